"""Seeing it learn: OUT/log.jsonl, the same for people on the terminal, and loss.png."""

import json
import math
import os
from pathlib import Path

from PIL import Image, ImageDraw

from runtime import RANK, atomic_write

WIDTH, HEIGHT, MARGIN = 960, 480, 40  # of loss.png, in pixels


def as_time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def draw_curve(log: Path, path: Path) -> None:
    """A log as a picture, on logarithmic scales: the running mean of the losses (blue), and what validation
    found (red): its loss on the same scale, or PSNR on one of its own."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in entries if entry.get("loss", 0) > 0]
    name = "psnr" if "psnr" in entries[-1] else "val_loss"
    found = [(entry["step"], entry[name]) for entry in entries if entry.get(name, 0) > 0]
    if len(losses) < 2 or not found:
        return
    mean = losses[0][1]
    means = []
    for step, loss in losses:
        mean += (loss - mean) / 30
        means.append((step, mean))
    both = means + found
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    _draw_line(pen, MARGIN, "#1f5fbf", "loss", means, both if name == "val_loss" else means)
    _draw_line(pen, WIDTH // 2, "#bf1f1f", name, found, both if name == "val_loss" else found)
    with atomic_write(path) as temporary:
        picture.save(temporary)


def _draw_line(pen, left: int, color: str, name: str, curve: list[tuple], scale: list[tuple]) -> None:
    """A curve of (step, value), in the height that the values of `scale` fill; left: where its texts stand"""
    values = [value for _, value in scale]
    low, high = min(values), max(values)
    across = (WIDTH - 2 * MARGIN) / max(1, curve[-1][0])
    up = (HEIGHT - 2 * MARGIN) / (math.log(high / low) or 1)
    points = [(MARGIN + across * x, HEIGHT - MARGIN - up * math.log(y / low)) for x, y in curve]
    pen.line(points, color, width=2)
    pen.text((left, 10), f"{name} {high:.4g}", color)
    step, value = curve[-1]
    pen.text((left, HEIGHT - 25), f"{name} {low:.4g}; at step {step} {value:.4g}", color)


class Log:
    """OUT/log.jsonl, a line a step, and the same for people on the terminal; on rank 0 alone."""

    def __init__(self, path: Path, length: int, num_steps: int):
        self.path, self.num_steps = path, num_steps
        self.pace = 0.0  # seconds a step, lately
        if RANK == 0:
            path.touch()
            os.truncate(path, min(length, path.stat().st_size))  # as it was when the checkpoint was written

    def write(self, entry: dict, line: str) -> None:
        if RANK == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(line, flush=True)

    def step(self, step: int, phase: int, seconds: float, **numbers: float) -> None:
        """numbers: loss, grad_norm, lr, tokens_per_s, wait, gib"""
        entry = {"step": step, "phase": phase, **numbers, "seconds": seconds}
        self.pace = 0.9 * self.pace + 0.1 * seconds if self.pace else seconds
        left = as_time(self.pace * (self.num_steps - step))
        text = (
            "phase {phase} step {step}/{of}  loss {loss:.4f}  grad {grad_norm:.3f}  lr {lr:.2e}  "
            "{tokens_per_s:.0f} tokens/s  wait {wait:.0%}  {gib:.2f} GiB  {left} left"
        )
        self.write(entry, text.format(**entry, of=self.num_steps, left=left))

    def validation(self, step: int, found: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.write({"step": step, **found}, f"held out at step {step}: {shown}")
        if RANK == 0:
            draw_curve(self.path, self.path.with_name("loss.png"))
