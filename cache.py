"""Encode once, train often: what VAE and T5 say of the samples, kept on disk or on the device.

    fill     before the steps of a phase: what its micro-batches ask for and is not there is made, clips
             first, then texts; so neither VAE nor T5 is in memory while the transformer learns
    batches  then gives each micro-batch as tensors

An entry is what one sample is under one key (seed, draw, sample), see data.Epochs:

    latents  32 f' h' w'   posterior of the clip: means, then log-variances   (control: of the control clip)
    masked   32 f' h' w'   the same of what an inpaint model is shown; known 1 f' h' w', zero: see inpaint.py
    picture  32 1 h' w'    the same of an image model's first picture; zero: whether it is dropped

Posteriors are kept, not samples of them, so each epoch samples anew. Texts are kept beside, one for each
caption. On disk (--cache-latents DIR) an entry is a file, named by a hash of all that decides it: the content
of the clip's file, weights, bucket, key, settings; after changes to the code raise VERSION. On the device a
bucket is one tensor, and a micro-batch an index into it. This file may be deleted.

Dimension key: b batch, f' h' w' frames, height, width of latents, L text tokens, d text width.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import open_safetensors, save_tensors
from data import Batch, Key, Loader, Micro, Record, Sample, draw_caption, each_ahead
from sizes import Bucket

VERSION = 3
TEXTS = 64  # that T5 encodes together: each time all its layers are read from the disk
TOKENS = 16384  # that the VAE encodes together: it takes far more memory than the latents it gives


@dataclass
class Cache:
    """What both homes share: making what is lacking."""

    loader: Loader
    read: Callable[[Record, Bucket, Key], Sample]
    encode_clips: Callable[[list[Sample]], Batch]
    encode_texts: Callable[[list[str]], Tensor]  # by T5, b L d; or, while T5 learns, to its ids, b L

    def fill(self, micros: list[Micro]) -> int:
        """Make what these micro-batches ask for and is not there yet; returns how many samples that were."""
        groups = self.lacking(micros)
        for group, samples in zip(groups, self.loader.each(groups, self.read)):
            # A broken file's place is taken by another, which comes with its own caption.
            self.keep_clips(group, self.encode_clips(samples), [sample.caption for sample in samples])
        self.keep_texts(micros)
        return sum(len(group.keys) for group in groups)

    def encoded_texts(self, captions: list[str]) -> Iterator[Tensor]:
        """What T5 says of each caption. It always gets TEXTS at once, filled up with empty ones: another
        number would round differently, and a resumed run would not end with the same bytes."""
        for i in range(0, len(captions), TEXTS):
            group = captions[i : i + TEXTS]
            padding = [""] * (TEXTS - len(group))
            yield from self.encode_texts(group + padding)[: len(group)]

    def lacking(self, micros: list[Micro]) -> list[Micro]:
        """The samples that are not there yet, each once, in micro-batches that the VAE can take."""
        by_bucket: dict[Bucket, list[tuple[int, Key]]] = {}
        for index, bucket, key in places_of(micros):
            if not self.has(index, bucket, key):
                by_bucket.setdefault(bucket, []).append((index, key))
        groups = []
        for bucket, pairs in by_bucket.items():
            size = max(1, TOKENS // bucket.tokens)
            for i in range(0, len(pairs), size):
                indices, keys = zip(*pairs[i : i + size])
                groups.append(Micro(bucket, list(indices), list(keys), epoch=0, number=0))
        return groups


def places_of(micros: list[Micro]) -> list[tuple[int, Bucket, Key]]:
    """Of all their samples, each once."""
    return list(dict.fromkeys(place for micro in micros for place in micro.places()))


@dataclass
class DeviceCache(Cache):
    """Kept on the device that trains: for small models, whose steps are quicker than any reading."""

    device: torch.device

    def __post_init__(self):
        self.tables: dict[Bucket, list[Batch]] = {}  # {name: n …}, while they are filled in pieces
        self.rows: dict[tuple[Bucket, Key], int] = {}  # in the tables of its bucket
        self.texts = torch.empty(0)  # of each caption, n L d or, while T5 learns, ids n L
        self.text_rows: dict[str, int] = {}
        self.text_of: dict[Bucket, list[int]] = {}  # of each row of its tables, the row in texts

    def has(self, index: int, bucket: Bucket, key: Key) -> bool:
        return (bucket, key) in self.rows

    def fill(self, micros: list[Micro]) -> int:
        count = super().fill(micros)
        for pieces in self.tables.values():
            pieces[:] = [{name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}]
        return count

    def keep_clips(self, group: Micro, batch: Batch, captions: list[str]) -> None:
        text_of = self.text_of.setdefault(group.bucket, [])
        for key, caption in zip(group.keys, captions):
            self.rows[group.bucket, key] = len(text_of)
            text_of.append(self.text_rows.setdefault(caption, len(self.text_rows)))
        here = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.tables.setdefault(group.bucket, []).append(here)

    def keep_texts(self, micros: list[Micro]) -> None:
        """All of them anew in each phase: T5 may have learnt in the last one."""
        self.texts = torch.stack(list(self.encoded_texts(list(self.text_rows)))).to(self.device)

    def batches(self, micros: Iterable[Micro]) -> Iterator[Batch]:
        """Texts come once for each caption of a micro-batch, with text_row b to repeat them."""
        for micro in micros:
            rows = [self.rows[micro.bucket, key] for key in micro.keys]
            text_of = self.text_of[micro.bucket]
            texts, text_row = torch.tensor([text_of[row] for row in rows]).unique(return_inverse=True)
            rows, text_row = torch.tensor([rows, text_row.tolist()]).to(self.device)  # in one transfer
            [table] = self.tables[micro.bucket]
            batch = {name: column[rows] for name, column in table.items()}
            yield batch | {"text": self.texts[texts.to(self.device)], "text_row": text_row}


@dataclass
class DiskCache(Cache):
    """Kept in a folder, for any number of runs."""

    folder: Path
    settings: tuple  # all that decides what encoding gives, such as `files_digest` of weights
    text_settings: tuple  # likewise of texts
    digests: list[str]  # of the records' contents, see `content_digests`

    def path(self, *decided_by) -> Path:
        name = hashlib.sha256(repr((VERSION, *decided_by)).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"  # a million files in one folder are slow

    def clip_path(self, index: int, bucket: Bucket, key: Key) -> Path:
        return self.path(self.settings, self.digests[index], tuple(bucket), key)

    def text_path(self, caption: str) -> Path:
        return self.path(self.text_settings, caption)

    def has(self, index: int, bucket: Bucket, key: Key) -> bool:
        """Not where another stands in for a broken file, which may have been mended since."""
        path = self.clip_path(index, bucket, key)
        return is_whole(path) and "caption" not in note_of(path)

    def keep_clips(self, group: Micro, batch: Batch, captions: list[str]) -> None:
        for i, (index, bucket, key) in enumerate(group.places()):
            entry = {name: tensor[i].contiguous().cpu() for name, tensor in batch.items()}
            own = draw_caption(self.loader.records[index], bucket, key)
            note = {} if captions[i] == own else {"caption": captions[i]}
            save_tensors(entry, self.clip_path(index, bucket, key), note)

    def caption(self, index: int, bucket: Bucket, key: Key) -> str:
        """The record's, as it is now; or of another, where that took its place."""
        note = note_of(self.clip_path(index, bucket, key))
        return note.get("caption", draw_caption(self.loader.records[index], bucket, key))

    def keep_texts(self, micros: list[Micro]) -> None:
        captions = dict.fromkeys(self.caption(*place) for place in places_of(micros))
        lacking = [caption for caption in captions if not is_whole(self.text_path(caption))]
        for caption, text in zip(lacking, self.encoded_texts(lacking)):
            save_tensors({"text": text.cpu().contiguous()}, self.text_path(caption), {})

    def batches(self, micros: Iterable[Micro]) -> Iterator[Batch]:
        for entries in each_ahead(micros, self.read_entry, self.loader.num_workers, ahead=4):
            yield {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def read_entry(self, index: int, bucket: Bucket, key: Key) -> Batch:
        entry = {}
        text_path = self.text_path(self.caption(index, bucket, key))
        for path in (self.clip_path(index, bucket, key), text_path):
            with open_safetensors(path) as file:
                entry |= {name: file.get_tensor(name) for name in file.keys()}
        return entry


def note_of(path: Path) -> dict[str, str]:
    with open_safetensors(path) as file:
        return file.metadata() or {}


def is_whole(path: Path) -> bool:
    """Whether there is such a file, of the length its header says; one that is damaged is made anew."""
    try:
        note_of(path)
        return True
    except (ValueError, OSError):
        return False


# ---------------------------------------------------------------- digests


def content_digests(records: list[Record]) -> list[str]:
    """A digest of what each record is read from."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(content_digest, records))


def content_digest(record: Record) -> str:
    if not record.content:  # two such records would be one
        raise ValueError(f"{record.name} cannot be cached: its Record does not say what its content is")
    parts = [file_digest(part) if isinstance(part, Path) else part for part in record.content]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Of the content; of the name alone where it cannot be read, which loading will then complain of."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return str(path)


def files_digest(folder: Path) -> list[str]:
    """Of a component's weights and config."""
    return [file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()]
