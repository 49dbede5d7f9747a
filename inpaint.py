"""The heart of CogVideoX-Fun: one model is shown which pixels are known, and generates the others.

    pixels b 3 f h w ─+ reference noise─► black where mask = 1 ─vae.encode─► latents b 16 f' h' w' ┐
    mask   b 1 f h w ─turned round, resize_mask──────────────► known   b 1  f' h' w' ┴─cat─► condition b 17 …

    noisy latents b 16 f' h' w' + condition b 17 f' h' w' = the 33 channels that the transformer reads

What is known decides what the model does: nothing, text to video; the first frame, image to video; the first
and the last, the way between them; any part of a clip, in- and outpainting. Training draws all of these from
`MASK_KINDS`. Sampling and training build the condition by the same two functions: `encode_masked`, which
needs the VAE, and `join_condition`, which does not, so that training may keep what the first one gave.

mask == 1 means "generate here", everywhere in this project; `encode_masked` is the one place that hands the
network the opposite.

Reference: CogVideoX-Fun, pipeline_cogvideox_inpaint.py, data/dataset_image_video.py, scripts/train.py.
Dimension key: b batch, c channels, f frames, h w height and width (f' h' w' of latents).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import chance, integer
from sizes import latent_grid
from vae import VAEConfig, VideoVAE, sample_posterior

# ---------------------------------------------------------------- masks that training draws

MASK_KINDS = {  # of a clip, with their share (the reference's); a picture: a box .2, everything .8
    "everything": 0.2,
    "after the start": 0.2,  # all frames from k on, k = 1 … 4
    "between start and end": 0.2,  # all but the first k and the last k
    "ellipse": 0.1,
    "circle": 0.05,
    "box": 0.05,
    "box for a while": 0.05,
    "boxes here and there": 0.05,
    "pixels": 0.05,
    "frames": 0.05,
}


def random_mask(
    generator: torch.Generator,
    num_frames: int,
    height: int,
    width: int,
    kinds: dict[str, float] = MASK_KINDS,
) -> Tensor:
    """What the network is to generate in one training sample, bool f h w, True = generate.

    kinds: the share of each kind among clips. What is equal over frames or pixels is an expanded view, so
    most draws cost nothing of the full size.
    """
    if num_frames == 1:
        kind = "box" if chance(generator, 0.2) else "everything"
    else:
        shares = torch.tensor(list(kinds.values()), dtype=torch.float32)
        kind = list(kinds)[int(torch.multinomial(shares, 1, generator=generator))]
    mask = _mask_of_kind(kind, generator, num_frames, height, width)
    return mask.expand(num_frames, height, width)


def _mask_of_kind(kind: str, generator: torch.Generator, f: int, h: int, w: int) -> Tensor:
    """bool, broadcastable to f h w. A new kind is a branch here and a share in MASK_KINDS."""
    frame = torch.arange(f).view(f, 1, 1)
    if kind == "everything":
        return torch.ones(1, 1, 1, dtype=torch.bool)
    if kind in ("after the start", "between start and end"):
        keep = integer(generator, 1, 4) if f >= 9 else 1
        end = f if kind == "after the start" else f - keep
        mask = (frame >= keep) & (frame < end)
        return mask if mask.any() else ~mask  # two frames have nothing between them: everything
    if kind in ("circle", "ellipse"):
        half_height = half_width = integer(generator, min(h, w) // 8, min(h, w) // 4)
        if kind == "ellipse":
            half_width = integer(generator, min(h, w) // 8, min(h, w) // 4)
        y = (torch.arange(h) - integer(generator, 0, h - 1)) / half_height
        x = (torch.arange(w) - integer(generator, 0, w - 1)) / half_width
        return (y**2)[:, None] + x**2 <= 1
    if kind == "box":
        return _box(generator, h, w)
    if kind == "box for a while":
        begin = integer(generator, 0, f // 2 - 1)
        end = integer(generator, f // 2, f - 1)
        return (frame >= begin) & (frame < end) & _box(generator, h, w)
    if kind == "boxes here and there":
        mask = torch.zeros(f, h, w, dtype=torch.bool)
        order = torch.randperm(f, generator=generator)
        for i in order[: integer(generator, 1, f // 2)]:
            rows = integer(generator, 1, h // 4)
            columns = integer(generator, 1, w // 4)
            top = integer(generator, 0, h - rows)
            left = integer(generator, 0, w - columns)
            mask[i, top : top + rows, left : left + columns] = True
        return mask
    if kind == "pixels":  # a bit for each: eight times faster to draw than a byte
        num_pixels = f * h * w
        packed = torch.randint(0, 256, (num_pixels // 8 + 1,), generator=generator, dtype=torch.uint8)
        bits = np.unpackbits(packed.numpy(), count=num_pixels)
        return torch.from_numpy(bits).view(torch.bool).view(f, h, w)
    assert kind == "frames", kind
    return torch.rand(f, 1, 1, generator=generator) < 0.5


def _box(generator: torch.Generator, h: int, w: int) -> Tensor:
    """bool h w: a box with sides of 1/4 … 3/4 of the frame around a random centre, cut at the border."""
    inside = []
    for length in (h, w):
        side = integer(generator, length // 4, 3 * length // 4)
        centre = integer(generator, 0, length - 1)
        begin = centre - side // 2
        place = torch.arange(length)
        inside.append((place >= begin) & (place < begin + side))
    return inside[0][:, None] & inside[1]


# ---------------------------------------------------------------- noise on what is known


def draw_noise_sigma(generator: torch.Generator) -> float:
    """The strength of the noise on a training sample's known pixels, exp(N(-3, 1/2)): mostly .02 … .13."""
    return torch.randn((), generator=generator).mul(0.5).sub(3).exp().item()


def add_reference_noise(pixels: Tensor, sigma: float | Tensor, noise: Tensor) -> Tensor:
    """Noise on what is known, so that the model does not copy it blindly: pixels + sigma · noise,
    except where pixels are exactly −1 (masked, or black), which stays the sign for "unknown"."""
    return torch.where(pixels == -1, pixels, pixels + sigma * noise)


# ---------------------------------------------------------------- the 17 channels


def resize_mask(mask: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Resize b 1 f h w to b 1 f' h' w': frame 0 alone, the rest trilinearly to f'-1, as the VAE groups them.

    A known last frame alone therefore reads 0 in the last latent (of its four frames the middle two are
    averaged), as in the reference, whose weights were trained so.
    """
    f, h, w = grid
    first = F.interpolate(mask[:, :, :1], size=(1, h, w), mode="trilinear", align_corners=False)
    if f == 1:
        return first
    rest = F.interpolate(mask[:, :, 1:], size=(f - 1, h, w), mode="trilinear", align_corners=False)
    return torch.cat([first, rest], dim=2)


def encode_masked(
    vae: VideoVAE,
    pixels: Tensor,
    mask: Tensor,
    zero_if_all_masked: bool | Tensor = True,
    tiled: bool = False,
) -> dict[str, Tensor]:
    """What an inpaint model is shown, before its posterior is sampled; arguments as of `inpaint_condition`.

    returns: masked b 32 f' h' w', means and log-variances of the video with its unknown pixels blacked out
        known b 1 f' h' w', 1 where pixels are known     zero b, bool: all its channels are to be zero
    """
    mask = mask.to(pixels)
    all_masked = (mask == 1).flatten(1).all(dim=1)
    zero = all_masked & torch.as_tensor(zero_if_all_masked, device=pixels.device)
    hidden = pixels * (1 - mask) - mask
    grid = latent_grid(*pixels.shape[2:])
    moments = pixels.new_zeros(len(pixels), 2 * vae.config.latent_channels, *grid, dtype=vae.dtype)
    if not zero.all():  # what is going to be zero need not be encoded
        moments[~zero] = torch.cat(vae.moments(hidden[~zero], tiled), dim=1)
    return {"masked": moments, "known": resize_mask(1 - mask, grid), "zero": zero}


def join_condition(
    masked: Tensor, known: Tensor, zero: Tensor, noise: Tensor | None, config: VAEConfig
) -> Tensor:
    """The condition b 17 f' h' w' from what `encode_masked` gave; noise b 16 f' h' w' samples the posterior.

    The latent scale multiplies the mask's channel too, since the reference scales after joining them.
    """
    mean, logvar = masked.chunk(2, dim=1)
    latents = sample_posterior(mean, logvar, noise, config)
    condition = torch.cat([(known * config.scaling_factor).to(latents), latents], dim=1)
    return condition * ~zero[:, None, None, None, None]


def inpaint_condition(
    vae: VideoVAE,
    pixels: Tensor,
    mask: Tensor,
    generator: torch.Generator | None = None,
    zero_if_all_masked: bool | Tensor = True,
    tiled: bool = False,
) -> Tensor:
    """Which pixels are known, and what they show, as an inpaint model reads it: b 17 f' h' w'.

    pixels: b 3 f h w in [-1, 1]    mask: b 1 f h w of 0 and 1, 1 = generate here
    generator: sample the posterior (training) instead of taking its mode (inference)
    zero_if_all_masked: whether a sample with nothing known gets an all-zero condition; one bool, or b of them
    """
    if mask.shape != (len(pixels), 1, *pixels.shape[2:]):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit pixels {tuple(pixels.shape)}")
    shown = encode_masked(vae, pixels, mask, zero_if_all_masked, tiled)
    noise = None
    if generator is not None:
        mean = shown["masked"].chunk(2, dim=1)[0]
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return join_condition(**shown, noise=noise, config=vae.config)
