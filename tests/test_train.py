"""train.py: losses against the reference, draws, accumulation, resuming, mistakes, and that it learns."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, assert_close, expected
from safetensors.torch import load_file
from torch import Tensor

import checkpoint
import data
import presets
import shapes
import sharding
import train
import train_dit
import train_vae
from checkpoint import save_weights
from data import Micro, Plan, Record, Sample, load_sample, pixels_of
from diffusion import Schedule
from lora import load_lora
from media import write_video
from run_folder import newest_checkpoint
from sizes import Bucket
from text_encoder import T5Encoder
from train import learning_rate, main, make_config, parse, stratified_timesteps
from train_dit import denoising_losses
from transformer import VideoTransformer
from vae import VideoVAE

INPAINT, CONTROL, PLAIN = (GOLDENS / name for name in ("fun-2b-inp", "fun-2b-control", "cogvideox-2b-t2v"))
IMAGE, IMAGE_15 = GOLDENS / "cogvideox-5b-i2v", GOLDENS / "cogvideox-1.5-5b-i2v"
PLAIN_15 = GOLDENS / "cogvideox-1.5-5b-t2v"
SMALL = "--resolutions 32 --max-tokens 8 --num-frames 5 --num-val 1 --num-previews 0 --batch-size 2".split()
SMALL += "--grad-accum 2 --dtype float32 --device cpu --preset tiny --lr 1e-3".split()
FIELDS = {"num_shapes": 8, "warmup_steps": 1, "cached_draws": 0, "only_full": "false"}
FIELDS |= {"save_dtype": "null", "text_only": 0, "equivariance": 0}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def argv(*options, model: Path = INPAINT, **fields) -> list[str]:
    """fields: of presets.Config, for --set"""
    changes = [f"{name}={value}" for name, value in (FIELDS | fields).items()]
    return [*SMALL, "--model", str(model), "--set", *changes, *map(str, options)]


def run(out: Path, *options, model: Path = INPAINT, **fields) -> int:
    return main(argv("--out", out, *options, model=model, **fields))


def entries(out: Path) -> list[dict]:
    """The lines of a log, without what the clock says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clock = {"seconds", "tokens_per_s", "wait", "gib"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def logged(out: Path, name: str) -> list[float]:
    return [line[name] for line in entries(out) if name in line]


def config_of(*options, model: Path = INPAINT, **fields) -> presets.Config:
    return make_config(parse(argv(*options, model=model, **fields)))


def task_for(model: Path, dtype: torch.dtype = torch.float32, **fields) -> train_dit.Denoising:
    """At the start of its first phase, with a text encoder that learns."""
    task = train_dit.Denoising(config_of(model=model, **fields), model, torch.device("cpu"), dtype)
    sharding.place(task.dit, torch.device("cpu"), dtype, offload=False)
    task.begin(task.config.phases[0])
    return task


def drawn(num: int = 3, **plan) -> tuple[list[Sample], Micro]:
    """Samples of one shape, and the micro-batch they are."""
    bucket, plan = Bucket(5, 32, 32), Plan((32,), 8, 8, **plan)
    keys = [(0, 0, index) for index in range(num)]
    clips = shapes.records(num, seed=0)
    samples = [load_sample(data.shape_record(c), bucket, key, plan) for c, key in zip(clips, keys)]
    return samples, Micro(bucket, list(range(num)), keys, epoch=0, number=0)


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("variant", ["fun-2b-inp", "fun-5b-inp", "fun-1.5-5b-inp"])
def test_loss_and_gradients_equal_the_reference(variant):
    """1e-5 of a loss near 1 is fp32's rounding over a few layers; gradients add up more of it, 1e-3."""
    want = {k.removeprefix("train."): v for k, v in expected(variant).items()}
    dit = VideoTransformer.from_pretrained(GOLDENS / variant)
    schedule = Schedule.from_pretrained(GOLDENS / variant)
    latents, noise, condition = (want[k].transpose(1, 2) for k in ("latents", "noise", "inpaint_latents"))
    t5 = T5Encoder.from_pretrained(GOLDENS / variant)
    text = t5(want["text.input_ids"][: len(latents)]).detach()
    assert_close(schedule.add_noise(latents, noise, want["t"]).transpose(1, 2), want["noisy"], 1e-5)
    assert_close(schedule.velocity(latents, noise, want["t"]).transpose(1, 2), want["target"], 1e-5)
    losses = denoising_losses(dit, schedule, latents, noise, want["t"], text, condition)
    assert losses.shape == (len(latents),)
    assert_close(losses.mean(), want["loss"], 1e-5)
    losses.mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in dit.parameters()])
    assert_close(norm / want["grad_norm"], torch.tensor(1.0), 1e-3)


# ---------------------------------------------------------------- draws


def test_timesteps_of_a_step_cover_every_band_once_and_over_many_steps_are_uniform():
    bands = stratified_timesteps(seed=0, step=3, count=50) // 20
    assert sorted(bands.tolist()) == list(range(50))
    assert bands.tolist() != sorted(bands.tolist())  # shuffled, as neighbours share a shape
    assert (stratified_timesteps(seed=0, step=4, count=50) // 20).tolist() != bands.tolist()
    drawn = torch.cat([stratified_timesteps(0, step, 8) for step in range(500)]).double()
    assert abs(drawn.mean() - 499.5) < 10  # 4000 draws, stratified: standard deviation below 1.5
    assert abs((drawn < 250).double().mean() - 0.25) < 0.01


def test_a_shift_draws_noisy_timesteps_more_often():
    plain, shifted = (stratified_timesteps(0, 0, 2000, shift).float() for shift in (1.0, 3.0))
    assert plain.median().item() == pytest.approx(500, abs=5)
    assert shifted.median().item() == pytest.approx(750, abs=5)  # 3/2 / (1 + 2/2)
    assert 0 <= shifted.min() and shifted.max() <= 999


@pytest.mark.parametrize("model", [INPAINT, GOLDENS / "fun-1.5-5b-inp"])
def test_a_sample_is_encoded_alike_in_every_batch(model):
    task = task_for(model)
    task.dit.config.add_noise_in_inpaint_model = True  # noisy references: another draw
    samples, _ = drawn()
    together = task.encode(samples)
    for i in range(3):
        for name, tensor in task.encode(samples[i : i + 1]).items():
            assert_close(tensor.float(), together[name][i : i + 1].float(), 1e-5)


def watch_losses(monkeypatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The latents, noise and condition of each call of `denoising_losses` from now on."""
    seen = []

    def watched(dit, schedule, latents, noise, timesteps, text, condition, motion):
        seen.append((latents, noise, condition))
        return torch.zeros(len(latents))

    monkeypatch.setattr(train_dit, "denoising_losses", watched)
    return seen


def test_noise_and_what_posteriors_give_are_a_function_of_the_micro_batch_alone(monkeypatch):
    seen = watch_losses(monkeypatch)
    task = task_for(INPAINT)
    samples, micro = drawn()
    batch = task.encode(samples)
    for changes in ({}, {}, {"number": 1}, {"epoch": 1}):
        task.losses(batch, replace(micro, **changes), torch.tensor([10, 500, 900]))
    for first, again, *others in zip(*seen):
        assert torch.equal(first, again)
        assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("model", [INPAINT, PLAIN])
def test_the_bands_of_a_large_clip_are_validated_in_turn(monkeypatch, model):
    """To the same losses: 1e-5 of about 1 is the rounding of other sums."""
    task = task_for(model)
    samples, micro = drawn(1)
    held_out = [(task.encode(samples), micro)]
    together = task.validate(held_out)
    seen = []
    task.dit.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(train_dit.sample, "SMALL_TOKENS", 1)
    assert task.validate(held_out) == pytest.approx(together, rel=1e-5)
    assert seen == [1] * 5


@pytest.mark.parametrize("fields", [{"lora_rank": 2}, {}], ids=["lora", "frozen text"])
def test_frozen_weights_in_bfloat16_give_the_same_bytes_as_float32_ones(fields):
    """Autocast rounds a frozen matrix at each use; stored rounded it is the same matrix."""
    samples, micro = drawn(2)
    found = []
    for stored in (torch.bfloat16, torch.float32):
        task = task_for(INPAINT, torch.bfloat16, **fields)
        block = task.dit.transformer_blocks[0]
        if stored is torch.float32:
            task.dit.float()
        elif fields:
            assert block.ff.net[2].weight.dtype == torch.bfloat16
            assert block.norm1.norm.weight.dtype == torch.float32
        losses = task.losses(task.encode(samples), micro, torch.tensor([100, 800]))
        losses.sum().backward()
        learns = [param for param in task.dit.parameters() if param.requires_grad]
        found.append([losses, *(param.grad for param in learns)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found))


# ---------------------------------------------------------------- the gradient of a global batch


def test_the_ranks_and_the_order_of_micro_batches_do_not_change_a_step(tmp_path, monkeypatch):
    """The same micro-batches in a step of four, dealt backwards: equal up to the order of fp32 sums."""
    options = ["--max-tokens", 4, "--batch-size", 1, "--grad-accum", 4, "--num-steps", 1]
    assert run(tmp_path / "forwards", *options) == 0
    steps = data.Epochs.steps
    monkeypatch.setattr(data.Epochs, "steps", lambda *args: (micros[::-1] for micros in steps(*args)))
    timesteps = stratified_timesteps
    monkeypatch.setattr(train, "stratified_timesteps", lambda *args: timesteps(*args).flip(0))
    assert run(tmp_path / "backwards", *options) == 0
    for name, rounding in (("loss", 1e-5), ("grad_norm", 1e-4), ("val_loss", 1e-5)):
        ours, theirs = (logged(tmp_path / out, name) for out in ("forwards", "backwards"))
        assert ours == pytest.approx(theirs, rel=rounding)


def test_samples_of_uneven_micro_batches_count_alike(tmp_path, clips, monkeypatch):
    """The loss is the mean over samples: of eight in micro-batches of 3, 3 and 2, each weighs an eighth."""

    def index_of_each_sample(self, batch, micro, _):
        weight = next(self.dit.parameters()).sum()  # so that there is a gradient, of zero
        return 0 * weight + torch.tensor([float(index) for index in micro.indices])

    monkeypatch.setattr(train_dit.Denoising, "losses", index_of_each_sample)
    monkeypatch.setattr(train_dit.Denoising, "validate", lambda *_: {"val_loss": 1.0})
    options = ["--batch-size", 3, "--grad-accum", 3, "--num-steps", 1, "--data", clips, "--val-data", clips]
    assert run(tmp_path, *options) == 0
    assert logged(tmp_path, "loss") == pytest.approx([sum(range(8)) / 8])


# ---------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Four steps without a stop."""
    out = tmp_path_factory.mktemp("whole")
    assert run(out, "--num-steps", 4) == 0
    return out


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    assert run(out, "--num-steps", 2) == 0
    return out


@pytest.fixture
def half(tmp_path, two_steps) -> Path:
    """A run of two steps of the four, to go on with; it has come into its second epoch."""
    state = json.loads((two_steps / "checkpoints/step-000002/training/state.json").read_text())
    assert state["counters"]["epoch"] > 0 and state["counters"]["batch"] > 0
    return Path(shutil.copytree(two_steps, tmp_path / "half"))


def killed_after(step: int, whole: Path) -> Path:
    """What a kill behind the checkpoint of `step` leaves of a run that has kept it; its log is longer."""
    out, kept = whole.with_name("killed"), f"checkpoints/step-{step:06d}"
    shutil.copytree(whole / kept, out / kept)
    shutil.copy(whole / "log.jsonl", out)
    return out


def assert_same_bytes(ours: Path, theirs: Path, *names: str) -> None:
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def assert_goes_on_as(whole: Path, half: Path) -> None:
    assert run(half, "--num-steps", 4, "--resume") == 0
    assert_same_bytes(whole, half, TRANSFORMER, "checkpoints/step-000004/training/state.safetensors")


def test_a_resumed_run_ends_with_the_same_bytes(whole, half):
    with (half / "log.jsonl").open("a") as log:  # what a kill after the checkpoint leaves behind
        log.write('{"step": 3, "loss": 1}\n{"st')
    (half / "checkpoints" / ".step-000004.1.tmp").mkdir()
    (half / "checkpoints" / "step-000009-good").mkdir()  # somebody's copy
    assert_goes_on_as(whole, half)
    ended_once = [line for line in entries(half) if "val_loss" in line and line["step"] == 2]
    assert entries(whole) == [line for line in entries(half) if line not in ended_once]
    assert not list((half / "checkpoints").glob(".*"))


@pytest.mark.parametrize("moment", ["checkpoint.save_weights", "log.draw_curve", "run_folder.publish"])
def test_a_kill_leaves_the_last_checkpoint_to_resume_from(whole, half, moment, monkeypatch):
    """In a save, before it and after it."""

    def kill(out, path=Path("step-000004"), *_):
        if path.name == "step-000004" or "publish" not in moment:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(torch.get_num_threads())  # mends the pool before two threads do
            monkeypatch.setattr(moment, kill)
            run(half, "--num-steps", 4, "--resume")
        finally:
            os._exit(1)  # it should not come here
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert newest_checkpoint(half).name == ("step-000004" if "publish" in moment else "step-000002")
    assert_goes_on_as(whole, half)


def test_a_signal_saves_and_stops(whole, half, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", rate_and_terminate_twice)
        assert run(half, "--num-steps", 4, "--resume") == 128 + signal.SIGTERM
    assert newest_checkpoint(half).name == "step-000003"
    assert_goes_on_as(whole, half)


def rate_and_terminate_twice(*args):
    """Called in every step; `timeout` and torchrun send their signal twice."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    return learning_rate(*args)


def test_a_later_signal_ends_at_once(half, monkeypatch, capsys):
    monkeypatch.setattr(train, "SAME_SIGNAL", -1.0)
    monkeypatch.setattr(train, "learning_rate", rate_and_terminate_twice)
    assert run(half, "--num-steps", 4, "--resume") == 2
    assert "interrupted" in capsys.readouterr().err
    assert newest_checkpoint(half).name == "step-000002"


def test_what_a_run_leaves_can_be_rounded_and_its_checkpoint_goes_on_from_all_digits(tmp_path, two_steps):
    """All networks in OUT, for --set save_dtype; not the checkpoint, nor the files of --model."""
    before = {path: path.read_bytes() for path in INPAINT.rglob("*.safetensors")}
    assert run(tmp_path, "--num-steps", 1, save_dtype="bfloat16") == 0
    kept = tmp_path / "checkpoints" / "step-000001"
    for name in (TRANSFORMER, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        rounded, whole = load_file(tmp_path / name), load_file(kept / name)
        assert all(torch.equal(tensor, whole[key].bfloat16()) for key, tensor in rounded.items())
    assert run(tmp_path, "--num-steps", 2, "--resume", save_dtype="bfloat16") == 0
    ours, theirs = load_file(tmp_path / TRANSFORMER), load_file(two_steps / TRANSFORMER)
    assert all(torch.equal(tensor, theirs[key].bfloat16()) for key, tensor in ours.items())
    assert before == {path: path.read_bytes() for path in before}


def test_weights_that_came_in_shards_become_what_was_learnt(tmp_path, two_steps, monkeypatch):
    """The index of the shards, which comes before a single file in loading, is not left behind."""
    model = tmp_path / "model"
    shutil.copytree(INPAINT, model)
    start = load_file(INPAINT / TRANSFORMER)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "MAX_SHARD_BYTES", 500_000)
        save_weights(start, model / "transformer", "diffusion_pytorch_model")
    assert len(list((model / "transformer").glob("*.safetensors"))) > 1
    assert run(tmp_path / "out", "--num-steps", 1, model=model) == 0
    now = VideoTransformer.from_pretrained(tmp_path / "out").state_dict()
    assert not all(torch.equal(weight, now[name]) for name, weight in start.items())
    assert run(tmp_path / "out", "--num-steps", 2, "--resume", model=model) == 0
    assert_same_bytes(two_steps, tmp_path / "out", TRANSFORMER)


def test_a_run_that_keeps_samples_on_the_device_resumes_to_the_byte(tmp_path):
    """Though it asks for other samples then, which T5 is told together with others."""
    fields = {"cached_draws": 1, "only_full": "true", "num_shapes": 30}
    options = ["--phase", 3, "--num-steps", 4, "--save-every", 2]
    assert run(tmp_path / "whole", *options, **fields) == 0
    again = killed_after(2, tmp_path / "whole")
    assert run(again, *options, "--resume", **fields) == 0
    assert_same_bytes(tmp_path / "whole", again, TRANSFORMER)


def test_phases_follow_each_other_and_resume_across_the_border(tmp_path):
    """In tiny's first two phases the text encoder learns; in the last it stays what the checkpoint says."""
    whole, options, text = tmp_path / "whole", ["--phase-steps", 1, 1, 1], "text_encoder/model.safetensors"
    assert run(whole, *options) == 0
    assert logged(whole, "phase") == [1, 2, 3]
    learnt, start = load_file(whole / text), load_file(INPAINT / text)
    assert not all(torch.equal(weight, start[name]) for name, weight in learnt.items())
    assert_same_bytes(whole, whole / "checkpoints/step-000002", text)
    again = killed_after(2, whole)
    assert run(again, *options, "--resume") == 0
    assert_same_bytes(whole, again, TRANSFORMER, text)


def test_at_a_constant_rate_a_run_may_become_longer_but_not_shorter(tmp_path, two_steps, capsys):
    assert run(tmp_path, "--phase-steps", 1) == 0
    assert run(tmp_path, "--phase-steps", 2, "--resume") == 0
    assert_same_bytes(tmp_path, two_steps, TRANSFORMER)
    assert run(tmp_path, "--phase-steps", 1, "--resume") == 2
    assert "num_steps of phase 1 = 2, now it is 1" in capsys.readouterr().err
    assert run(tmp_path, "--phase-steps", 9, "--lr", 1e-3, 1e-4, "--resume") == 2


def test_other_settings_are_not_resumed_but_those_of_an_older_version_are(half, capsys):
    assert run(half, "--num-steps", 3, "--resume", "--seed", 1) == 2
    assert "seed = 0, now it is 1" in capsys.readouterr().err
    assert run(half, "--num-steps", 3) == 2
    assert "--resume" in capsys.readouterr().err
    path = half / "checkpoints/step-000002/training/state.json"
    state = json.loads(path.read_text())
    del state["settings"]["wide_clip_steps"], state["settings"]["dtype"]
    path.write_text(json.dumps(state))
    assert run(half, "--num-steps", 3, "--resume") == 0


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_the_files(
    tmp_path, clips, monkeypatch, capsys
):
    monkeypatch.setattr(train_dit, "denoising_losses", lambda *args: denoising_losses(*args) * float("nan"))
    monkeypatch.setattr(train_dit.Denoising, "validate", lambda *_: {"val_loss": 1.0})
    assert run(tmp_path / "out", "--num-steps", 2, "--data", clips, "--phase", 2) == 2
    message = capsys.readouterr().err
    assert "step 1:" in message and "not finite" in message
    assert 2 <= message.count(".mp4") <= 4  # of this step alone: two micro-batches, each of up to two
    assert newest_checkpoint(tmp_path / "out") is None
    start = load_file(INPAINT / TRANSFORMER)
    now = load_file(tmp_path / "out" / TRANSFORMER)
    assert all(torch.equal(weight, start[name]) for name, weight in now.items())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora-rank", 4, "--in-channels", 33], "--in-channels"),  # the file would lack the new channels
        (["--model", IMAGE], "clips alone"),
        (["--model", IMAGE_15, "--phase", 2, "--set", "picture_share=0"], "one frame is left at 32"),
        (["--lora-rank", 2, "--set", "position=slice"], "--lora-rank learns"),  # the file says nothing of it
        (["--set", "dit.num_layers=4"], "dit.num_layers=4: transformer/ of --model stays"),
        (["--set", "keep_encoder=true"], "keep_encoder"),
        (["--from-scratch", "--lora-rank", 2], "--lora-rank fine-tunes"),  # of zeros it would learn nothing
        (["--set", "optimizer=Muon"], "optimizer=Muon is unknown"),
        (["--set", "save_dtype=int8"], "save_dtype=int8 is unknown"),
        (["--set", "masks.box=0.1"], "should be FIELD=VALUE"),
        (["--train", "vae", "--set", "noises_per_clip=2"], "noises_per_clip is for --train dit"),
    ],
)
def test_a_run_that_would_not_learn_what_was_asked_does_not_begin(tmp_path, capsys, options, message):
    assert run(tmp_path, "--num-steps", 1, *options) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_there_is_not_replaced_by_a_new_run(tmp_path, half, capsys):
    """As one whose checkpoints were removed, to make room; a run killed before its first one begins anew."""
    for path in (half / "checkpoints").iterdir():
        shutil.rmtree(path)
    before = (half / TRANSFORMER).read_bytes()
    assert run(half, "--num-steps", 1, "--resume") == 2
    assert "holds a model" in capsys.readouterr().err and (half / TRANSFORMER).read_bytes() == before
    (half / "checkpoints" / "none-yet").touch()
    assert run(half, "--num-steps", 1, model=half) == 2  # it would remove what it starts from
    assert run(half, "--num-steps", 1) == 0


def test_ranks_that_see_other_samples_do_not_begin(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "agree", lambda settings: settings | {"digest of the training samples": "0"})
    assert run(tmp_path, "--num-steps", 1) == 2
    assert "other settings or samples than rank 0" in capsys.readouterr().err


def test_a_preview_that_fails_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_dit.Denoising, "preview", fail)
    assert run(tmp_path, "--num-previews", 1, "--preview-every", 1, "--num-steps", 2) == 0
    assert capsys.readouterr().out.count("no preview: out of memory") == 2
    assert newest_checkpoint(tmp_path).name == "step-000002"


# ---------------------------------------------------------------- learning


def test_a_transformer_learns_one_clip_and_its_folder_samples(tmp_path):
    """Validation on the clip it trains on; from random weights the loss falls by a third in 12 steps."""
    [clip] = shapes.records(1, 3)
    (tmp_path / "clips").mkdir()
    write_video(clip.read(0, 5, (32, 32)), tmp_path / "clips/clip.gif")
    (tmp_path / "clips/clip.txt").write_text(clip.scene.caption())
    options = ["--data", tmp_path / "clips", "--num-steps", 12, "--grad-accum", 1, "--lr", 1e-2]
    options += ["--num-previews", 1, "--preview-steps", 2]
    assert run(tmp_path / "out", *options, noises_per_clip=4) == 0
    first, last = logged(tmp_path / "out", "val_loss")
    assert last < 0.67 * first
    assert all(f"val_loss_{t}" in entries(tmp_path / "out")[-1] for t in train_dit.BANDS)
    for name in ("previews/step-000012-0.gif", "previews/step-000012-0.png", "loss.png", "model_index.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    models, size = train.sample.load_models(tmp_path / "out"), {"height": 32, "width": 32, "num_frames": 5}
    frames = train.sample.generate(models, "a", num_steps=2, seed=0, **size)
    assert frames.shape == (5, 32, 32, 3)


def test_a_vae_learns_writes_the_scale_of_its_own_latents_and_resumes_to_the_byte(tmp_path, capsys):
    """Resumed, it saves step 7 before it has validated, with the scale it has from its checkpoint."""
    whole = tmp_path / "whole"
    options = ["--train", "vae", "--num-steps", 8, "--lr", 3e-3, "--grad-accum", 1, "--save-every", 1]
    fields = {"optimizer": "adamw", "equivariance": 0.2}  # AdamW is quicker at first
    assert run(whole, *options, **fields) == 0
    first, last = logged(whole, "psnr")
    assert last > first + 1
    assert f"now python train.py --preset tiny --model {whole}\n" in capsys.readouterr().out
    vae = VideoVAE.from_pretrained(whole)
    pixels = pixels_of(drawn(8)[0], torch.device("cpu"))  # other clips than it was measured on
    assert vae.encode(pixels).std().item() == pytest.approx(1, abs=0.3)
    assert (whole / "transformer" / "config.json").exists()

    checkpoints = [f"checkpoints/step-00000{step}" for step in (6, 7, 8)]
    assert sorted(whole.glob("checkpoints/*")) == [whole / name for name in checkpoints]  # --keep 3
    again = killed_after(6, whole)
    assert run(again, *options, "--resume", **fields) == 0
    for folder in checkpoints[1:]:
        weights = f"{folder}/vae/diffusion_pytorch_model.safetensors"
        assert_same_bytes(whole, again, f"{folder}/vae/config.json", weights)


def test_a_decoder_learns_alone_and_latents_stay_what_they_were(tmp_path):
    options = ["--train", "vae", "--num-steps", 1, "--grad-accum", 1]
    assert run(tmp_path, *options, ema_decay=0, keep_encoder="true") == 0
    before, after = (VideoVAE.from_pretrained(folder) for folder in (INPAINT, tmp_path))
    assert after.config.scaling_factor == before.config.scaling_factor
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]) == name.startswith("encoder."), name


def test_colours_count_more_where_the_target_is_colourful():
    grey = torch.zeros(1, 3, 1, 2, 2)
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 2, 2)
    error = torch.tensor([0.2, -0.1, -0.1]).view(1, 3, 1, 1, 1)
    on_grey = train_vae.reconstruction_losses(grey + error, grey)
    on_red = train_vae.reconstruction_losses(red + error, red)
    assert on_red > on_grey
    assert on_grey.item() == pytest.approx(0.4 / 3 + 0.06 / 3 + 0.06 / 3)  # |e| + e² + colour, no gradient
    edge = torch.tensor([0.5, 0.0]).expand(1, 3, 1, 2, 2)
    flat = torch.full((1, 3, 1, 2, 2), 0.25)
    assert train_vae.reconstruction_losses(edge, grey) > train_vae.reconstruction_losses(flat, grey)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_text_only_samples_have_everything_masked_and_a_zero_condition(share):
    samples, _ = drawn(8, text_only=share)
    assert all(bool(one.mask.all()) for one in samples) == (share == 1.0)
    assert bool(task_for(INPAINT).encode(samples)["zero"].all()) == (share == 1.0)


# ---------------------------------------------------------------- LoRA


def test_lora_learns_beside_the_transformer_and_resumes_to_the_byte(tmp_path, capsys):
    """And its file, merged, gives the loss that the run validated with the average: 1e-5 for other sums."""
    whole = tmp_path / "whole"
    options = ["--lora-rank", 3, "--lora-alpha", 2]  # 2/3: folding it into a file rounds
    options += ["--lr", 1e-2, "--num-steps", 3, "--save-every", 2]
    assert run(whole, *options) == 0
    assert f"--model {whole} --lora {whole / 'lora.safetensors'}\n" in capsys.readouterr().out
    again = killed_after(2, whole)
    assert run(again, *options, "--resume") == 0
    assert_same_bytes(whole, again, "lora.safetensors", "checkpoints/step-000003/training/state.safetensors")
    encoders = "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
    assert_same_bytes(whole, INPAINT, TRANSFORMER, *encoders)
    assert run(tmp_path / "next", *options, model=whole) == 2  # it would begin with the base alone
    assert "with a LoRA" in capsys.readouterr().err
    lora = load_file(whole / "lora.safetensors")
    assert any(tensor.any() for key, tensor in lora.items() if "lora_B" in key)
    assert all(key.startswith("transformer.") for key in lora)
    model = shutil.copytree(INPAINT, tmp_path / "model")
    merged = VideoTransformer.from_pretrained(model)
    load_lora(merged, whole / "lora.safetensors")
    merged.save_pretrained(model)
    assert run(tmp_path / "merged", "--num-steps", 1, model=model) == 0
    first, last = logged(whole, "val_loss")
    assert logged(tmp_path / "merged", "val_loss")[0] == pytest.approx(last, rel=1e-5)
    assert abs(first / last - 1) > 1e-4


def test_a_transformer_from_scratch_fits_its_text_encoder_and_keeps_its_position_rule(tmp_path):
    fields = {"dit.num_layers": 1, "position": "slice"}
    assert run(tmp_path, "--from-scratch", "--num-steps", 1, **fields) == 0
    dit = VideoTransformer.from_pretrained(tmp_path)
    assert dit.config.text_embed_dim == T5Encoder.from_pretrained(INPAINT).config.d_model
    assert dit.config.num_layers == 1 and dit.config.time_embed_dim == presets.TINY.dit.time_embed_dim
    assert dit.position == "slice"


# ---------------------------------------------------------------- models by channels


@pytest.mark.parametrize("in_channels, kind", [(33, "Inpaint"), (32, "Control")])
def test_a_run_grows_from_a_text_model_without_changing_what_it_says(tmp_path, clips, in_channels, kind):
    options = ["--num-steps", 1, "--in-channels", in_channels, "--lr", 0, "--data", clips / "controls.json"]
    options += ["--num-previews", 1, "--preview-steps", 1]
    assert run(tmp_path, *options, model=PLAIN) == 0
    grown, plain = VideoTransformer.from_pretrained(tmp_path), VideoTransformer.from_pretrained(PLAIN)
    assert grown.config.in_channels == in_channels
    assert f"Fun_Pipeline_{kind}" in (tmp_path / "model_index.json").read_text()
    grown.position = plain.position
    noisy = torch.randn(1, 16, 2, 4, 6)
    text = torch.randn(1, plain.config.max_text_seq_length, plain.config.text_embed_dim)
    with torch.no_grad():
        condition = torch.randn(1, in_channels - 16, 2, 4, 6)
        ours = grown(noisy, torch.tensor([500]), text, condition)
        assert_close(ours, plain(noisy, torch.tensor([500]), text), 1e-5)


def test_control_pixels_are_the_condition():
    samples, _ = drawn(2)
    controls = [shapes.draw([one.drawing[0]], *one.mask.shape)[0] for one in samples]
    samples = [one._replace(control=control) for one, control in zip(samples, controls[::-1])]
    batch = task_for(CONTROL).encode(samples)
    assert batch["control"].shape == batch["latents"].shape
    assert not torch.equal(batch["control"], batch["latents"])


# ---------------------------------------------------------------- image-to-video


@pytest.mark.parametrize("model", [IMAGE, IMAGE_15], ids=["5b", "1.5"])
def test_an_image_model_learns_resumes_to_the_byte_and_loads_in_diffusers(tmp_path, clips, model):
    diffusers = pytest.importorskip("diffusers")
    whole = tmp_path / "whole"
    options = ["--data", clips, "--phase", 2, "--lr", 1e-2, "--max-tokens", 18, "--num-frames", 9]
    options += ["--grad-accum", 1, "--num-steps", 3, "--save-every", 2]
    assert run(whole, *options, "--num-previews", 1, "--preview-steps", 1, model=model) == 0
    again = killed_after(2, whole)
    assert run(again, *options, "--resume", model=model) == 0
    assert_same_bytes(whole, again, TRANSFORMER)
    first, last = logged(whole, "val_loss")
    assert last < first
    assert (whole / "previews" / "step-000003-0.gif").exists()
    ours = VideoTransformer.from_pretrained(whole)
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(whole / "transformer")
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(weight, ours.get_parameter(name)) for name, weight in theirs.named_parameters())


@pytest.mark.parametrize("model", [IMAGE, IMAGE_15], ids=["5b", "1.5"])
def test_an_image_model_is_shown_in_training_what_it_is_shown_in_sampling(monkeypatch, model):
    """But for the noise and the drop: the picture's latents, scaled alike, before zeros. CogVideoX1.5 has a
    copy of the first latent frame in front of the clip, and the picture beside it."""
    monkeypatch.setattr(train_dit, "draw_noise_sigma", lambda _: 0.0)
    monkeypatch.setattr(train_dit, "PICTURE_DROP", 0.0)
    monkeypatch.setattr(train_dit.Denoising, "normal", lambda self, shape, _: torch.zeros(tuple(shape)))
    seen = watch_losses(monkeypatch)
    task = task_for(model)
    [clip] = shapes.records(1, seed=0)
    bucket, key = Bucket(9, 32, 48), (0, 0, 0)
    one = load_sample(data.shape_record(clip), bucket, key, Plan((32,), 100, 100))
    micro = Micro(bucket, [0], [key], epoch=0, number=0)
    task.losses(task.encode([one]), micro, torch.tensor([500]))
    latents, _, condition = seen[0]

    models = train.sample.load_models(model)
    picture = train_dit.to_uint8(pixels_of([one], torch.device("cpu"))[0])[0]
    request = train.sample.Request("a", image=picture, num_frames=9, height=32, width=48)
    known = train.sample.read_inputs(request, models.config)
    shown, _ = train.sample.encode_known(models, request, known, torch.zeros)
    assert_close(condition, shown, 1e-6)
    assert condition.shape == latents.shape
    whole = task.models.load("vae").encode(pixels_of([one], torch.device("cpu")))
    is_padded = model == IMAGE_15
    assert latents.shape[2] == 3 + is_padded
    assert_close(latents[:, :, is_padded:], whole, 1e-6)
    assert_close(latents[:, :, :1], whole[:, :, :1], 1e-6)

    monkeypatch.setattr(train_dit, "PICTURE_DROP", 1.0)
    task.losses(task.encode([one]), micro, torch.tensor([500]))
    _, _, dropped = seen[1]
    assert dropped.shape == condition.shape and not dropped.any()


def test_an_image_models_picture_is_noisy_and_sometimes_dropped(monkeypatch):
    """5 % of 1000 samples are 50, give or take 7; σ = exp(N(−3, ½)) has its median at exp(−3) = 0.05."""
    seen = []

    def moments(self, pixels, *_):
        seen.append(pixels)
        return [pixels.new_zeros(len(pixels), 16, 1, 4, 4)] * 2

    monkeypatch.setattr(VideoVAE, "moments", moments)
    task = task_for(IMAGE)
    samples, _ = drawn(1)
    samples = [samples[0]._replace(key=(0, 0, i)) for i in range(1000)]
    zero = task.encoders.clips(samples)["zero"]
    assert 25 < zero.sum() < 75
    pixels, pictures = seen
    sigmas = (pictures - pixels[:, :, :1]).flatten(1).std(dim=1)
    assert pictures.shape[2] == 1
    assert sigmas.median().item() == pytest.approx(0.05, rel=0.1)
    assert sigmas.log().std().item() == pytest.approx(0.5, rel=0.1)


def test_the_clips_of_an_image_model_fit_its_budget_and_its_positions():
    """CogVideoX1.5's copied frame has tokens as well: 22 latent frames are made of 81 frames, not of 85.
    The first CogVideoX has learned positions, for one size alone."""
    long_clip = Record("a long clip", lambda _: "", 1000, (32, 32), read=None)
    task = task_for(IMAGE_15)
    for budget, num_frames in ((22, 81), (21, 73), (13, 41), (2, 1), (1, 1)):
        phase = replace(task.config.phases[1], resolutions=(32,), max_tokens=4 * budget)
        plan = replace(task.plan(phase), max_frames=81)
        bucket = data.bucket_at(long_clip, plan, 32)
        assert bucket == (num_frames, 32, 32)
        assert data.tokens_of(bucket, plan) <= 4 * budget
    learned = task_for(IMAGE)
    assert data.bucket_at(long_clip, learned.plan(learned.config.phases[1]), 512)[1:] == (32, 48)


def test_motion_can_be_a_share_of_the_loss():
    dit = VideoTransformer.from_pretrained(PLAIN)
    schedule = Schedule.from_pretrained(PLAIN)
    latents, noise = torch.randn(2, 2, 16, 3, 4, 6)
    text = torch.randn(2, dit.config.max_text_seq_length, dit.config.text_embed_dim)
    inputs = dit, schedule, latents, noise, torch.tensor([100, 900]), text, None
    with torch.no_grad():
        plain, both = denoising_losses(*inputs), denoising_losses(*inputs, motion_sub_loss=0.25)
        noisy = schedule.add_noise(latents, noise, inputs[4])
        error = dit(noisy, inputs[4], text) - schedule.velocity(latents, noise, inputs[4])
    motion = (error[:, :, 1:] - error[:, :, :-1]).square().mean((1, 2, 3, 4))
    assert_close(both, 0.75 * plain + 0.25 * motion, 1e-5)


def test_presets_hold_the_reports_phases():
    phases = presets.PRESETS["fun-2b"]["dit"].phases
    assert [phase.max_tokens for phase in phases] == [13312, 29952, 53248]
    assert [phase.global_batch for phase in phases] == [128, 256, 128]
    assert [phase.num_steps for phase in phases] == [7000, 6500, 5000]
    assert [phase.resolutions[0] for phase in phases] == [512, 768, 1024]
    assert {phase.resolutions[-1] for phase in phases} == {1280}
    assert [phase.max_tokens for phase in presets.TINY.phases[1:]] == [80, 180, 320]


def test_what_is_held_out_is_not_trained_on(clips):
    """Of eight files one, as half of a small data set would be too many; of shapes, combinations of words."""
    records, held_out, failures = data.open_files(str(clips), None, 16, fps=8)
    assert len(records) == 7 and len(held_out) == 1 and not failures
    assert held_out[0].name not in [record.name for record in records]
    records, held_out, _ = data.draw_files(20, 1 / 6, 30, 5, seed=0)
    assert len(records) == 20 and len(held_out) == 30
    assert not {record.caption(17) for record in records} & {record.caption(17) for record in held_out}
    assert {record.num_frames for record in records} == {1, 5}
    frames = records[0].read(0, 5, (32, 48))
    assert frames.shape == (5, 32, 48, 3) and frames.dtype == np.uint8


def test_flags_replace_the_presets_values():
    config = config_of("--lr", 0.5, "--grad-accum", 3)
    for phase in config.phases:
        assert (phase.lr, phase.final_lr, phase.global_batch, phase.max_tokens) == (0.5, 0.5, 6, 8)
    assert all((phase.lr, phase.final_lr) == (0.5, 0.25) for phase in config_of("--lr", 0.5, 0.25).phases)
    assert config_of("--cache-latents", "latents").cached_draws == 4
    assert config_of("--cache-latents", "latents", cached_draws=2).cached_draws == 2
    assert config_of("--from-scratch", **{"dit.num_layers": 3}).dit.num_layers == 3
    assert (config_of().fps, config_of(model=IMAGE_15).fps) == (8, 16)  # the model's own rate
    assert config_of("--fps", 12, model=IMAGE_15).fps == 12
    assert config_of("--in-channels", 33, model=PLAIN_15).fps == 8  # it becomes Fun V1.5
    assert not any(phase.train_text for phase in config_of(lora_rank=2).phases)
    assert config_of("--masks", "after the start", "circle").masks == {"after the start": 0.2, "circle": 0.05}


def test_the_preset_knows_how_many_words_the_drawn_world_has():
    """By heart, since shapes.py may be deleted."""
    assert presets.TINY.t5.vocab_size == shapes.make_tokenizer().get_vocab_size()


def test_weights_with_the_host_learn_what_others_do_also_behind_a_validation(tmp_path, two_steps):
    """FSDP lets the outermost weights lie gathered: a step must not meet the averaged ones there. 1e-5: the
    gradient's length is summed in another order."""
    assert run(tmp_path, "--num-steps", 2, "--val-every", 1, "--offload") == 0
    assert logged(tmp_path, "loss") == pytest.approx(logged(two_steps, "loss"), rel=1e-5)
