"""The autoencoder of vae.py, faster, for inference: `speed_up(vae)` changes it in place. May be deleted.

Each class here takes the place of the one in vae.py that it is named after, and says what it computes
instead, which is the same up to rounding. Names and weights stay, so a sped-up VAE can still be saved.

    in memory           channels-last, which convolutions prefer; group-norm statistics are taken so that flat
                        pictures keep their digits all the same
    norm, SiLU, concat  one multiply-add, written straight behind the two remembered frames
    start of a video    its first three frames are one, so a third of the work is left for it
    pairs of frames     convolved for two thirds of the work (on a CPU)
    upsampling          one transposed convolution for nearest ×2 and a 3×3 convolution

Dimension key: b batch, c channels, f frames, h w height and width (f' h' w' of latents), n pixels of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vae
from vae import Cache, VideoVAE

Affine = tuple[Tensor, Tensor]  # a norm as scale and shift, each b c f' h' w' or b c 1 1 1: x * scale + shift
LAST_2D, LAST_3D = torch.channels_last, torch.channels_last_3d


def speed_up(model: VideoVAE) -> None:
    """Change a loaded VAE in place, for inference alone: it no longer learns, and gradients are refused."""
    for module in model.modules():  # the same attributes, other methods
        module.__class__ = FAST.get(type(module), type(module))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 3:
            memory_format = LAST_3D if parameter.dim() == 5 else LAST_2D
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


# ---------------------------------------------------------------- norms


def group_statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel group of a chunk, fp32: b c f h w -> twice b num_groups.

    Channel by channel, some pixels at a time, after their own mean is taken off: sums of squares would lose
    the digits of flat pictures. The law of total variance then joins these parts to groups.
    """
    pixels = x.permute(0, 2, 3, 4, 1).flatten(1, 3)  # b n c, a view of channels-last memory
    length = 2**10 if x.is_cpu else 2**17  # stays in a processor's cache; on a GPU few large parts
    means, variances, shares = [], [], []
    for part in pixels.split(length, dim=1):
        part = part.float()
        mean = part.mean(1, keepdim=True)
        means.append(mean)
        variances.append((part - mean).square_().mean(1, keepdim=True))
        shares.append(part.shape[1] / pixels.shape[1])
    means = torch.cat(means, dim=1).unflatten(2, (num_groups, -1))  # b parts groups c/groups
    variances = torch.cat(variances, dim=1).unflatten(2, (num_groups, -1))
    shares = torch.tensor(shares, device=x.device)[:, None]  # parts 1
    mean = (means.mean(3) * shares).sum(1)
    spread = (means - mean[:, None, :, None]).square()
    return mean, ((variances + spread).mean(3) * shares).sum(1)


def group_norm_affine(norm: nn.GroupNorm, x: Tensor) -> Affine:
    """norm(x) = x * scale + shift, fp32, each b c 1 1 1."""
    mean, variance = group_statistics(x, norm.num_groups)
    inverse_std = torch.rsqrt(variance + norm.eps)
    group_size = norm.num_channels // norm.num_groups
    scale = inverse_std.repeat_interleave(group_size, dim=1) * norm.weight.float()  # b c
    shift = norm.bias.float() - mean.repeat_interleave(group_size, dim=1) * scale
    return scale[:, :, None, None, None], shift[:, :, None, None, None]


def modulate(x: Tensor, affine: Affine, out: Tensor) -> Tensor:
    """out = x * scale + shift in one pass, scale and shift repeated up to x's size as by `vae.enlarge`."""
    scale, shift = affine
    if scale.shape[2] > 1 and x.shape[2] % 2 == 1:  # frame 0 is latent 0's alone
        modulate(x[:, :, :1], (scale[:, :, :1], shift[:, :, :1]), out[:, :, :1])
        modulate(x[:, :, 1:], (scale[:, :, 1:], shift[:, :, 1:]), out[:, :, 1:])
        return out
    grid = scale.shape[2:4]

    def per_latent(t: Tensor) -> Tensor:
        """b c f h w -> b c f' f/f' h' h/h' w, a view: each row of pixels beside its latents' f' h'."""
        return t.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))

    def in_rows(latents: Tensor) -> Tensor:
        """b c f' h' w' -> b c f' 1 h' 1 w, repeated along rows alone: they lie in memory as x's rows do."""
        rows = F.interpolate(latents.to(x.dtype), (*grid, x.shape[4]))
        return rows.contiguous(memory_format=LAST_3D)[:, :, :, None, :, None]

    torch.addcmul(in_rows(shift), per_latent(x), in_rows(scale), out=per_latent(out))
    return out


def empty_frames(x: Tensor, channels: int, num_frames: int) -> Tensor:
    """Room for b channels num_frames h w, channels-last, otherwise like x."""
    b, _, _, h, w = x.shape
    return x.new_empty(b, num_frames, h, w, channels).permute(0, 4, 1, 2, 3)


class GroupNorm(vae.GroupNorm):
    """As a multiply-add, since torch's own group norm is inexact on channels-last memory."""

    def scale_and_shift(self, x: Tensor, z: None) -> Affine:
        return group_norm_affine(self, x)

    def forward(self, x: Tensor, z: None) -> Tensor:
        return modulate(x, self.scale_and_shift(x, z), out=torch.empty_like(x))


class SpatialNorm(vae.SpatialNorm):
    """(x * scale + shift) * y + b is x * (scale * y) + (shift * y + b), folded where all but x is small."""

    def scale_and_shift(self, x: Tensor, z: Tensor) -> Affine:
        scale, shift = group_norm_affine(self.norm_layer, x)
        y = self.conv_y(z).float()
        return scale * y, shift * y + self.conv_b(z)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return modulate(x, self.scale_and_shift(x, z), out=torch.empty_like(x))


# ---------------------------------------------------------------- convolutions


class CausalConv3d(vae.CausalConv3d):
    """The same convolution with less work, see `convolve` and `convolve_pairs`."""

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        is_start = self not in cache
        frames = self.room(x)
        frames[:, :, 2:] = x
        self.fill_past(frames, cache)
        return self.convolve(frames, is_start)

    def room(self, x: Tensor) -> Tensor:
        """For the frames x b c f h w behind the two before them: b c 2+f h w."""
        return empty_frames(x, x.shape[1], x.shape[2] + 2)

    def fill_past(self, frames: Tensor, cache: Cache) -> None:
        """The first two of b c 2+f h w are what is remembered, or at the start of a video the third."""
        frames[:, :, :2] = cache.get(self, frames[:, :, 2:3])
        cache[self] = frames[:, :, -2:].clone()

    def convolve(self, frames: Tensor, is_start: bool) -> Tensor:
        """b c 2+f h w -> b c f h w, frame 0 of a video apart from the rest, and the rest in pairs."""
        num_alone = int(is_start)
        rest = frames[:, :, num_alone:]
        num_rest = rest.shape[2] - 2
        # Pairs take 0.66 … 0.94 of the time from this size on, on one core with AVX-512; below mostly more.
        is_wide = frames.shape[1] >= 64 and frames.shape[3] * frames.shape[4] >= 256
        in_pairs = frames.is_cpu and is_wide and num_rest % 2 == 0
        if num_alone == 0 and not in_pairs:
            return self.convolve_plainly(frames)
        out = empty_frames(frames, self.conv.out_channels, num_alone + num_rest)
        if num_alone == 1:
            out[:, :, 0] = self.convolve_start(frames[:, :, 2])
        if num_rest > 0 and in_pairs:
            self.convolve_pairs(rest, out[:, :, num_alone:])
        elif num_rest > 0:
            out[:, :, num_alone:] = self.convolve_plainly(rest)
        return out

    def convolve_plainly(self, frames: Tensor) -> Tensor:
        """b c 2+f h w -> b c f h w. A small single clip is slow on a CPU, a batch of its frames is not."""
        b, c, num_frames, h, _ = frames.shape
        if frames.is_cpu and b == 1 and num_frames > 3 and c * num_frames * h <= 20480:
            windows = frames[0].unfold(1, 3, 1).permute(1, 0, 4, 2, 3)  # f c 3 h w: frames after their past
            return self.conv(windows).transpose(0, 2)
        return self.conv(frames)

    def convolve_start(self, frame: Tensor) -> Tensor:
        """b c h w -> b c h w. The three taps all see this frame: one 2D convolution by their sum."""
        w0, w1, w2 = self.conv.weight.float().unbind(2)
        weight = (w0 + w1 + w2).to(frame.dtype)  # .sum(2) is ten times as slow
        return F.conv2d(frame, weight, self.conv.bias, padding=1)

    def convolve_pairs(self, frames: Tensor, out: Tensor) -> None:
        """Frames f0 … f3 give w0·f0 + w1·f1 + w2·f2 and w0·f1 + w1·f2 + w2·f3, six 2D convolutions, by four:
        Winograd's F(2, 3) in time (Lavin & Gray, arXiv 1509.09308, sec. 4.1)."""

        def conv(frames: Tensor, weight: Tensor) -> Tensor:
            weight = weight.to(frames.dtype, memory_format=LAST_2D)
            return F.conv2d(frames.flatten(0, 1), weight, padding=1).unflatten(0, frames.shape[:2])

        w0, w1, w2 = self.conv.weight.float().unbind(2)
        half_sum, half_difference = (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2
        bias = self.conv.bias[:, None, None]
        frames, out = frames.transpose(1, 2), out.transpose(1, 2)  # b f c h w
        # At once: many pairs of small frames, as each call lays the weights out anew; few of large ones.
        step = 2 * max(1, 2**12 // out[0, 0, 0].numel())
        for begin in range(0, out.shape[1], step):
            end = min(begin + step, out.shape[1])
            f0, f1, f2, f3 = (frames[:, begin + i : end + i : 2] for i in range(4))
            both = conv(f1 + f2, half_sum).add_(bias)
            change = conv(f2 - f1, half_difference)
            torch.add(conv(f0 - f2, w0).add_(both), change, out=out[:, begin:end:2])
            torch.sub(conv(f3 - f1, w2).add_(both), change, out=out[:, begin + 1 : end : 2])


class ResnetBlock(vae.ResnetBlock):
    """Norm and SiLU are written straight to where the convolution reads, and no tensor is kept longer."""

    def forward(self, x: Tensor, cache: Cache, z: Tensor | None) -> Tensor:
        h = x
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            is_start = conv not in cache
            frames = conv.room(h)
            modulate(h, norm.scale_and_shift(h, z), out=frames[:, :, 2:])
            del h  # before the next large tensor is made
            F.silu(frames[:, :, 2:], inplace=True)
            conv.fill_past(frames, cache)
            h = conv.convolve(frames, is_start)
            del frames
        return h.add_(self.conv_shortcut(x))


class Upsample(vae.Upsample):
    """Pixel 2i of the enlarged picture sees source pixels i-1, i, i, and pixel 2i+1 sees i, i, i+1. Taps that
    meet one pixel are summed beforehand: a transposed 4×4 convolution of stride 2, 2.25 times cheaper."""

    taps = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))  # 4 transposed from 3 plain

    def enlarge(self, x: Tensor) -> Tensor:
        taps = torch.tensor(self.taps, device=x.device)
        weight = torch.einsum("oiyx,ay,bx->ioab", self.conv.weight.float(), taps, taps)
        weight = weight.to(x.dtype, memory_format=LAST_2D)
        frames = x.transpose(1, 2).flatten(0, 1)  # b·f c h w
        frames = F.conv_transpose2d(frames, weight, self.conv.bias, stride=2, padding=1)
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


# ---------------------------------------------------------------- at the door


def enter(network: nn.Module, x: Tensor) -> Tensor:
    """x in channels-last memory; RuntimeError if gradients are asked for."""
    learns = x.requires_grad or any(parameter.requires_grad for parameter in network.parameters())
    if learns and torch.is_grad_enabled():
        raise RuntimeError("this VAE was sped up for inference; load it anew for gradients")
    return x.contiguous(memory_format=LAST_3D)


class Encoder(vae.Encoder):
    def forward(self, pixels: Tensor, cache: Cache) -> Tensor:
        return super().forward(enter(self, pixels), cache)


class Decoder(vae.Decoder):
    def forward(self, z: Tensor, cache: Cache) -> Tensor:
        return super().forward(enter(self, z), cache)


FAST = {
    vae.GroupNorm: GroupNorm,
    vae.SpatialNorm: SpatialNorm,
    vae.CausalConv3d: CausalConv3d,
    vae.ResnetBlock: ResnetBlock,
    vae.Upsample: Upsample,
    vae.Encoder: Encoder,
    vae.Decoder: Decoder,
}
