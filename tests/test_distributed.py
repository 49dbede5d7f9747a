"""Two ranks (gloo, CPU) learn what one learns, their number may change, and in sampling they share work.

This file is also what torchrun starts, so that two processes are started once for all runs."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GOLDENS
from safetensors.torch import load_file

import media
import parallel
import run_folder
import sample
import train

ROOT = Path(train.__file__).parent
INPAINT = str(GOLDENS / "fun-2b-inp")
SMALL = "--preset tiny --data shapes --num-val 1 --resolutions 32 --max-tokens 12 --batch-size 2".split()
SMALL += "--grad-accum 2 --num-previews 0 --preview-steps 1 --num-workers 1 --lr 1e-4".split()
SMALL += ["--dtype", "float32", "--device", "cpu", "--model", INPAINT]
SET = "--set num_shapes=24 warmup_steps=1 ema_decay=0.5 cached_draws=0 only_full=false".split()
SET += ["save_dtype=null"]
KINDS = {
    "dit": ["--num-previews", "1", "--set", "optimizer=muon"],
    "vae": ["--train", "vae", "--num-previews", "1"],
    "lora": ["--lora-rank", "2", "--activation-checkpointing", "--set", "optimizer=adamw"],
    "fun": "--preset fun-2b --num-frames 17 --offload".split(),  # AdamW with the reference's tiny eps
    "kept": "--set cached_draws=1 only_full=true".split(),
}
SAMPLES = {  # one video, which two ranks compute together; of "each" three, which they share out
    "sincos": ["--model", INPAINT, *"--num-frames 5 --guidance-scale 1".split()],
    "rotary": ["--model", str(GOLDENS / "fun-5b-inp"), "--num-frames", "9"],
    "long": ["--model", INPAINT, "--num-frames", "17"],
    "each": ["--model", INPAINT, *"--num-frames 5 --seed 1 2 3".split()],
}
WHOLE, PART, RESUME = ["--num-steps", "2"], ["--num-steps", "1"], ["--num-steps", "2", "--resume"]
ENDLESS = "--num-steps 500 --save-every 1000 --val-every 1000".split()  # until a signal comes


def sample_argv(out: Path, name: str) -> list[str]:
    settings = "a --seed 1 --num-steps 2 --height 32 --width 48 --device cpu --quiet".split()
    return [*settings, *SAMPLES[name], "--out", str(out / "strip.png")]


def train_argv(out: Path, options: list[str], kind: str = "dit") -> list[str]:
    return [*SMALL, *SET, *KINDS[kind], *options, "--out", str(out)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two ranks made: KIND after two steps, SAMPLE, stopped/, and what they said in said.txt.

    two-one/ has one step and leaves the second to one rank; one-two/ had its first from one rank."""
    top = tmp_path_factory.mktemp("two")
    assert train.main(train_argv(top / "one-two", PART)) == 0
    runs = [train_argv(top / kind, WHOLE, kind) for kind in KINDS]
    runs += [train_argv(top / "one-two", RESUME), train_argv(top / "two-one", PART)]
    runs += [sample_argv(top / name, name) for name in SAMPLES]
    (top / "file").touch()
    signalled, failing = train_argv(top / "stopped", ENDLESS), train_argv(top / "file" / "out", PART)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    command += map(json.dumps, (runs, signalled, failing))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, timeout=200, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode != 0, done.stdout
    assert done.stdout.count("only an error is left") == 2, done.stdout
    (top / "said.txt").write_text(done.stdout)
    return top


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Callable[[str], Path]:
    """What one rank makes of a kind; of each once."""
    top = tmp_path_factory.mktemp("one")

    @functools.cache
    def made(kind: str) -> Path:
        assert train.main(train_argv(top / kind, WHOLE, kind)) == 0
        return top / kind

    return made


def entries(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_one_learns(two, one, kind):
    assert_same_run(one(kind), two / kind)


def test_a_run_goes_on_with_another_number_of_ranks(two, one):
    assert train.main(train_argv(two / "two-one", RESUME)) == 0
    for parts in ("one-two", "two-one"):
        assert_same_run(one("dit"), two / parts)


def assert_same_run(one: Path, two: Path) -> None:
    """Losses and gradient norms within 1e-5 of their size, all weights, moments and EMA within 1e-5."""
    validated = "psnr" if two.name == "vae" else "val_loss"
    for name, steps in (("loss", (1, 2)), ("grad_norm", (1, 2)), (validated, (0, 2))):
        ours, theirs = ({e["step"]: e[name] for e in entries(out) if name in e} for out in (one, two))
        for step in steps:
            assert theirs[step] == pytest.approx(ours[step], rel=1e-5), name
    files = sorted((one / "checkpoints" / "step-000002").rglob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        ours, theirs = load_file(file), load_file(two / file.relative_to(one))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() < 1e-5, f"{file} {name}"


def test_micro_batches_that_cannot_be_dealt_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "NUM_RANKS", 3)
    with pytest.raises(ValueError, match="for 3 ranks"):
        train.make_config(train.parse([*SMALL, "--out", str(tmp_path)]))


def test_a_signal_to_one_rank_stops_both_behind_the_same_step(two):
    newest = run_folder.newest_checkpoint(two / "stopped")
    last = entries(two / "stopped")[-1]["step"]
    assert newest.name == f"step-{last:06d}" and last < 500
    assert json.loads((newest / "training/state.json").read_text())["counters"]["total_steps"] == last


def test_rank_0_alone_speaks_and_an_error_of_it_ends_both(two):
    """It cannot make the folder, for which rank 1 waits."""
    said = (two / "said.txt").read_text()
    assert said.count("step 2/2") == len(KINDS) + 1
    assert said.count("train.py: error: ") == 1 and "Not a directory" in said
    assert 'train.py", line' not in said  # a traceback
    assert said.count("ranks work together") == 2 * (len(SAMPLES) - 1)


@pytest.mark.parametrize("name", SAMPLES)
def test_two_ranks_make_what_one_makes(two, tmp_path, name):
    """The same files; latents within 1e-5, and so frames within a grey level."""
    assert sample.main(sample_argv(tmp_path, name)) == 0
    ours, theirs = ({path.name for path in folder.iterdir()} for folder in (tmp_path, two / name))
    assert ours == theirs
    strips, latents = list(tmp_path.glob("*.png")), list(tmp_path.glob("*.safetensors"))
    assert (len(strips), len(latents)) == {"each": (3, 3), "long": (1, 0)}.get(name, (1, 1))
    for path in strips:
        ours, theirs = (media.read_image(folder / path.name).astype(int) for folder in (tmp_path, two / name))
        assert ours.shape == theirs.shape and abs(ours - theirs).max() <= 1
    for path in latents:
        ours, theirs = (load_file(folder / path.name)["latents"] for folder in (tmp_path, two / name))
        assert (ours - theirs).abs().max() < 1e-5


FOUR_RANKS = """
import os, sys, torch, torch.distributed as dist, parallel
from transformer import VideoTransformer
dit = VideoTransformer.from_pretrained(sys.argv[1])
noisy, condition, text = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 17, 2, 4, 6), torch.randn(2, 226, 16)
with torch.inference_mode():
    one = dit(noisy, 500, text, condition)
    others = []
    for rank in range(1, 4):
        others.append(os.fork())
        if others[-1] == 0:
            break
    else:
        rank = 0
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=4)
    parallel.divide(dit)
    for rows in (2, 1):
        four = dit(noisy[:rows], 500, text[:rows], condition[:rows])
        assert (four - one[:rows]).abs().max() < 1e-5
if rank == 0:
    assert all(os.waitpid(other, 0)[1] == 0 for other in others)
"""


def test_of_four_ranks_two_share_the_tokens_of_each_prompt(tmp_path):
    """Of a lone prompt all four do. Velocities within 1e-5, the rounding of float32."""
    command = [sys.executable, "-c", FOUR_RANKS, str(GOLDENS / "fun-5b-inp"), str(tmp_path / "meeting")]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=settings, timeout=200).returncode == 0


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


def signal_rank_1(*args) -> float:
    if train.RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return learning_rate(*args)


if __name__ == "__main__":
    divide, parallel.divide = parallel.divide, divide_and_watch
    runs, signalled, failing = map(json.loads, sys.argv[1:])
    for argv in runs:
        program = train if "--preset" in argv else sample
        assert program.main(argv) == 0
    learning_rate, train.learning_rate = train.learning_rate, signal_rank_1  # called in every step
    assert train.main(signalled) == 128 + signal.SIGTERM
    print("only an error is left", flush=True)
    sys.exit(train.main(failing))
