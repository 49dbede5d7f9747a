"""The notebooks of docs/lessons run from the first cell to the last, and what they keep is what they show."""

import base64
import io
import json
import re

import lessons
import numpy as np
import pytest
from PIL import Image

NOTEBOOKS = sorted(lessons.LESSONS_DIR.glob("*.ipynb"))
SHORTER = {"5_lora": {"NUM_CLIPS": 8, "NUM_STEPS": 2, "NUM_SAMPLING_STEPS": 2}}  # else two minutes
AGAIN = "run python tools/lessons.py"


def texts(cell: dict) -> list[str]:
    """What it printed, without numbers: another processor may round them otherwise."""
    printed = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
    return [re.sub(r"-?\d[\d.,]*(e-?\d+)?", "#", text) for text in printed]


def pictures(cell: dict) -> list[np.ndarray]:
    data = [output["data"]["image/png"] for output in cell["outputs"] if "data" in output]
    opened = [Image.open(io.BytesIO(base64.b64decode(png))) for png in data]
    return [np.asarray(picture.convert("RGB"), dtype=float) for picture in opened]


def test_there_are_five_small_notebooks():
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert path.stat().st_size < 150_000 and len(cells) <= 15, path.name
        assert any(pictures(cell) for cell in cells if cell["cell_type"] == "code"), f"{path.name}: {AGAIN}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_shows_what_it_keeps(path):
    kept = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shown = lessons.run(path, SHORTER.get(path.stem, {}))["cells"]
    for i, (before, now) in enumerate(zip(kept, shown)):
        if before["cell_type"] != "code":
            continue
        where = f"{path.name}, cell {i + 1}: {AGAIN}"
        old, new = pictures(before), pictures(now)
        assert [picture.shape for picture in old] == [picture.shape for picture in new], where
        if path.stem in SHORTER:
            continue
        assert texts(before) == texts(now), where
        for a, b in zip(old, new):  # grey levels; few colours are chosen anew where rounding differs
            assert np.abs(a - b).mean() < 4, where
