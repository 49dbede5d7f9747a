"""Two ranks (gloo, CPU) learn what one learns, their number may change, and in sampling they share work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDENS
from safetensors.torch import load_file

import sample
import train

TRAIN = Path(__file__).parents[1] / "train.py"
SMALL = ["--model", GOLDENS / "fun-2b-inp", "--data", "shapes", "--num-shapes", 24, "--num-val", 2]
SMALL += ["--resolutions", 32, "--max-tokens", 12, "--batch-size", 2, "--grad-accum", 2, "--dtype", "float32"]
SMALL += ["--num-workers", 1, "--num-previews", 1, "--preview-steps", 1, "--device", "cpu"]
SMALL = [*map(str, SMALL), "--lr", "1e-4", "--warmup-steps", "1", "--ema-decay", "0.5"]


def start(out: Path, *options: object) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(TRAIN),
    ]
    command += [*SMALL, "--out", str(out), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def on_two(out: Path, *options: object) -> str:
    process = start(out, *options)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def on_one(out: Path, *options: object) -> None:
    assert train.main([*SMALL, "--out", str(out), *map(str, options)]) == 0


def assert_same_run(one: Path, two: Path) -> None:
    """Losses and gradient norms within 1e-5 of their size, all weights, moments and EMA within 1e-5."""
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, two)]
    assert len(logs[0]) == len(logs[1]) > 2
    for ours, theirs in zip(*logs):
        names = {"loss", "grad_norm", "val_loss", "psnr"} & ours.keys()
        assert names and all(theirs[name] == pytest.approx(ours[name], rel=1e-5) for name in names)
    [newest] = {train.checkpoint.newest_checkpoint(out).name for out in (one, two)}
    files = sorted((one / "checkpoints" / newest).rglob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        ours, theirs = load_file(file), load_file(two / file.relative_to(one))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() < 1e-5, f"{file} {name}"


@pytest.mark.parametrize(
    "options",
    [[], ["--train", "vae"], ["--lora-rank", 2, "--optimizer", "adamw"]],
    ids=["dit", "vae", "lora"],
)
def test_two_ranks_learn_what_one_learns(tmp_path, options):
    steps = ["--num-steps", 5]
    on_one(tmp_path / "one", *options, *steps)
    said = on_two(tmp_path / "two", *options, *steps)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert said.count("step 5/5") == 1  # rank 0 alone speaks


@pytest.mark.parametrize("first, then", [(on_two, on_one), (on_one, on_two)], ids=["2 to 1", "1 to 2"])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, first, then):
    on_one(tmp_path / "whole", "--num-steps", 4)
    first(tmp_path / "cut", "--num-steps", 2)
    then(tmp_path / "cut", "--num-steps", 4, "--resume")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    ours, theirs = ([e for e in map(json.loads, log) if "loss" in e] for log in logs)
    assert [e["loss"] for e in theirs] == pytest.approx([e["loss"] for e in ours], rel=1e-5)
    weights = [
        load_file(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors")
        for name in ("whole", "cut")
    ]
    assert all((tensor - weights[1][name]).abs().max() < 1e-5 for name, tensor in weights[0].items())


def test_micro_batches_that_cannot_be_dealt_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "NUM_RANKS", 3)
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "the 2 micro-batches of a step cannot be dealt to 3 ranks" in capsys.readouterr().err


def test_a_signal_to_one_rank_stops_both_behind_the_same_step(tmp_path):
    process = start(tmp_path, "--num-steps", 500, "--save-every", 1000, "--val-every", 1000)
    while "step 3/" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {
        entry.split("=")[1]: int(child)
        for child in children
        for entry in Path(f"/proc/{child}/environ").read_text().split("\0")
        if entry.startswith("RANK=")
    }
    os.kill(ranks["1"], signal.SIGTERM)
    process.communicate(timeout=120)
    newest = train.checkpoint.newest_checkpoint(tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert newest.name == f"step-{entries[-1]['step']:06d}"
    assert json.loads((newest / "training/state.json").read_text())["counters"]["total_steps"] < 500


def test_an_error_on_one_rank_ends_all(tmp_path):
    start_time = time.monotonic()
    process = start(tmp_path, "--num-steps", 2, "--lr", "nan")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "not finite" in said
    assert time.monotonic() - start_time < 100


def test_ranks_share_prompts_and_seeds(tmp_path):
    """The same files as one process writes, each made once."""
    options = [
        "a",
        "b",
        "--model",
        GOLDENS / "fun-2b-inp",
        "--seed",
        1,
        2,
        "--num-steps",
        2,
        "--num-frames",
        5,
    ]
    options = [*map(str, options), "--device", "cpu", "--height", "32", "--width", "32"]
    assert sample.main([*options, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    command += [str(TRAIN.with_name("sample.py")), *options, "--out", str(tmp_path / "three")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("one", "three")]
    assert names[0] == names[1] and len(names[0]) == 12  # .mp4, .json, .safetensors of four
    for i in range(1, 5):
        ours, theirs = (
            load_file(tmp_path / name / f"{i:04d}.safetensors")["latents"] for name in ("one", "three")
        )
        assert (ours - theirs).abs().max() < 1e-5
