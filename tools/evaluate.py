"""Measure what a model of the drawn world can do, on held-out combinations only.

    python tools/evaluate.py checkpoints/tiny --num 200 --workers 2 --out outputs/evaluation
    python tools/evaluate.py checkpoints/tiny --num 16 --tasks "text 64x64" picture        a quick look

Everything is made by `sample.generate` as a user would, with the model's own sampler and guidance 2, fixed
beforehand; `shapes.read_attributes` reads the frames. Two measures: are the words of the prompt right, and
the fit, the overlap of the object with the ideal shape of equal area and centre, as the mean over a clip's
frames and in its worst frame. Each task has its own endless list of scenes, seed 2026.

Written are OUT.jsonl (clip by clip; a run that was stopped goes on behind them), OUT.json (the summary, each
number with an interval), OUT.png and OUT.gif (the first twenty clips from text, nobody has chosen them).
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))

import sample  # noqa: E402
import shapes  # noqa: E402
from media import to_pixels, to_uint8, write_video  # noqa: E402
from runtime import DTYPES, choose_device  # noqa: E402
from shapes import HELD_OUT, Scene, psnr, read_attributes  # noqa: E402
from vae import VideoVAE  # noqa: E402

SEED = 2026
GUIDANCE = 2.0
WORDS = ("color", "shape", "motion", "background")
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NUM_SHOWN = 20

# ---------------------------------------------------------------- one clip


def judge(frames: np.ndarray, scene: Scene, words: Iterable[str] = WORDS) -> dict:
    """Which words of the scene the frames show, whether all of them, and the fit; 0 where nothing is read."""
    found = read_attributes(frames)
    verdict = {word: found is not None and found[word] == getattr(scene, word) for word in words}
    verdict["all"] = all(verdict.values())
    verdict["fit"] = 0.0 if found is None else float(found["fit"].mean())
    verdict["worst_fit"] = 0.0 if found is None else float(found["fit"].min())
    return verdict


def drawn(scene: Scene, side: int = 64) -> np.ndarray:
    return shapes.draw([scene], height=side, width=side)[0].numpy()


def seed_of(scene: Scene) -> int:
    return random.Random(f"{SEED} {scene}").randrange(2**31)


def make(models: sample.Models, scene: Scene, prompt: str | None = None, **settings) -> np.ndarray:
    """A clip from the scene's caption, or another prompt; each scene has a seed of its own."""
    settings |= {"seed": seed_of(scene), "num_steps": NUM_STEPS, "guidance_scale": GUIDANCE}
    return sample.generate(models, prompt or scene.caption(), **settings)


def from_text(models: sample.Models, scene: Scene, height: int, width: int) -> dict:
    return judge(make(models, scene, height=height, width=width, num_frames=17), scene)


def picture(models: sample.Models, scene: Scene) -> dict:
    frames = make(models, scene, scene.caption(1), height=64, width=64, num_frames=1)
    return judge(frames, scene, ("color", "shape", "background"))


def from_start(models: sample.Models, scene: Scene) -> dict:
    true = drawn(scene)
    frames = make(models, scene, image=true[0], num_frames=17)
    return judge(frames, scene) | {"psnr": psnr(frames[:1], true[:1])}


def from_both_ends(models: sample.Models, scene: Scene) -> dict:
    """The worse of both ends."""
    true = drawn(scene)
    frames = make(models, scene, image=true[0], end_image=true[-1], num_frames=17)
    ends = [psnr(frames[i][None], true[i][None]) for i in (0, -1)]
    return judge(frames, scene) | {"psnr": min(ends)}


def within_mask(models: sample.Models, scene: Scene) -> dict:
    """A box with sides of 1/4 … 3/4 around a random centre is made anew, or all but it; dB of the rest."""
    dice = random.Random(str(scene))
    top, height = dice.randrange(64), dice.randrange(16, 49)
    left, width = dice.randrange(64), dice.randrange(16, 49)
    true = drawn(scene)
    mask = np.zeros(true.shape[:3], np.uint8)
    rows = slice(max(0, top - height // 2), top + height // 2)
    columns = slice(max(0, left - width // 2), left + width // 2)
    mask[:, rows, columns] = 255
    if dice.random() >= 0.5:
        mask = 255 - mask
    frames = make(models, scene, video=true, mask=mask)
    return judge(frames, scene) | {"psnr": psnr(frames, true, torch.from_numpy(mask == 0))}


def recolored(models: sample.Models, scene: Scene, strength: float) -> dict:
    """The prompt names another colour; every centre must stay within a tenth of the side."""
    true = drawn(scene)
    others = [color for color in shapes.COLORS if color != scene.color]
    color = random.Random(str(scene)).choice(others)
    prompt = scene.caption().replace(scene.color, color, 1)
    frames = make(models, scene, prompt, video=true, strength=strength)
    verdict = {"color": False, "path": False} | judge(frames, scene, ())
    found = read_attributes(frames)
    if found:
        verdict["color"] = found["color"] == color
        far = (shapes.path(frames) - shapes.path(true)).norm(dim=1).max()
        verdict["path"] = far.item() <= 0.1
    return verdict | {"all": verdict["color"] and verdict["path"]}


@torch.inference_mode()
def reconstructed(models: sample.Models, scene: Scene, side: int) -> dict:
    """What the VAE alone gives back of a drawn clip, from the posterior's mode."""
    true = drawn(scene, side)
    vae = VideoVAE.from_pretrained(models.model_dir, models.dtype, models.device)
    frames = to_uint8(vae.decode(vae.encode(to_pixels(true)[None].to(vae.device)))[0])
    return judge(frames, scene) | {"psnr": psnr(frames, true)}


# name -> (which list of scenes, what is done with each)
TASKS: dict[str, tuple[int, Callable[[sample.Models, Scene], dict]]] = {
    "text 64x64": (0, partial(from_text, height=64, width=64)),
    "text 96x96": (1, partial(from_text, height=96, width=96)),
    "text 128x128": (2, partial(from_text, height=128, width=128)),
    "text 64x96": (3, partial(from_text, height=64, width=96)),
    "text 96x64": (4, partial(from_text, height=96, width=64)),
    "text 128x64": (12, partial(from_text, height=128, width=64)),
    "picture": (9, picture),
    "start": (5, from_start),
    "both ends": (6, from_both_ends),
    "mask": (7, within_mask),
    **{f"recolor {strength}": (8, partial(recolored, strength=strength)) for strength in STRENGTHS},
    "VAE 64x64": (13, partial(reconstructed, side=64)),
    "VAE 96x96": (14, partial(reconstructed, side=96)),
    "VAE 128x128": (15, partial(reconstructed, side=128)),
}


def scene_of(task: str, index: int) -> Scene:
    return shapes.sample_scene(SEED, index + 10_000 * TASKS[task][0], HELD_OUT)


# ---------------------------------------------------------------- all clips, in several processes


def begin(model_dir: Path, dtype: str, device: str, num_steps: int) -> None:
    """In each process: load the model, once."""
    global MODELS, NUM_STEPS
    torch.set_num_threads(1)  # at these sizes, threads would mostly wait for each other
    MODELS = sample.load_models(model_dir, getattr(torch, dtype), device, keep=True)
    NUM_STEPS = num_steps


def entry(job: tuple[str, int]) -> dict:
    task, index = job
    scene = scene_of(task, index)
    result = TASKS[task][1](MODELS, scene)
    return {"task": task, "index": index, "prompt": scene.caption(), "result": result}


def shown_clip(index: int) -> np.ndarray:
    """The same clip that the task "text 64x64" has judged."""
    return make(MODELS, scene_of("text 64x64", index), height=64, width=64, num_frames=17)


# ---------------------------------------------------------------- what came out


def wilson(hits: int, num: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, hits / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def number(name: str, values: list) -> list[float]:
    """[value, low, high]: a share or a mean with its 95 % interval; of decibels the median and quartiles."""
    if isinstance(values[0], bool):
        return [sum(values) / len(values), *wilson(sum(values), len(values))]
    if name == "psnr":
        low, middle, high = np.percentile(np.minimum(values, 99), [25, 50, 75])
        return [middle, low, high]
    mean, half = np.mean(values), 1.96 * np.std(values) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def summarize(entries: list[dict]) -> dict[str, dict]:
    """task -> number of clips and each measure's [value, low, high]"""
    summary = {}
    for task in TASKS:
        results = [each["result"] for each in entries if each["task"] == task]
        if not results:
            continue
        summary[task] = {"clips": len(results)}
        for name in results[0]:
            values = number(name, [result[name] for result in results])
            summary[task][name] = [round(float(value), 4) for value in values]
    return summary


COLUMNS = ["all", "color", "shape", "motion", "background", "path", "fit", "worst_fit", "psnr"]
FORMATS = {"fit": "{:.3f}", "worst_fit": "{:.3f}", "psnr": "{:.1f} dB"}  # the others are shares


def table(summary: dict[str, dict]) -> Iterator[str]:
    yield "| task | clips | " + " | ".join(COLUMNS) + " |"
    yield "| --- " * (2 + len(COLUMNS)) + "|"
    for task, measures in summary.items():
        cells = []
        for name in COLUMNS:
            form = FORMATS.get(name, "{:.0%}")
            cells.append(form.format(measures[name][0]) if name in measures else "")
        yield f"| {task} | {measures['clips']} | " + " | ".join(cells) + " |"


def show(clips: list[np.ndarray], out: Path) -> None:
    """OUT.png, five frames of each clip under its prompt; OUT.gif, all clips moving side by side."""
    columns, height, width = 2, 84, 5 * 66 + 10
    sheet = Image.new("RGB", (columns * width, -(-len(clips) // columns) * height), "silver")
    pen = ImageDraw.Draw(sheet)
    for i, clip in enumerate(clips):
        left, top = i % columns * width, i // columns * height
        pen.text((left + 2, top), f"{i}: {scene_of('text 64x64', i).caption()}", fill="black")
        for k, frame in enumerate(clip[::4]):
            sheet.paste(Image.fromarray(frame), (left + 66 * k, top + 14))
    sheet.save(f"{out}.png")
    framed = [np.pad(clip, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=192) for clip in clips]
    framed += [np.full_like(framed[0], 192)] * (-len(framed) % 5)
    rows = [np.concatenate(framed[i : i + 5], axis=2) for i in range(0, len(framed), 5)]
    wall = np.concatenate(rows, axis=1).repeat(2, axis=1).repeat(2, axis=2)
    write_video([wall], Path(f"{out}.gif"), 8)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--num", type=int, default=200, help="clips of each task")
    add("--num-steps", type=int, default=50, help="of the sampler; 50 in whatever we state")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK", help="all, or some")
    add("--out", type=Path, default=Path("outputs/evaluation"), help="without ending")
    add("--dtype", default="float32", choices=DTYPES)
    add("--device", default=str(choose_device()))
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, of one thread each")
    return parser.parse_args(argv)


def read_entries(path: Path, origin: dict) -> list[dict]:
    """What an earlier run has left; SystemExit if it was of another model or other settings."""
    if not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    if any(each["origin"] != origin for each in entries):
        raise SystemExit(f"{path} is of other weights or settings; delete it or give another --out")
    return entries


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    weights = [zlib.crc32(path.read_bytes()) for path in sorted(args.model.glob("*/*.safetensors"))]
    origin = {"weights": weights, "dtype": args.dtype, "device": args.device, "num_steps": args.num_steps}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = Path(f"{args.out}.jsonl")
    entries = read_entries(lines, origin)
    done = {(each["task"], each["index"]) for each in entries}
    jobs = [(task, index) for index in range(args.num) for task in args.tasks if (task, index) not in done]
    settings = (args.model, args.dtype, args.device, args.num_steps)
    processes = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, processes, initializer=begin, initargs=settings)
    with pool, lines.open("a") as file:
        for each in pool.map(entry, jobs):
            entries.append(each | {"origin": origin})
            file.write(json.dumps(entries[-1]) + "\n")
            file.flush()
        if "text 64x64" in args.tasks:
            show(list(pool.map(shown_clip, range(min(NUM_SHOWN, args.num)))), args.out)
    summary = summarize(entries)
    Path(f"{args.out}.json").write_text(json.dumps(summary, indent=1))
    print("\n".join(table(summary)))


if __name__ == "__main__":
    main()
