"""What the options that save steps or memory change, measured on a model of the drawn world.

    python tools/options.py checkpoints/tiny --num 16    the table of docs/speed.md: eight minutes on one core
    python tools/options.py checkpoints/tiny --num 2 --rows "dpm++ 20" "step cache 0.1"

Held-out captions at 64×64×17, guidance 2, seeds and judgement as in evaluate.py. Each way makes the same
clips; PSNR is that of a clip against the first way's clip of the same seed.
"""

import argparse
import sys
import time
from pathlib import Path

import evaluate
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import sample  # noqa: E402
from shapes import psnr  # noqa: E402

FIRST, NUM_STEPS = "ddim 50", 50
ROWS = {  # name -> fields of the request
    **{f"step cache {threshold}": {"step_cache": threshold} for threshold in (0.05, 0.1, 0.2)},
    **{
        f"{sampler} {num_steps}": {"sampler": sampler, "num_steps": num_steps}
        for num_steps in (20, 15, 10, 6)
        for sampler in ("ddim", "euler", "dpm++")
    },
    "low memory": {},
}


def measure(models: sample.Models, name: str, index: int) -> tuple[np.ndarray, dict]:
    """The clip of one way and one scene, and what is said about it."""
    scene = evaluate.scene_of("text 64x64", index)
    settings = {"num_steps": NUM_STEPS, "guidance_scale": evaluate.GUIDANCE, "seed": evaluate.seed_of(scene)}
    settings |= {"height": 64, "width": 64, "num_frames": 17} | ROWS.get(name, {})
    models.forwards = [0, 0]
    start = time.process_time()
    latents = sample.generate(models, scene.caption(), output="latents", **settings)
    seconds = time.process_time() - start
    clip = np.concatenate(list(sample.decode(models, latents)))
    computed, forwards = models.forwards
    share = computed / forwards if forwards else 1.0
    return clip, evaluate.judge(clip, scene) | {"seconds": seconds, "computed": share}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--num", type=int, default=16, help="clips of each way")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    models = sample.load_models(args.model, keep=True)
    small = sample.load_models(args.model, keep=True)
    small.low_memory = True
    results = {name: [] for name in (FIRST, *args.rows)}
    for index in range(args.num):
        for name in results:
            clip, result = measure(small if name == "low memory" else models, name, index)
            if name == FIRST:
                first = clip
            results[name].append(result | {"psnr": min(99.0, psnr(clip, first))})
    print("| way | seconds | computed | PSNR, dB | fit | all words right |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, each in results.items():
        middle = {key: np.median([result[key] for result in each]) for key in ("seconds", "psnr")}
        mean = {key: np.mean([result[key] for result in each]) for key in ("computed", "fit", "all")}
        decibels = "" if name == FIRST else f"{middle['psnr']:.1f}"
        print(f"| {name} | {middle['seconds']:.2f} | {mean['computed']:.0%} | {decibels} | {mean['fit']:.3f} "
              f"| {mean['all']:.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
