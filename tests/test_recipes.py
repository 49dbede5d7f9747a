"""Every training command of docs/recipes.md, on small models, sizes and data: its held-out loss falls."""

from pathlib import Path

import pytest
from conftest import GOLDENS
from test_readme import ROOT, commands
from test_train import logged

import sample
import train

RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
STAND_INS = {
    "alibaba-pai/CogVideoX-Fun-V1.1-2b-InP": "fun-2b-inp",
    "alibaba-pai/CogVideoX-Fun-V1.1-5b-InP": "fun-5b-inp",
    "THUDM/CogVideoX-2b": "cogvideox-2b-t2v",
    "THUDM/CogVideoX-5b-I2V": "cogvideox-5b-i2v",
    "THUDM/CogVideoX1.5-5B-I2V": "cogvideox-1.5-5b-i2v",
}
SMALL = "--resolutions 32 --max-tokens 18 --num-frames 9 --batch-size 1 --grad-accum 2 --lr 2e-2".split()
SMALL += "--num-val 1 --num-previews 0 --num-workers 1 --dtype float32 --device cpu".split()
TRAINING = [words[words.index("train.py") + 1 :] for words in commands(RECIPES) if "train.py" in words]


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda words: words[words.index("--out") + 1])
def test_the_loss_of_a_recipe_falls(tmp_path, clips, recipe):
    """In three steps at a rate for small random models, without the reference's tight clipping."""
    recipe = [word for word in recipe if word != "--compile"]  # a minute on a CPU
    model = recipe[recipe.index("--model") + 1]
    clips = clips / "controls.json" if "POSES" in recipe else clips
    small = [*SMALL, "--model", GOLDENS / STAND_INS[model], "--data", clips, "--val-data", clips]
    small += ["--out", tmp_path / "out", "--phase-steps", 1, 1, 1]
    if "--cache-latents" in recipe:
        small += ["--cache-latents", tmp_path / "latents"]
    small += ["--set", "warmup_steps=1", "max_grad_norm=1", "wide_clip_steps=null"]
    assert train.main([*recipe, *map(str, small)]) == 0
    losses = logged(tmp_path / "out", "val_loss")
    assert losses[-1] < 0.95 * losses[0]


def test_every_command_of_the_recipes_can_be(monkeypatch):
    monkeypatch.setattr(train.checkpoint, "find_model", Path)
    for words in TRAINING:
        train.make_config(train.parse(words))
    for words in commands(RECIPES):
        if "sample.py" in words:
            sample.parse(words[words.index("sample.py") + 1 :])
