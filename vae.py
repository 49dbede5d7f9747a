"""The causal 3D video autoencoder.

    pixels b 3 f h w                                    latents b 16 f' h' w'
      │ chunks of 8 frames (the first takes the rest)     │ chunks of 2 (see `decode_chunks`)
      ▼                                                   ▼
    conv_in ─► down block ×4 ─► mid ─► norm, conv_out   conv_in ─► mid ─► up block ×4 ─► norm, conv_out
               resnets, then               │                       resnets, each norm           │
               ↓2 time (blocks 0, 1)       ▼                       fed the latents, then        ▼
               ↓2 space (0, 1, 2)  mean, logvar b 16 f' h' w'      ↑2 space, ↑2 time     pixels b 3 f h w

    f' = 1 + (f-1)/4, h' = h/8, w' = w/8

Time is causal: each 3×3×3 convolution sees the present frame and the two before it, and remembers the last
two for the next chunk. A video is therefore coded chunk by chunk in memory that does not grow with its
length. Group-norm statistics are taken per chunk, so the chunk boundaries are part of the result and must be
the reference's.

This is the plain version, which also trains. `vae_fast.speed_up` computes the same faster.

Papers: Yang et al. 2024, CogVideoX (arXiv 2408.06072), sec. 2.1; Zheng et al. 2022, MoVQ (arXiv 2209.09002).
Reference: cogvideox/models/autoencoder_magvit.py; diffusers/models/autoencoders/autoencoder_kl_cogvideox.py.
Dimension key: b batch, c channels, f frames, h w height and width (f' h' w' of latents).
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import component_dir, load_component, only, save_component

# What layers remember of the chunks before: a causal convolution its last two input frames, an upsampler that
# the video has begun. Empty at the start of a video.
Cache = dict[nn.Module, Tensor | bool]


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
    invert_scale_latents: bool = False  # a start picture's latents are divided by it (CogVideoX1.5)
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    extra: dict = field(default_factory=dict)  # unknown keys, written back as they came

    def __post_init__(self):
        only(
            self,
            act_fn=("silu",),
            temporal_compression_ratio=(4,),
            use_quant_conv=(False,),
            use_post_quant_conv=(False,),
        )

    @property
    def tiles(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of a tile, in pixels and in latents.

        Half the sample size, down to a multiple of 48×40, which it is in official files: a sixth and a fifth
        of it are whole latents. Of other sizes the reference's tiles do not meet.
        """
        height = 48 * max(self.sample_height // 96, 1)
        width = 40 * max(self.sample_width // 80, 1)
        return (height, width), (height // 8, width // 8)


# ---------------------------------------------------------------- layers


class CausalConv3d(nn.Module):
    """3×3×3 convolution over the present frame and the two before it; zero padding in space."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        """b c f h w -> b c f h w. Before the first frame of a video that frame itself is seen."""
        if self in cache:
            x = torch.cat([cache[self], x], dim=2)
        else:
            x = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
        cache[self] = x[:, :, -2:].clone()  # a view would keep the whole chunk alive
        return self.conv(x)


class GroupNorm(nn.GroupNorm):
    """The encoder's norm, over all frames of a chunk. Called like the decoder's, without latents."""

    def forward(self, x: Tensor, z: None) -> Tensor:
        return super().forward(x)


class SpatialNorm(nn.Module):
    """The decoder's norm, modulated by the latents: norm(x) * conv_y(z) + conv_b(z)   (MoVQ, eq. 6).

    The reference enlarges z to x's size and convolves there; a 1×1×1 convolution gives the same before.
    """

    def __init__(self, channels: int, latent_channels: int, num_groups: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, channels, eps=1e-6)
        # Official files call these weights conv_y.conv.weight and so on.
        self.conv_y = nn.Sequential(OrderedDict(conv=nn.Conv3d(latent_channels, channels, kernel_size=1)))
        self.conv_b = nn.Sequential(OrderedDict(conv=nn.Conv3d(latent_channels, channels, kernel_size=1)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x: b c f h w, z: b 16 f' h' w', the latents of this chunk -> b c f h w"""
        scale = enlarge(self.conv_y(z), x.shape[2:])
        shift = enlarge(self.conv_b(z), x.shape[2:])
        return self.norm_layer(x) * scale + shift


def repeat(x: Tensor, time: int, space: int) -> Tensor:
    """Nearest: b c f h w -> b c f·time h·space w·space. F.interpolate is the same; its gradient is slower."""
    x = x[:, :, :, None, :, None, :, None].expand(-1, -1, -1, time, -1, space, -1, space)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def enlarge(latents: Tensor, size: torch.Size) -> Tensor:
    """b c f' h' w' -> b c *size. Of an odd number of frames the first is latent 0's alone."""
    num_frames, height, _ = size
    space = height // latents.shape[3]
    num_alone = num_frames % 2 if latents.shape[2] > 1 else 0
    alone, rest = latents[:, :, :num_alone], latents[:, :, num_alone:]
    time = (num_frames - num_alone) // rest.shape[2]
    enlarged = repeat(rest, time, space)
    return torch.cat([repeat(alone, 1, space), enlarged], dim=2) if num_alone else enlarged


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))))))"""

    def __init__(self, config: VAEConfig, in_channels: int, out_channels: int, is_decoder: bool):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if is_decoder:
                return SpatialNorm(channels, config.latent_channels, config.norm_num_groups)
            return GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, cache: Cache, z: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, z)), cache)
        h = self.conv2(F.silu(self.norm2(h, z)), cache)
        return self.conv_shortcut(x) + h


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A 2D layer on every frame: b c f h w -> b c f h w."""
    frames = x.transpose(1, 2).flatten(0, 1)
    return layer(frames).unflatten(0, (len(x), -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Mean of pairs of frames if `time` (frame 0 of an odd chunk stays alone), then a strided convolution."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        self.time = time

    def forward(self, x: Tensor, cache: Cache, z: None) -> Tensor:
        if self.time:
            num_alone = x.shape[2] % 2
            alone, pairs = x[:, :, :num_alone], x[:, :, num_alone:]
            x = torch.cat([alone, (pairs[:, :, 0::2] + pairs[:, :, 1::2]) / 2], dim=2)
        x = F.pad(x, (0, 1, 0, 1))  # zeros on the right and at the bottom only
        return per_frame(self.conv, x)


class Upsample(nn.Module):
    """Nearest ×2 in space, a convolution; then, if `time`, every frame twice.

    Frame 0 of a video is not repeated if its first chunk is odd. The reference repeats frames before it
    convolves; after is the same and half the work.
    """

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.time = time

    def forward(self, x: Tensor, cache: Cache, z: Tensor) -> Tensor:
        x = self.enlarge(x)
        if not self.time:
            return x
        is_start = self not in cache
        cache[self] = True
        doubled = repeat(x, time=2, space=1)
        if is_start and x.shape[2] % 2 == 1:
            doubled = doubled[:, :, 1:]
        return doubled

    def enlarge(self, x: Tensor) -> Tensor:
        """b c f h w -> b c f 2h 2w"""
        return per_frame(self.conv, repeat(x, time=1, space=2))


class Block(nn.Module):
    """Resnets, then at most one resampler, under their official names; every layer takes (x, cache, z)."""

    def __init__(self, config: VAEConfig, channels: list[int], is_decoder: bool):
        super().__init__()
        pairs = zip(channels, channels[1:])
        self.resnets = nn.ModuleList(ResnetBlock(config, i, o, is_decoder) for i, o in pairs)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.resnets
        yield from self.downsamplers
        yield from self.upsamplers


class Encoder(nn.Module):
    """One chunk of pixels b 3 f h w -> moments b 32 f' h' w'."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            block = Block(config, [channels] + [width] * config.layers_per_block, is_decoder=False)
            if i < 3:
                block.downsamplers.append(Downsample(width, time=i < 2))
            self.down_blocks.append(block)
            channels = width
        self.mid_block = Block(config, [channels] * 3, is_decoder=False)
        self.norm_out = GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.conv_out = CausalConv3d(channels, 2 * config.latent_channels)

    def forward(self, pixels: Tensor, cache: Cache) -> Tensor:
        x = self.conv_in(pixels, cache)
        for block in [*self.down_blocks, self.mid_block]:
            for layer in block:
                x = layer(x, cache, None)
        return self.conv_out(F.silu(self.norm_out(x, None)), cache)


class Decoder(nn.Module):
    """One chunk of unscaled latents b 16 f' h' w' -> pixels b 3 f h w."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        channels = widths[0]
        self.conv_in = CausalConv3d(config.latent_channels, channels)
        self.mid_block = Block(config, [channels] * 3, is_decoder=True)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            block = Block(config, [channels] + [width] * (config.layers_per_block + 1), is_decoder=True)
            if i < 3:
                block.upsamplers.append(Upsample(width, time=i < 2))
            self.up_blocks.append(block)
            channels = width
        self.norm_out = SpatialNorm(channels, config.latent_channels, config.norm_num_groups)
        self.conv_out = CausalConv3d(channels, config.out_channels)

    def forward(self, z: Tensor, cache: Cache) -> Tensor:
        x = self.conv_in(z, cache)
        for block in [self.mid_block, *self.up_blocks]:
            for layer in block:
                x = layer(x, cache, z)
        return self.conv_out(F.silu(self.norm_out(x, z)), cache)


# ---------------------------------------------------------------- chunks and tiles


def in_chunks(count: int, size: int) -> list[int]:
    """`count` frames in chunks of `size`, the remainder joining the first."""
    num_chunks = max(count // size, 1)
    return [count - size * (num_chunks - 1)] + [size] * (num_chunks - 1)


def encode_chunks(num_frames: int) -> list[int]:
    """Frames per chunk when encoding: 17 -> [9, 8]; 13 -> [13]."""
    return in_chunks(num_frames, 8)


def decode_chunks(num_latent_frames: int, first_alone: bool) -> list[int]:
    """Latent frames per chunk when decoding.

    first_alone: CogVideoX-Fun's way, one frame, then twos, the last may be one: 4 -> [1, 2, 1], always 4f'-3
    frames. Otherwise diffusers' way, twos with an odd frame joining the first: 5 -> [3, 2]; even counts give
    4f' frames.
    """
    if first_alone:
        return [1] + [2] * ((num_latent_frames - 1) // 2) + [1] * ((num_latent_frames - 1) % 2)
    return in_chunks(num_latent_frames, 2)


def decoded_frames(num_latent_frames: int, first_alone: bool) -> int:
    """How many frames come out: 4f'-3, but 4f' where diffusers' chunks start with an even one."""
    starts_even = decode_chunks(num_latent_frames, first_alone)[0] % 2 == 0
    return 4 * num_latent_frames - (0 if starts_even else 3)


def run_chunks(network: nn.Module, x: Tensor, chunks: list[int]) -> Iterator[Tensor]:
    """The encoder or decoder over consecutive chunks of frames."""
    cache = {}
    for chunk in x.split(chunks, dim=2):
        yield network(chunk, cache)


def run_tiles(
    network: nn.Module, x: Tensor, chunks: list[int], size: tuple[int, int], out: tuple[int, int]
) -> Iterator[Tensor]:
    """The same on overlapping tiles of a larger picture, one after the other, each through all its chunks: so
    layers remember one tile, and only the results of all tiles are held until they are joined.

    size, out: height and width of a tile going in and coming out
    Tiles overlap by a sixth of their height and a fifth of their width, as in the reference.
    """
    height, width = x.shape[3:]
    if height <= size[0] and width <= size[1]:
        yield from run_chunks(network, x, chunks)
        return
    grid = []
    for top in range(0, height, size[0] - size[0] // 6):
        strip = x[:, :, :, top : top + size[0]]
        lefts = range(0, width, size[1] - size[1] // 5)
        grid.append([list(run_chunks(network, strip[..., left : left + size[1]], chunks)) for left in lefts])
    overlap = out[0] // 6, out[1] // 5
    for _ in chunks:
        rows = [[tile.pop(0) for tile in row] for row in grid]
        yield join_tiles(rows, overlap, keep=(out[0] - overlap[0], out[1] - overlap[1]))


def join_tiles(rows: list[list[Tensor]], overlap: tuple[int, int], keep: tuple[int, int]) -> Tensor:
    """One picture from rows of tiles, each faded in over the tile above and the tile to the left.

    keep: height and width of a tile that are shown; what overlaps the next tile is only blended into it
    """
    strips = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                fade_in(tile, rows[i - 1][j], dim=3, extent=overlap[0])
            if j > 0:
                fade_in(tile, row[j - 1], dim=4, extent=overlap[1])
        kept = [tile[..., : keep[0], : keep[1]] for tile in row]
        strips.append(torch.cat(kept, dim=4))
    return torch.cat(strips, dim=3)


def fade_in(tile: Tensor, before: Tensor, dim: int, extent: int) -> None:
    """Blend the end of the tile `before` linearly into the start of `tile`, in place."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    ramp = torch.arange(extent, device=tile.device, dtype=torch.float32) / extent
    ramp = ramp.to(tile.dtype)
    if dim == 3:
        ramp = ramp[:, None]
    start = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(end * (1 - ramp) + start * ramp)


# ---------------------------------------------------------------- the model


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor | None, config: VAEConfig) -> Tensor:
    """Scaled latents from moments: the mode, or the sample mean + std · noise where noise is given."""
    if noise is not None:
        mean = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise.to(mean)
    return mean * config.scaling_factor


def sample_first_picture(mean: Tensor, logvar: Tensor, noise: Tensor, config: VAEConfig) -> Tensor:
    """What an image-to-video model is shown: a sample of the picture's posterior, scaled its own way.

    CogVideoX1.5 was trained with these latents divided by the scaling factor, all others multiplied.
    """
    latents = sample_posterior(mean, logvar, noise, config)
    if config.invert_scale_latents:
        latents = latents / config.scaling_factor**2
    return latents


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

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.conv.weight.device

    def moments(self, pixels: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """The posterior's mean and log-variance, not scaled, not clamped.

        pixels: b 3 f h w in [-1, 1], f = 4k+1 (other counts are chunked as in the reference)
        returns: twice b 16 f' h' w'
        raises ValueError if height or width is not a multiple of 8
        """
        height, width = pixels.shape[3:]
        if height % 8 or width % 8:
            raise ValueError(f"a picture of {height} × {width}; the VAE takes multiples of 8")
        # Channels-last pixels would make torch's group norm lose digits where a picture is flat.
        pixels = pixels.to(self.device, self.dtype).contiguous()
        chunks = encode_chunks(pixels.shape[2])
        if tiled:
            tile, latent_tile = self.config.tiles
            encoded = run_tiles(self.encoder, pixels, chunks, size=tile, out=latent_tile)
        else:
            encoded = run_chunks(self.encoder, pixels, chunks)
        mean, logvar = torch.cat(list(encoded), dim=2).chunk(2, dim=1)
        return mean, logvar

    def posterior(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `sample_posterior`."""
        return sample_posterior(mean, logvar, noise, self.config)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None, tiled: bool = False) -> Tensor:
        """pixels b 3 f h w in [-1, 1] -> scaled latents b 16 f' h' w'.

        The posterior's mode, as inference uses it, or a sample where a generator is given, as training does.
        """
        mean, logvar = self.moments(pixels, tiled)
        noise = None
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return self.posterior(mean, logvar, noise)

    def encode_first_picture(self, pixels: Tensor, noise: Tensor, tiled: bool = False) -> Tensor:
        """`sample_first_picture` of pixels b 3 1 h w in [-1, 1]; noise: b 16 1 h' w' -> b 16 1 h' w'."""
        mean, logvar = self.moments(pixels, tiled)
        return sample_first_picture(mean, logvar, noise, self.config)

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
        """Like `decode`, but yields b 3 k h w as soon as k frames are ready, in memory independent of f'.

        Of a picture larger than a tile, all tiles are decoded and held first; only joining goes by chunks.
        """
        yield from self._decoded_chunks(latents, tiled, first_alone)

    def _decoded_chunks(self, latents: Tensor, tiled: bool, first_alone: bool) -> Iterator[Tensor]:
        z = latents.to(self.device, self.dtype) / self.config.scaling_factor
        chunks = decode_chunks(z.shape[2], first_alone)
        if tiled:
            tile, latent_tile = self.config.tiles
            return run_tiles(self.decoder, z, chunks, size=latent_tile, out=tile)
        return run_chunks(self.decoder, z, chunks)

    @classmethod
    def from_pretrained(
        cls, model_dir: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """model_dir: a checkpoint folder that holds vae/, or that folder itself."""
        return load_component(cls, VAEConfig, component_dir(model_dir, "vae"), dtype, device)

    def save_pretrained(self, model_dir: str | Path) -> None:
        """Write model_dir/vae/ in the official layout."""
        save_component(self, Path(model_dir) / "vae", _class_name="AutoencoderKLCogVideoX")
