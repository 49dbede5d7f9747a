"""cache.py: it keeps what the networks say, serves nothing stale, and when full needs no networks."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from test_train import CONTROL, INPAINT, entries, run

import cache
import data
import train
from data import read_metadata
from media import write_video
from sizes import Bucket
from text_encoder import T5Encoder
from vae import VideoVAE

OPTIONS = ["--batch-size", 2, "--grad-accum", 1, "--num-steps", 4, "--val-every", 2, "--num-workers", 2]


@pytest.fixture
def clips(tmp_path) -> Path:
    """Three noisy clips, one longer than its bucket, and a picture, each with a control."""
    folder, random = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    items = []
    for i, (frames, ending) in enumerate([(5, "mp4"), (5, "mp4"), (12, "mp4"), (1, "png")]):
        names = [f"{kind}{i}.{ending}" for kind in ("clip", "control")]
        for name in names:
            write_video(random.integers(0, 255, (frames, 32, 32, 3), np.uint8), folder / name)
        kind = "image" if ending == "png" else "video"
        items.append(
            {"file_path": names[0], "control_file_path": names[1], "text": f"clip {i}", "type": kind}
        )
    (folder / "meta.json").write_text(json.dumps(items))
    return folder / "meta.json"


def files(folder: Path) -> dict[Path, tuple]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*.safetensors")}


def task_and_records(clips: Path, model: Path = INPAINT, *options: str) -> tuple[train.Denoising, list]:
    args, config = train.parse(["--model", str(model), "--cache-latents", "unused", *options])
    task = train.Denoising(config, model, torch.device("cpu"), torch.float32)
    return task, data.open_records(read_metadata(clips), config.fps)[0]


@pytest.mark.parametrize("model", [INPAINT, CONTROL], ids=["inpaint", "control"])
def test_a_full_cache_gives_the_same_run_without_vae_and_text_encoder(tmp_path, clips, monkeypatch, model):
    folder = tmp_path / "cache"
    options = ["--data", clips, "--cache-latents", folder, *OPTIONS, "--phase", 2]
    assert run(tmp_path / "filling", *options, model=model) == 0
    before = files(folder)

    def unexpected(*_, **__):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(VideoVAE, "from_pretrained", unexpected)
    monkeypatch.setattr(T5Encoder, "from_pretrained", unexpected)
    assert run(tmp_path / "full", *options, model=model) == 0
    assert entries(tmp_path / "full") == entries(tmp_path / "filling")
    assert before == files(folder)


@pytest.mark.parametrize("model", [INPAINT, CONTROL], ids=["inpaint", "control"])
@pytest.mark.parametrize("frames", [1, 5])
def test_entries_are_what_the_networks_say(tmp_path, clips, model, frames):
    task, records = task_and_records(clips, model)
    kept, record, bucket = (
        cache.LatentCache(tmp_path / "cache", task, True),
        records[2],
        Bucket(frames, 32, 32),
    )
    kept.join([kept.read(record, bucket, 3, 6, 0)])  # made here, below read again
    found = kept.read(record, bucket, 3, 6, 0)
    assert found.sample is None
    batch = kept.join([found])
    draw = (3, 2, found.draw[2])  # 6 mod 4
    start = data.draw_start(record, bucket, 3, 0, draw[2])
    sample = data.collate([data.load_sample(record, bucket, *draw, start)])
    want = task.clip_moments(sample) | task.condition_moments(sample, [draw])
    assert want.keys() == batch.tensors.keys()
    assert all(torch.equal(want[name], batch.tensors[name]) for name in want)
    assert torch.equal(batch.caption, task.text(sample.caption))
    latents, condition = task.encode(batch, [(0, 0, 0)])
    again, its_condition = task.encode(sample, [(0, 0, 0)])
    assert torch.equal(latents, again)
    if model == CONTROL:
        assert torch.equal(condition, its_condition)


def test_a_posterior_is_sampled_anew_in_every_epoch(tmp_path, clips):
    task, records = task_and_records(clips)
    kept = cache.LatentCache(tmp_path / "cache", task, True)
    batch = kept.join([kept.read(records[0], Bucket(5, 32, 32), 0, 1, 0)])
    one, other = (task.encode(batch, [(0, epoch, 0)])[0] for epoch in (1, 5))
    assert not torch.equal(one, other)


def test_epochs_take_four_draws_in_turn_and_share_the_clip(tmp_path, clips):
    task, records = task_and_records(clips)
    kept = cache.LatentCache(tmp_path / "cache", task, True)
    keys = [
        {
            kind: key
            for kind, (key, _) in kept.read(records[2], Bucket(5, 32, 32), 0, epoch, 0).entries.items()
        }
        for epoch in range(-1, 8)
    ]
    assert len({key["clip"] for key in keys}) == 1 and len({key["condition"] for key in keys}) == 4
    assert keys[0] == keys[4] == keys[8] and keys[1] == keys[5]


def test_the_place_of_a_file_in_the_list_and_its_name_do_not_count(tmp_path, clips):
    task, records = task_and_records(clips)
    kept = cache.LatentCache(tmp_path / "cache", task, True)
    moved = Path(shutil.copy(records[1].name, tmp_path / "moved.mp4"))
    renamed = data.open_record(data.Entry(moved, "clip 1", False, records[1].content[1]), 8)
    entries = [kept.read(r, Bucket(5, 32, 32), 0, 0, i).entries for i, r in enumerate([records[1], renamed])]
    assert entries[0] == entries[1]


def changed_weights(tmp_path: Path, component: str) -> Path:
    model = Path(shutil.copytree(GOLDENS / "fun-2b-inp", tmp_path / "changed"))
    [path] = (model / component).glob("*.safetensors")
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: weights[name] * 1.001}, path, {"format": "pt"})
    return model


def test_nothing_stale_is_served(tmp_path, clips):
    """Each change makes the keys new that depend on it, and those alone."""
    bucket = Bucket(5, 32, 32)

    def keys(model: Path = INPAINT, *options: str, seed: int = 0, bucket: Bucket = bucket) -> dict[str, str]:
        task, records = task_and_records(clips, model, *options)
        kept = cache.LatentCache(tmp_path / "cache", task, True)
        found = kept.read(records[2], bucket, seed, 0, 0)
        return {kind: key for kind, (key, _) in found.entries.items()}

    before = keys()
    both = {"clip", "condition"}

    def new(*args, **settings) -> set[str]:
        after = keys(*args, **settings)
        return {kind for kind in before if before[kind] != after[kind]}

    assert new() == set()
    assert new(changed_weights(tmp_path / "a", "vae")) == both
    assert new(changed_weights(tmp_path / "b", "text_encoder")) == {"text"}
    assert new(INPAINT, "--fps", "4") == both
    assert new(INPAINT, "--text-only", "1") == {"condition"}
    assert new(bucket=Bucket(1, 32, 32)) == both
    assert new(bucket=Bucket(5, 32, 48)) == both
    assert new(seed=1) >= {"condition"}
    assert new(INPAINT, "--lr", "1", "--ema-decay", "0.5") == set()

    path = clips.parent / "clip2.mp4"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the same size, at the same time
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert new() >= both


def test_damaged_entries_are_made_anew(tmp_path, clips, capsys):
    folder = tmp_path / "cache"
    options = ["--data", clips, "--cache-latents", folder, *OPTIONS, "--phase", 2]
    assert run(tmp_path / "filling", *options) == 0
    whole = {path: path.read_bytes() for path in files(folder)}

    def flip(content: bytes, place: int) -> bytes:
        changed = bytearray(content)
        changed[place] ^= 0x40
        return bytes(changed)

    damages = [
        lambda c: b"",
        lambda c: c[:-1],
        lambda c: flip(c, -5),
        lambda c: flip(c, 12),
        lambda c: c + b"x",
    ]
    damages += [lambda c: flip(c, len(c) // 2), lambda c: flip(c, 0), lambda c: b"\0" * len(c)]
    for i, (path, content) in enumerate(whole.items()):
        path.write_bytes(damages[i % len(damages)](content))
    capsys.readouterr()
    assert run(tmp_path / "again", *options) == 0
    assert capsys.readouterr().out.count("is damaged; it is made anew") == len(whole)
    assert entries(tmp_path / "again") == entries(tmp_path / "filling")
    assert {path: path.read_bytes() for path in files(folder)} == whole


def test_a_cache_that_cannot_be_changed_is_still_read(tmp_path, clips, monkeypatch, capsys):
    """Neither a damaged entry there nor a folder where an entry should be is taken for a broken clip."""
    folder = tmp_path / "cache"
    options = ["--data", clips, "--cache-latents", folder, *OPTIONS, "--phase", 2]
    assert run(tmp_path / "filling", *options) == 0
    damaged, folded, *_ = files(folder)
    damaged.write_bytes(b"")
    folded.unlink()
    folded.mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    replace, unlink = os.replace, Path.unlink

    def refused(function, path: Path, *args, **settings):
        if folder in Path(path).parents and not Path(path).name.endswith(".tmp.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *args, **settings)

    monkeypatch.setattr(Path, "unlink", lambda path, **settings: refused(unlink, path, **settings))
    monkeypatch.setattr(os, "replace", lambda path, to: refused(lambda to, path: replace(path, to), to, path))
    capsys.readouterr()
    assert run(tmp_path / "again", *options) == 0
    said = capsys.readouterr().out
    assert f"{damaged} is damaged" in said and "skipped" not in said
    assert said.count("going on without what does not fit") == 1
    assert entries(tmp_path / "again") == entries(tmp_path / "filling")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_an_interrupted_run_keeps_what_it_has_made(tmp_path, clips, monkeypatch):
    folder = tmp_path / "cache"
    options = ["--data", clips, "--cache-latents", folder, *OPTIONS, "--phase", 2]
    keep, made = cache.LatentCache.keep, []

    def interrupted(*args):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(keep(*args))

    monkeypatch.setattr(cache.LatentCache, "keep", interrupted)
    assert run(tmp_path / "first", *options) == 2
    monkeypatch.undo()
    before = files(folder)
    assert len(before) == 4
    assert run(tmp_path / "second", *options) == 0
    after = files(folder)
    assert len(after) > 4 and before.items() <= after.items()


def test_a_full_disk_is_told_once_and_costs_only_the_entries(tmp_path, clips, monkeypatch, capsys):
    folder = tmp_path / "cache"
    options = ["--data", clips, *OPTIONS, "--phase", 2, "--cache-latents"]
    assert run(tmp_path / "there", *options, folder) == 0
    (tmp_path / "file").touch()  # where a folder should be
    capsys.readouterr()
    assert run(tmp_path / "full", *options, tmp_path / "file" / "cache") == 0
    assert capsys.readouterr().out.count("going on without what does not fit") == 1
    assert entries(tmp_path / "full") == entries(tmp_path / "there")


def test_while_the_text_encoder_learns_its_output_is_not_kept(tmp_path):
    options = ["--cache-latents", tmp_path / "cache", *OPTIONS, "--num-steps", 2]
    assert run(tmp_path / "out", *options) == 0  # phase 1 of the tiny preset
    assert not any("text" in load_file(path) for path in files(tmp_path / "cache"))
    assert run(tmp_path / "other", *options, "--phase", 2) == 0
    assert any("text" in load_file(path) for path in files(tmp_path / "cache"))


def test_caching_the_training_of_a_vae_is_refused(tmp_path, capsys):
    assert run(tmp_path / "out", "--train", "vae", "--cache-latents", tmp_path / "cache") == 2
    assert "--cache-latents" in capsys.readouterr().err
