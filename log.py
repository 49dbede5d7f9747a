"""Seeing it learn: OUT/log.jsonl, the same for people on the terminal, and loss.png."""

import itertools
import json
import math
import os
from pathlib import Path

from PIL import Image, ImageDraw

from runtime import RANK, atomic_write


def as_time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def draw_curve(log: Path, path: Path, width: int = 960, height: int = 480) -> None:
    """A log as a picture, on logarithmic scales: the running mean of the losses (blue), and what validation
    found (red): its loss on the same scale, or PSNR on one of its own."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    name = "psnr" if "psnr" in entries[-1] else "val_loss"
    losses, found = ([(e["step"], e[key]) for e in entries if e.get(key, 0) > 0] for key in ("loss", name))
    if len(losses) < 2 or not found:
        return
    steps, values = zip(*losses)
    means = list(zip(steps, itertools.accumulate(values, lambda mean, loss: mean + (loss - mean) / 30)))
    both = means + found
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for label, curve, color in (("loss", means, "#1f5fbf"), (name, found, "#bf1f1f")):
        low, *_, high = sorted(math.log(y) for _, y in (both if name == "val_loss" else curve) * 2)
        up, across = (height - 80) / (high - low or 1), (width - 80) / max(1, steps[-1])
        pen.line([(40 + across * x, height - 40 - up * (math.log(y) - low)) for x, y in curve], color, 2)
        left = 40 if curve is means else width // 2
        pen.text((left, 10), f"{label} {math.exp(high):.4g}", color)
        ends = f"{math.exp(low):.4g}; at step {curve[-1][0]} {curve[-1][1]:.4g}"
        pen.text((left, height - 25), f"{label} {ends}", color)
    with atomic_write(path) as temporary:
        picture.save(temporary)


class Log:
    """OUT/log.jsonl, a line a step, and the same for people on the terminal; on rank 0 alone."""

    def __init__(self, path: Path, length: int, num_steps: int):
        self.path, self.num_steps, self.pace = path, num_steps, 0.0  # pace: seconds a step, lately
        if RANK == 0:
            path.touch()
            os.truncate(path, min(length, path.stat().st_size))  # as it was when the checkpoint was written

    def write(self, entry: dict, line: str) -> None:
        if RANK > 0:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            reason = error.strerror
            raise OSError(f"cannot write {self.path} ({reason}); make room and --resume") from None
        print(line, flush=True)

    def step(self, step: int, phase: int, seconds: float, **numbers: float) -> None:
        """numbers: loss, grad_norm, lr, tokens_per_s, wait, gib"""
        entry = {"step": step, "phase": phase, **numbers, "seconds": seconds}
        self.pace = 0.9 * self.pace + 0.1 * seconds if self.pace else seconds
        left = as_time(self.pace * (self.num_steps - step))
        text = ("phase {phase} step {step}/{of}  loss {loss:.4f}  grad {grad_norm:.3f}  lr {lr:.2e}  "
                "{tokens_per_s:.0f} tokens/s  wait {wait:.0%}  {gib:.2f} GiB  {left} left")  # fmt: skip
        self.write(entry, text.format(**entry, of=self.num_steps, left=left))

    def validation(self, step: int, found: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.write({"step": step, **found}, f"held out at step {step}: {shown}")
        if RANK == 0:
            draw_curve(self.path, self.path.with_name("loss.png"))
