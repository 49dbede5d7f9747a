"""Measure what a model of the drawn world can do, on held-out combinations only: the numbers of the README.

    python tests/evaluate.py checkpoints/tiny --num 200 --out evaluation.jsonl

Everything is made by `sample.generate` as a user would, with the sampler and guidance below, fixed
beforehand; `shapes.read_attributes` reads the frames. Each task has its own list of scenes, seed 2026.
Results are appended to --out clip by clip, and a run that was stopped goes on behind them; --summary prints
the table only.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import sample
import shapes
from media import to_pixels, to_uint8
from shapes import HELD_OUT, Scene, draw, psnr, read_attributes, sample_scene

SEED = 2026
SETTINGS = {"num_steps": 50, "guidance_scale": 2.0}  # and the model's own sampler
WORDS = ("color", "shape", "motion", "background")


def right(frames: np.ndarray, scene: Scene, names: Iterable[str] = WORDS) -> dict[str, bool]:
    """Which of the named attributes the frames show as the scene has them, and whether all are."""
    found = read_attributes(frames)
    verdict = {name: found is not None and found[name] == getattr(scene, name) for name in names}
    return verdict | {"all": all(verdict.values())}


def make(models, scene: Scene, prompt: str | None = None, **settings) -> np.ndarray:
    """A clip from the scene's caption, or another prompt; each scene has a seed of its own."""
    prompt, seed = prompt or scene.caption(), random.Random(f"{SEED} {scene}").randrange(2**31)
    return sample.generate(models, prompt, seed=seed, **SETTINGS, **settings)


def drawn(scene: Scene, side: int = 64) -> np.ndarray:
    return draw([scene], height=side, width=side)[0].numpy()


def from_text(models, scene: Scene, height: int, width: int) -> dict:
    return right(make(models, scene, height=height, width=width, num_frames=17), scene)


def to_picture(models, scene: Scene) -> dict:
    frames = make(models, scene, scene.caption(1), height=64, width=64, num_frames=1)
    return right(frames, scene, ("color", "shape", "background"))


def from_start(models, scene: Scene) -> dict:
    true = drawn(scene)
    frames = make(models, scene, image=true[0], num_frames=17)
    return {"first_psnr": psnr(frames[:1], true[:1]), "motion": right(frames, scene)["motion"]}


def from_both_ends(models, scene: Scene) -> dict:
    """One object throughout: readable in all frames, of the scene's colour, its fit never that of two."""
    true = drawn(scene)
    frames = make(models, scene, image=true[0], end_image=true[-1], num_frames=17)
    found = read_attributes(frames)
    one = found is not None and found["color"] == scene.color and bool(found["fit"].min() > 0.5)
    return {"worse_end_psnr": min(psnr(frames[i][None], true[i][None]) for i in (0, -1)), "one_object": one}


def within_mask(models, scene: Scene) -> dict:
    """A box with sides of 1/4 … 3/4 around a random centre is made anew, or all but it."""
    dice, true = random.Random(str(scene)), drawn(scene)
    mask = np.zeros(true.shape[:3], np.uint8)
    (top, height), (left, width) = ((dice.randrange(64), dice.randrange(16, 49)) for _ in range(2))
    rows, columns = (
        slice(max(0, at - side // 2), at + side // 2) for at, side in ((top, height), (left, width))
    )
    mask[:, rows, columns] = 255
    mask = mask if dice.random() < 0.5 else 255 - mask
    frames = make(models, scene, video=true, mask=mask)
    return {"kept_psnr": psnr(frames, true, torch.from_numpy(mask == 0)), **right(frames, scene)}


def recolored(models, scene: Scene) -> dict:
    """The prompt names another colour, strength is 0.7 … 0.9; the path must stay within 10 % of the side."""
    dice, true = random.Random(str(scene)), drawn(scene)
    color = dice.choice([c for c in shapes.COLORS if c != scene.color])
    prompt = scene.caption().replace(scene.color, color, 1)
    strength = dice.uniform(0.7, 0.9)
    frames = make(models, scene, prompt, video=true, strength=strength)
    found, path, before = read_attributes(frames), shapes.path(frames), shapes.path(true)
    near = path is not None and (path - before).norm(dim=1).max().item() <= 0.1
    return {"strength": strength, "color": found is not None and found["color"] == color, "path": near}


@torch.inference_mode()
def reconstructed(models, scene: Scene, side: int) -> dict:
    """What the VAE alone gives back of a drawn clip, from the posterior's mode."""
    true = drawn(scene, side)
    with models.use("vae", "encode") as vae:
        pixels = vae.decode(vae.encode(to_pixels(true)[None].to(models.device)))
    frames = to_uint8(pixels[0])
    return {"psnr": psnr(frames, true), **right(frames, scene)}


TASKS: dict[str, Callable] = {
    "text 64x64": lambda models, scene: from_text(models, scene, 64, 64),
    "text 96x96": lambda models, scene: from_text(models, scene, 96, 96),
    "text 128x128": lambda models, scene: from_text(models, scene, 128, 128),
    "text 64x96": lambda models, scene: from_text(models, scene, 64, 96),
    "text 96x64": lambda models, scene: from_text(models, scene, 96, 64),
    "start": from_start,
    "start and end": from_both_ends,
    "mask": within_mask,
    "recolor": recolored,
    "picture": to_picture,
    # the first of them trained at, the others not
    "text 80x80": lambda models, scene: from_text(models, scene, 80, 80),
    "text 112x112": lambda models, scene: from_text(models, scene, 112, 112),
    "text 128x64": lambda models, scene: from_text(models, scene, 128, 64),
    # the ceiling of all of them
    "VAE 64x64": lambda models, scene: reconstructed(models, scene, 64),
    "VAE 96x96": lambda models, scene: reconstructed(models, scene, 96),
    "VAE 128x128": lambda models, scene: reconstructed(models, scene, 128),
}


def wilson(hits: int, num: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, hits / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(entries: list[dict]) -> dict[str, dict[str, list[float]]]:
    """task -> number -> [value, low, high]: shares with their interval, dB as median and quartiles."""
    table: dict[str, dict[str, list[float]]] = {}
    for task in TASKS:
        results = [entry["result"] for entry in entries if entry["task"] == task]
        for name in results[0] if results else ():
            values = [result[name] for result in results]
            if isinstance(values[0], bool):
                numbers = [sum(values) / len(values), *wilson(sum(values), len(values))]
            else:
                low, middle, high = np.percentile(np.minimum(values, 99), [25, 50, 75])
                numbers = [middle, low, high]
            table.setdefault(task, {"clips": [len(values)]})[name] = [round(float(n), 4) for n in numbers]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--num", type=int, default=200, help="clips of each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("evaluation.jsonl"))
    parser.add_argument("--dtype", default="float32", choices=sample.DTYPES)
    parser.add_argument("--device", default=None)
    parser.add_argument("--summary", action="store_true", help="make nothing, read --out")
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    entries = [json.loads(line) for line in lines]
    done = {(entry["task"], entry["index"]) for entry in entries}
    if not args.summary:
        device, dtype = sample.choose_device(args.device, args.dtype)
        models = sample.load_models(args.model, dtype, device, keep=True)
        with args.out.open("a") as file:
            for index in range(args.num):
                for task in args.tasks:
                    if (task, index) not in done:
                        scene = sample_scene(SEED, index + 10_000 * list(TASKS).index(task), HELD_OUT)
                        entry = {"task": task, "index": index, "prompt": scene.caption()}
                        entry["result"] = TASKS[task](models, scene)
                        file.write(json.dumps(entry) + "\n")
                        file.flush()
                        entries.append(entry)
    print(json.dumps(summarize(entries), indent=1))


if __name__ == "__main__":
    main()
