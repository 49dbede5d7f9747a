"""The shipped tiny model, checkpoints/tiny: complete, small, the default of sample.py, and no noise."""

import json
from pathlib import Path

import card
import evaluate
import numpy as np

import long_video
import media
import sample
from diffusion import Schedule
from shapes import HELD_OUT, WORDS, read_attributes

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
PROMPT = "a red circle moves left on a black background"  # held out of training


def test_it_is_small_and_says_where_it_comes_from():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 40e6
    origin = json.loads((TINY / "training.json").read_text())
    assert {"commit", "commands", "seed", "machine", "evaluation"} <= origin.keys()
    assert ("red", "circle", "moves left", "black") in HELD_OUT


def test_its_card_states_its_sizes_and_what_was_measured():
    written = (TINY / "README.md").read_text(encoding="utf-8")
    measured = json.loads((TINY / "training.json").read_text())["evaluation"]
    assert card.filled(written, "parts", card.parts(TINY)) == written
    assert card.filled(written, "numbers", list(evaluate.table(measured))) == written


def test_the_default_model_shows_the_color_and_ground_asked_for(tmp_path):
    out = tmp_path / "clip.mp4"
    assert sample.main([PROMPT, "--seed", "1", "--num-steps", "10", "--out", str(out), "--quiet"]) == 0
    found = read_attributes(media.read_video(out, 17))
    assert found["color"] == "red" and found["background"] == "black"
    assert len(found["areas"]) == 17
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["guidance_scale"] == 2.0 == Schedule.from_pretrained(TINY).default_guidance_scale


def test_words_it_does_not_know_are_named_with_those_it_knows(tmp_path, capsys):
    prompt = "a red panda moves left"
    assert sample.main([prompt, "--num-steps", "1", "--num-frames", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "does not know: panda" in said and all(word in said for word in WORDS)


def test_the_seams_of_long_videos_move_no_more_than_the_rest_of_them():
    """Change from frame to frame where a segment follows another, against elsewhere."""
    models = sample.load_models(TINY, keep=True)
    length, [_, shared] = 17, long_video.segments(29, 17)
    seam = slice(length - shared - 1, length)  # the shared frames and both of their neighbours
    at_seams, elsewhere = [], []
    for prompt in (PROMPT, "a blue square grows on a white background"):
        frames = np.concatenate(list(long_video.generate_long(models, prompt, 29, num_steps=6, seed=1)))
        changes = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
        at_seams.append([changes[seam].mean(), changes[seam].max()])
        elsewhere.append([np.delete(changes, seam).mean(), np.delete(changes, seam).max()])
    # two videos vary that much
    assert (np.mean(at_seams, axis=0) < 1.1 * np.mean(elsewhere, axis=0)).all()
