"""Everything that turns a list of pictures and clips into training batches.

    metadata ─read_metadata─► entries ─open_records─► records ─epoch_batches─► batches ─Loader─► Sample

Errors a user can cause are one sentence with the path in it: OSError where the file system refuses, and
ValueError where the contents are at fault. Dimension key: b batch, f frames, h height, w width, c channels.
"""

import collections
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inpaint import random_mask
from media import (
    CLIP_ENDINGS,
    MILLISECOND,
    PICTURE_ENDINGS,
    _must_exist,
    fit,
    probe_video,
    read_image,
    read_video,
    to_pixels,
)
from runtime import chance, generator, integer
from sizes import Bucket, frames_for, nearest_shape

# ---------------------------------------------------------------- samples: what is known before decoding


# (start, num_frames, size) -> uint8 f h w 3; start counts frames at the rate we train at. The size (height,
# width) is a wish, which a drawing can fulfil; a file comes as it is and is fitted afterwards.
Reader = Callable[[int, int, tuple[int, int]], np.ndarray]


@dataclass(frozen=True)
class Record:
    """One sample. Files become records below; anything that can draw itself is one as well."""

    name: str  # for messages: the path
    caption: Callable[[int], str]  # of so many frames: one frame alone shows no motion
    num_frames: int  # at the rate we train at; 1 for a picture
    size: tuple[int, int]  # height, width
    read: Reader
    read_control: Reader | None = None
    content: tuple[Path | str, ...] = ()  # files and words that decide what is read, see cache.py


class Entry(NamedTuple):
    """One line of a metadata file."""

    path: Path
    caption: str
    is_image: bool
    control: Path | None = None


def read_metadata(path: str | Path) -> list[Entry]:
    """The samples listed in a .json (a list) or .jsonl file, or found in a folder with a .txt beside each.

    An item is {"file_path", "text", "type": "video" | "image"}, as in the reference, and for control models
    "control_file_path"; paths are absolute or relative to the file; other fields are ignored.
    raises OSError if there is no such file, ValueError with one line for each mistake in it
    """
    entries, mistakes = _scan_metadata(Path(path))
    if mistakes:
        lines = mistakes[:100] + [f"and {len(mistakes) - 100} more"] * (len(mistakes) > 100)
        raise ValueError("\n  ".join([f"{path} cannot be used; mistakes: {len(mistakes)}", *lines]))
    return entries


def _scan_metadata(path: Path) -> tuple[list[Entry], list[str]]:
    """(the samples that can be used, a line for each mistake)"""
    mistakes: list[str] = []
    entries: dict[Entry, str] = {}
    for where, item in _folder_items(path) if path.is_dir() else _file_items(path):
        problems, entry = ([item], None) if isinstance(item, str) else _to_entry(path, item)
        if entry in entries:
            problems = [f"says the same as {entries[entry]}; remove one"]
        mistakes += [f"{where}: {problem}" for problem in problems]
        if not problems:
            entries[entry] = where
    if not entries and not mistakes:
        mistakes = ["it lists no samples"]
    return list(entries), mistakes


def _file_items(path: Path) -> Iterator[tuple[str, object]]:
    """(where, parsed item, or a mistake as str) for each item of a JSON list or line of a JSONL file."""
    _must_exist(path)
    is_lines = path.suffix.lower() == ".jsonl"
    content = path.read_bytes()
    pieces = content.splitlines() if is_lines else [content]
    for number, piece in enumerate(pieces, 1):
        where = f"line {number}" if is_lines else "the file"
        if is_lines and not piece.strip():
            continue
        try:
            parsed = json.loads(piece.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield where, f"not JSON in UTF-8 ({error}); one object a line is .jsonl"
            continue
        if is_lines:
            yield where, parsed if isinstance(parsed, dict) else "should be an object {…}"
        elif not isinstance(parsed, list):
            yield where, "should be a list […] of objects {…}"
        else:
            for number, item in enumerate(parsed, 1):
                yield f"item {number}", item if isinstance(item, dict) else "should be an object {…}"


def _folder_items(folder: Path) -> Iterator[tuple[str, object]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURE_ENDINGS | CLIP_ENDINGS and not path.name.startswith("."):
            kind = "image" if path.suffix.lower() in PICTURE_ENDINGS else "video"
            try:
                caption = path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
                item = {"file_path": str(path.relative_to(folder)), "text": caption, "type": kind}
            except (OSError, ValueError) as error:
                reason = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
                item = f"its caption {path.with_suffix('.txt').name} is {reason}"
            yield str(path.relative_to(folder)), item


def _to_entry(metadata: Path, item: dict) -> tuple[list[str], Entry | None]:
    """(what is wrong with an item, the entry it stands for)"""
    problems = []
    for field in ("file_path", "text", "type", "control_file_path"):
        if field not in item and field != "control_file_path":
            problems.append(f"{field} is missing")
        elif not isinstance(item.get(field, ""), str):
            problems.append(f"{field} = {json.dumps(item[field])[:80]} should be a string")
    if isinstance(item.get("type"), str) and item["type"] not in ("video", "image"):
        problems.append(f'type = "{item["type"]}" should be "video" or "image"')
    wrong_endings = {"video": PICTURE_ENDINGS, "image": CLIP_ENDINGS}.get(str(item.get("type")), set())
    paths = {}
    for field in ("file_path", "control_file_path"):
        if isinstance(item.get(field), str):
            paths[field] = path = (metadata if metadata.is_dir() else metadata.parent) / item[field]
            if not path.is_file():
                problems.append(f"{field}: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
            elif path.suffix.lower() in wrong_endings:
                problems.append(f'{field}: {path} is no {item["type"]}, as type = "{item["type"]}" says')
    if problems:
        return problems, None
    is_image = item["type"] == "image"
    return [], Entry(paths["file_path"], item["text"], is_image, paths.get("control_file_path"))


def open_record(entry: Entry, fps: float) -> Record:
    """Look at a file's header (a picture is read whole); raises ValueError or OSError if it is damaged."""

    def reader(path: Path) -> Reader:
        if entry.is_image:
            return lambda start, num_frames, size: read_image(path)[None]
        return lambda start, num_frames, size: read_video(path, num_frames, fps, start / fps)

    def look(path: Path) -> tuple[int, int, int]:
        if entry.is_image:
            return 1, *read_image(path).shape[:2]
        clip = probe_video(
            path
        )  # frames up to the instant of its last: how long that lasts is not always said
        return int((clip.seconds - 1 / clip.fps + MILLISECOND) * fps) + 1, clip.height, clip.width

    num_frames, *size = look(entry.path)
    record = Record(
        str(entry.path),
        lambda _: entry.caption,
        num_frames,
        tuple(size),
        reader(entry.path),
        content=(entry.path,) if entry.control is None else (entry.path, entry.control),
    )
    if entry.control is None:
        return record
    num_frames = min(num_frames, look(entry.control)[0])
    return replace(record, num_frames=num_frames, read_control=reader(entry.control))


def open_records(entries: list[Entry], fps: float = 8) -> tuple[list[Record], dict[str, str]]:
    """(records, {path: what is wrong} of the files that cannot be opened), looking at several at a time."""
    failures = {}

    def open_or_note(entry: Entry) -> Record | None:
        try:
            return open_record(entry, fps)
        except (ValueError, OSError) as error:
            failures[str(entry.path)] = str(error)

    with ThreadPoolExecutor() as pool:
        records = [record for record in pool.map(open_or_note, entries) if record]
    return records, dict(sorted(failures.items()))


# ---------------------------------------------------------------- buckets: which samples share a batch


class Batch(NamedTuple):
    bucket: Bucket
    indices: list[int]  # into the records


@dataclass(frozen=True)
class Plan:
    """What a phase of training asks of the data."""

    resolutions: tuple[int, ...]  # base sizes: a bucket of size S has about S² pixels
    max_tokens: int  # of one clip
    batch_tokens: int  # of a micro-batch: it holds max(1, batch_tokens // tokens of its bucket) samples
    max_frames: int = 49
    frames_per_token: int = 1


def sizes_for(record: Record, plan: Plan) -> list[int]:
    """The base sizes a sample is sharp enough for: less than 1.25 x the geometric mean of its sides."""
    return [size for size in plan.resolutions if size < 1.25 * math.sqrt(math.prod(record.size))]


def bucket_at(record: Record, plan: Plan, size: int) -> Bucket:
    """The nearest aspect at a base size, and the frames that fill the token budget, no more than the clip."""
    height, width = nearest_shape(size, *record.size)
    max_frames = min(plan.max_frames, record.num_frames)
    return Bucket(
        frames_for(plan.max_tokens, height, width, max_frames, plan.frames_per_token), height, width
    )


def choose_bucket(record: Record, plan: Plan, draws: torch.Generator) -> Bucket:
    """Draw one of the base sizes a sample is sharp enough for; if none is, the smallest is taken."""
    sizes = sizes_for(record, plan) or [min(plan.resolutions)]
    return bucket_at(record, plan, sizes[integer(draws, 0, len(sizes) - 1)])


def epoch_batches(records: list[Record], plan: Plan, seed: int, epoch: int) -> list[Batch]:
    """One epoch: every record once, in random order, in batches of one shape that follow their first samples.

    Cheap shapes come in larger batches; the last batch of a bucket may be smaller.
    """

    def lot(index: int, purpose: str) -> float:
        return torch.rand((), generator=generator(seed, epoch, index, purpose), dtype=torch.float64).item()

    members: dict[Bucket, list[int]] = {}
    for index in sorted(range(len(records)), key=lambda index: lot(index, "order")):
        bucket = choose_bucket(records[index], plan, generator(seed, epoch, index, "resolution"))
        members.setdefault(bucket, []).append(index)
    batches = []
    for bucket, indices in members.items():
        size = max(1, plan.batch_tokens // bucket.tokens)
        batches += [Batch(bucket, indices[i : i + size]) for i in range(0, len(indices), size)]
    return sorted(batches, key=lambda batch: lot(batch.indices[0], "order"))


def bucket_table(batches: list[Batch]) -> str:
    """The shapes of an epoch with their counts, for printing before training."""
    counts: dict[Bucket, list[int]] = {}
    for batch in batches:
        counts.setdefault(batch.bucket, []).append(len(batch.indices))
    lines = ["frames  height x width   tokens  samples  batches  samples a batch"]
    for bucket, sizes in sorted(counts.items()):
        lines.append(
            f"{bucket.num_frames:6d}  {bucket.height:6d} x {bucket.width:<5d}  {bucket.tokens:7d}"
            f"  {sum(sizes):7d}  {len(sizes):7d}  {max(sizes):15d}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- loading

CAPTION_DROP = 0.1  # unconditional samples, for guidance
TEXT_ONLY = 0.9  # of the samples with everything masked have a zero condition


class Sample(NamedTuple):
    """One sample, or a batch of them with a leading b."""

    pixels: Tensor  # 3 f h w, float in [−1, 1]
    caption: str  # "" where dropped
    mask: Tensor  # f h w, bool, True = generate
    zero_if_all_masked: bool  # see inpaint.inpaint_condition
    control: Tensor | None  # 3 f h w


def draw_start(record: Record, bucket: Bucket, seed: int, epoch: int, index: int) -> int:
    """The frame of a record, counted at the rate we train at, with which a sample begins."""
    return integer(generator(seed, epoch, index, "start"), 0, record.num_frames - bucket.num_frames)


def drops_caption(seed: int, epoch: int, index: int) -> bool:
    return chance(generator(seed, epoch, index, "caption"), CAPTION_DROP)


def load_sample(
    record: Record, bucket: Bucket, seed: int, epoch: int, index: int, start: int | None = None
) -> Sample:
    """Decode and draw everything about one sample but noise and timestep, which the training step draws.

    start: its first frame, in place of the draw
    raises ValueError or OSError if the file is damaged or shorter than its header says
    """
    num_frames, height, width = bucket
    start = draw_start(record, bucket, seed, epoch, index) if start is None else start

    def take(read: Reader) -> Tensor:
        frames = read(start, num_frames, (height, width))
        if len(frames) < num_frames:
            raise ValueError(f"{record.name} ends {num_frames - len(frames)} frames before its header says")
        return to_pixels(fit(frames, height, width))

    return Sample(
        pixels=take(record.read),
        caption="" if drops_caption(seed, epoch, index) else record.caption(num_frames),
        mask=random_mask(generator(seed, epoch, index, "mask"), num_frames, height, width),
        zero_if_all_masked=chance(generator(seed, epoch, index, "text only"), TEXT_ONLY),
        control=take(record.read_control) if record.read_control else None,
    )


class Loader:
    """Loads batches in order and ahead of their use, in threads, and finds replacements for files that fail.

    A failing file is named once, counted, and replaced by the next record in the list that has the frames its
    place needs. More than `max_failures` of all files, if more than one, stop the run with the list.
    """

    def __init__(
        self,
        records: list[Record],
        seed: int,
        failures: dict[str, str] = {},  # files already found broken by open_records
        num_workers: int = 4,
        max_failures: float = 0.05,
        say: Callable[[str], None] = print,
        read: Callable = load_sample,  # in threads
        join: Callable | None = None,  # the samples of a batch; default `collate`
    ):
        self.records, self.seed, self.num_workers, self.say = records, seed, num_workers, say
        self.read, self.join = read, join or collate
        self.num_files = len(records) + len(failures)
        self.max_failures = max(1, int(max_failures * self.num_files))
        self.failures: dict[str, str] = {}
        self.lock = threading.Lock()
        for name, reason in failures.items():
            self.note_failure(name, reason)

    def note_failure(self, name: str, reason: str) -> None:
        with self.lock:
            if name not in self.failures:
                self.failures[name] = reason
                self.say(f"skipped: {reason}" if name in reason else f"skipped: {name}: {reason}")
            if len(self.failures) > self.max_failures:
                listed = "\n  ".join(self.failures[name] for name in sorted(self.failures))
                count = f"{len(self.failures)} of {self.num_files}"
                raise ValueError(f"{count} files are broken; repair or remove them:\n  {listed}")

    def load(self, bucket: Bucket, epoch: int, index: int) -> Sample:
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            try:  # whether it failed before or not: a resumed run would not know
                if record.num_frames >= bucket.num_frames:
                    return self.read(record, bucket, self.seed, epoch, index)
            except (ValueError, OSError) as error:
                self.note_failure(record.name, str(error))
        raise ValueError(f"no file that can be read has {bucket.num_frames} frames")

    def batches(self, todo: Iterable[tuple[int, Batch]], ahead: int = 2) -> Iterator[tuple]:
        """(epoch, batch, its samples collated) for each (epoch, batch) of `todo`; `ahead` more load."""
        queue = collections.deque()
        todo = iter(todo)
        with ThreadPoolExecutor(self.num_workers) as pool:
            try:
                while True:
                    for epoch, batch in itertools.islice(todo, ahead + 1 - len(queue)):
                        jobs = [pool.submit(self.load, batch.bucket, epoch, index) for index in batch.indices]
                        queue.append((epoch, batch, jobs))
                    if not queue:
                        return
                    epoch, batch, jobs = queue.popleft()
                    yield epoch, batch, self.join([job.result() for job in jobs])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def collate(samples: list[Sample]) -> Sample:
    """Samples of one shape as a batch: tensors with a leading b, captions as a list."""
    pixels, captions, masks, zero, control = zip(*samples)
    return Sample(
        torch.stack(pixels),
        list(captions),
        torch.stack(masks),
        torch.tensor(zero),
        torch.stack(control) if all(part is not None for part in control) else None,
    )
