"""Run the notebooks of docs/lessons and keep what they show in them; no Jupyter is needed.

    python tools/lessons.py                  all of them, after the code or the tiny model has changed
    python tools/lessons.py 3_inpainting     one

A cell's outputs are what it prints, and the picture that its last line is. `show` makes such pictures.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from figures import as_png
from PIL import Image, ImageDraw, ImageFont

LESSONS_DIR = Path(__file__).parents[1] / "docs" / "lessons"
MAX_BYTES = 22_000  # of a picture


# ---------------------------------------------------------------- what the cells use


def show(rows: dict[str, np.ndarray], count: int = 9, cell: int = 64) -> Image.Image:
    """Clips below each other, each with its name and at most `count` of its frames, evenly spread.

    rows: name -> uint8 f h w 3 or f h w    cell: height of a frame as it is shown
    """
    font, placed, width, top = ImageFont.load_default(14), [], 0, 0
    for frames in rows.values():
        top += 20  # for the name
        for i, place in enumerate(np.linspace(0, len(frames) - 1, min(count, len(frames))).round()):
            frame = Image.fromarray(frames[int(place)])
            size = frame.width * cell // frame.height, cell
            how = Image.Resampling.NEAREST if cell > frame.height else Image.Resampling.BOX
            placed.append((frame.resize(size, how), (i * (size[0] + 1), top)))
            width = max(width, (i + 1) * (size[0] + 1))
        top += cell + 4
    width = max([width, *(int(font.getlength(name)) for name in rows)])
    picture = Image.new("RGB", (width, top), (232, 232, 232))
    for frame, place in placed:
        picture.paste(frame, place)
    for i, name in enumerate(rows):
        ImageDraw.Draw(picture).text((0, i * (cell + 24) + 2), name, "black", font)
    return picture


# ---------------------------------------------------------------- a notebook without Jupyter


def run(path: Path, constants: dict[str, int] = {}) -> dict:
    """The notebook with the outputs of all its cells, run in order in its folder.

    constants: other values for lines `NAME = …` of its cells; ValueError for one that no cell has
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    programs, missing = {}, set(constants)
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            programs[i] = ast.parse("".join(cell["source"]))
            missing -= set_constants(programs[i], constants)
    if missing:
        raise ValueError(f"{path.name} has no line {sorted(missing)[0]} = …")
    namespace = {}
    unchanged = mock.patch.object(sys, "path", list(sys.path))
    with contextlib.chdir(path.parent), unchanged, torch.enable_grad():  # restored, whatever cells set
        for i, program in programs.items():
            notebook["cells"][i]["outputs"] = execute(program, f"{path.name}, cell {i + 1}", namespace)
    return notebook


def set_constants(program: ast.Module, constants: dict[str, int]) -> set[str]:
    """The names that were found and set."""
    found = set()
    for line in program.body:
        name = ast.unparse(line.targets[0]) if isinstance(line, ast.Assign) else None
        if name in constants:
            line.value = ast.copy_location(ast.Constant(constants[name]), line.value)
            found.add(name)
    return found


def execute(program: ast.Module, name: str, namespace: dict) -> list[dict]:
    """Outputs in the notebook's format."""
    last = program.body.pop() if isinstance(program.body[-1], ast.Expr) else None
    shown, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, name, "exec"), namespace)
        if last:
            shown = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if isinstance(shown, Image.Image):
        data = {"image/png": base64.b64encode(as_png(shown, MAX_BYTES)).decode()}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="by default all")
    args = parser.parse_args(argv)
    paths = [LESSONS_DIR / f"{name}.ipynb" for name in args.names] or sorted(LESSONS_DIR.glob("*.ipynb"))
    for path in paths:
        text = json.dumps(run(path), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
