"""The causal 3D video autoencoder.

    pixels b 3 f h w                                    latents b 16 f' h' w'
      │ chunks of 8 frames (the first takes the rest)     │ chunks of 2 (see `decode_chunks`)
      ▼                                                   ▼
    conv_in ─► down block ×4 ─► mid ─► norm, conv_out   conv_in ─► mid ─► up block ×4 ─► norm, conv_out
               resnets, then               │                       resnets, each norm           │
               ↓2 time (blocks 0, 1)       ▼                       fed the latents, then        ▼
               ↓2 space (0, 1, 2)  mean, logvar b 16 f' h' w'      ↑2 time, ↑2 space     pixels b 3 f h w

    f' = 1 + (f-1)/4, h' = h/8, w' = w/8

Time is causal: each 3×3×3 convolution sees the present frame and the two before it, and remembers the last
two for the next chunk. A video is therefore coded chunk by chunk in memory that does not grow with its
length. Group-norm statistics are taken per chunk, so the chunk boundaries are part of the result and must be
the reference's.

Four exact rewritings make it cheap; each has its comment below:
  norm + SiLU is one multiply-add, written straight behind the two remembered frames (`norm_silu`);
  the decoder's norm runs its 1×1×1 convolutions at latent resolution (`SpatialNorm`);
  nearest ×2 and then a 3×3 convolution is one transposed convolution (`Upsample`);
  on the CPU two frames are convolved for four thirds of the work of one (`CausalConv3d.convolve_pairs`).
Activations and weights are channels-last in memory, which convolutions prefer.

Paper: Yang et al. 2024, CogVideoX (arXiv 2408.06072), sec. 2.1. Reference:
cogvideox/models/autoencoder_magvit.py; diffusers/models/autoencoders/autoencoder_kl_cogvideox.py.
Dimension key: b batch, c channels, f frames, h w height and width (f' h' w' of latents), n pixels of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import component_dir, load_component, save_component

Cache = dict[nn.Module, Tensor]  # the last two input frames of every causal convolution, for its next chunk
Draw = torch.Generator | list[torch.Generator]  # one for the whole batch, or one for each sample
SMALL = 20480  # c·f·h up to which torch convolves a single sample slowly on the CPU; a batch it does not


@dataclass
class VAEConfig:
    """Fields as in vae/config.json; the defaults are the official 2B model's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 256, 512])
    layers_per_block: int = 3  # resnets per down block; up blocks have one more
    norm_num_groups: int = 32
    norm_eps: float = 1e-6  # of the encoder's resnets; every other norm has 1e-6 fixed
    act_fn: str = "silu"
    temporal_compression_ratio: float = 4
    sample_height: int = 480  # tiles are half of this
    sample_width: int = 720
    scaling_factor: float = 1.15258426  # latents are multiplied by it, for a standard deviation of about 1
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    extra: dict = field(default_factory=dict)  # unknown keys, written back as they came

    def __post_init__(self):
        if self.act_fn != "silu":
            raise ValueError(f"act_fn = {self.act_fn!r}; CogVideoX VAEs use 'silu'")
        if self.use_quant_conv or self.use_post_quant_conv:
            raise ValueError("use_quant_conv and use_post_quant_conv must be false, as in all CogVideoX VAEs")
        if self.temporal_compression_ratio != 4:
            raise ValueError(f"temporal_compression_ratio = {self.temporal_compression_ratio}; it must be 4")
        if len(self.block_out_channels) != 4 or not self.layers_per_block:
            raise ValueError(f"block_out_channels = {self.block_out_channels} with {self.layers_per_block} "
                             "layers per block; a VAE has four blocks of at least one layer")  # fmt: skip
        if not self.norm_num_groups or any(c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(f"block_out_channels = {self.block_out_channels} do not divide into "
                             f"norm_num_groups = {self.norm_num_groups}")  # fmt: skip
        if not self.scaling_factor:
            raise ValueError("scaling_factor = 0 would erase the latents")


# ---------------------------------------------------------------- norms


def group_statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel group over a whole chunk, in fp32: b c f h w -> twice b num_groups.

    The law of total variance joins those of parts. On a CPU they come from torch's group-norm kernel, whose
    normalised output we throw away, on parts that stay in the processor's cache. It adds up in fp32, pixel
    after pixel, so parts are short for one sample (flat pictures keep their digits) and long for a batch:
    that is training, where the reference adds up whole chunks so, and we are compared with its rounding too.
    """
    return GroupStatistics.apply(x, num_groups)


def part_statistics(part: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel group of pixels b n c, in fp32: twice b num_groups."""
    if not part.is_cpu:  # on a GPU the kernel would round them to x's dtype
        variance, mean = torch.var_mean(part.float().unflatten(2, (num_groups, -1)), (1, 3), correction=0)
        return mean, variance
    eps = 1e-6  # keeps 1/std finite; taken off again
    b, n, c = part.shape
    one = torch.ones(c)  # only fp32 affine parameters make the kernel return the statistics of bf16 in fp32
    plane = part.contiguous().mT.unsqueeze(2)  # b c 1 n; contiguous() copies only where b > 1
    _, mean, inverse_std = torch.native_group_norm(plane, one, one, b, c, n, num_groups, eps)
    return mean.float(), inverse_std.float().pow(-2) - eps


class GroupStatistics(torch.autograd.Function):
    """`group_statistics` with its gradient written out: torch takes ten passes over x for it, this one."""

    @staticmethod
    def forward(ctx, x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        pixels = x.permute(0, 2, 3, 4, 1).flatten(1, 3)  # b n c, a view of channels-last memory
        # On a GPU few large parts: a part's fp32 copy takes 134 MB at 128 channels.
        length = 2**18 if not x.is_cpu else 2**10 if len(pixels) == 1 else 2**14
        parts = pixels.split(length, dim=1)
        shares = [part.shape[1] / pixels.shape[1] for part in parts]
        shares = torch.tensor(shares, device=x.device)[:, None, None]
        found = zip(*(part_statistics(part, num_groups) for part in parts))
        means, variances = map(torch.stack, found)  # parts b groups
        mean = (means * shares).sum(0)
        ctx.save_for_backward(x, mean)
        return mean, ((variances + (means - mean).square()) * shares).sum(0)

    @staticmethod
    def backward(ctx, mean_grad: Tensor, variance_grad: Tensor) -> tuple[Tensor, None]:
        """d mean/dx = 1/n and d variance/dx = 2 (x − mean)/n, n the elements of a group: scale·x + shift."""
        x, mean = ctx.saved_tensors
        b, num_groups = mean.shape
        n = x[0].numel() // num_groups
        scale = 2 * variance_grad / n
        shift = mean_grad / n - scale * mean
        scale, shift = (
            s.repeat_interleave(x.shape[1] // num_groups, dim=1)[:, :, None, None, None]
            for s in (scale, shift)
        )  # b c 1 1 1
        return modulate(x, scale, shift), None


def group_norm_affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Group norm as a multiply-add: fp32 (scale, shift), each b c 1 1 1; norm(x) = x * scale + shift."""
    mean, variance = group_statistics(x, norm.num_groups)
    channels_per_group = x.shape[1] // norm.num_groups
    inverse_std = torch.rsqrt(variance + norm.eps).repeat_interleave(channels_per_group, dim=1)  # b c
    scale = inverse_std * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(channels_per_group, dim=1) * scale
    return scale[:, :, None, None, None], shift[:, :, None, None, None]


class SpatialNorm(nn.Module):
    """Group norm modulated by the latents: norm(x) * conv_y(z) + conv_b(z)   (MoVQ, arXiv 2209.09002, eq. 6).

    The reference resizes z to x's size (nearest) and convolves there. A 1×1×1 convolution commutes with
    repeating pixels, so both run at latent resolution, where the norm's own scale and shift are folded in
    too.
    """

    def __init__(self, channels: int, latent_channels: int, num_groups: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x: b c f h w, z: b 16 f' h' w' (this chunk's latents) -> (scale, shift), each b c f' h' w'."""
        scale, shift = group_norm_affine(self.norm_layer, x)
        y = self.conv_y.conv(z).float()
        return scale * y, shift * y + self.conv_b.conv(z)


def _per_latent(x: Tensor, grid: torch.Size) -> Tensor:
    """View b c f h w as b c f' kf h' kh w: each row of pixels beside the latents (f' h') it belongs to."""
    return x.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))


def _in_rows(latents: Tensor, x: Tensor) -> Tensor:
    """b c f' h' w' in x's dtype, repeated along w alone, to go with `_per_latent(x)`: b c f' 1 h' 1 w.

    Rows that lie in memory as x's do make one long loop of what would be many loops over a few channels."""
    rows = latents.to(x.dtype).permute(0, 2, 3, 4, 1)  # b f' h' w' c
    rows = rows.unsqueeze(4).expand(-1, -1, -1, -1, x.shape[4] // latents.shape[4], -1)
    return rows.flatten(3, 4).contiguous().permute(0, 4, 1, 2, 3)[:, :, :, None, :, None]


def modulate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """x * scale + shift, where scale and shift b c f' h' w' are repeated up to x's b c f h w, in one pass."""
    grid = scale.shape[2:]
    if out is not None:
        out = _per_latent(out, grid)
    rows = torch.addcmul(_in_rows(shift, x), _per_latent(x, grid), _in_rows(scale, x), out=out)
    return rows.reshape(x.shape)


class ModulateSiLU(torch.autograd.Function):
    """silu(modulate(x, scale, shift)) that keeps its inputs alone; the sums per latent are a pooling."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        return F.silu(modulate(x, scale, shift), inplace=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, shift = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad, modulate(x, scale, shift))
        x_grad = (_per_latent(grad, scale.shape[2:]) * _in_rows(scale, x)).reshape(x.shape)
        scale_grad, shift_grad = (_sum_per_latent(g, scale.shape) for g in (grad * x, grad))
        return x_grad, scale_grad.to(scale.dtype), shift_grad.to(shift.dtype)


def _sum_per_latent(x: Tensor, shape: torch.Size) -> Tensor:
    """b c f h w -> b c f' h' w' = shape, in fp32: each latent's pixels added up."""
    b, c, f, h, w = shape
    kernel = (x.shape[3] // h, x.shape[4] // w)
    frames = F.avg_pool2d(x.transpose(1, 2).flatten(0, 1), kernel).float() * (kernel[0] * kernel[1])
    return frames.unflatten(0, (b, f, -1)).sum(2).transpose(1, 2)


def norm_silu(x: Tensor, affine: tuple[Tensor, Tensor], past: Tensor | None) -> Tensor:
    """silu(norm(x)) behind the two frames before it: b c f h w -> b c 2+f h w, a causal convolution's input.

    affine: the norm's scale and shift at latent resolution, or b c 1 1 1
    past: b c 2 h w, what the convolution remembers of the last chunk; None at the start: frame 0, repeated
    In a first chunk of an odd number of frames, frame 0 belongs to latent 0 alone, and the rest to the rest.
    """
    scale, shift = affine
    spans = [(slice(None), slice(None))]
    if scale.shape[2] > 1 and x.shape[2] % 2 == 1:
        spans = [(slice(0, 1),) * 2, (slice(1, None),) * 2]  # frames of x and of the latents
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        parts = [ModulateSiLU.apply(x[:, :, fs], scale[:, :, zs], shift[:, :, zs]) for fs, zs in spans]
        return torch.cat([parts[0][:, :, :1]] * 2 + parts if past is None else [past, *parts], dim=2)
    b, c, f, h, w = x.shape
    out = x.new_empty(b, f + 2, h, w, c).permute(0, 4, 1, 2, 3)  # channels-last: frames stay contiguous
    for fs, zs in spans:
        modulate(x[:, :, fs], scale[:, :, zs], shift[:, :, zs], out=out[:, :, 2:][:, :, fs])
    F.silu(out[:, :, 2:], inplace=True)
    out[:, :, :2] = out[:, :, 2:3] if past is None else past
    return out


# ---------------------------------------------------------------- blocks


class CausalConv3d(nn.Module):
    """3×3×3 convolution over the present frame and the two before it; zero padding in space."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__()
        padding = (0, kernel_size // 2, kernel_size // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=padding)

    def forward(self, x: Tensor, cache: Cache, affine: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: b c f h w -> b c f h w. affine: scale and shift of a norm to apply first, followed by SiLU."""
        is_start = self not in cache
        return self.convolve(self.with_past(x, cache, affine), is_start)

    def with_past(self, x: Tensor, cache: Cache, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        """The frames behind the two that come before them, b c 2+f h w; the last two stay in the cache."""
        past = cache.get(self)
        if affine is not None:
            x = norm_silu(x, affine, past)
        else:
            x = torch.cat([x[:, :, :1]] * 2 + [x] if past is None else [past, x], dim=2)
        cache[self] = x[:, :, -2:].clone()  # a view would keep the whole chunk alive
        return x

    def convolve(self, x: Tensor, is_start: bool = False) -> Tensor:
        """b c 2+f h w -> b c f h w. is_start: the first three frames are one, so that taps can be summed."""
        if is_start:  # frame 0 for a third of the work
            w0, w1, w2 = self.conv.weight.float().unbind(2)  # .sum(2) is ten times as slow
            weight = (w0 + w1 + w2).to(x.dtype)
            first = F.conv2d(x[:, :, 2], weight, self.conv.bias, padding=1)[:, :, None]
            if x.shape[2] == 3:
                return first
            rest = self.convolve(x[:, :, 1:])
            del x  # before the next large tensor is made
            return torch.cat([first, rest], dim=2)
        learns = torch.is_grad_enabled() and (x.requires_grad or self.conv.weight.requires_grad)
        # Measured on one core with AVX-512: 0.66 … 0.94 of the time from here on, below mostly more than 1.
        wide = x.shape[1] >= 64 and x[0, 0, 0].numel() >= 256  # channels, pixels of a frame
        if x.is_cpu and wide and x.shape[2] % 2 == 0 and not learns:
            return self.convolve_pairs(x)
        if x.is_cpu and len(x) == 1 and x.shape[2] > 3 and x[0, ..., 0].numel() <= SMALL:
            frames = x.unfold(2, 3, 1)[0].permute(1, 0, 4, 2, 3)  # f c 3 h w: each with the two before it
            return self.conv(frames).transpose(0, 2)
        return self.conv(x)

    def convolve_pairs(self, x: Tensor) -> Tensor:
        """b c 2+f h w -> b c f h w. Two frames take four 2D convolutions in place of six: F(2, 3) in time
        (Winograd 1980; Lavin & Gray, arXiv 1509.09308, sec. 4.1)."""

        def conv(frames: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.conv2d(frames.flatten(0, 1), weight, bias, padding=1).unflatten(0, frames.shape[:2])

        w0, w1, w2 = self.conv.weight.float().unbind(2)
        weights = (w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2)
        first, plus, minus, last = (w.to(x.dtype, memory_format=torch.channels_last) for w in weights)
        b, _, f, h, w = x.shape
        out = x.new_empty(b, f - 2, h, w, len(w0)).permute(0, 1, 4, 2, 3)  # b f c h w, as all that follows
        places = [x.transpose(1, 2)[:, i : f - 2 + i : 2] for i in range(4)] + [out[:, ::2], out[:, 1::2]]
        # At once: many pairs of small frames, as each call lays the weights out anew; few of large ones.
        num_pairs = max(1, 2**12 // (h * w))
        for f0, f1, f2, f3, even, odd in zip(*(frames.split(num_pairs, dim=1) for frames in places)):
            both, change = conv(f1 + f2, plus, self.conv.bias), conv(f2 - f1, minus)
            torch.add(conv(f0 - f2, first).add_(both), change, out=even)
            torch.sub(conv(f3 - f1, last).add_(both), change, out=odd)
        return out.transpose(1, 2)


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with group norms, spatial ones in the decoder."""

    def __init__(self, config: VAEConfig, in_channels: int, out_channels: int, spatial_norm: bool):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if spatial_norm:
                return SpatialNorm(channels, config.latent_channels, config.norm_num_groups)
            return nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, cache: Cache, z: Tensor | None = None) -> Tensor:
        is_start = self.conv1 not in cache
        h = self.conv1(x, cache, norm_affine(self.norm1, x, z))
        h = self.conv2.with_past(h, cache, norm_affine(self.norm2, h, z))
        h = self.conv2.convolve(h, is_start)  # in two steps: what conv1 gave is not kept
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return h.add_(x)  # the convolution's fresh output, which no backward pass needs


def norm_affine(norm: nn.Module, x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, shift) of either kind of norm for a chunk x and, in the decoder, its latents z."""
    return group_norm_affine(norm, x) if z is None else norm(x, z)


class Downsample(nn.Module):
    """Mean of pairs of frames if `time` (frame 0 of an odd chunk stays alone), then a strided convolution."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        if self.time:
            alone, rest = x[:, :, : x.shape[2] % 2], x[:, :, x.shape[2] % 2 :]
            x = torch.cat([alone, (rest[:, :, 0::2] + rest[:, :, 1::2]) / 2], dim=2)
        frames = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))  # b·f c h+1 w+1: right and bottom only
        return self.conv(frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Upsample(nn.Module):
    """Nearest ×2 in space, a 3×3 convolution; then, if `time`, every frame twice (frame 0 of the video once).

    The reference repeats frames before convolving; after is the same and half the work. Pixel 2i of the
    enlarged picture sees the source pixels i-1, i, i and pixel 2i+1 sees i, i, i+1, so taps that meet the
    same pixel can be summed beforehand: a transposed 4×4 convolution of stride 2, 2.25 times cheaper.
    """

    taps = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))  # 4 transposed from 3 plain

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = time

    def forward(self, x: Tensor, is_start: bool) -> Tensor:
        taps = torch.tensor(self.taps, device=x.device, dtype=torch.float32)
        weight = torch.einsum("oiyx,ay,bx->ioab", self.conv.weight.float(), taps, taps).to(
            self.conv.weight.dtype
        )
        frames = x.transpose(1, 2).flatten(0, 1)  # b·f c h w
        weight = weight.to(memory_format=torch.channels_last)
        frames = F.conv_transpose2d(frames, weight, self.conv.bias, stride=2, padding=1)
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        if not self.time:
            return x
        num_alone = x.shape[2] % 2 if is_start else 0
        return torch.cat([x[:, :, :num_alone], x[:, :, num_alone:].repeat_interleave(2, dim=2)], dim=2)


class Block(nn.Module):
    """Resnets, then at most one resampler; official names of the two kinds of block and of the middle."""

    def __init__(
        self, config: VAEConfig, channels: list[int], spatial_norm: bool, resampler: nn.Module | None = None
    ):
        super().__init__()
        pairs = zip(channels, channels[1:])
        self.resnets = nn.ModuleList(ResnetBlock(config, i, o, spatial_norm) for i, o in pairs)
        if isinstance(resampler, Downsample):
            self.downsamplers = nn.ModuleList([resampler])
        elif isinstance(resampler, Upsample):
            self.upsamplers = nn.ModuleList([resampler])

    def resample(self, x: Tensor, is_start: bool) -> Tensor:
        if hasattr(self, "downsamplers"):
            return self.downsamplers[0](x)
        return self.upsamplers[0](x, is_start) if hasattr(self, "upsamplers") else x


def run_blocks(blocks: list[Block], x: Tensor, cache: Cache, z: Tensor | None = None) -> Tensor:
    """In one loop, so that nothing holds a block's input, the largest of its tensors, to the block's end."""
    is_start = blocks[0].resnets[0].conv1 not in cache
    for block in blocks:
        for resnet in block.resnets:
            x = resnet(x, cache, z)
        x = block.resample(x, is_start)
    return x


class Encoder(nn.Module):
    """One chunk of pixels b 3 f h w -> moments b 32 f' h' w'."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            channels = [widths[max(i - 1, 0)]] + [width] * config.layers_per_block
            resampler = Downsample(width, time=i < 2) if i < last else None  # time is halved twice: 4 = 2²
            self.down_blocks.append(Block(config, channels, spatial_norm=False, resampler=resampler))
        self.mid_block = Block(config, [widths[-1]] * 3, spatial_norm=False)
        self.norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, pixels: Tensor, cache: Cache) -> Tensor:
        x = run_blocks([*self.down_blocks, self.mid_block], self.conv_in(pixels, cache), cache)
        return self.conv_out(x, cache, group_norm_affine(self.norm_out, x))


class Decoder(nn.Module):
    """One chunk of unscaled latents b 16 f' h' w' -> pixels b 3 f h w."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = Block(config, [widths[0]] * 3, spatial_norm=True)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            channels = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block + 1)
            resampler = Upsample(width, time=i < 2) if i < last else None
            self.up_blocks.append(Block(config, channels, spatial_norm=True, resampler=resampler))
        self.norm_out = SpatialNorm(widths[-1], config.latent_channels, config.norm_num_groups)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, cache: Cache) -> Tensor:
        x = run_blocks([self.mid_block, *self.up_blocks], self.conv_in(z, cache), cache, z)
        return self.conv_out(x, cache, self.norm_out(x, z))


# ---------------------------------------------------------------- chunks and tiles


def encode_chunks(num_frames: int) -> list[int]:
    """Frames per chunk when encoding: eights, the remainder joining the first. 17 -> [9, 8]; 13 -> [13]."""
    num_chunks = max(num_frames // 8, 1)
    return [num_frames - 8 * (num_chunks - 1)] + [8] * (num_chunks - 1)


def decode_chunks(num_latent_frames: int, first_alone: bool) -> list[int]:
    """Latent frames per chunk when decoding.

    first_alone: CogVideoX-Fun's way, one frame, then twos, the last may be one: 4 -> [1, 2, 1], always 4f'-3
    frames. Otherwise diffusers' way, twos with an odd frame joining the first: 5 -> [3, 2]; even counts give
    4f' frames.
    """
    if first_alone:
        return [1] + [2] * ((num_latent_frames - 1) // 2) + [1] * ((num_latent_frames - 1) % 2)
    num_chunks = max(num_latent_frames // 2, 1)
    return [num_latent_frames - 2 * (num_chunks - 1)] + [2] * (num_chunks - 1)


def decoded_frames(num_latent_frames: int, first_alone: bool) -> int:
    """How many frames come out: 4f'-3, but 4f' where diffusers' chunks start with an even one."""
    starts_even = decode_chunks(num_latent_frames, first_alone)[0] % 2 == 0
    return 4 * num_latent_frames - (0 if starts_even else 3)


@dataclass
class Tiling:
    """Overlapping tiles: size and stride in the input's pixels, kept part and blend in the output's."""

    size: tuple[int, int]
    stride: tuple[int, int]
    keep: tuple[int, int]
    blend: tuple[int, int]


def blend_tiles(rows: list[list[Tensor]], tiling: Tiling) -> Tensor:
    """One picture from overlapping tiles, each faded in linearly over the tiles above and to the left."""

    def fade(before: Tensor, tile: Tensor, dim: int, extent: int) -> None:
        extent = min(before.shape[dim], tile.shape[dim], extent)
        ramp = torch.arange(extent, device=tile.device, dtype=torch.float32) / max(extent, 1)
        ramp = ramp.to(tile.dtype).reshape([-1 if d == dim else 1 for d in range(tile.dim())])
        old = before.narrow(dim, before.shape[dim] - extent, extent)
        new = tile.narrow(dim, 0, extent)
        new.copy_(old * (1 - ramp) + new * ramp)

    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                fade(rows[i - 1][j], tile, 3, tiling.blend[0])
            if j > 0:
                fade(row[j - 1], tile, 4, tiling.blend[1])
    keep_height, keep_width = tiling.keep
    rows = [torch.cat([tile[..., :keep_height, :keep_width] for tile in row], dim=4) for row in rows]
    return torch.cat(rows, dim=3)


def run_chunks(network: nn.Module, x: Tensor, chunks: list[int], tiling: Tiling | None) -> Iterator[Tensor]:
    """The encoder or decoder over consecutive chunks of frames, tile by tile; each tile has its own cache."""
    height, width = x.shape[3:]
    if tiling is None or (height <= tiling.size[0] and width <= tiling.size[1]):
        cache = {}
        for chunk in x.split(chunks, dim=2):
            yield network(chunk, cache)
        return
    tops, lefts = range(0, height, tiling.stride[0]), range(0, width, tiling.stride[1])
    caches = {(top, left): {} for top in tops for left in lefts}
    for chunk in x.split(chunks, dim=2):
        strips = [(top, chunk[:, :, :, top : top + tiling.size[0]]) for top in tops]
        rows = [
            [network(strip[..., left : left + tiling.size[1]], caches[top, left]) for left in lefts]
            for top, strip in strips
        ]
        yield blend_tiles(rows, tiling)


# ---------------------------------------------------------------- the model


class VideoVAE(nn.Module):
    """Pixels b 3 f h w in [-1, 1] <-> latents b 16 f' h' w', scaled already: no caller ever multiplies.

    `tiled=True` works through spatial tiles of half the config's sample size where the picture is larger:
    less memory, slightly other numbers (each tile has its own norm statistics), as the reference's
    enable_tiling().
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._to_channels_last()

    def _to_channels_last(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
            elif parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.conv.weight.device

    def _tiling(self, encode: bool) -> Tiling:
        """The reference's tile geometry: tiles overlap by 1/6 of their height and 1/5 of their width."""
        pixels = (self.config.sample_height // 2, self.config.sample_width // 2)
        latents = (pixels[0] // 8, pixels[1] // 8)
        size, out = (pixels, latents) if encode else (latents, pixels)
        overlaps = (1 / 6, 1 / 5)
        stride = tuple(int(s * (1 - overlap)) for s, overlap in zip(size, overlaps))
        blend = tuple(int(o * overlap) for o, overlap in zip(out, overlaps))
        if 0 in stride:
            raise ValueError(f"sample_height × sample_width = {self.config.sample_height} × "
                             f"{self.config.sample_width} is too small for tiles")  # fmt: skip
        return Tiling(size, stride, keep=(out[0] - blend[0], out[1] - blend[1]), blend=blend)

    def moments(self, pixels: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """The posterior's mean and log-variance, not scaled, not clamped.

        pixels: b 3 f h w in [-1, 1], f = 4k+1 (other counts are chunked as in the reference)
        returns: twice b 16 f' h' w'
        raises ValueError if height or width is not a multiple of 8
        """
        b, c, f, height, width = pixels.shape
        if c != self.config.in_channels or not f or height % 8 or width % 8 or not height or not width:
            raise ValueError(f"pixels of shape {tuple(pixels.shape)}; the VAE takes "
                             f"b {self.config.in_channels} f h w, f > 0, h and w multiples of 8")  # fmt: skip
        pixels = pixels.to(self.device, self.dtype)
        tiling = self._tiling(encode=True) if tiled else None
        moments = torch.cat(list(run_chunks(self.encoder, pixels, encode_chunks(f), tiling)), dim=2)
        mean, logvar = moments.contiguous().chunk(2, dim=1)
        return mean, logvar

    def posterior(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents from moments: the mode, or the sample mean + std · noise where noise is given."""
        return sample_posterior(mean, logvar, noise, self.config)

    def encode(self, pixels: Tensor, generator: Draw | None = None, tiled: bool = False) -> Tensor:
        """pixels b 3 f h w in [-1, 1] -> scaled latents b 16 f' h' w'.

        The posterior's mode, as inference uses it, or a sample where a generator is given, as training does;
        with a list of b generators each sample's draw is its own, whatever else is in the batch.
        """
        mean, logvar = self.moments(pixels, tiled)
        noise = None
        if isinstance(generator, list):
            noise = torch.stack(
                [torch.randn(mean.shape[1:], generator=g, device=g.device) for g in generator]
            )
        elif generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return self.posterior(mean, logvar, noise)

    def _decoded_chunks(self, latents: Tensor, tiled: bool, first_alone: bool) -> Iterator[Tensor]:
        if latents.dim() != 5 or latents.shape[1] != self.config.latent_channels or 0 in latents.shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}; the VAE decodes b "
                             f"{self.config.latent_channels} f' h' w'")  # fmt: skip
        z = latents.to(self.device, self.dtype) / self.config.scaling_factor
        tiling = self._tiling(encode=False) if tiled else None
        return run_chunks(self.decoder, z, decode_chunks(z.shape[2], first_alone), tiling)

    def decode(self, latents: Tensor, tiled: bool = False, first_alone: bool = True) -> Tensor:
        """Scaled latents b 16 f' h' w' -> pixels b 3 f h w, about [-1, 1], not clamped.

        first_alone: chunks as CogVideoX-Fun decodes (1, 2, 2, …), for inpaint and control models; False: as
        diffusers does (2 or 3, 2, …), for plain text and image models
        """
        return torch.cat(list(self._decoded_chunks(latents, tiled, first_alone)), dim=2)

    @torch.no_grad()
    def decode_stream(
        self, latents: Tensor, tiled: bool = False, first_alone: bool = True
    ) -> Iterator[Tensor]:
        """Like `decode`, but yields b 3 k h w as soon as k frames are ready, in memory independent of f'."""
        yield from self._decoded_chunks(latents, tiled, first_alone)

    @classmethod
    def from_pretrained(
        cls, model_dir: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """model_dir: a checkpoint folder that holds vae/, or that folder itself."""
        vae = load_component(cls, VAEConfig, component_dir(model_dir, "vae"), dtype, device)
        vae._to_channels_last()
        return vae

    def save_pretrained(self, model_dir: str | Path) -> None:
        """Write model_dir/vae/ in the official layout."""
        save_component(self, Path(model_dir) / "vae", _class_name="AutoencoderKLCogVideoX")


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor | None, config: VAEConfig) -> Tensor:
    """See `VideoVAE.posterior`; it needs no weights."""
    if noise is not None:
        mean = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise.to(mean)
    return mean * config.scaling_factor
