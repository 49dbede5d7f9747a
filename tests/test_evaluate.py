"""tools/evaluate.py: drawn clips get full marks, spoilt ones do not; a stopped run goes on."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import evaluate
import numpy as np
import options
import pytest

import sample
from shapes import HELD_OUT, sample_scene

SCENE = next(s for s in (sample_scene(3, i, HELD_OUT) for i in range(9)) if s.motion == "moves left")


def test_a_drawn_clip_gets_full_marks():
    verdict = evaluate.judge(evaluate.drawn(SCENE), SCENE)
    assert all(verdict[word] for word in (*evaluate.WORDS, "all"))
    assert verdict["worst_fit"] > 0.97 and verdict["worst_fit"] <= verdict["fit"] <= 1


def test_one_spoilt_frame_shows_in_the_worst_fit_alone_and_nothing_to_read_in_all():
    frames = evaluate.drawn(SCENE).copy()
    whole = evaluate.judge(frames, SCENE)
    background = frames[8, 0, 0]
    rows, columns = np.nonzero((frames[8] != background).any(-1))
    frames[8, : int(np.median(rows)), : int(np.median(columns))] = background  # a quarter of the object
    spoilt = evaluate.judge(frames, SCENE)
    assert spoilt["worst_fit"] < 0.85 and spoilt["fit"] > whole["fit"] - 0.03
    nothing = evaluate.judge(np.full_like(frames, 128), SCENE)
    assert nothing == {**dict.fromkeys((*evaluate.WORDS, "all"), False), "fit": 0.0, "worst_fit": 0.0}


def test_every_word_can_be_wrong():
    others = [sample_scene(3, i) for i in range(60)]
    for word in evaluate.WORDS:
        other = next(scene for scene in others if getattr(scene, word) != getattr(SCENE, word))
        assert not evaluate.judge(evaluate.drawn(other), SCENE)[word]


def test_a_recolored_clip_is_judged_by_its_new_color_and_its_old_path(monkeypatch):
    def repaint(models, scene, prompt, video, strength):
        color = next(word for word in evaluate.shapes.COLORS if f" {word} " in prompt)
        return evaluate.drawn(replace(scene, color=color))

    monkeypatch.setattr(evaluate, "make", repaint)
    verdict = evaluate.recolored(None, SCENE, 0.5)
    assert verdict["color"] and verdict["path"] and verdict["all"]
    monkeypatch.setattr(evaluate, "make", lambda models, scene, prompt, video, strength: video[::-1].copy())
    verdict = evaluate.recolored(None, SCENE, 0.5)
    assert not (verdict["color"] or verdict["path"] or verdict["all"])


def test_a_stopped_evaluation_goes_on_and_another_model_is_refused(tmp_path, capsys, monkeypatch):
    here = lambda workers, processes, **begin: ThreadPoolExecutor(1, **begin)  # noqa: E731
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", here)  # which would import torch anew
    out = tmp_path / "evaluation"
    run = [str(evaluate.sample.TINY), "--num-steps", "1", "--out", str(out), "--device", "cpu"]
    evaluate.main([*run, "--num", "1", "--tasks", "picture", "VAE 64x64"])
    first = out.with_suffix(".jsonl").read_text()
    monkeypatch.setattr(evaluate, "make", lambda models, scene, *prompt, **settings: evaluate.drawn(scene))
    evaluate.main([*run, "--num", "2", "--tasks", "picture", "text 64x64"])
    lines = out.with_suffix(".jsonl").read_text()
    assert first.count("\n") == 2 and lines.startswith(first) and lines.count("\n") == 5
    summary = json.loads(out.with_suffix(".json").read_text())
    assert [summary[task]["clips"] for task in ("text 64x64", "picture", "VAE 64x64")] == [2, 2, 1]
    assert summary["VAE 64x64"]["fit"][0] > 0.9
    assert "| text 64x64 | 2 | 100%" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000 and out.with_suffix(".gif").stat().st_size > 1000
    with pytest.raises(SystemExit, match="of other weights or settings"):
        evaluate.main([*run, "--num-steps", "2"])


def test_intervals_are_wilsons():
    """For 8 of 10: 0.490 … 0.943 (Wilson's table)."""
    assert evaluate.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert evaluate.number("fit", [0.9, 0.9]) == pytest.approx([0.9, 0.9, 0.9])


def test_the_ways_of_sampling_are_compared_with_the_first(capsys, monkeypatch):
    monkeypatch.setattr(options, "NUM_STEPS", 8)
    monkeypatch.setitem(options.ROWS, "step cache 0.2", {"step_cache": 0.9})  # of eight steps some
    options.main([str(sample.TINY), "--num", "1", "--rows", "step cache 0.2", "low memory"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["ddim 50", "step cache 0.2", "low memory"]
    assert [row[2] == "100%" for row in rows] == [True, False, True]
    decibels = [float(row[3]) for row in rows[1:]]
    assert 15 < min(decibels) and max(decibels) < 60
