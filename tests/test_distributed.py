"""Two ranks (gloo, CPU) learn what one learns, their number may change, and in sampling they share work.

This file is also what torchrun starts, so that two processes are started once for many runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDENS
from safetensors.torch import load_file

import media
import parallel
import sample
import train

ROOT = Path(train.__file__).parent
SMALL = ["--model", str(GOLDENS / "fun-2b-inp"), *"--data shapes --num-val 2".split()]
SMALL += "--resolutions 32 --max-tokens 12 --batch-size 2 --grad-accum 2 --num-previews 1".split()
SMALL += "--preview-steps 1 --num-workers 1 --lr 1e-4 --dtype float32 --device cpu".split()
SET = "--set num_shapes=24 warmup_steps=1 ema_decay=0.5 cached_draws=0 keep_on_device=false".split()
SET += ["save_dtype=null"]
KINDS = {"dit": [], "vae": ["--train", "vae"], "lora": ["--lora-rank", "2", *SET, "optimizer=adamw"]}
KINDS["fun"] = ["--preset", "fun-2b", "--num-frames", "17"]  # AdamW with the reference's tiny eps
KINDS["whole"] = [*SET, "replicate=true"]
KINDS["blocks"] = ["--activation-checkpointing", *SET, "optimizer=adamw"]
KINDS["offload"] = ["--offload"]
KINDS["kept"] = [*SET, "cached_draws=1", "keep_on_device=true"]
SAMPLES = {  # one video, which two ranks compute together
    "sincos": ["a", "--model", str(GOLDENS / "fun-2b-inp"), "--num-frames", "5", "--guidance-scale", "1"],
    "rotary": ["a", "--model", str(GOLDENS / "fun-5b-inp"), "--num-frames", "9"],
    "long": ["a", "--model", str(GOLDENS / "fun-2b-inp"), "--num-frames", "17"],
}
SAMPLES = {
    name: [*argv, *"--seed 1 --num-steps 2 --height 32 --width 48 --device cpu --quiet".split()]
    for name, argv in SAMPLES.items()
}
FIVE, TWO, RESUME = ["--num-steps", "5"], ["--num-steps", "2"], ["--num-steps", "5", "--resume"]


def torchrun(program: Path, *arguments: str, num_ranks: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, str(program), *arguments], env=environment, **pipes)


def output(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=200)[0]
    finally:
        process.terminate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of five steps each: one/KIND, two/KIND; two-one/dit, one-two/dit changed ranks after two.

    Videos: one/SAMPLE, two/SAMPLE."""
    top = tmp_path_factory.mktemp("runs")

    def argv(name: str, kind: str, options: list[str]) -> list[str]:
        return [*SMALL, *SET, *KINDS[kind], *options, "--out", str(top / name / kind)]

    for kind in KINDS:
        assert train.main(argv("one", kind, FIVE)) == 0
    assert train.main(argv("one-two", "dit", TWO)) == 0
    on_two = [argv("two", kind, FIVE) for kind in KINDS]
    on_two += [argv("one-two", "dit", RESUME), argv("two-one", "dit", TWO)]
    for name, options in SAMPLES.items():
        assert sample.main([*options, "--out", str(top / "one" / name / "strip.png")]) == 0
        on_two.append([*options, "--out", str(top / "two" / name / "strip.png")])
    process = torchrun(Path(__file__), json.dumps(on_two))
    said = output(process)
    assert process.returncode == 0, said
    assert said.count("step 5/5") == len(KINDS) + 1  # rank 0 alone speaks
    assert said.count("ranks work together") == 2 * len(SAMPLES)
    assert train.main(argv("two-one", "dit", RESUME)) == 0
    return top


def entries(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_one_learns(runs, kind):
    assert_same_run(runs / "one" / kind, runs / "two" / kind)


@pytest.mark.parametrize("way", ["one-two", "two-one"])
def test_a_run_goes_on_with_another_number_of_ranks(runs, way):
    assert_same_run(runs / "one" / "dit", runs / way / "dit")


def assert_same_run(one: Path, two: Path) -> None:
    """Losses and gradient norms within 1e-5 of their size, all weights, moments and EMA within 1e-5."""
    for name, count in (("loss", 5), ("grad_norm", 5), ("psnr" if one.name == "vae" else "val_loss", 2)):
        found = [{e["step"]: e[name] for e in entries(out) if name in e} for out in (one, two)]
        ours, theirs = ({step: x for step, x in steps.items() if count == 5 or step != 2} for steps in found)
        assert len(ours) == count and theirs == pytest.approx(ours, rel=1e-5), name  # at 2 some stopped
    files = sorted((one / "checkpoints" / "step-000005").rglob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        ours, theirs = load_file(file), load_file(two / file.relative_to(one))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() < 1e-5, f"{file} {name}"


def test_micro_batches_that_cannot_be_dealt_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "NUM_RANKS", 3)
    with pytest.raises(ValueError, match="for 3 ranks"):
        train.make_config(train.parse([*SMALL, "--out", str(tmp_path)]))


def test_a_signal_to_one_rank_stops_both_behind_the_same_step(tmp_path):
    often = ["--num-steps", "500", "--save-every", "1000", "--val-every", "1000"]
    process = torchrun(ROOT / "train.py", *SMALL, *SET, *often, "--out", str(tmp_path))
    while "step 2/" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [rank_1] = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(rank_1), signal.SIGTERM)
    said = output(process)
    assert "\nstopped: " in said
    newest, last = train.checkpoint.newest_checkpoint(tmp_path), entries(tmp_path)[-1]["step"]
    assert newest.name == f"step-{last:06d}" and last < 500
    assert json.loads((newest / "training/state.json").read_text())["counters"]["total_steps"] == last


def test_an_error_on_one_rank_ends_all_and_is_said_once(tmp_path):
    (tmp_path / "file").touch()
    process = torchrun(ROOT / "train.py", *SMALL, *SET, *TWO, "--out", str(tmp_path / "file" / "out"))
    said = output(process)  # rank 0 cannot make the folder, for which rank 1 waits
    assert process.returncode != 0
    assert said.count("train.py: error: ") == 1 and "Not a directory" in said
    assert 'train.py", line' not in said  # a traceback


@pytest.mark.parametrize("name", SAMPLES)
def test_two_ranks_make_one_video_together(runs, name):
    assert_same_video(runs / "one" / name, runs / "two" / name)


def assert_same_video(one: Path, two: Path) -> None:
    """Latents within 1e-5, which is rounding; the same file names."""
    one, two = ({path.name: path for path in folder.iterdir()} for folder in (one, two))
    assert one.keys() == two.keys() and len(one) == (2 if "long" in str(two) else 3)
    for name, path in one.items():
        if path.suffix == ".png":
            ours, theirs = media.read_image(path).astype(int), media.read_image(two[name]).astype(int)
            assert ours.shape == theirs.shape and abs(ours - theirs).max() <= 1  # of 255
        if path.suffix == ".safetensors":
            ours, theirs = load_file(path)["latents"], load_file(two[name])["latents"]
            assert (ours - theirs).abs().max() < 1e-5


def test_four_ranks_share_six_videos_or_one(tmp_path):
    """The same files as one process writes, each made once; of one alone, two ranks share each half."""
    options = ["a", "b", "--model", str(GOLDENS / "fun-2b-inp"), "--device", "cpu", "--seed", "1", "2", "3"]
    options += "--num-steps 1 --num-frames 5 --height 32 --width 32".split()
    commands = {"six": options, "rotary/strip.png": SAMPLES["rotary"]}
    on_four = [[*argv, "--out", str(tmp_path / "four" / name)] for name, argv in commands.items()]
    for name, argv in commands.items():
        assert sample.main([*argv, "--out", str(tmp_path / "one" / name)]) == 0
    process = torchrun(Path(__file__), json.dumps(on_four), num_ranks=4)
    said = output(process)
    assert process.returncode == 0, said
    assert said.count("ranks work together") == 4
    assert_same_video(tmp_path / "one" / "rotary", tmp_path / "four" / "rotary")
    names = [sorted(path.name for path in (tmp_path / ranks / "six").iterdir()) for ranks in ("one", "four")]
    assert names[0] == names[1] and len(names[0]) == 18  # .mp4, .json, .safetensors of six
    for i in range(1, 7):
        files = [tmp_path / ranks / "six" / f"{i:04d}.safetensors" for ranks in ("one", "four")]
        ours, theirs = (load_file(file)["latents"] for file in files)
        assert (ours - theirs).abs().max() < 1e-5


def divide_and_watch(dit) -> None:
    """`parallel.divide`, and an error if a rank then works on more than its part of prompts and tokens."""

    def enter(_, args: tuple) -> None:
        noisy, _, text, _ = args
        whole.append(len(noisy) * (noisy.shape[2:].numel() // (4 * dit.config.patch[0]) + text.shape[1]))

    def is_part(_, args: tuple) -> None:
        num_ranks = int(os.environ["WORLD_SIZE"])
        assert args[0].shape[:2].numel() < whole[-1] / num_ranks + 1, "a rank works on more than its part"

    whole = []  # tokens of all prompts together
    dit.register_forward_pre_hook(enter)
    divide(dit)
    dit.transformer_blocks[0].ff.register_forward_pre_hook(is_part)
    print("ranks work together")


if __name__ == "__main__":
    divide, parallel.divide = parallel.divide, divide_and_watch
    for argv in json.loads(sys.argv[1]):
        program = train if argv[: len(SMALL)] == SMALL else sample
        assert program.main(argv) == 0
