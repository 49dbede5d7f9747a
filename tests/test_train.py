"""train.py: losses against the reference, draws, accumulation, resuming, mistakes, and that it learns."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, assert_close, expected
from safetensors.torch import load_file

import shapes
import train
from checkpoint import newest_checkpoint
from data import Record, collate, load_sample
from diffusion import Schedule
from lora import load_lora
from media import write_video
from sizes import Bucket
from text_encoder import T5Encoder
from train import (
    Learner,
    denoising_losses,
    learning_rate,
    main,
    make_config,
    normal,
    parse,
    stratified_timesteps,
)
from transformer import VideoTransformer
from vae import VideoVAE

ROOT = Path(train.__file__).parent
INPAINT, CONTROL, PLAIN = (GOLDENS / name for name in ("fun-2b-inp", "fun-2b-control", "cogvideox-2b-t2v"))
SMALL = "--resolutions 32 --max-tokens 8 --num-frames 5 --num-shapes 20 --num-val 2 --num-previews 0".split()
SMALL += "--batch-size 2 --grad-accum 2 --warmup-steps 1 --save-every 3 --dtype float32 --device cpu".split()
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def run(out: Path, *options, model: Path | None = INPAINT) -> int:
    model_option = ["--model", str(model)] if model else []
    return main([*SMALL, *model_option, "--out", str(out), *map(str, options)])


def entries(out: Path) -> list[dict]:
    """The lines of a log, without what the clock says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clock = {"seconds", "tokens_per_s", "wait", "gib"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def task_for(model: Path, draws_per_clip: int = 1) -> train.Denoising:
    args, config = parse([*SMALL, "--model", str(model), "--draws-per-clip", str(draws_per_clip)])
    return train.Denoising(config, model, torch.device("cpu"), torch.float32)


def drawn_batch(num: int = 3, frames: int = 5, size: int = 32):
    clips = shapes.records(num, seed=0)
    samples = [
        load_sample(train.shape_record(clip, "clip"), Bucket(frames, size, size), 0, 0, index)
        for index, clip in enumerate(clips)
    ]
    return collate(samples), [(0, 0, index) for index in range(num)]


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


def test_timesteps_of_a_global_batch_cover_every_band_once():
    keys = [(0, 3, index) for index in range(50)]
    bands = stratified_timesteps(keys) // 20
    assert sorted(bands.tolist()) == list(range(50))
    assert bands.tolist() != sorted(bands.tolist())  # shuffled, as neighbours share a shape
    assert stratified_timesteps([(0, 4, index) for index in range(50)]).tolist() != bands.tolist()


def test_timesteps_are_uniform_over_many_batches():
    drawn = torch.cat([stratified_timesteps([(0, epoch, i) for i in range(8)]) for epoch in range(500)])
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert abs(drawn.double().mean() - 499.5) < 10  # 4000 draws, stratified: standard deviation below 1.5
    assert abs((drawn < 250).double().mean() - 0.25) < 0.01


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together = normal((4, 2), [(0, 1, 5), (0, 1, 6)], "noise")
    assert torch.equal(together[1:], normal((4, 2), [(0, 1, 6)], "noise"))
    for other in [(1, 1, 6), (0, 2, 6), (0, 1, 7)]:
        assert not torch.equal(together[1:], normal((4, 2), [other], "noise"))


@pytest.mark.parametrize(
    "model", [INPAINT, GOLDENS / "fun-1.5-5b-inp"]
)  # the latter with noise on the reference
def test_a_sample_has_the_same_loss_in_every_batch(model):
    task = task_for(model)
    task.dit.config.add_noise_in_inpaint_model = True  # another draw
    task.begin(task.config.phases[0], [])
    batch, keys = drawn_batch()
    timesteps = torch.tensor([10, 500, 900])
    with torch.no_grad():
        together = task.losses(batch, keys, timesteps)
        for i in range(3):
            alone = train.Sample(*(part[i : i + 1] for part in batch[:4]), None)
            assert_close(task.losses(alone, keys[i : i + 1], timesteps[i : i + 1]), together[i : i + 1], 1e-5)


def test_draws_of_one_clip_have_noises_of_their_own_and_share_its_condition():
    task = task_for(INPAINT, draws_per_clip=3)
    task.begin(task.config.phases[0], [])
    batch, keys = drawn_batch(2)
    losses = task.losses(batch, keys, torch.full((6,), 500))
    assert losses.shape == (6,) and len(set(losses.tolist())) == 6


# ---------------------------------------------------------------- the gradient of a global batch


def test_accumulation_does_not_change_a_run(tmp_path):
    """The same samples in two micro-batches of four or eight of one: equal up to the order of fp32 sums."""
    for name, batch, accum in (("whole", 4, 1), ("halves", 2, 2), ("singles", 1, 4)):
        options = ["--batch-size", batch, "--grad-accum", accum, "--num-steps", 3]
        clips = one_shape(tmp_path)  # eight of them, so that no epoch ends with a shorter micro-batch
        assert run(tmp_path / name, *options, "--data", clips, "--val-data", clips) == 0
    logs = {name: entries(tmp_path / name)[1:4] for name in ("whole", "halves", "singles")}
    for other in ("halves", "singles"):
        for ours, theirs in zip(logs["whole"], logs[other]):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def one_shape(folder: Path) -> Path:
    """Eight square clips, so that there is one bucket."""
    folder = folder / "clips"
    if not folder.exists():
        folder.mkdir()
        for i, clip in enumerate(shapes.records(8, 5, sizes=[(32, 32)])):
            write_video(clip.read(0, 9), folder / f"{i}.mp4")
            (folder / f"{i}.txt").write_text(clip.scene.caption())
    return folder


def test_samples_of_uneven_micro_batches_count_alike(tmp_path, monkeypatch):
    """The loss is the mean over samples: of eight in micro-batches of 3, 3 and 2, each weighs an eighth."""

    def index_of_each_sample(self, batch, keys, timesteps):
        weight = next(self.dit.parameters()).sum()  # so that there is a gradient, of zero
        return 0 * weight + torch.tensor([float(index) for _, _, index in keys])

    monkeypatch.setattr(train.Denoising, "losses", index_of_each_sample)
    options = ["--batch-size", 3, "--grad-accum", 3, "--num-steps", 1, "--draws-per-clip", 1]
    clips = one_shape(tmp_path)
    assert run(tmp_path / "out", *options, "--data", clips, "--val-data", clips) == 0
    assert entries(tmp_path / "out")[1]["loss"] == pytest.approx(sum(range(8)) / 8)


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "--num-steps", 6) == 0
    assert run(parts, "--num-steps", 3) == 0
    with (parts / "log.jsonl").open("a") as log:  # what a kill after the checkpoint leaves behind
        log.write('{"step": 4, "loss": 1}\n{"st')
    (parts / "checkpoints" / ".step-000006.1.tmp").mkdir()
    assert run(parts, "--num-steps", 6, "--resume") == 0
    for name in (TRANSFORMER, "checkpoints/step-000006/training/state.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    ours, theirs = entries(whole), entries(parts)
    theirs = [
        line for line in theirs if not ("val_loss" in line and line["step"] == 3)
    ]  # it ended there once
    assert ours == theirs
    assert not list((parts / "checkpoints").glob(".*"))


@pytest.mark.parametrize("moment", ["checkpoint.save_weights", "train.draw_curve", "checkpoint.publish"])
def test_a_kill_leaves_the_last_checkpoint_to_resume_from(tmp_path, moment):
    """In a save, before it and after it."""
    out = tmp_path / "out"
    assert run(out, "--num-steps", 3) == 0
    argv = [*SMALL, "--model", str(INPAINT), "--out", str(out), "--resume", "--num-steps", "6"]
    kill = "lambda out, path, *_: path.name == 'step-000006' and " if "publish" in moment else "lambda *_: "
    code = "import checkpoint, os, signal, torch, train\n"
    code += "torch.set_num_threads(1)\n"  # like here: sums depend on it
    code += f"{moment} = {kill}os.kill(os.getpid(), signal.SIGKILL)\n"
    code += f"train.main({argv})"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert newest_checkpoint(out).name == ("step-000006" if "publish" in moment else "step-000003")
    assert run(out, "--num-steps", 6, "--resume") == 0
    assert run(tmp_path / "whole", "--num-steps", 6) == 0
    assert (out / TRANSFORMER).read_bytes() == (tmp_path / "whole" / TRANSFORMER).read_bytes()


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(out, "--num-steps", 3) == 0
    before = (out / TRANSFORMER).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.checkpoint, "save_weights", full)
    assert run(out, "--num-steps", 6, "--resume") == 2
    message = capsys.readouterr().err
    assert "No space left" in message and "step-000003 is intact" in message and message.count("\n") == 1
    assert (out / TRANSFORMER).read_bytes() == before
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]


def test_a_signal_saves_and_stops(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def rate_and_terminate(*args):  # called in every step
        os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", rate_and_terminate)
        assert run(out, "--num-steps", 6) == 128 + signal.SIGTERM
    assert newest_checkpoint(out).name == "step-000001"
    assert run(out, "--num-steps", 6, "--resume") == 0
    assert run(tmp_path / "whole", "--num-steps", 6) == 0
    assert (out / TRANSFORMER).read_bytes() == (tmp_path / "whole" / TRANSFORMER).read_bytes()


def test_only_the_last_checkpoints_stay(tmp_path):
    assert run(tmp_path, "--num-steps", 4, "--save-every", 1, "--keep", 2) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_phases_follow_each_other_and_resume_across_the_border(tmp_path):
    """In tiny's first phase the text encoder learns; afterwards it stays what the checkpoint says."""
    options = ["--phase-steps", 2, 2, "--draws-per-clip", 2]
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "parts", *options, "--num-steps", 2) == 0
    text = {step: None for step in (2, 4)}
    text[2] = load_file(tmp_path / "parts/text_encoder/model.safetensors")
    assert run(tmp_path / "parts", *options, "--resume") == 0
    text[4] = load_file(tmp_path / "parts/text_encoder/model.safetensors")
    start = T5Encoder.from_pretrained(INPAINT).state_dict()
    changed = [key for key in start if key in text[2] and not torch.equal(text[2][key], start[key])]
    assert changed and all(torch.equal(text[2][key], text[4][key]) for key in text[2])
    for name in (TRANSFORMER, "text_encoder/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert [line["phase"] for line in entries(tmp_path / "whole") if "loss" in line] == [1, 1, 2, 2]


def test_a_checkpoint_older_than_a_setting_resumes(tmp_path):
    assert run(tmp_path, "--num-steps", 1) == 0
    path = tmp_path / "checkpoints/step-000001/training/state.json"
    state = json.loads(path.read_text())
    del state["settings"]["wide_clip_steps"], state["settings"]["dtype"]
    path.write_text(json.dumps(state))
    assert run(tmp_path, "--num-steps", 2, "--resume") == 0


def test_mistakes_in_the_data_are_found_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "meta.json").write_text('[{"file_path": "gone.mp4", "type": "video"}]')
    assert run(tmp_path / "out", "--data", tmp_path / "meta.json") == 2
    error = capsys.readouterr().err
    assert "text is missing" in error and "gone.mp4 does not exist" in error
    assert not (tmp_path / "out").exists()


def test_other_settings_are_not_resumed(tmp_path, capsys):
    assert run(tmp_path, "--num-steps", 1) == 0
    assert run(tmp_path, "--num-steps", 2, "--resume", "--seed", 1) == 2
    assert "seed = 0, now it is 1" in capsys.readouterr().err
    assert run(tmp_path, "--num-steps", 2) == 2
    assert "--resume" in capsys.readouterr().err


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_the_files(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "denoising_losses", lambda *args: denoising_losses(*args) * float("nan"))
    monkeypatch.setattr(train.Denoising, "validate", lambda self: {})
    clips = one_shape(tmp_path)
    assert run(tmp_path / "out", "--num-steps", 2, "--data", clips) == 2
    message = capsys.readouterr().err
    assert "step 1:" in message and "not finite" in message and ".mp4" in message and message.count("\n") == 1
    assert message.count(".mp4") == 2  # the micro-batch, not the whole step
    assert not (tmp_path / "out" / "checkpoints").exists()
    start = load_file(INPAINT / TRANSFORMER)
    assert all(
        torch.equal(value, start[key]) for key, value in load_file(tmp_path / "out" / TRANSFORMER).items()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-frames", 6], "try 5"),
        (["--resolutions", 40], "multiple of 16"),
        (["--phase", 4], "--phase 4"),
        (["--lora-rank", 0], "lora-rank 0"),
        (["--lora-alpha", 3], "needs --lora-rank"),
        (["--lora-rank", 4, "--in-channels", 33], "--in-channels"),
        (["--train", "vae", "--draws-per-clip", 2], "--draws-per-clip"),
        (["--keep-encoder"], "--keep-encoder"),
        (["--train", "vae", "--from-scratch", "--keep-encoder"], "--from-scratch"),
        (["--ema-decay", 1], "--ema-decay 1"),
        (["--phase-steps", 0], "--phase-steps 0"),
        (["--phase-steps", 1, 2, 3, 4], "--phase-steps"),
        (["--batch-size", 0], "batch-size 0"),
        (["--grad-accum", 0], "grad-accum 0"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--in-channels", 12], "less than"),
        (["--data", "nothing.json"], "nothing.json"),
        (["--model", GOLDENS / "cogvideox-5b-i2v"], "image-to-video"),
        (["--model", CONTROL], "control_file_path"),
        (["--model", GOLDENS / "fun-5b-inp", "--position", "regenerate"], "rotary"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options, message):
    argv = [*SMALL, "--model", INPAINT, "--out", tmp_path / "out", "--num-steps", 1, *options]
    assert main([str(part) for part in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------- learning


def test_the_learning_rate_warms_up_and_decays():
    phase = train.Phase((64,), 80, 4, 100, lr=2.0, final_lr=1.0)
    assert learning_rate(phase, 10, 0) == pytest.approx(0.2, rel=1e-3)
    assert learning_rate(phase, 0, 0) == 2.0
    assert learning_rate(phase, 10, 50) == pytest.approx(1.5)
    assert learning_rate(phase, 10, 100) == pytest.approx(1.0)
    assert learning_rate(replace(phase, final_lr=2.0), 10, 70) == 2.0


def test_clipping_over_time_is_the_references():
    """Five times max_grad_norm, falling to it over 1000 steps; spikes of s > 5 are cut to 1 / min(s, 10)."""
    config = replace(train.FUN_2B, max_grad_norm=2.0)
    assert [train.clip_norm(config, step, 99.0) for step in (0, 500, 1000)] == [10.0, 6.0, 2.0]
    assert [train.clip_norm(config, 1001, norm) for norm in (1.0, 10.0, 12.0, 99.0)] == [2.0, 2.0, 2 / 6, 0.2]
    assert train.clip_norm(replace(config, wide_clip_steps=None), 0, 99.0) == 2.0


def test_the_average_follows_and_steps_aside():
    module = torch.nn.Linear(2, 2, bias=False)
    learner = Learner({"m": module}, replace(train.TINY, ema_decay=0.5, max_grad_norm=1.0))
    start = module.weight.detach().clone()
    module.weight.grad = torch.ones_like(start)
    learner.step(0.1)
    learner.update_ema(1000)
    stepped = module.weight.detach().clone()
    assert not torch.equal(start, stepped)
    with learner.averaged():
        assert_close(module.weight.detach(), (start + stepped) / 2, 1e-6)
    assert torch.equal(module.weight, stepped)


def test_a_transformer_learns_one_clip_and_its_folder_samples(tmp_path):
    """Validation on the clip it trains on; from random weights the loss falls by a third in 40 steps."""
    clip = shapes.records(1, 3)[0]
    write_video(clip.read(0, 5, (32, 32)), tmp_path / "clip.gif")
    meta = [{"file_path": "clip.gif", "text": clip.scene.caption(), "type": "video"}]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    options = ["--data", tmp_path / "meta.json", "--num-steps", 40, "--val-every", 1, "--lr", 3e-3]
    options += ["--draws-per-clip", 4, "--num-previews", 1, "--preview-steps", 2, "--preview-every", 40]
    assert run(tmp_path / "out", *options) == 0
    losses = [line["val_loss"] for line in entries(tmp_path / "out") if "val_loss" in line]
    assert len(losses) == 41 and losses[-1] < 0.67 * losses[0]
    assert all(f"val_loss_{t}" in entries(tmp_path / "out")[-1] for t in train.BANDS)
    for name in ("previews/step-000040-0.gif", "previews/step-000040-0.png", "loss.png", "model_index.json"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    frames = train.sample.generate(
        train.sample.load_models(tmp_path / "out"),
        "a",
        height=32,
        width=32,
        num_frames=5,
        num_steps=2,
        seed=0,
    )
    assert frames.shape == (5, 32, 32, 3)


def test_a_vae_learns_and_writes_the_scale_of_its_own_latents(tmp_path):
    options = ["--train", "vae", "--num-steps", 25, "--val-every", 1, "--lr", 3e-3, "--grad-accum", 1]
    assert run(tmp_path, *options, "--optimizer", "adamw") == 0  # quicker in the first steps
    psnr = [line["psnr"] for line in entries(tmp_path) if "psnr" in line]
    assert psnr[-1] > psnr[0] + 1
    vae = VideoVAE.from_pretrained(tmp_path)
    batch, _ = drawn_batch(8)
    assert vae.encode(batch.pixels).std().item() == pytest.approx(
        1, abs=0.3
    )  # other clips than it was measured on
    assert (tmp_path / "transformer" / "config.json").exists()


def test_a_decoder_learns_alone_and_latents_stay_what_they_were(tmp_path):
    assert run(tmp_path, "--train", "vae", "--keep-encoder", "--num-steps", 2, "--ema-decay", 0) == 0
    before, after = (VideoVAE.from_pretrained(folder) for folder in (INPAINT, tmp_path))
    assert after.config.scaling_factor == before.config.scaling_factor
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]) == name.startswith("encoder."), name


def test_colours_count_more_where_the_target_is_colourful():
    grey, red = (
        torch.zeros(1, 3, 1, 2, 2),
        torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 2, 2),
    )
    error = torch.tensor([0.2, -0.1, -0.1]).view(1, 3, 1, 1, 1)
    on_grey = train.reconstruction_losses(grey + error, grey)
    on_red = train.reconstruction_losses(red + error, red)
    assert on_red > on_grey
    assert on_grey.item() == pytest.approx(0.4 / 3 + 0.06 / 3 + 0.06 / 3)  # |e| + e² + colour, no gradient
    edge = torch.zeros(1, 3, 1, 2, 2)
    edge[..., 0] = 0.5
    flat = torch.full((1, 3, 1, 2, 2), 0.25)
    assert train.reconstruction_losses(edge, grey) > train.reconstruction_losses(flat, grey)


# ---------------------------------------------------------------- what the tiny preset adds


def test_muon_makes_all_singular_values_of_an_update_alike():
    matrix = torch.randn(6, 4) @ torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.03])) @ torch.randn(4, 4)
    for shape in (matrix, matrix.T):
        values = torch.linalg.svdvals(train.orthogonal(shape))
        assert 0.6 < values.min() and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest = left @ right
    assert (train.orthogonal(matrix) * nearest).sum() / nearest.norm() ** 2 > 0.8


def test_muon_moves_a_kernel_as_far_as_adamw_would():
    kernel = torch.nn.Parameter(torch.zeros(8, 2, 3, 3))
    optimizer = train.Muon([kernel], weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.1
    kernel.grad = torch.randn(8, 2, 3, 3)
    optimizer.step()
    assert kernel.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)
    assert (kernel * kernel.grad).sum() < 0


def test_muon_gets_matrices_and_adamw_vectors_and_tables():
    module = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 4), "layer": torch.nn.Linear(4, 3)})
    learner = Learner({"m": module}, train.TINY)
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    learner.step(1e-3)
    with_momentum = {name for name, moments in learner.moments.items() if "momentum_buffer" in moments}
    assert with_momentum == {"m/layer.weight"}
    assert "exp_avg" in learner.moments["m/table.weight"] and "exp_avg" in learner.moments["m/layer.bias"]


def test_a_shift_draws_noisy_timesteps_more_often():
    keys = [(0, 0, index) for index in range(2000)]
    plain, shifted = (stratified_timesteps(keys, shift).float() for shift in (1.0, 3.0))
    assert plain.median().item() == pytest.approx(500, abs=5)
    assert shifted.median().item() == pytest.approx(750, abs=5)  # 3/2 / (1 + 2/2)
    assert 0 <= shifted.min() and shifted.max() <= 999


def test_text_only_samples_have_a_zero_condition_whatever_their_mask():
    task = task_for(INPAINT)
    batch, keys = drawn_batch(4)
    conditions = []
    for share in (0.0, 1.0):
        task.config = replace(task.config, text_only=share)
        conditions.append(task.encode(batch._replace(mask=torch.zeros_like(batch.mask)), keys)[1])
    assert conditions[0].abs().amax((1, 2, 3, 4)).min() > 0
    assert not conditions[1].any()
    task.config = replace(task.config, text_only=0.0)
    mask = torch.zeros_like(batch.mask)
    mask[:2] = 1  # these two are not even encoded; the others come out as they did in a batch of four
    hidden = torch.tensor([True, True, False, False])
    mixed = task.encode(batch._replace(mask=mask, zero_if_all_masked=hidden), keys)[1]
    assert not mixed[:2].any()
    assert_close(mixed[2:], conditions[0][2:], 1e-5)


# ---------------------------------------------------------------- LoRA


def test_lora_learns_beside_the_transformer_and_resumes_to_the_byte(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--lora-rank", 3, "--lora-alpha", 2, "--lr", 1e-2]  # 2/3: folding it into a file rounds
    assert run(whole, *options, "--num-steps", 4) == 0
    assert run(parts, *options, "--num-steps", 3) == 0
    assert run(parts, *options, "--num-steps", 4, "--resume") == 0
    for name in ("lora.safetensors", "checkpoints/step-000004/training/state.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    for name in (TRANSFORMER, "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (whole / name).read_bytes() == (INPAINT / name).read_bytes()
    lora = load_file(whole / "lora.safetensors")
    assert any(tensor.any() for key, tensor in lora.items() if "lora_B" in key)
    assert all(key.startswith("transformer.") for key in lora)


def test_a_lora_file_says_what_the_run_validated(tmp_path):
    """Merged by `load_lora`, the EMA weights in OUT/lora.safetensors give the last validation loss again."""
    options = ["--lora-rank", 2, "--lora-alpha", 3, "--lr", 1e-1, "--num-steps", 2, "--warmup-steps", 0]
    assert run(tmp_path, *options) == 0
    args, config = parse([*SMALL, "--model", str(INPAINT)])
    learnt = train.Run(
        parse([*SMALL, "--model", str(INPAINT), "--out", str(tmp_path / "new")])[0], config, []
    )
    load_lora(learnt.task.dit, tmp_path / "lora.safetensors")
    learnt.begin_phase()
    first, *_, last = (line["val_loss"] for line in entries(tmp_path) if "val_loss" in line)
    assert learnt.task.validate()["val_loss"] == pytest.approx(last, rel=1e-5)  # sums in another order
    assert abs(first - last) > 1e-3


def test_a_transformer_from_scratch_fits_the_text_encoder_it_is_given(tmp_path):
    options = ["--from-scratch", "--num-steps", 1]
    assert run(tmp_path, *options) == 0
    dit = VideoTransformer.from_pretrained(tmp_path).config
    assert dit.text_embed_dim == T5Encoder.from_pretrained(INPAINT).config.d_model
    assert dit.num_layers == train.TINY.dit.num_layers


# ---------------------------------------------------------------- models by channels


def test_an_inpaint_run_grows_from_a_text_model_without_changing_what_it_says(tmp_path):
    options = ["--num-steps", 1, "--in-channels", 33, "--lr", 0, "--warmup-steps", 0]
    assert run(tmp_path, *options, model=PLAIN) == 0
    grown, plain = VideoTransformer.from_pretrained(tmp_path), VideoTransformer.from_pretrained(PLAIN)
    assert grown.config.in_channels == 33
    assert "Fun_Pipeline_Inpaint" in (tmp_path / "model_index.json").read_text()
    grown.position = plain.position
    noisy = torch.randn(1, 16, 2, 4, 6)
    text = torch.randn(1, plain.config.max_text_seq_length, plain.config.text_embed_dim)
    with torch.no_grad():
        ours = grown(noisy, torch.tensor([500]), text, torch.randn(1, 17, 2, 4, 6))
        assert_close(ours, plain(noisy, torch.tensor([500]), text), 1e-5)


def test_a_run_with_another_position_rule_says_so_in_its_folder(tmp_path):
    assert run(tmp_path / "sliced", "--num-steps", 1, "--position", "slice") == 0
    assert VideoTransformer.from_pretrained(tmp_path / "sliced").position == "slice"
    assert run(tmp_path / "on", "--num-steps", 1, model=tmp_path / "sliced") == 0
    assert VideoTransformer.from_pretrained(tmp_path / "on").position == "slice"
    path = tmp_path / "on/transformer/config.json"
    path.write_text(path.read_text().replace('"slice"', '"sideways"'))
    with pytest.raises(ValueError, match="position = 'sideways' is not supported, only 'interpolate'"):
        VideoTransformer.from_pretrained(tmp_path / "on")


def test_text_models_and_control_models_train(tmp_path):
    assert run(tmp_path / "text", "--num-steps", 1, model=PLAIN) == 0
    one_shape(tmp_path)
    names = [(f"clips/{i}.mp4", f"clips/{7 - i}.mp4") for i in range(8)]
    meta = [{"file_path": a, "control_file_path": b, "text": "a", "type": "video"} for a, b in names]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    options = ["--num-steps", 1, "--data", tmp_path / "meta.json", "--num-previews", 1, "--preview-steps", 1]
    assert run(tmp_path / "control", *options, model=CONTROL) == 0


def test_control_pixels_are_the_condition():
    task = task_for(CONTROL)
    batch, keys = drawn_batch(2)
    batch = batch._replace(control=batch.pixels.flip(0))
    latents, condition = task.encode(batch, keys)
    swapped, _ = task.encode(batch._replace(pixels=batch.control), keys)
    assert condition.shape == latents.shape
    assert_close(condition.mean(), swapped.mean(), 0.2)  # the same pixels, another draw of the posterior
    assert not torch.equal(condition, latents)


def test_all_masked_samples_have_no_condition_where_their_draw_says_so():
    task = task_for(INPAINT)
    batch, keys = drawn_batch(2)
    batch = batch._replace(mask=torch.ones_like(batch.mask), zero_if_all_masked=torch.tensor([True, False]))
    _, condition = task.encode(batch, keys)
    assert condition[0].abs().max() == 0 and condition[1].abs().max() > 0


def test_presets_hold_the_reports_phases():
    phases = train.PRESETS["fun-2b"]["dit"].phases
    assert [phase.max_tokens for phase in phases] == [13312, 29952, 53248]
    assert [phase.global_batch for phase in phases] == [128, 256, 128]
    assert [phase.num_steps for phase in phases] == [7000, 6500, 5000]
    assert [phase.resolutions[0] for phase in phases] == [512, 768, 1024]
    assert all(size % 128 == 0 for phase in phases for size in phase.resolutions)
    assert [phase.max_tokens for phase in train.TINY.phases] == [80, 180, 320]


def test_half_the_clips_of_a_small_data_set_are_not_held_out(tmp_path):
    """Of eight files one is held out; a single file is trained on and looked at."""
    args, config = parse([*SMALL, "--model", str(INPAINT), "--data", str(one_shape(tmp_path))])
    records, held_out, failures = train.open_data(args, config)
    assert len(records) == 7 and len(held_out) == 1 and not failures
    assert held_out[0].name not in [record.name for record in records]


def test_shapes_on_trial_are_the_held_out_combinations():
    args, config = parse([*SMALL, "--model", str(INPAINT), "--num-val", "30"])
    records, held_out, _ = train.open_data(args, config)
    assert len(records) == 20 and len(held_out) == 30
    seen = {record.caption(17) for record in records}
    assert not seen & {record.caption(17) for record in held_out}
    assert isinstance(records[0], Record) and {record.num_frames for record in records} == {1, 5}
    assert (
        records[0].read(0, 5, (32, 48)).shape == (5, 32, 48, 3)
        and records[0].read(0, 1, (16, 16)).dtype == np.uint8
    )


def test_flags_replace_the_presets_values():
    args, config = parse([*SMALL, "--model", str(INPAINT), "--lr", "0.5", "--grad-accum", "3"])
    assert config == make_config(args)
    for phase in config.phases:
        assert (phase.lr, phase.final_lr, phase.global_batch, phase.max_tokens) == (0.5, 0.5, 6, 8)
    args, config = parse([*SMALL, "--model", str(INPAINT), "--lr", "0.5", "0.25"])
    assert all((phase.lr, phase.final_lr) == (0.5, 0.25) for phase in config.phases)
    cached = [*SMALL, "--model", str(INPAINT), "--cache-latents", "latents"]
    assert [parse([*cached, *more])[1].cached_draws for more in ([], ["--cached-draws", "2"])] == [4, 2]


@pytest.mark.parametrize(
    "flags, said", [(["--lr", 3, 2, 1], "--lr takes"), (["--cached-draws", 2], "--cache-latents")]
)
def test_flags_that_cannot_be_are_refused(tmp_path, capsys, flags, said):
    assert run(tmp_path / "out", "--num-steps", 1, *flags) == 2
    assert said in capsys.readouterr().err


def test_a_step_that_cannot_be_cut_into_micro_batches_is_refused(capsys):
    assert main(["--preset", "fun-2b", "--model", str(INPAINT), "--data", "x.json", "--batch-size", "3"]) == 2
    assert "micro-batches of 3" in capsys.readouterr().err


def test_the_last_line_says_what_to_do_next(tmp_path, capsys):
    runs = {"dit": [], "vae": ["--train", "vae"], "lora": ["--lora-rank", 1]}
    for name, options in runs.items():
        assert run(tmp_path / name, "--num-steps", 1, *options) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("done: 1 steps") and str(tmp_path / name) in last
        assert ("train.py" in last) == (name == "vae") and ("--lora " in last) == (name == "lora")


def test_the_tiny_transformer_asks_for_its_vae_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--preset", "tiny"]) == 2
    assert "--train vae first" in capsys.readouterr().err


def test_the_preset_knows_how_many_words_the_drawn_world_has():
    """By heart, since shapes.py may be deleted."""
    assert train.TINY.t5.vocab_size == shapes.make_tokenizer().get_vocab_size()


def test_a_log_that_cannot_be_written_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    path_open = Path.open

    def full(path: Path, mode: str = "r", **settings):
        if path.name == "log.jsonl" and mode == "a":
            raise OSError(28, "No space left on device")  # as from a write: without the name
        return path_open(path, mode, **settings)

    monkeypatch.setattr(Path, "open", full)
    assert run(tmp_path / "out", "--num-steps", 1) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "log.jsonl (No space left on device)" in said and "--resume" in said


def test_what_the_softmax_does_not_see_does_not_learn():
    """The bias of k's norm, where no rotation follows: its gradient would be rounding alone."""
    for model, learns in ((INPAINT, False), (GOLDENS / "fun-5b-inp", True)):
        biases = [block.attn1.norm_k.bias for block in task_for(model).dit.transformer_blocks]
        assert all(bias.requires_grad == learns for bias in biases)
