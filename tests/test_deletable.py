"""Files that may be deleted: the rest samples and trains without all of them."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import GOLDENS
from PIL import Image

ROOT = Path(__file__).parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
DELETABLE = "lora cache parallel shapes train_vae check_data vae_fast stepcache float8".split()


def test_sampling_and_training_need_none_of_them(tmp_path):
    for path in ROOT.glob("*.py"):
        if path.stem not in DELETABLE:
            shutil.copy(path, tmp_path)
    (tmp_path / "pictures").mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"a {color} picture")
    model = ["--model", str(GOLDENS / "fun-2b-inp"), "--device", "cpu", "--num-steps", "1"]
    clip = [*"red --num-frames 5 --height 32 --width 32 --out clip.gif".split(), *model]
    sizes = "--resolutions 32 --max-tokens 4 --num-frames 1 --batch-size 1 --grad-accum 1".split()
    run = "--preset tiny --data pictures --out run --num-val 1 --num-previews 0 --dtype float32".split()
    fields = ["--set", "cached_draws=0", "only_full=false"]  # tiny needs cache.py
    programs = f"import sample, train; sample.main({clip}); train.main({[*model, *sizes, *run, *fields]})"
    done = subprocess.run(
        [sys.executable, "-c", programs], cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 5 and np.asarray(gif.convert("RGB")).shape == (32, 32, 3)
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_nothing_imports_them_at_the_top_of_a_file():
    for path in ROOT.glob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            if isinstance(statement, ast.ImportFrom):
                names = [statement.module]
            assert not {name.split(".")[0] for name in names} & {*DELETABLE, "tools"}, path.name
