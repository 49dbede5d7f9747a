"""Everything that turns a list of pictures and clips into training batches.

    metadata.py ─► entries ─open_records─► records ─Epochs─► micro-batches ─Loader─► samples

Errors a user can cause are one sentence with the path in it: OSError where the file system refuses, and
ValueError where the contents are at fault. Dimension key: b batch, f frames, h height, w width, c channels.
"""

import collections
import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inpaint import MASK_KINDS, random_mask
from media import MILLISECOND, fit, probe_video, read_image, read_video, to_pixels
from metadata import Entry, read_metadata
from runtime import chance, generator, integer, say
from sizes import Bucket, frames_for, nearest_shape, num_tokens

# ---------------------------------------------------------------- samples: what is known before decoding

# (start, num_frames, size) -> uint8 f h w 3 of that size (height, width), to which files are fitted; start
# counts frames at the rate we train at.
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
    scene: object = None  # of a drawn clip: many are drawn at once where they are needed, by shapes.draw


class Files(NamedTuple):
    """What a run learns from."""

    records: list[Record]
    held_out: list[Record]  # for validation and previews
    failures: dict[str, str] = {}  # what is wrong with those that cannot be opened, by path


def open_record(entry: Entry, fps: float) -> Record:
    """Look at a file's header (a picture is read whole); raises ValueError or OSError if it is damaged."""

    def reader(path: Path) -> Reader:
        if entry.is_image:
            return lambda start, num_frames, size: fit(read_image(path)[None], *size)
        return lambda start, num_frames, size: read_video(path, num_frames, fps, start / fps, size=size)

    def look(path: Path) -> tuple[int, tuple[int, int]]:
        """Frames at the rate we train at; height, width."""
        if entry.is_image:
            return 1, read_image(path).shape[:2]
        clip = probe_video(path)
        last = clip.seconds - 1 / clip.fps  # how long the last frame lasts is not always said
        return int((last + MILLISECOND) * fps) + 1, (clip.height, clip.width)

    name = str(entry.path)
    num_frames, size = look(entry.path)
    read = reader(entry.path)
    if entry.control is None:
        return Record(name, lambda _: entry.caption, num_frames, size, read, content=(entry.path,))
    num_frames = min(num_frames, look(entry.control)[0])
    content = (entry.path, entry.control)
    return Record(name, lambda _: entry.caption, num_frames, size, read, reader(entry.control), content)


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


def open_files(path: str, held_out_path: str | None, num_held_out: int, fps: float) -> Files:
    """The samples of a metadata file or folder; held out are those of another one, or every tenth, at most
    num_held_out of them."""
    records, failures = open_records(read_metadata(path), fps)
    if held_out_path:
        held_out, more = open_records(read_metadata(held_out_path), fps)
        return Files(records, held_out[:num_held_out], failures | more)
    chosen = range(9, len(records), 10)[:num_held_out] or range(len(records))[-1:]
    held_out = [records[i] for i in chosen]
    rest = [record for i, record in enumerate(records) if i not in chosen]
    return Files(rest or held_out, held_out, failures)


def draw_files(
    num_samples: int, picture_share: float, num_held_out: int, num_frames: int, seed: int
) -> Files:
    """The drawn world of shapes.py. Of ten clips four are square, two each 2:3 and 3:2, one each 1:2 and 2:1.
    Pictures are square, as each shape would be micro-batches of its own, and nearly empty ones. Held out are
    the combinations of `shapes.is_held_out`."""
    import shapes  # here and in `pixels_of`, so that shapes.py can be deleted

    num_pictures = int(num_samples * picture_share)
    sizes = [(128, 128), (104, 156), (128, 128), (156, 104), (90, 180)]
    sizes += [(128, 128), (104, 156), (128, 128), (156, 104), (180, 90)]
    clips = shapes.records(num_samples - num_pictures, seed, sizes=sizes, num_frames=num_frames)
    clips += shapes.records(num_pictures, seed + 1, sizes=sizes[:1], num_frames=1)
    unseen = shapes.records(num_held_out, seed + 2, True, sizes, num_frames)
    return Files([shape_record(clip) for clip in clips], [shape_record(clip) for clip in unseen])


def shape_record(clip) -> Record:
    """A `shapes.Clip`, which is drawn where it is needed."""
    return Record(
        name=clip.scene.caption(),
        caption=clip.scene.caption,
        num_frames=clip.num_frames,
        size=clip.size,
        read=clip.read,
        content=(Path(inspect.getfile(type(clip))), repr(clip)),
        scene=clip.scene,
    )


def digest(records: list[Record]) -> str:
    """What a list of samples is, wherever its files lie: their names, sizes and captions, in order.

    A run that goes on with other samples would train on what it had held out.
    """
    hashed = hashlib.sha256()
    for record in records:
        parts = []
        for part in record.content:
            parts.append((part.name, part.stat().st_size) if isinstance(part, Path) else part)
        hashed.update(repr((parts, record.caption(record.num_frames))).encode(errors="surrogatepass"))
    return hashed.hexdigest()


def caption_report(captions: list[str], tokenizer, max_length: int) -> list[str]:
    """A line each on captions that are cut to so many tokens, and on words that the model does not know."""
    lengths = [len(tokenizer.encode(caption)) + 1 for caption in captions]  # 1 for </s>
    num_cut = sum(length > max_length for length in lengths)
    unknown = collections.Counter(word for caption in captions for word in tokenizer.unknown_words(caption))
    lines = []
    if num_cut:
        count = f"{num_cut} of {len(captions)}, the longest has {max(lengths)}"
        lines.append(f"captions cut to {max_length} tokens: {count}")
    if unknown:
        words = ", ".join(f"{word} ({count}x)" for word, count in unknown.most_common(10))
        lines.append(f"words in captions that the model does not know: {len(unknown)}, such as {words}")
    return lines


# ---------------------------------------------------------------- micro-batches: which samples train together

CAPTION_DROP = 0.1  # unconditional samples, for guidance
ZERO_CONDITION = 0.9  # share of the samples with everything masked whose condition is zero
PICTURE_DROP = 0.05  # of an image model's samples are not shown their first picture

Key = tuple[int, int, int]  # (seed, draw, sample): what all about a sample is a function of, see `Epochs`


@dataclass(frozen=True)
class Plan:
    """What a phase of training asks of the data."""

    resolutions: tuple[int, ...]  # base sizes: a bucket of size S has about S² pixels
    max_tokens: int  # of one clip
    batch_tokens: int  # of a micro-batch: it holds max(1, batch_tokens // tokens of its bucket) samples
    max_frames: int = 49
    frames_per_token: int = 1
    num_padding: int = 0  # latent frames in front of a clip, which count: CogVideoX1.5's, see Denoising
    size: tuple[int, int] | None = None  # height, width, where a model takes no other
    masks: dict[str, float] = dataclasses.field(default_factory=MASK_KINDS.copy)  # none: not drawn
    text_only: float = 0.0  # share of samples with everything masked and a zero condition, beyond `masks`


def sizes_for(record: Record, plan: Plan) -> list[int]:
    """The base sizes a sample is sharp enough for: less than 1.25 x the geometric mean of its sides."""
    return [size for size in plan.resolutions if size < 1.25 * math.sqrt(math.prod(record.size))]


def bucket_at(record: Record, plan: Plan, size: int) -> Bucket:
    """The nearest aspect at a base size, and the frames that fill the token budget, no more than the clip."""
    height, width = plan.size or nearest_shape(size, *record.size)
    longest = min(plan.max_frames, record.num_frames)
    frames = frames_for(plan.max_tokens, height, width, longest, plan.frames_per_token, plan.num_padding)
    return Bucket(frames, height, width)


def tokens_of(bucket: Bucket, plan: Plan) -> int:
    """What a clip of this shape counts; a picture is not padded."""
    padding = plan.num_padding if bucket.num_frames > 1 else 0
    return num_tokens(bucket.num_frames + 4 * padding, bucket.height, bucket.width)


def choose_bucket(record: Record, plan: Plan, draws: torch.Generator) -> Bucket:
    """Draw one of the base sizes a sample is sharp enough for; if none is, the smallest is taken."""
    sizes = sizes_for(record, plan) or [min(plan.resolutions)]
    return bucket_at(record, plan, sizes[integer(draws, 0, len(sizes) - 1)])


@dataclass
class Micro:
    """A micro-batch: samples of one shape, that go through the network together."""

    bucket: Bucket
    indices: list[int]  # of its samples, in the records
    keys: list[Key]  # of the same
    epoch: int
    number: int  # in the epoch's list

    def places(self) -> list[tuple[int, Bucket, Key]]:
        """What each sample is made from: its number in the records, its shape, its draws."""
        return [(index, self.bucket, key) for index, key in zip(self.indices, self.keys)]

    def draws(self, seed: int, device: torch.device) -> torch.Generator:
        """Of its posterior and diffusion noise, which are drawn at once for all its samples."""
        return generator(seed, self.epoch, self.number, "noise", device=device)


Batch = dict[str, Tensor]  # a micro-batch encoded, see train_dit.Encoders and cache.py


@dataclass
class Epochs:
    """Epoch after epoch of micro-batches: every record once an epoch, in random order.

    All about a sample (bucket, start, mask, dropped mask and caption, noise on known pixels) is a function of
    its key (seed, draw, sample). The draw is the epoch; or with num_draws > 0, where samples are kept once
    they are encoded, the epoch modulo num_draws, so that only so many are ever asked for. The sample is its
    place in the list; or its number in `names`, which may follow from its content, wherever it stands.
    Cheap shapes come in larger micro-batches. The last one of a bucket is smaller; or, with only_full, what
    is left over waits for another epoch, so that each bucket has one size, and a compiler one shape.
    """

    records: list[Record]
    plan: Plan
    seed: int
    num_draws: int = 0
    only_full: bool = False
    names: Sequence[int] = ()

    def __post_init__(self):
        self.names = self.names or range(len(self.records))
        self.buckets: dict[int, list[Bucket]] = {}  # by draw

    def micros(self, epoch: int, everything: bool = False) -> list[Micro]:
        """The micro-batches of one epoch; everything: with what only_full would leave over."""
        draw = epoch % self.num_draws if self.num_draws else epoch
        order = generator(self.seed, epoch, "order")
        buckets = self._buckets(draw)
        members: dict[Bucket, list[int]] = {}
        for index in torch.randperm(len(self.records), generator=order).tolist():
            members.setdefault(buckets[index], []).append(index)
        groups = []
        for bucket, indices in members.items():
            size = max(1, self.plan.batch_tokens // tokens_of(bucket, self.plan))
            if self.only_full and not everything and len(indices) > size:
                indices = indices[: len(indices) // size * size]
            groups += [(bucket, indices[i : i + size]) for i in range(0, len(indices), size)]
        micros = []
        shuffled = torch.randperm(len(groups), generator=order).tolist()
        for number, (bucket, indices) in enumerate(groups[i] for i in shuffled):
            keys = [(self.seed, draw, self.names[index]) for index in indices]
            micros.append(Micro(bucket, indices, keys, epoch, number))
        return micros

    def _buckets(self, draw: int) -> list[Bucket]:
        """Of each record, under a draw."""
        if draw not in self.buckets:
            if not self.num_draws:
                self.buckets.clear()  # the last epoch's will not come again
            draws = (generator(self.seed, draw, name, "resolution") for name in self.names)
            self.buckets[draw] = [choose_bucket(r, self.plan, d) for r, d in zip(self.records, draws)]
        return self.buckets[draw]

    def asked(self, epoch: int, number: int, size: int, num_steps: int) -> Iterator[Micro]:
        """What `num_steps` of `steps` ask for; where that passes all there is, everything once."""
        if size * num_steps < sum(len(self.micros(draw)) for draw in range(self.num_draws)):
            for micros in itertools.islice(self.steps(epoch, number, size), num_steps):
                yield from micros
        else:
            for draw in range(self.num_draws):
                yield from self.micros(draw, everything=True)

    def steps(self, epoch: int, number: int, size: int) -> Iterator[list[Micro]]:
        """Lists of `size` micro-batches, one for each step, through all epochs from a place on."""
        todo = self.micros(epoch)[number:]
        while True:
            while len(todo) < size:
                epoch += 1
                todo += self.micros(epoch)
            yield todo[:size]
            todo = todo[size:]


VALIDATION = -1  # the epoch of held-out samples, so that they never share a draw with training


def held_out_micros(records: list[Record], plan: Plan, seed: int) -> list[Micro]:
    """A micro-batch for each held-out sample, of the same crop, mask and noise each time."""
    micros = []
    for index, record in enumerate(records):
        key = (seed, VALIDATION, index)
        bucket = choose_bucket(record, plan, generator(*key, "resolution"))
        micros.append(Micro(bucket, [index], [key], VALIDATION, index))
    return micros


def bucket_table(micros: list[Micro], plan: Plan) -> str:
    """The shapes of an epoch with their counts, for printing before training."""
    counts: dict[Bucket, list[int]] = {}
    for micro in micros:
        counts.setdefault(micro.bucket, []).append(len(micro.keys))
    lines = ["frames  height x width   tokens  samples  batches  samples a batch"]
    for bucket, sizes in sorted(counts.items()):
        num_frames, height, width = bucket
        shape = f"{num_frames:6d}  {height:6d} x {width:<5d}  {tokens_of(bucket, plan):7d}"
        lines.append(f"{shape}  {sum(sizes):7d}  {len(sizes):7d}  {max(sizes):15d}")
    return "\n".join(lines)


# ---------------------------------------------------------------- loading


class Sample(NamedTuple):
    """One sample, read and drawn; only the noise of its micro-batch is still to come."""

    key: Key
    frames: Tensor | None  # uint8 f h w 3; None where it is to be drawn
    caption: str  # "" where dropped
    mask: Tensor  # bool f h w, True = generate
    zero_if_all_masked: bool  # see inpaint.inpaint_condition
    control: Tensor | None  # uint8 f h w 3
    drawing: tuple[object, int, int] | None = None  # scene, first frame, frames of the whole clip


def draw_caption(record: Record, bucket: Bucket, key: Key) -> str:
    """The record's, or "" for a share of the samples."""
    return "" if chance(generator(*key, "caption"), CAPTION_DROP) else record.caption(bucket.num_frames)


def read_all(record: Record, read: Reader, start: int, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    """What one of a record's readers gives; ValueError if the file is shorter than its header says."""
    frames = read(start, num_frames, size)
    missing = num_frames - len(frames)
    if missing > 0:
        raise ValueError(f"{record.name} ends {missing} frames before its header says; encode it anew")
    return frames


def load_sample(record: Record, bucket: Bucket, key: Key, plan: Plan) -> Sample:
    """Decode and draw everything about one sample.

    raises ValueError or OSError if the file is damaged or shorter than its header says
    """
    num_frames, height, width = bucket
    start = integer(generator(*key, "start"), 0, record.num_frames - num_frames)

    def take(read: Reader) -> Tensor:
        return torch.from_numpy(np.array(read_all(record, read, start, num_frames, (height, width))))

    mask = torch.ones(1, 1, 1, dtype=torch.bool).expand(num_frames, height, width)  # generate everything
    zero_if_all_masked = True
    if plan.masks and not (plan.text_only and chance(generator(*key, "mask dropped"), plan.text_only)):
        mask = random_mask(generator(*key, "mask"), num_frames, height, width, plan.masks)
        zero_if_all_masked = chance(generator(*key, "text only"), ZERO_CONDITION)
    drawing = (record.scene, start, record.num_frames) if record.scene else None
    return Sample(
        key=key,
        frames=None if drawing else take(record.read),
        caption=draw_caption(record, bucket, key),
        mask=mask,
        zero_if_all_masked=zero_if_all_masked,
        control=take(record.read_control) if record.read_control else None,
        drawing=drawing,
    )


def pixels_of(samples: list[Sample], device: torch.device) -> Tensor:
    """The clips of samples of one shape, b 3 f h w in [−1, 1], on a device."""
    drawings = [one.drawing for one in samples]
    if None in drawings:
        return to_pixels(torch.stack([one.frames for one in samples]).to(device))
    from shapes import draw

    f, h, w = samples[0].mask.shape
    frames = torch.empty(len(samples), f, h, w, 3, dtype=torch.uint8, device=device)
    lengths = [length for _, _, length in drawings]
    for length in set(lengths):  # those of one length are drawn at once
        rows = [i for i, other in enumerate(lengths) if other == length]
        scenes = [drawings[i][0] for i in rows]
        starts = [drawings[i][1] for i in rows]
        frames[rows] = draw(scenes, f, h, w, starts, length, device)
    return to_pixels(frames)


class Loader:
    """Loads micro-batches in order and ahead of their use, in threads, and finds replacements for bad files.

    A failing file is named once, counted, and replaced by the next record in the list that has the frames its
    place needs. More than `max_failures` of all files, if more than one, stop the run with the list.
    """

    def __init__(
        self,
        records: list[Record],
        failures: dict[str, str] = {},  # files already found broken by open_records
        num_workers: int = 4,
        max_failures: float = 0.05,
    ):
        self.records, self.num_workers = records, num_workers
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
                text = f"skipped: {reason}" if name in reason else f"skipped: {name}: {reason}"
                say(text, on_all_ranks=True)
            if len(self.failures) > self.max_failures:
                listed = "\n  ".join(self.failures[name] for name in sorted(self.failures))
                count = f"{len(self.failures)} of {self.num_files}"
                raise ValueError(f"{count} files are broken; repair or remove them:\n  {listed}")

    def load(self, index: int, bucket: Bucket, key: Key, read: Callable):
        """What `read(record, bucket, key)` gives; of the next record that can be read if this one cannot."""
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            try:  # whether it failed before or not: a resumed run would not know
                if record.num_frames >= bucket.num_frames:
                    return read(record, bucket, key)
            except (ValueError, OSError) as error:
                self.note_failure(record.name, str(error))
        raise ValueError(f"no file that can be read has {bucket.num_frames} frames")

    def each(self, micros: Iterable[Micro], read: Callable, ahead: int = 2) -> Iterator[list]:
        """What `load` gives for the samples of each micro-batch."""
        return each_ahead(micros, functools.partial(self.load, read=read), self.num_workers, ahead)


def each_ahead(micros: Iterable[Micro], load: Callable, num_threads: int, ahead: int) -> Iterator[list]:
    """What `load(index, bucket, key)` gives for the samples of each micro-batch, in order; `ahead` more of
    them are loaded meanwhile."""
    waiting = collections.deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for micro in micros:
                waiting.append([pool.submit(load, *place) for place in micro.places()])
                if len(waiting) > ahead:
                    yield [job.result() for job in waiting.popleft()]
            while waiting:
                yield [job.result() for job in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)
