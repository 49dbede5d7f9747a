"""--cache-latents DIR: what VAE and T5 say of the training data, kept on disk. This file may be deleted.

    read   in the loader's threads: the entries of a sample, and the sample itself where one is lacking
    join   in the training loop: makes and keeps what is lacking; then a batch of `Moments`

    DIR/KEY.safetensors   of a clip in a bucket, from one first frame on: its posterior (and its control's)
                          of one of `cached_draws` draws: mask, and the posterior of the masked clip; epoch e
                          uses draw e mod cached_draws
                          of a caption: the T5 output, in runs that train no text encoder

Posteriors are kept, not samples of them, so each epoch still samples anew. KEY is a hash of all that decides
an entry: content of the file, weights, bucket, seed, settings; after changes to the code raise VERSION. What
has changed is therefore made anew, under another name; old entries stay until DIR is removed. An entry is
written whole or not at all, with a checksum; one that is damaged is made anew.
"""

import contextlib
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
import inpaint
from checkpoint import component_dir, open_safetensors, save_tensors
from data import Record, Sample
from sizes import Bucket

VERSION = 2


class Moments(NamedTuple):
    """A batch of samples as `Denoising.encode` and `predict` in train.py take it in place of pixels."""

    tensors: dict[str, Tensor]  # see Denoising.clip_moments and condition_moments
    caption: list[str] | Tensor  # or what T5 made of them, b L d


class Found(NamedTuple):
    """The entries of one sample, {kind: (key, tensors or None where there is no such entry yet)}."""

    sample: Sample | None  # pixels, if something is to be made from them
    caption: str
    draw: tuple[int, int, int]  # what all random about the entries is a function of
    entries: dict[str, tuple[str, dict[str, Tensor] | None]]


class LatentCache:
    def __init__(self, folder: Path, task, with_text: bool):
        """task: train.Denoising, which encodes    with_text: T5 outputs as well; not while T5 learns"""
        self.folder, self.task, self.with_text = folder, task, with_text
        config, dit = task.config, task.dit.config
        self.draws = config.cached_draws
        self.clip_key = _hash(VERSION, _weights(task, "vae"), task.dtype, task.kind, config.fps)
        self.condition_key = _hash(
            inpaint.MASK_KINDS, data.TEXT_ONLY, config.text_only, dit.add_noise_in_inpaint_model
        )
        text_weights = [_weights(task, name) for name in ("text_encoder", "tokenizer") if with_text]
        self.text_key = _hash(VERSION, text_weights, task.dtype, dit.max_text_seq_length)
        self.warned = False

    def read(self, record: Record, bucket: Bucket, seed: int, epoch: int, index: int) -> Found:
        """Takes the place of `data.load_sample`."""
        if not record.content:
            raise ValueError(f"{record.name} cannot be cached: its Record does not say what its content is")
        content = [_file_hash(part) if isinstance(part, Path) else part for part in record.content]
        draw = (seed, epoch % self.draws, int(_hash(content)[:15], 16))  # wherever it stands in the list
        start = data.draw_start(record, bucket, seed, 0, draw[2])
        clip = _hash(self.clip_key, content, *bucket, start)
        keys = {"clip": clip}
        if self.task.kind == "inpaint":
            keys["condition"] = _hash(clip, self.condition_key, *draw)
        caption = "" if data.drops_caption(*draw) else record.caption(bucket.num_frames)
        if self.with_text:
            keys["text"] = _hash(self.text_key, caption)
        entries = {kind: (key, self.load(key)) for kind, key in keys.items()}
        pixels_needed = any(entries[kind][1] is None for kind in keys.keys() - {"text"})
        sample = data.load_sample(record, bucket, *draw, start) if pixels_needed else None
        return Found(sample, caption, draw, entries)

    def join(self, found: list[Found]) -> Moments:
        """Takes the place of `data.collate`."""
        tensors = [self.complete(one) for one in found]
        batch = {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}
        return Moments(batch, batch.pop("text") if self.with_text else [one.caption for one in found])

    def complete(self, found: Found) -> dict[str, Tensor]:
        """All tensors of one sample; those of lacking entries are made and kept."""
        make = {
            "clip": lambda: self.task.clip_moments(data.collate([found.sample])),
            "condition": lambda: self.task.condition_moments(data.collate([found.sample]), [found.draw]),
            "text": lambda: {"text": self.task.text([found.caption])},
        }
        tensors = {}
        for kind, (key, entry) in found.entries.items():
            entry = entry or self.load(key)  # made for another sample since then?
            if entry is None:
                entry = {name: batch[0].contiguous().cpu() for name, batch in make[kind]().items()}
                self.keep(key, entry)
            tensors |= entry
        return tensors

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"  # a million files in one folder are slow

    def load(self, key: str) -> dict[str, Tensor] | None:
        try:
            with open_safetensors(self.path(key)) as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}
                if (file.metadata() or {}).get("checksum") == _checksum(entry):
                    return entry
        except FileNotFoundError:
            return None
        except (ValueError, OSError):
            pass
        print(f"{self.path(key)} is damaged; it is made anew", flush=True)
        with contextlib.suppress(OSError):  # where nothing can be changed; `keep` says so
            self.path(key).unlink(missing_ok=True)
        return None

    def keep(self, key: str, entry: dict[str, Tensor]) -> None:
        try:
            save_tensors(entry, self.path(key), {"checksum": _checksum(entry)})
        except OSError as error:
            if not self.warned:
                print(f"--cache-latents: {error}; going on without what does not fit", flush=True)
            self.warned = True


def _hash(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _checksum(entry: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(entry.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights(task, name: str) -> list[str]:
    folder = component_dir(task.model_dir, name, "")
    return [_file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()]


def _file_hash(path: Path) -> str:
    """Of its content, which is read again only if it may have changed since."""
    stat = path.stat()
    return _content_hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@functools.cache
def _content_hash(path: Path, *_) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
