"""Every rule about sizes, in plain numbers; no tensor and no network is needed here.

    pixels   f  × h   × w       f = 4k+1; h, w multiples of 16
    latents  f' × h/8 × w/8     f' = 1 + (f−1)/4: the first frame alone, then four to one
    tokens   f' × h/16 × w/16   2×2 latent pixels; models with patch_size_t = 2 take latent frames in pairs

Training counts tokens, not pixels: a clip of 512² × 49 frames has 13 × 32 × 32 = 13312 of them, and about as
many have 768² × 21 and 1024² × 9. So a budget of tokens fixes the frames of each resolution, and clips of
different shapes cost the same (report of CogVideoX-Fun v1, "training by token length").
"""

import functools
import math
from typing import NamedTuple


def latent_frames(num_frames: int) -> int:
    """f' of f frames."""
    return (num_frames + 3) // 4


def video_frames(num_latent_frames: int) -> int:
    """f of f' latent frames: 4f'−3."""
    return 4 * num_latent_frames - 3


def latent_grid(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """f', h', w' of a clip in pixels."""
    return latent_frames(num_frames), height // 8, width // 8


def num_tokens(num_frames: int, height: int, width: int, frames_per_token: int = 1) -> int:
    """Video tokens of a clip in pixels. frames_per_token: the model's patch_size_t; a part counts whole."""
    return math.ceil(latent_frames(num_frames) / frames_per_token) * (height // 16) * (width // 16)


MAX_FRAMES = 16385  # half an hour and more: a typing error should not run for days


def check_frames(num_frames: int) -> None:
    """ValueError, with the nearest counts, unless num_frames is 4k+1 and at most MAX_FRAMES."""
    if num_frames > MAX_FRAMES:
        raise ValueError(f"num_frames={num_frames} is very long; the most is {MAX_FRAMES}")
    if num_frames < 1 or num_frames % 4 != 1:
        below = max(1, (num_frames - 1) // 4 * 4 + 1)
        raise ValueError(f"num_frames={num_frames}; the VAE needs 4k+1, try {below + 4} (or {below})")


MAX_SIDE = 16384  # of a frame; no position ends there, but a typing error should not run for hours


def near_side(size: float) -> int:
    """The legal height or width next to a size."""
    return min(max(round(size / 16) * 16, 16), MAX_SIDE)


def check_side(name: str, size: int) -> None:
    """ValueError, with the nearest size, unless a height or width (the name) is a multiple of 16."""
    if size != near_side(size):
        raise ValueError(f"{name}={size}; sizes are multiples of 16 up to {MAX_SIDE}, try {near_side(size)}")


# ---------------------------------------------------------------- the token budget


def frames_for(
    max_tokens: int,
    height: int,
    width: int,
    max_frames: int = 49,
    frames_per_token: int = 1,
    num_padding: int = 0,
) -> int:
    """The frames, 4k+1, of a clip that fills a token budget: those of the nearest number of latent frames.

    13312 tokens are 49 frames at 512², 21 at 768², 9 at 1024². Nearest, so a clip may pass the budget
    by half a latent frame: by up to a fifth at nine frames.
    frames_per_token: 2 for models that take latent frames in pairs; one frame alone stays one
    num_padding: latent frames that are put in front of them, which the budget pays for
    """
    tokens_per_frame = (height // 16) * (width // 16)
    count = round(max_tokens / tokens_per_frame)
    count = min(max(count, 1), latent_frames(max_frames) + num_padding)
    count = count // frames_per_token * frames_per_token - num_padding
    return video_frames(max(count, 1))


class Bucket(NamedTuple):
    """The shape that all samples of a micro-batch have."""

    num_frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return num_tokens(*self)

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        return latent_grid(*self)


@functools.cache
def aspect_shapes(size: int) -> list[tuple[int, int]]:
    """(height, width) of about size² pixels: the square and 40 others from 1:4 to 4:1, multiples of 16.

    The steps are even in the logarithm; small sizes have fewer, as neighbours fall together.
    """
    rows = [round(size / 16 * 2 ** (i / 20)) for i in range(21)]
    tall = [(16 * r, 16 * max(1, round(size**2 / (256 * r)))) for r in rows]
    wide = [(width, height) for height, width in tall]
    return sorted({*tall, *wide})


def nearest_shape(size: int, height: int, width: int) -> tuple[int, int]:
    """Of `aspect_shapes`, the one with the aspect ratio nearest to height : width."""
    aspect = math.log(height / width)
    return min(aspect_shapes(size), key=lambda shape: abs(math.log(shape[0] / shape[1]) - aspect))
