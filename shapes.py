"""The drawn world of the tiny model: one coloured shape that moves, grows, shrinks or rests on plain ground.

    "a {color} {shape} {motion} on a {background} background"          6 x 3 x 7 x 3 = 378 combinations
    (seed, index) -> Scene -> draw -> uint8 b f h w c -> read_attributes -> color, shape, motion, background

A Scene holds fractions, never pixels: the shorter side of the picture is the unit of length, so a circle is
round in any picture, and one scene fits every size, aspect ratio and number of frames. The motion takes 17
frames at constant speed (or rate of growth); shorter clips are crops of it, longer ones follow the same path
more slowly, so that the caption stays true to the last frame. Nothing of ours is imported here.

Dimension key: b batch, f frames, h w height and width, c channels
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import normalize

# ---------------------------------------------------------------- the grammar

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}


class Reach(NamedTuple):
    """From the centroid, in radii of the circle of equal area, so that size never tells the shape."""

    edge: float  # the nearest
    sides: float
    above: float
    below: float


SHAPES = {
    "circle": Reach(1.0, 1.0, 1.0, 1.0),
    "square": Reach(0.8862, 0.8862, 0.8862, 0.8862),
    "triangle": Reach(0.7776, 1.3468, 1.5551, 0.7776),  # equilateral, and points up
}
MOTIONS = ["moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "stays still"]
DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
BACKGROUNDS = {"black": 0, "gray": 128, "white": 255}
CLIP_FRAMES = 17  # the frames one motion takes

GRAMMAR = (COLORS, SHAPES, MOTIONS, BACKGROUNDS)
COMBINATIONS = list(itertools.product(*GRAMMAR))  # 378 tuples of four
WORDS = " ".join(["a", *COLORS, *SHAPES, *MOTIONS, "on", *BACKGROUNDS, "background"]).split()
WORDS = list(dict.fromkeys(WORDS))  # each once, in the order of a sentence


def is_held_out(combination: tuple[str, str, str, str]) -> bool:
    """The rule that keeps a tenth for testing: with each word's place in its list above, counted from 0,

        color + shape + 3 motion + 3 background   is divisible by ten.

    These 38 combinations are never trained on. Every word loses 9 to 11 % of its combinations, every pair of
    words at most 1/6, every triple at most 1/3: all parts of a held-out prompt are known, only not together.
    """
    color, shape, motion, background = (list(words).index(word) for words, word in zip(GRAMMAR, combination))
    return (color + shape + 3 * motion + 3 * background) % 10 == 0


HELD_OUT = [combination for combination in COMBINATIONS if is_held_out(combination)]
TRAINING = [combination for combination in COMBINATIONS if not is_held_out(combination)]


def make_tokenizer() -> Tokenizer:
    """The tokenizer.json of this world: one id per word, case and punctuation ignored, </s> at the end."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s.,;:!?\"']+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


# ---------------------------------------------------------------- a scene

MARGIN = 0.03  # free space between shape and border, of the shorter side
SHORTEST_MOVE = 0.3  # of the side it moves along; the promise is 0.25


@dataclass(frozen=True)
class Scene:
    """One shape and its motion, in fractions of the picture."""

    color: str
    shape: str
    motion: str
    background: str
    radius: float  # of the circle of equal area, per shorter side; of grows and shrinks the smaller end
    growth: float  # larger radius / smaller radius, used by grows and shrinks
    travel: float  # 0 … 1: from the shortest move to the longest that fits; this is also the speed
    place: tuple[float, float]  # 0 … 1 in x and y: where the path lies within the room it has

    def caption(self, num_frames: int = CLIP_FRAMES) -> str:
        """The sentence for this scene; one frame shows no motion, so its caption names none."""
        motion = f" {self.motion}" if num_frames > 1 else ""
        return f"a {self.color} {self.shape}{motion} on a {self.background} background"


def sample_scene(seed: int, index: int, combinations: Sequence[tuple] = TRAINING) -> Scene:
    """Scene number `index` of the endless list `seed`: the same for every size, frame count and machine."""
    rng = random.Random(f"{seed}/{index}")
    combination = combinations[int(rng.random() * len(combinations))]
    color, shape, motion, background = combination
    smallest, largest = (0.13, 0.16) if motion in ("grows", "shrinks") else (0.14, 0.22)
    return Scene(
        color,
        shape,
        motion,
        background,
        radius=rng.uniform(smallest, largest),
        growth=rng.uniform(1.5, 2.0),  # 2.25 … 4 times the area; the promise is 2
        travel=rng.random(),
        place=(rng.random(), rng.random()),
    )


def _first_and_last_place(
    side: float, before: float, after: float, direction: int, travel: float, place: float
) -> tuple[float, float]:
    """Along one side of the picture, for a shape that reaches `before` and `after` its centroid."""
    room = side - before - after - 2 * MARGIN
    shortest = SHORTEST_MOVE * side
    distance = abs(direction) * (shortest + travel * (room - shortest))
    low = MARGIN + before + place * (room - distance)
    high = low + distance
    return (low, high) if direction >= 0 else (high, low)


def first_and_last(scene: Scene, height: int, width: int) -> list[tuple[float, float, float]]:
    """x and y of the centroid and the radius, in pixels, in frames 0 and 16; wholly visible in both."""
    unit = min(height, width)
    radii = {"grows": (1, scene.growth), "shrinks": (scene.growth, 1)}.get(scene.motion, (1, 1))
    reach = SHAPES[scene.shape]
    sides = reach.sides * scene.radius * max(radii)
    above = reach.above * scene.radius * max(radii)
    below = reach.below * scene.radius * max(radii)
    right, down = DIRECTIONS.get(scene.motion, (0, 0))
    x_place, y_place = scene.place
    xs = _first_and_last_place(width / unit, sides, sides, right, scene.travel, x_place)
    ys = _first_and_last_place(height / unit, above, below, down, scene.travel, y_place)
    return [(x * unit, y * unit, r * scene.radius * unit) for x, y, r in zip(xs, ys, radii)]


# ---------------------------------------------------------------- drawing


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel the shape covers, 0 … 1: its signed distance to the edge in pixels, clamped.

    x: … 1 w and y: … h 1, pixel centres seen from the centroid    radius: … 1 1    returns: … h w
    """
    if shape == "circle":
        distance = (x.square() + y.square()).sqrt()
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs())
    else:  # the largest of the distances along the normals of its three sides
        distance = torch.maximum(y, 0.75**0.5 * x.abs() - y / 2)
    return (SHAPES[shape].edge * radius + 0.5 - distance).clamp_(0, 1)


def draw(
    scenes: Sequence[Scene],
    num_frames: int = CLIP_FRAMES,
    height: int = 64,
    width: int = 64,
    start: int | Sequence[int] = 0,
    length: int | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Frames start … start + num_frames of each scene, anti-aliased: uint8 b f h w c.

    start: one for all scenes, or one for each
    length: frames of the whole clip, from which these are taken, default start + num_frames; up to 17 the
        motion is a function of the frame's number / 16, beyond that it is spread over the clip
    """
    starts = torch.as_tensor(start, device=device).view(-1, 1)
    last_frame = max(CLIP_FRAMES, length or int(starts.max()) + num_frames) - 1
    time = (starts + torch.arange(num_frames, device=device)) / last_frame  # b f, or 1 f; 0 … 1
    ends = torch.tensor([first_and_last(scene, height, width) for scene in scenes], device=device)
    first, last = ends[..., None].unbind(1)  # b 3 1: x, y and radius
    x, y, _ = torch.lerp(first, last, time[:, None]).unbind(1)  # b f
    radius = first[:, 2] * (last[:, 2] / first[:, 2]) ** time  # b f; by a constant rate all crops grow alike
    columns = torch.arange(width, device=device) + 0.5
    rows = torch.arange(height, device=device) + 0.5
    x = (columns - x[..., None])[..., None, :]  # b f 1 w
    y = (rows - y[..., None])[..., None]  # b f h 1
    radius = radius[..., None, None]
    colors = torch.tensor([COLORS[scene.color] for scene in scenes], device=device)
    grounds = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device)
    frames = torch.empty(len(scenes), num_frames, height, width, 3, dtype=torch.uint8, device=device)
    for shape in SHAPES:
        chosen = [i for i, scene in enumerate(scenes) if scene.shape == shape]
        covered = coverage(shape, x[chosen], y[chosen], radius[chosen])  # b f h w
        ground = grounds[chosen].view(-1, 1, 1, 1) + 0.5  # + 0.5 and cut: rounded
        for c in range(3):
            color = colors[chosen, c].view(-1, 1, 1, 1) + 0.5
            frames[chosen, ..., c] = torch.lerp(ground, color, covered).to(torch.uint8)
    return frames


@dataclass(frozen=True)
class Clip:
    """A drawn clip with the face of a video file; one of a single frame is an image."""

    scene: Scene
    size: tuple[int, int] = (128, 128)  # height, width
    num_frames: int = CLIP_FRAMES

    def read(self, start: int, num_frames: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 f h w c; any other `size` is drawn directly, so that nothing is resized or cropped."""
        height, width = size or self.size
        return draw([self.scene], num_frames, height, width, start, self.num_frames)[0].numpy()


def records(
    count: int,
    seed: int,
    held_out: bool = False,
    sizes: Sequence[tuple[int, int]] = ((128, 128),),
    num_frames: int = CLIP_FRAMES,
) -> list[Clip]:
    """The first `count` clips of the list `seed`, in sizes taken in turn; each is drawn when it is read."""
    combinations = HELD_OUT if held_out else TRAINING
    clips = []
    for index in range(count):
        scene = sample_scene(seed, index, combinations)
        clips.append(Clip(scene, sizes[index % len(sizes)], num_frames))
    return clips


# ---------------------------------------------------------------- reading it back


def read_attributes(frames: Tensor | np.ndarray) -> dict | None:
    """What a clip, uint8 f h w c, shows; each decision cuts near halfway between the cases it separates.

    color, shape, motion, background: words of the grammar; motion is None for a single frame, color for a
        gray object, shape for one whose mean fit is below 0.7
    centres: f 2, x and y in pixels    areas: f, in pixels
    fit: f, intersection / union with the drawn shape of equal centroid and area: 0.94 … 1 for a clean object,
        0.66 … 0.84 if a shape is taken for another, below 0.3 for two objects
    returns None if the ground is none of the grays, or an object is missing in any frame
    """
    frames = torch.as_tensor(frames).float() / 255
    _, height, width, _ = frames.shape
    smallest = 0.005 * height * width  # drawn objects cover at least 0.013, in pictures of 1:4

    border = torch.cat([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], dim=1)
    ground = border.flatten(0, 1).median(dim=0).values
    grays = torch.tensor(list(BACKGROUNDS.values()))[:, None] / 255
    deviation, background = (grays - ground).abs().amax(dim=1).min(dim=0)
    if deviation > 0.25:
        return None

    offset = frames - ground  # f h w c
    inside = offset.norm(dim=-1) > 0.4  # drawn colours lie 0.87 … 1.4 from the grays
    if inside.sum() < smallest:
        return None
    color = offset[inside].median(dim=0).values
    hues = torch.tensor(list(COLORS.values())) / 255
    likeness = normalize(hues - hues.mean(dim=1, keepdim=True)) @ (color - color.mean())  # as angles of hue

    mask = _harden(offset @ color / color.square().sum())  # f h w
    areas = mask.sum((1, 2))
    if areas.min() < smallest:
        return None
    x = torch.arange(width) + 0.5
    y = torch.arange(height) + 0.5
    centres = torch.stack([mask.sum(1) @ x, mask.sum(2) @ y], dim=1) / areas[:, None]  # f 2
    fits = _fits(mask, x, y, centres, areas)  # 3 f
    best = int(fits.mean(dim=1).argmax())
    return {
        "color": list(COLORS)[int(likeness.argmax())] if likeness.max() > 0.2 else None,  # drawn: 0.82
        "shape": list(SHAPES)[best] if fits[best].mean() > 0.7 else None,
        "motion": _read_motion(centres, areas, height, width) if len(frames) > 1 else None,
        "background": list(BACKGROUNDS)[int(background)],
        "centres": centres,
        "areas": areas,
        "fit": fits[best],
    }


def _harden(mask: Tensor) -> Tensor:
    """A soft mask without the noise below 1/4 and the blur above 3/4; its edges stay where they are."""
    return (2 * mask - 0.5).clamp_(0, 1)


def _fits(mask: Tensor, x: Tensor, y: Tensor, centres: Tensor, areas: Tensor) -> Tensor:
    """Intersection / union of a mask f h w with each shape drawn at its place and in its size: 3 f."""
    x = (x - centres[:, :1])[:, None, :]  # f 1 w
    y = (y - centres[:, 1:])[:, :, None]  # f h 1
    radius = (areas / torch.pi).sqrt()[:, None, None]
    drawn = torch.stack([_harden(coverage(shape, x, y, radius)) for shape in SHAPES])  # 3 f h w
    return torch.minimum(drawn, mask).sum((2, 3)) / torch.maximum(drawn, mask).sum((2, 3))


def _read_motion(centres: Tensor, areas: Tensor, height: int, width: int) -> str:
    """First against last frame: a move counts from half of 25 % of the side, growth from half of log 2 in
    area, both less by a crop's part of the motion; the larger, each by its measure, decides."""
    part = min(1, (len(areas) - 1) / (CLIP_FRAMES - 1))
    moved = (centres[-1] - centres[0]) / torch.tensor([width, height])
    right, down = (moved / (0.125 * part)).tolist()
    growth = float((areas[-1] / areas[0]).log2()) / (0.5 * part)
    amounts = {
        "moves left": -right,
        "moves right": right,
        "moves up": -down,
        "moves down": down,
        "grows": growth,
        "shrinks": -growth,
        "stays still": 1.0,  # if none is above
    }
    return max(amounts, key=amounts.get)


def path(frames: Tensor | np.ndarray) -> Tensor | None:
    """Centre of the object in every frame: f 2, x and y per shorter side; None if it is not readable."""
    found = read_attributes(frames)
    return found and found["centres"] / min(frames.shape[1:3])


def psnr(a: Tensor | np.ndarray, b: Tensor | np.ndarray, keep: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 clips f h w c, where keep (f h w) is True."""
    error = (torch.as_tensor(a).double() - torch.as_tensor(b).double()).square()
    error = error if keep is None else error[keep]
    return float(10 * torch.log10(255**2 / error.mean()))
