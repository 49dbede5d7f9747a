"""Timesteps, patches and positions: how numbers and places become vectors. Pure functions, no parameters.

    t        b                ─timestep_embedding─► b d                       cos | sin
    latents  b c f h w        ─patchify───────────► b n (c p_t p p)           ◄─unpatchify─
    grid     (f, rows, cols)  ─sincos_table───────► L+n d                     added to the tokens (2B)
    grid     (f, rows, cols)  ─rope_table─────────► cos, sin: L+n head_dim/2  rotates q and k (5B)

A grid counts patches: n = f·rows·cols tokens, frame by frame, row by row. Tables cover the joint sequence of
L text tokens and n video tokens. Text has no position: its rows are zero when added and turn by zero angle.

Sinusoids: Vaswani et al. 2017, sec. 3.5. RoPE: Su et al. 2021. Their 3D forms: CogVideoX (Yang et al. 2024),
sec. 2.2, and diffusers models/embeddings.py (get_3d_sincos_pos_embed, get_3d_rotary_pos_embed).

b batch · f h w frames, height, width of latents · c channels · n video tokens · L text tokens · d model width
p patch
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]  # frames, rows, columns, in patches
Rope = tuple[Tensor, Tensor]  # cos, sin: L+n head_dim/2


# ---------------------------------------------------------------- timesteps


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of a timestep, [cos(t·ω), sin(t·ω)] with ω_i = 10000^(-2i/dim)   (Ho et al. 2020).

    timesteps: b, in [0, 1000)    dim: even
    returns: b dim, float32 (bf16 could not tell t = 998 from t = 999)
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000) * index / half)
    angles = timesteps[:, None].float() * frequencies  # b dim/2
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ---------------------------------------------------------------- patches


def patchify(x: Tensor, p_t: int, p: int) -> Tensor:
    """Cut a video into boxes of p_t frames × p × p: b c f h w -> b n (c p_t p p), channels slowest."""
    x = x.unflatten(4, (-1, p))
    x = x.unflatten(3, (-1, p))
    x = x.unflatten(2, (-1, p_t))  # b c f p_t h p w p
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # b f h w c p_t p p
    return x.flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: Grid, p_t: int, p: int) -> Tensor:
    """The inverse of `patchify`: b n (c p_t p p) -> b c f h w."""
    x = tokens.unflatten(2, (-1, p_t, p, p))
    x = x.unflatten(1, grid)  # b f h w c p_t p p
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # b c f p_t h p w p
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------- positions that are added


def _sincos(dim: int, num: int, scale: float) -> Tensor:
    """[sin(x·ω), cos(x·ω)] for places x = i/scale, ω_i = 10000^(-2i/dim): num dim, float32.

    Places are rounded to float32 and then multiplied by float64 frequencies, because the reference does.
    """
    index = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    frequencies = 10000 ** -(index / (dim / 2))
    places = torch.arange(num, dtype=torch.float32, device="cpu") / scale
    angles = torch.outer(places, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def _stretch(table: Tensor, num: int) -> Tensor:
    """Linear interpolation between pixel centres (align_corners=False) of m dim -> num dim."""
    columns = table.T[None]  # 1 dim m
    return F.interpolate(columns, size=num, mode="linear", align_corners=False)[0].T


def _per_token(frame: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of the three axes (f a, rows b, cols c), each repeated along the other two: n a, n b, n c."""
    grid = (len(frame), len(row), len(col), -1)
    frame = frame[:, None, None].expand(grid)
    row = row[None, :, None].expand(grid)
    col = col[None, None, :].expand(grid)
    return frame.flatten(0, 2), row.flatten(0, 2), col.flatten(0, 2)


# A table is as large as the tokens (400 MB at 2B and 53k tokens), so only the last few are kept. They are
# built outside inference mode: what a preview leaves in the cache must be usable in the next training step.
@lru_cache(maxsize=2)
@torch.inference_mode(False)
def sincos_table(
    dim: int,
    grid: Grid,
    native: tuple[int, int],
    num_text: int,
    spatial_scale: float,
    temporal_scale: float,
    device: torch.device,
) -> Tensor:
    """3D sincos positions for text (zeros) and video: L+n dim, float32.

    The first dim/4 channels say the frame, the next 3/8 the column, the last 3/8 the row. The table of a
    `native` (rows, cols) grid is stretched bilinearly to the rows and columns of `grid`; since every axis has
    channels of its own, that is a linear stretch of each axis. native == grid[1:] changes nothing.
    dim: a multiple of 16    scales: the places' unit, 1.875 in space and 1 in time in all released models
    """
    frames, rows, cols = grid
    native_rows, native_cols = native
    frame = _sincos(dim // 4, frames, temporal_scale)
    row = _sincos(3 * dim // 8, native_rows, spatial_scale)
    col = _sincos(3 * dim // 8, native_cols, spatial_scale)
    frame, row, col = _per_token(frame, _stretch(row, rows), _stretch(col, cols))
    video = torch.cat([frame, col, row], dim=-1)
    return F.pad(video, (0, 0, num_text, 0)).to(device)


# ---------------------------------------------------------------- positions that rotate


def crop_region(rows: int, cols: int, native: tuple[int, int]) -> tuple[int, int, int, int]:
    """Fit a grid's aspect ratio into the native grid, centred: (top, bottom, left, right) in native patches.

    Rounds size and offset half to even, as the reference does (get_resize_crop_region_for_grid).
    """
    native_rows, native_cols = native
    height, width = native_rows, native_cols
    if rows / cols > native_rows / native_cols:  # narrower than native: full height
        width = round(native_rows / rows * cols)
    else:
        height = round(native_cols / cols * rows)
    top = round((native_rows - height) / 2)
    left = round((native_cols - width) / 2)
    return top, top + height, left, left + width


def _places(start: int, stop: int, num: int) -> Tensor:
    """start + (stop - start)·i/num for i = 0 … num-1, float32.

    Differs from recent diffusers (0.42), which ends at stop·(num-1)/num: the same only where start is 0, and
    not what the weights were trained with.
    """
    index = torch.arange(num, dtype=torch.float64, device="cpu")
    return (start + (stop - start) / num * index).float()


def _angles(dim: int, places: Tensor) -> Tensor:
    """x·ω_i with ω_i = 10000^(-2i/dim): num dim/2, all in float32 like the reference."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return torch.outer(places, 1 / 10000**exponents)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def rope_table(
    head_dim: int, grid: Grid, native: tuple[int, int] | None, num_text: int, device: torch.device
) -> Rope:
    """cos and sin of the angles by which 3D RoPE turns each pair of channels: two of L+n head_dim/2, float32.

    The first 1/4 of the pairs turns with the frame, the next 3/8 with the row, the last 3/8 with the column.
    native: (rows, cols) of the grid whose crop region the video is laid over (V1.0), so that places mean the
            same at every resolution; None counts patches from the top left corner (V1.5, "slice")
    head_dim: a multiple of 16
    """
    frames, rows, cols = grid
    top, bottom, left, right = crop_region(rows, cols, native) if native else (0, rows, 0, cols)
    frame = _angles(head_dim // 4, _places(0, frames, frames))
    row = _angles(3 * head_dim // 8, _places(top, bottom, rows))
    col = _angles(3 * head_dim // 8, _places(left, right, cols))
    video = torch.cat(_per_token(frame, row, col), dim=-1)
    angles = F.pad(video, (0, 0, num_text, 0)).to(device)  # text: angle 0, left as it is
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring channels (2i, 2i+1) of x by the table's angles.

    The products are float32 whatever x is, since the table is; the result has x's dtype.

    x: b heads L+n head_dim    rope: what `rope_table` gives
    """
    cos, sin = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned_even = even * cos - odd * sin
    turned_odd = odd * cos + even * sin
    return torch.stack([turned_even, turned_odd], dim=-1).flatten(-2).to(x.dtype)
