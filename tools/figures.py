"""Draw the pictures of the documentation from the code itself, with Pillow alone.

    python tools/figures.py                    all of docs/figures
    python tools/figures.py masks budget       some of them

Nothing here is painted by hand: what the network is shown comes from `inpaint_condition`, frame counts from
`frames_for`, positions from `sincos_table`, masks from `random_mask`, and clips from the tiny model. So they
are to be drawn again when those change, and tests/test_figures.py says when.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from diffusion import SAMPLERS  # noqa: E402
from embeddings import sincos_table  # noqa: E402
from inpaint import MASK_KINDS, inpaint_condition, random_mask  # noqa: E402
from media import to_pixels, to_uint8  # noqa: E402
from request import Request, complete, place_pictures  # noqa: E402
from runtime import generator  # noqa: E402
from sample import TINY, encode_text, guided, load_models  # noqa: E402
from shapes import Scene, draw  # noqa: E402
from sizes import frames_for, latent_grid, num_tokens  # noqa: E402
from transformer import TransformerConfig  # noqa: E402

FIGURES_DIR = ROOT / "docs" / "figures"
WIDTH = 880  # about what a README is shown at
MAX_BYTES = 55_000  # of a file
INK, SOFT = (30, 30, 40), (130, 130, 140)
ORANGE, GREEN, BLUE = (214, 110, 0), (0, 140, 70), (40, 90, 200)

SCENE = Scene("red", "circle", "moves right", "white", 0.22, 1.5, 0.9, (0.5, 0.5))


# ---------------------------------------------------------------- paper and pencil


def page(height: int) -> Image.Image:
    return Image.new("RGB", (WIDTH, height), "white")


def write(picture: Image.Image, x: int, y: int, words: str, color=INK, size: int = 14, anchor: str = "la"):
    """anchor: of two letters, left, middle or right, and ascender, middle or descender (Pillow's)."""
    font = ImageFont.load_default(size)  # part of Pillow; it has ASCII letters only
    ImageDraw.Draw(picture).text((x, y), words, fill=color, font=font, anchor=anchor)


def put(picture: Image.Image, x: int, y: int, frame: np.ndarray, size: tuple[int, int], edge=None) -> None:
    """A frame, uint8 h w 3 or h w, at a size (width, height); enlarged it shows its pixels."""
    how = Image.Resampling.NEAREST if size[0] > frame.shape[1] else Image.Resampling.BOX
    picture.paste(Image.fromarray(frame).resize(size, how), (x, y))
    if edge:
        ImageDraw.Draw(picture).rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline=edge)


def bracket(picture: Image.Image, left: int, right: int, y: int, words: str, color) -> None:
    """A coloured line over what it spans, and what that is."""
    ImageDraw.Draw(picture).rectangle((left, y, right, y + 2), fill=color)
    write(picture, (left + right) // 2, y - 4, words, color, anchor="md")


def grey(values: Tensor, low: float = -3, high: float = 3) -> np.ndarray:
    """Numbers as grey, low black and high white: uint8. Latents are mostly between -3 and 3."""
    return ((values.float() - low) / (high - low) * 255).clamp(0, 255).to(torch.uint8).numpy()


def as_png(picture: Image.Image, max_bytes: int) -> bytes:
    """A file, in few colours where it would be large."""
    for num_colors in (None, 256, 96, 32):
        file = io.BytesIO()
        octree = Image.Quantize.FASTOCTREE  # keeps colours that are rare, as the default does not
        (picture.quantize(num_colors, octree) if num_colors else picture).save(file, "PNG", optimize=True)
        if len(file.getvalue()) <= max_bytes:
            break
    return file.getvalue()


# ---------------------------------------------------------------- the figures


@torch.no_grad()
def channels() -> Image.Image:
    """What an inpaint model is shown for a start picture: the 33 channels of each latent frame."""
    picture = page(366)
    start = draw([SCENE], 1)[0, 0].numpy()
    frames, mask = place_pictures(start[None], False, 17)
    models = load_models(TINY)
    with models.use("vae", "encode") as vae:
        condition = inpaint_condition(vae, to_pixels(frames)[None], mask[None, None])
    noise = torch.randn(1, 16, *condition.shape[2:], generator=generator("channels"))
    stack = torch.cat([noise, condition], dim=1)[0]  # 33 f' h' w'

    shown = np.where(mask[..., None].numpy(), 0, frames)
    cell, left = 42, 158
    write(picture, 8, 22, "the clip:")
    write(picture, 8, 40, "unknown is black", SOFT)
    write(picture, 8, 72, "the mask:")
    write(picture, 8, 90, "white is generated", SOFT)
    for i in range(17):
        put(picture, left + i * cell, 20, shown[i], (40, 40), SOFT)
        put(picture, left + i * cell, 68, grey(mask[i], 0, 1), (40, 40), SOFT)
    write(picture, left + 20, 2, "start", size=13, anchor="ma")
    write(picture, 8, 122, "latent frame", SOFT)
    for i in range(5):
        first, last = max(0, 4 * i - 3), 4 * i
        span = left + first * cell, 116, left + last * cell + 40, 118
        ImageDraw.Draw(picture).rectangle(span, fill=SOFT)
        write(picture, (span[0] + span[2]) // 2, 122, str(i), SOFT, anchor="ma")

    cell, left, top = 26, 20, 206
    write(picture, 8, 158, "33 channels of 5 latent frames, as the network reads them:")
    bracket(picture, left, left + 16 * cell - 3, top - 8, "16 noisy latents, what is being made", ORANGE)
    bracket(picture, left + 16 * cell, left + 17 * cell - 3, top - 8, "1 known", GREEN)
    bracket(picture, left + 17 * cell, left + 33 * cell - 3, top - 8, "16 latents of the clip above", BLUE)
    scale = models.vae_config.scaling_factor
    for frame in range(5):
        y = top + frame * cell
        write(picture, 8, y + 12, str(frame), SOFT, anchor="mm")
        for channel in range(33):
            x = left + channel * cell
            if channel == 16:
                put(picture, x, y, grey(stack[channel, frame], 0, scale), (24, 24), GREEN)
            else:
                put(picture, x, y, grey(stack[channel, frame]), (24, 24))
    write(picture, 8, y + 32, "grey is 0; in the channel known, white is known and black is unknown", SOFT)
    return picture


def budget() -> Image.Image:
    """One token budget as three stacks of frames, all to one scale."""
    picture = page(370)
    lines = ImageDraw.Draw(picture)
    max_tokens, pixels_per_dot, step, left, floor = 13312, 4, 2, 12, 296
    for size in (512, 768, 1024):
        num_frames = frames_for(max_tokens, size, size)
        side = size // pixels_per_dot
        frames = draw([SCENE], num_frames, side, side)[0].numpy()
        for i in reversed(range(num_frames)):
            x, y = left + step * i, floor - side - step * i
            put(picture, x, y, frames[i], (side, side), SOFT)
        f, rows, columns = latent_grid(num_frames, size, size)
        for i in range(0, side, 16 // pixels_per_dot):  # the grid of tokens
            lines.line((left, floor - side + i, left + side - 1, floor - side + i), fill=(200, 205, 215))
            lines.line((left + i, floor - side, left + i, floor - 1), fill=(200, 205, 215))
        write(picture, left, floor + 8, f"{num_frames} frames of {size} x {size}", size=16)
        tokens = num_tokens(num_frames, size, size)
        write(picture, left, floor + 30, f"{f} x {rows // 2} x {columns // 2} = {tokens} tokens", BLUE)
        left += side + step * num_frames + 50
    words = "A token is one square, 16 x 16 pixels: of the first frame alone, then of four frames together."
    write(picture, 12, 350, words, SOFT)
    return picture


NATIVE = TransformerConfig().native_grid[1:]  # 30 rows and 45 columns of patches, CogVideoX-2B's


def places_told(grid: tuple[int, int], rule: str) -> Tensor:
    """What the network is told of the place of each token of one frame: frame, row, column, 3 h w.

    Read from one channel an axis of the vectors it adds to the tokens, a sine too slow to turn back here.
    """
    config = TransformerConfig()
    drawn, native = (1, *grid), grid
    if rule == "interpolate":
        native = NATIVE
    if rule == "slice":
        drawn, native = config.native_grid, NATIVE
    table = sincos_table(config.dim, drawn, native, 0, 1.0, 1.0, torch.device("cpu"))[: grid[0] * grid[1]]
    axes = table.split([config.dim // 4, 3 * config.dim // 8, 3 * config.dim // 8], dim=1)  # frame, col, row
    places = []
    for axis in axes:
        num_sines = axis.shape[1] // 2
        slow = num_sines // 2
        places.append(axis[:, slow].asin() * 10000 ** (slow / num_sines))
    frame, column, row = places
    return torch.stack([frame, row, column]).unflatten(1, grid)


CORNERS = torch.tensor([[255, 240, 200], [235, 90, 60], [40, 150, 170], [70, 20, 100]])  # top, then bottom


def as_colors(places: Tensor, most: tuple[int, int]) -> np.ndarray:
    """Places 3 h w as uint8 h w 3: CORNERS mixed by row and column up to `most`, darker in later frames."""
    frame, row, column = places[..., None]
    down, right = row / most[0], column / most[1]
    top = torch.lerp(CORNERS[0].float(), CORNERS[1].float(), right)
    bottom = torch.lerp(CORNERS[2].float(), CORNERS[3].float(), right)
    return (torch.lerp(top, bottom, down) * 0.7**frame).round().to(torch.uint8).numpy()


def positions() -> Image.Image:
    """A grid larger than the model's own, its positions by three rules."""
    picture = page(254)
    larger, dot, x, top = (48, 72), 3, 8, 66
    shown = {
        "own": ("the model's own grid", "30 rows of 45 tokens;", "a colour is a place"),
        "interpolate": (
            "interpolated: CogVideoX-Fun",
            "48 rows of 72: stretched,",
            "a corner stays a corner",
        ),
        "regenerate": ("regenerated: CogVideoX", "places go on; those beyond", "the line are new to it"),
        "slice": ("sliced: the original code", "lines of 45 laid in lines of 72,", "then the next frame's"),
    }
    for rule, (title, *lines) in shown.items():
        rows, columns = grid = NATIVE if rule == "own" else larger
        put(picture, x, top, as_colors(places_told(grid, rule), larger), (columns * dot, rows * dot))
        write(picture, x, 4, title, size=15)
        write(picture, x, 26, "\n".join(lines), SOFT, size=13)
        if rule == "regenerate":
            edge = x, top, x + NATIVE[1] * dot, top + NATIVE[0] * dot
            ImageDraw.Draw(picture).rectangle(edge, outline="white")
        x += columns * dot + 22
    words = "Equal colours are equal places to the network, which learnt on its own grid what a place means."
    write(picture, 8, 224, words, SOFT)
    return picture


@torch.no_grad()
def estimates() -> Image.Image:
    """The clean clip that the network sees in the noise, over the steps of sampling."""
    prompt, num_steps, shown = "a red circle moves left on a black background", 20, (0, 1, 3, 5, 8, 13, 19)
    models = load_models(TINY, keep=True)
    request = complete(Request(prompt, num_steps=num_steps), models)
    schedule, timesteps = models.schedule, models.schedule.timesteps(num_steps)
    noise = torch.randn(1, 16, 5, 8, 8, generator=generator("estimates"))
    nothing_known = torch.zeros(1, 17, 5, 8, 8)
    text = encode_text(models, request.texts)
    pairs = []  # of each step the noisy latents, and the clean ones estimated from them
    with models.use("transformer", "denoise") as dit:
        velocity = guided(models, dit, request, text, nothing_known, num_steps)

        def watched(x: Tensor, t: int) -> Tensor:
            v = velocity(x, t)
            a = schedule.alphas_cumprod[t]
            pairs.append((x, a**0.5 * x - (1 - a) ** 0.5 * v))
            return v

        list(SAMPLERS["ddim"](watched, noise, schedule, timesteps, None))

    picture = page(484)
    cell, left = 106, 130
    tops = (44, 166, 272, 378)
    labels = ("noisy latents,\nframe 8", "what it sees:\nframe 0", "frame 8", "frame 16")
    for label, y in zip(labels, tops):
        write(picture, 8, y + 34, label)
    with models.use("vae", "decode") as vae:
        for column, step in enumerate(shown):
            noisy, clean = pairs[step]
            noisy = to_uint8(vae.decode(noisy[:, :, :3])[0])  # its first 9 frames
            clean = to_uint8(vae.decode(clean)[0])
            x = left + column * cell
            write(picture, x + 50, 4, f"step {step + 1}", anchor="ma")
            write(picture, x + 50, 22, f"t = {timesteps[step]}", SOFT, anchor="ma")
            for y, frame in zip(tops, (noisy[8], clean[0], clean[8], clean[16])):
                put(picture, x, y, frame, (100, 100))
    return picture


def masks() -> Image.Image:
    """The kinds of masks that training draws, over a clip; white is to be generated."""
    picture = page(372)
    num_frames, cell, side = 9, 46, 43
    scene = Scene("blue", "square", "moves right", "gray", 0.22, 1.5, 0.9, (0.5, 0.5))
    clip = draw([scene], num_frames, side, side)[0].numpy()
    for i, (kind, share) in enumerate(MASK_KINDS.items()):
        x, y = 8 + (i % 2) * 456, 8 + (i // 2) * 73
        mask = random_mask(generator("masks", 9, kind), num_frames, side, side, {kind: 1.0})
        write(picture, x, y, kind)
        write(picture, x + num_frames * cell - 3, y, f"{share:.0%}", SOFT, anchor="ra")
        for j in range(num_frames):
            frame = np.where(mask[j, :, :, None].numpy(), np.uint8(255), clip[j])
            put(picture, x + j * cell, y + 19, frame, (side, side), SOFT)
    return picture


FIGURES = {f.__name__: f for f in (channels, budget, positions, estimates, masks)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; by default all")
    parser.add_argument("--out", type=Path, default=FIGURES_DIR)
    args = parser.parse_args(argv)
    for name in args.names or FIGURES:
        path = args.out / f"{name}.png"
        path.write_bytes(as_png(FIGURES[name](), MAX_BYTES))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
