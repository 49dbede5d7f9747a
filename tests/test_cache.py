"""cache.py: it keeps what the networks say, serves nothing stale, and when full asks them for nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from test_train import CONTROL, INPAINT, TRANSFORMER, assert_same_bytes, entries, killed_after
from test_train import run as run_small

import cache
import data
import train
import train_dit
from data import Epochs, Micro, Plan, load_sample, read_metadata
from media import write_video
from sizes import Bucket
from text_encoder import T5Encoder
from vae import VideoVAE

OPTIONS = ["--batch-size", 2, "--grad-accum", 1, "--num-steps", 4, "--num-workers", 2]
PLAN = Plan((32,), max_tokens=8, batch_tokens=16, max_frames=5)


def run(out: Path, clips: Path, folder: Path, *options) -> int:
    return run_small(out, "--data", clips, "--cache-latents", folder, *OPTIONS, *options, cached_draws=1)


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
        items.append(dict(zip(("file_path", "control_file_path"), names)))
        items[-1] |= {"text": f"clip {i}", "type": "image" if ending == "png" else "video"}
    (folder / "meta.json").write_text(json.dumps(items))
    return folder / "meta.json"


def files(folder: Path) -> dict[Path, tuple]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*.safetensors")}


def task_and_records(clips: Path, model: Path = INPAINT, *options: str) -> tuple[train_dit.Denoising, list]:
    argv = ["--preset", "tiny", "--model", str(model), "--cache-latents", "unused", *options]
    config = train.make_config(train.parse(argv))
    task = train_dit.Denoising(config, model, torch.device("cpu"), torch.float32)
    task.begin(config.phases[2])
    return task, data.open_records(read_metadata(clips), config.fps)[0]


def cache_for(task: train_dit.Denoising, records: list, folder: Path | None, plan: Plan = PLAN):
    """As in a run; folder: None for the device."""
    loader = data.Loader(records, num_workers=2)
    return task.cache(loader, plan, folder, cache.content_digests(records))


def micros_of(records: list, num_epochs: int) -> list[Micro]:
    names = [int(digest, 16) for digest in cache.content_digests(records)]
    epochs = Epochs(records, PLAN, 0, num_draws=2, names=names)
    return [micro for epoch in range(num_epochs) for micro in epochs.micros(epoch)]


# ---------------------------------------------------------------- whole runs


def test_a_run_resumed_with_a_full_cache_ends_with_the_same_bytes_and_asks_the_networks_for_nothing(
    tmp_path, clips, monkeypatch, capsys
):
    """Held-out samples included: neither VAE nor T5 is loaded. They are let go before the first step."""
    losses, loaded = train_dit.Denoising.losses, []

    def watched(self, *args):
        loaded.extend(self.models.loaded)
        return losses(self, *args)

    monkeypatch.setattr(train_dit.Denoising, "losses", watched)
    whole, options = tmp_path / "whole", [clips, tmp_path / "cache", "--phase", 3, "--save-every", 3]
    assert run(whole, *options) == 0
    assert "\n4 samples encoded" in capsys.readouterr().out
    assert not loaded
    before = files(tmp_path / "cache")
    for network in (VideoVAE, T5Encoder):
        monkeypatch.setattr(network, "from_pretrained", None)
    again = killed_after(3, whole)
    assert run(again, *options, "--resume") == 0
    assert "\n0 samples encoded" in capsys.readouterr().out
    assert_same_bytes(whole, again, TRANSFORMER)
    assert entries(whole) == entries(again)
    assert before == files(tmp_path / "cache")


def test_while_the_text_encoder_learns_its_output_is_not_kept(tmp_path, clips):
    """Ids are, and behind its last phase what it says then, not what it said before."""
    whole, options = tmp_path / "whole", [clips, tmp_path / "cache", "--phase-steps", 1, 2, 2, "--lr", 1e-2]
    assert run(whole, *options, "--phase", 2) == 0
    kept = [load_file(path).get("text") for path in files(tmp_path / "cache")]
    texts = [text for text in kept if text is not None and text.is_floating_point()]
    ids = torch.stack([text for text in kept if text is not None and not text.is_floating_point()])
    assert len(texts) == len(ids) > 0
    learnt = whole / "checkpoints/step-000002"
    with torch.no_grad():
        now, before = (T5Encoder.from_pretrained(path)(ids) for path in (learnt, INPAINT))
    for text in texts:  # 1e-5: encoded in another batch
        assert (text - now).abs().amax((1, 2)).min() < 1e-5
        assert (text - before).abs().amax((1, 2)).min() > 0.1
    again = killed_after(2, whole)
    assert run(again, *options, "--phase", 2, "--resume") == 0
    assert entries(whole) == entries(again)


# ---------------------------------------------------------------- entries


@pytest.mark.parametrize("model, home", [(INPAINT, "disk"), (CONTROL, "disk"), (INPAINT, "device")])
def test_entries_are_what_the_networks_say(tmp_path, clips, model, home):
    task, records = task_and_records(clips, model)
    kept = cache_for(task, records, tmp_path / "cache" if home == "disk" else None)
    micros = [Micro(Bucket(5, 32, 32), [2, 0], [(3, 1, 7), (3, 0, 8)], 0, 0)]
    micros += [Micro(Bucket(1, 32, 32), [3, 2], [(3, 1, 9), (3, 0, 7)], 0, 1)]
    micros += micros  # asked for once more, as later epochs do
    assert kept.fill(micros) == 4 and kept.fill(micros) == 0
    for micro, batch in zip(micros, kept.batches(micros), strict=True):
        pairs = zip(micro.indices, micro.keys)
        samples = [load_sample(records[index], micro.bucket, key, PLAN) for index, key in pairs]
        want = task.encode(samples)
        text, rows = batch.pop("text"), batch.pop("text_row", slice(None))
        torch.testing.assert_close(text[rows], want.pop("text"), rtol=0, atol=1e-5)  # in another batch of T5
        assert want.keys() == batch.keys()
        assert all(torch.equal(want[name], batch[name]) for name in want)
    alone, among_others = (next(kept.encoded_texts(captions)) for captions in (["a"], ["a", "b", "c"]))
    assert torch.equal(alone, among_others)  # to the byte, as a resumed run asks for other ones


def test_what_an_interrupted_run_has_made_is_kept_and_what_is_damaged_made_anew(tmp_path, clips, monkeypatch):
    """A kill or a full disk leaves files of a wrong length. Nobody looks for flipped bits."""
    task, records = task_and_records(clips)
    kept, micros = cache_for(task, records, tmp_path / "cache"), micros_of(records, num_epochs=1)
    save, made = cache.save_tensors, []

    def interrupted(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(save(*args))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "save_tensors", interrupted)
        kept.fill(micros)
    before = files(tmp_path / "cache")
    assert len(before) == 2 == kept.fill(micros)
    assert before.items() <= files(tmp_path / "cache").items()

    whole = {path: path.read_bytes() for path in files(tmp_path / "cache")}
    assert len(whole) >= 4
    for i, (path, content) in enumerate(whole.items()):
        damaged = [b"", content[:-1], content + b"x", b"\0" * len(content)]
        path.write_bytes(damaged[i % 4])
    assert kept.fill(micros) == 4
    assert {path: path.read_bytes() for path in whole} == whole


def test_on_the_device_a_second_phase_adds_to_what_is_there_and_tells_the_texts_anew(tmp_path, clips):
    task, records = task_and_records(clips)
    first, second = micros_of(records, 1), micros_of(records, 2)
    kept = cache_for(task, records, None)
    assert kept.fill(first) == 4
    before = list(kept.batches(first))
    kept.encode_texts = lambda captions: task.encode_texts(captions) + 1  # as if T5 had learnt
    assert kept.fill(second) == 4
    for old, new in zip(before, kept.batches(first), strict=True):
        assert torch.equal(old["latents"], new["latents"]) and torch.equal(old["masked"], new["masked"])
        old, new = (batch["text"][batch["text_row"]] for batch in (old, new))
        torch.testing.assert_close(new, old + 1, rtol=0, atol=1e-5)  # in another batch of T5
    assert len(list(kept.batches(second))) == len(second)


@pytest.mark.parametrize("home", ["disk", "device"])
def test_a_broken_file_is_replaced_with_the_caption_of_its_stand_in(tmp_path, clips, home):
    """Now, and when the cache is full. In a folder the file is tried again: it may have been mended."""
    task, records = task_and_records(clips)
    path = clips.parent / "clip0.mp4"
    path.write_bytes(path.read_bytes()[:-3000])  # its header, in front, still tells of five frames
    folder = tmp_path / "cache" if home == "disk" else None
    micros = [Micro(Bucket(5, 32, 32), [0, 2], [(0, 0, 6), (0, 0, 7)], 0, 0)]
    kept = cache_for(task, records, folder)
    kept.fill(micros)
    assert list(kept.loader.failures) == [str(path)]
    captions = [data.draw_caption(records[i], Bucket(5, 32, 32), micros[0].keys[0]) for i in (0, 1)]
    assert captions == ["clip 0", "clip 1"]  # neither was dropped
    for later in [kept, cache_for(task, records, folder)] if folder else [kept]:
        assert later.fill(micros) == (1 if folder else 0)
        [batch] = later.batches(micros)
        text = batch["text"][batch.get("text_row", slice(None))]
        torch.testing.assert_close(text[:1], task.encode_texts(captions[1:]), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what an entry depends on


def test_the_place_of_a_file_in_the_list_and_its_name_do_not_count(tmp_path, clips):
    task, records = task_and_records(clips)
    moved = Path(shutil.copy(records[1].name, tmp_path / "moved.mp4"))
    renamed = data.open_record(data.Entry(moved, "clip 1", False, records[1].content[1]), 8)
    records = [records[1], records[0], renamed]
    kept = cache_for(task, records, tmp_path / "cache")
    micros = micros_of(records, num_epochs=1)
    keys = {index: key for micro in micros for index, key in zip(micro.indices, micro.keys)}
    assert keys[0] == keys[2] != keys[1]
    paths = [kept.clip_path(index, Bucket(5, 32, 32), keys[index]) for index in range(3)]
    assert paths[0] == paths[2] != paths[1]


def changed_weights(folder: Path, component: str) -> Path:
    model = Path(shutil.copytree(GOLDENS / "fun-2b-inp", folder / "changed"))
    [path] = (model / component).glob("*.safetensors")
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: weights[name] * 1.001}, path, {"format": "pt"})
    return model


def test_nothing_stale_is_served(tmp_path, clips):
    """Each change makes the names new that depend on it, and those alone."""
    bucket = Bucket(5, 32, 32)

    def names(model: Path = INPAINT, *options: str, seed=0, bucket=bucket, plan=PLAN) -> dict[str, Path]:
        task, records = task_and_records(clips, model, *options)
        kept = cache_for(task, records, tmp_path / "cache", plan)
        return {"clip": kept.clip_path(2, bucket, (seed, 0, 5)), "text": kept.text_path("clip 2")}

    before = names()

    def new(*args, **settings) -> set[str]:
        after = names(*args, **settings)
        return {kind for kind in before if before[kind] != after[kind]}

    assert new() == set()
    assert new(changed_weights(tmp_path / "a", "vae")) == {"clip"}
    assert new(changed_weights(tmp_path / "b", "text_encoder")) == {"text"}
    assert new(INPAINT, "--fps", "4") == {"clip"}
    assert new(plan=Plan((32,), 8, 16, 5, text_only=1.0)) == {"clip"}
    assert new(plan=Plan((32,), 8, 16, 5, masks={"everything": 1.0})) == {"clip"}
    assert new(bucket=Bucket(1, 32, 32)) == {"clip"}
    assert new(bucket=Bucket(5, 32, 48)) == {"clip"}
    assert new(seed=1) == {"clip"}
    assert new(INPAINT, "--lr", "1", "--set", "ema_decay=0.5", "text_only=0.1") == set()

    path = clips.parent / "clip2.mp4"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the same size, at the same time
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert new() == {"clip"}
