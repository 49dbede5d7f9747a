"""Files that may be deleted: the rest samples and trains without all of them."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image

ROOT = Path(__file__).parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
DELETABLE = [
    "lora",
    "cache",
    "parallel",
    "shapes",
    "train_vae",
    "check_data",
    "vae_fast",
    "stepcache",
    "float8",
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A copy of the product without any of them, nor tools/, and two pictures to train on."""
    folder = tmp_path_factory.mktemp("bare")
    for path in ROOT.glob("*.py"):
        if path.stem not in DELETABLE:
            shutil.copy(path, folder)
    (folder / "pictures").mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), color).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"a {color} picture")
    return folder


def test_sampling_and_training_need_none_of_them(bare):
    model = ["--model", str(GOLDENS / "fun-2b-inp"), "--device", "cpu", "--num-steps", "1"]
    clip = [*"red --num-frames 5 --height 32 --width 32 --out clip.gif".split(), *model]
    sizes = "--resolutions 32 --max-tokens 4 --num-frames 1 --batch-size 1 --grad-accum 1".split()
    run = "--preset tiny --data pictures --out run --num-val 1 --num-previews 0 --dtype float32".split()
    fields = ["--set", "cached_draws=0", "keep_on_device=false"]  # tiny needs cache.py
    programs = f"import sample, train; sample.main({clip}); train.main({[*model, *sizes, *run, *fields]})"
    done = subprocess.run(
        [sys.executable, "-c", programs], cwd=bare, capture_output=True, text=True, env=ONE_THREAD
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Image.open(bare / "clip.gif") as gif:
        assert gif.n_frames == 5 and np.asarray(gif.convert("RGB")).shape == (32, 32, 3)
    [checkpoint] = (bare / "run" / "checkpoints").iterdir()
    assert (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("name", [*DELETABLE, "tools"])
def test_nothing_imports_it_at_the_top_of_a_file(name):
    for path in ROOT.glob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import):
                assert name not in {alias.name.split(".")[0] for alias in statement.names}, path.name
            if isinstance(statement, ast.ImportFrom):
                assert statement.module.split(".")[0] != name, path.name
