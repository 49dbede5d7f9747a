"""Pictures and clips in and out, and everything that turns a list of them into training batches.

    .mp4 .gif .mkv …  ─read_video─► uint8 f h w 3 ─resize, or fit in training─to_pixels─► 3 f h w ∈ [−1, 1]
    .png .jpg …       ─read_image─► uint8   h w 3
    mask picture/clip ─read_mask──► bool  f h w, True = generate here (white)
    float 3 f h w ─to_uint8─► uint8 f h w 3 ─write_video─► .mp4 .gif .png

    metadata ─read_metadata─► entries ─open_records─► records ─epoch_batches─► batches ─Loader─► Sample

A clip is a function of time: reading it means choosing instants start + i/fps and taking the frame nearest to
each, so a 30 fps clip read at 8 fps keeps its speed, and variable frame rates need no special case.

Errors a user can cause are one sentence with the path in it: OSError where the file system refuses, and
ValueError where the contents are at fault. Dimension key: f frames, h height, w width, c = 3 colours.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from checkpoint import atomic_write

MAX_PIXELS, MAX_CLIP_PIXELS = 2**26, 2**31  # 8192x8192, and 64 of them: a small file may claim anything
MILLISECOND = 1e-3  # what containers round timestamps to: instants closer than that are the same
Picture = str | Path | Image.Image | np.ndarray | Tensor  # arrays are uint8
Clip = str | Path | np.ndarray | Tensor
PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
CLIP_ENDINGS = set(".mp4 .gif .mov .mkv .webm .avi .m4v .mpg .mpeg .ts .wmv .flv".split())

# ---------------------------------------------------------------- pictures


def read_image(source: Picture) -> np.ndarray:
    """A picture as uint8 h w 3, upright (EXIF orientation applied).

    source: path, PIL picture, or uint8 array h w, h w 3 or h w 4. Grey and palette pictures become RGB, 16
    bits become 8; transparency is dropped (the colour beneath it shows), as the reference does.
    raises OSError if the file is missing, ValueError if it is damaged or a clip
    """
    if not isinstance(source, (str, Path)):
        return _to_rgb(source if isinstance(source, Image.Image) else _from_array(np.asarray(source)))
    _must_exist(source)
    if Path(source).suffix.lower() in CLIP_ENDINGS - {".gif"}:
        raise ValueError(f"{source} is a clip; a picture is needed here (its first frame, for instance)")
    try:
        with Image.open(source) as picture:
            if math.prod(picture.size) > MAX_PIXELS:
                raise OverflowError(f"{picture.width}x{picture.height}, try at most 8192x8192")
            is_clip = picture.format in ("GIF", "PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1
            rgb = _to_rgb(picture)
    except (OverflowError, Image.DecompressionBombError) as error:
        raise ValueError(f"{source} is too large ({error})") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise ValueError(
            f"{source} is empty, damaged or no picture ({type(error).__name__}); give a .png or .jpg"
        ) from None
    if is_clip:
        raise ValueError(f"{source} is a clip; a picture is needed here (its first frame, for instance)")
    return rgb


def _to_rgb(picture: Image.Image) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip at 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    return np.asarray(picture.convert("RGB"))  # h w 3


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"a picture is uint8 h w, h w 3 or h w 4, not {array.dtype} {list(array.shape)}")
    return Image.fromarray(array)


def _must_exist(path: str | Path) -> None:
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "does not exist as a file"
        raise FileNotFoundError(f"{path or 'an empty name'} {problem}; give the path of a file")


def resize(
    frames: np.ndarray, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """uint8 f h w c (or h w c) at another size: PIL's bicubic, frame by frame, as the reference does.

    box: the part to take, as left, top, right, bottom in pixels; all of it by default
    """
    if frames.ndim == 4:
        return np.stack([resize(frame, height, width, box) for frame in frames])
    picture = Image.fromarray(frames)  # resizing to the size it has copies
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box))


# ---------------------------------------------------------------- clips in


class ClipInfo(NamedTuple):
    num_frames: int
    fps: float  # average
    height: int  # upright, as shown
    width: int
    seconds: float


@contextlib.contextmanager
def _open_clip(path: str | Path) -> Iterator:
    """The container and its video stream; whatever ffmpeg raises in the block comes out as one sentence."""
    import av  # here and below: a clip may not be needed, and it is slow to import

    _must_exist(path)
    try:
        absolute = str(Path(path).absolute())  # so that ffmpeg never takes a name for a protocol
        with av.open(absolute, metadata_errors="replace") as container:
            kind = container.format.name
            if kind.endswith("_pipe") or kind in ("image2", "ico"):
                raise ValueError(f"{path} is a picture; a clip (.mp4, .gif, …) is needed here")
            if not container.streams.video or kind == "tty":  # ffmpeg draws text files as terminals
                raise ValueError(f"{path} holds no video; give an .mp4 or .gif")
            container.streams.video[0].thread_count = 1  # threads read ahead, and may fail beyond the span
            yield container, container.streams.video[0]
    except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV's, where a stream appears on the way
        reason = getattr(error, "strerror", error)
        raise ValueError(
            f"{path} is empty, damaged or no clip ({reason}); make it again, for instance as .mp4"
        ) from None


def _decode(container, stream, start: float) -> Iterator[tuple]:
    """(seconds since the clip's first frame, frame) from the keyframe before `start` on; last (end, None).

    Nothing before that keyframe is decoded. Frames without a timestamp follow at the stream's rate.
    """
    import av

    origin = stream.start_time or 0
    step = duration = float(1 / (stream.guessed_rate or stream.average_rate or 25))
    seeked = start > 0 and stream.start_time is not None
    if seeked:
        with contextlib.suppress(av.FFmpegError):  # not every format can: then decode from the beginning
            container.seek(origin + int(start / stream.time_base), stream=stream)
    seconds = -step
    for frame in container.decode(stream):
        seconds = float((frame.pts - origin) * stream.time_base) if frame.pts is not None else seconds + step
        if seeked and seconds > start:  # the file's index led past the target
            container.seek(min(origin, 0), stream=stream)
            yield from _decode(container, stream, 0.0)
            return
        seeked = False
        duration = float((frame.duration or 0) * stream.time_base) or step
        yield seconds, frame
    yield seconds + duration, None


def _shown(path: str | Path, container, stream, start: float) -> Iterator[tuple]:
    """(from, to, nearest until, frame), in seconds, of each frame from the keyframe before `start` on.

    A frame is nearest up to half-way to its successor, which loses a tie; the last one up to its end.
    raises ValueError where timestamps jump
    """
    slack = 6 * MILLISECOND if container.format.name == "gif" else MILLISECOND  # counts in 1/100 s
    for (seconds, frame), (following, successor) in itertools.pairwise(_decode(container, stream, start)):
        if not -1 < following - seconds < 60:
            raise ValueError(f"{path} has timestamps that jump by {following - seconds:.0f} s")
        until = (seconds + following + MILLISECOND) / 2 if successor else following - slack
        yield seconds, following, until, frame


def _upright_rgb(frame) -> np.ndarray:
    """uint8 h w 3; phones store the sensor's picture and a rotation (degrees counter-clockwise)."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def read_video(
    source: Clip, num_frames: int | None = None, fps: float | None = None, start: float = 0.0
) -> np.ndarray:
    """The frames nearest to the instants start + i/fps of a clip, uint8 f h w 3.

    num_frames: at most so many; a shorter clip gives what it has   start: seconds
    fps: frames a second to read at (a slow clip repeats frames); None takes every frame as it is stored
    source: path, or uint8 array f h w 3, which is taken to be at the wanted rate already
    raises OSError if the file is missing, ValueError if it is damaged, a picture, or over before `start`
    """
    if not isinstance(source, (str, Path)):
        return _checked_frames(np.asarray(source), "a clip")[:num_frames]
    frames: list[np.ndarray] = []
    with _open_clip(source) as (container, stream):
        for seconds, _, until, frame in _shown(source, container, stream, start):
            if fps is None:
                count = int(seconds > start - MILLISECOND)
            else:
                count = max(0, math.ceil((until - start) * fps) - len(frames))
            pixels, held = frame.width * frame.height, min(len(frames) + count, num_frames or 2**31)
            if pixels > MAX_PIXELS or pixels * held > MAX_CLIP_PIXELS:
                raise ValueError(f"{source} is too large, {frame.width}x{frame.height}; make it smaller")
            if count:
                frames += [_upright_rgb(frame)] * count
            if num_frames is not None and len(frames) >= num_frames:
                break
    if not frames:
        raise ValueError(f"{source} has no frame at {start:g} s; it is empty or shorter than that")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{source} changes its size on the way; encode it anew at one size")
    return np.stack(frames[:num_frames])


def probe_video(path: str | Path) -> ClipInfo:
    """Length, rate and size of a clip: from its header, else by counting packets; one frame is decoded."""
    with _open_clip(path) as (container, stream):
        _, frame = next(_decode(container, stream, 0.0))
        if frame is None:
            raise ValueError(f"{path} has no frames")
        height, width = _upright_rgb(frame).shape[:2]
        num_frames, duration = stream.frames, stream.duration
    with _open_clip(path) as (container, stream):
        step = 1 / (stream.guessed_rate or stream.average_rate or 25)
        if num_frames <= 0 or not duration or duration < 0:
            packets = [packet for packet in container.demux(stream) if packet.size]
            stamps = [packet.pts for packet in packets if packet.pts is not None] or [0]
            num_frames = max(1, len(packets))
            duration = max(stamps) - min(stamps) + (packets[-1].duration or 0 if packets else 0)
        seconds = float(duration * stream.time_base or num_frames * step)
    return ClipInfo(num_frames, num_frames / seconds, height, width, seconds)


def read_mask(source: Picture, num_frames: int, height: int, width: int, fps: float | None = None) -> Tensor:
    """Where to generate, bool f h w: True where a picture (held over all frames) or a clip is white, ≥ 240.

    source: path, PIL picture, or array h w, h w 3, f h w, f h w 1 or f h w 3, uint8 or bool; resized to fit
    raises ValueError if a mask of several frames has fewer than `num_frames`
    """
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() not in PICTURE_ENDINGS:
        frames = read_video(source, num_frames, fps)
    elif isinstance(source, (str, Path, Image.Image)):
        frames = read_image(source)[None]
    else:
        frames = np.asarray(source)
        frames = frames.astype(np.uint8) * 255 if frames.dtype == bool else frames
        frames = frames[None] if frames.ndim == 2 or frames.ndim == 3 and frames.shape[-1] == 3 else frames
        frames = frames[..., 0] if frames.ndim == 4 and frames.shape[-1] == 1 else frames
    name = source if isinstance(source, (str, Path)) else "the mask"
    if 1 < len(frames) < num_frames:
        raise ValueError(f"{name} has {len(frames)} frames, the clip {num_frames}; give a picture or as many")
    grey = [np.asarray(_from_array(frame).convert("L")) for frame in frames[:num_frames]]
    white = torch.from_numpy(np.stack([resize(frame, height, width) >= 240 for frame in grey]))
    return white.expand(num_frames, -1, -1)


# ---------------------------------------------------------------- between files and the network


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 f h w 3 -> float 3 f h w in [−1, 1].

    The same bits as the reference's u8/255·2 − 1, because doubling is exact.
    """
    return torch.from_numpy(np.array(frames)).movedim(-1, -4).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> np.ndarray:
    """float … 3 f h w in [−1, 1] -> uint8 … f h w 3, the inverse of `to_pixels`.

    Rounds to nearest as diffusers' export does; the reference's truncates, which darkens by half a step.
    """
    return (
        ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(-4, -1).cpu().numpy()
    )


# ---------------------------------------------------------------- clips out


def write_video(frames: Clip | Iterable[np.ndarray], path: str | Path, fps: float = 8) -> None:
    """Write uint8 f h w 3 by the ending: .mp4 (H.264), .gif (looped), .png (a strip of at most 8 frames).

    frames: all at once, or an iterable of chunks in order; an mp4 then never holds more than one chunk.
    Written under a temporary name and renamed; equal frames give equal bytes.
    raises ValueError for another ending or odd sizes, OSError if the place cannot be written
    """
    import av

    path = Path(path)
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_strip}
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path} should end in {', '.join(writers)}")
    chunks = [frames] if isinstance(frames, (np.ndarray, Tensor)) else frames
    chunks = (_checked_frames(np.asarray(chunk), str(path)) for chunk in chunks)
    if (first := next(chunks, None)) is None:
        raise ValueError(f"there are no frames to write to {path}")
    try:
        with atomic_write(path) as temporary:
            writers[path.suffix.lower()](temporary, itertools.chain([first], chunks), fps)
    except (OSError, av.FFmpegError) as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}); choose another place") from None


def _checked_frames(frames: np.ndarray, name: str) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name} needs frames as uint8 f h w 3, not {frames.dtype} {list(frames.shape)}")
    return frames


def _write_mp4(path: Path, chunks: Iterator[np.ndarray], fps: float) -> None:
    import av

    first = next(chunks)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} frames do not fit .mp4, which needs even sizes; write a .gif")
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        # No visible loss, and always the same bytes: one thread on any machine, and no mbtree, whose look
        # ahead was seen to read memory that nobody wrote.
        options = {"crf": "17", "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709 …
        codec.color_range = 1  # … in limited range, said so that players need not guess
        for chunk in itertools.chain([first], chunks):
            for frame in chunk:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_gif(path: Path, chunks: Iterator[np.ndarray], fps: float) -> None:
    frames = np.concatenate(list(chunks))
    sample = Image.fromarray(frames[:, ::2, ::2].reshape(len(frames), -1, 3))
    palette = sample.quantize(256)  # one for all frames: a palette each would flicker
    pictures = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    ends = [round(100 * i / fps) for i in range(len(pictures) + 1)]  # GIF counts hundredths of a second
    durations = [10 * (end - begin) for begin, end in zip(ends, ends[1:])]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _write_strip(path: Path, chunks: Iterator[np.ndarray], fps: float) -> None:
    frames = np.concatenate(list(chunks))
    Image.fromarray(np.concatenate(frames[_evenly(len(frames), 8)], axis=1)).save(path)


def _evenly(num: int, most: int) -> list[int]:
    """At most `most` indices out of `num`, evenly spread, the first and last among them."""
    return [round(i) for i in np.linspace(0, num - 1, min(num, most))]


# ---------------------------------------------------------------- one randomness rule


def rng(seed: int, epoch: int, index: int, purpose: str) -> torch.Generator:
    """The generator of one draw in training: a function of what it is for, never of what was drawn before.

    So a run's state is a few counters, and neither order, ranks, threads nor a resume change a number.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {index} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _chance(generator: torch.Generator, probability: float) -> bool:
    return torch.rand((), generator=generator).item() < probability


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Uniform in low … high, both included."""
    return int(torch.randint(low, max(low, high) + 1, (), generator=generator))


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


def frames_for(
    max_tokens: int, height: int, width: int, max_frames: int = 49, latent_multiple: int = 1
) -> int:
    """The frames of a clip that fill a token budget: 4k+1, for the nearest number k+1 of latent frames.

    A token is 16x16 pixels of a latent frame. 13312 tokens are 49 frames at 512², 21 at 768², 9 at 1024².
    latent_multiple: 2 for models that patch latent frames in pairs (patch_size_t); one frame alone stays one
    """
    latent_frames = round(max_tokens / (height / 16 * width / 16))
    latent_frames = min(max(latent_frames, 1), (max_frames - 1) // 4 + 1)
    return 4 * (max(latent_frames // latent_multiple * latent_multiple, 1) - 1) + 1


class Bucket(NamedTuple):
    """The shape all samples of a batch have."""

    num_frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return ((self.num_frames - 1) // 4 + 1) * (self.height // 16) * (self.width // 16)


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
    latent_multiple: int = 1


@functools.cache
def aspect_shapes(size: int) -> list[tuple[int, int]]:
    """(height, width) of about size² pixels: the square and 40 others from 1:4 to 4:1, multiples of 16.

    The steps are even in the logarithm; small sizes have fewer, as neighbours fall together.
    """
    rows = [round(size / 16 * 2 ** (i / 20)) for i in range(21)]
    tall = [(16 * r, 16 * round(size**2 / (256 * r))) for r in rows]
    return sorted({*tall, *((width, height) for height, width in tall)})


def sizes_for(record: Record, plan: Plan) -> list[int]:
    """The base sizes a sample is sharp enough for: less than 1.25 x the geometric mean of its sides."""
    return [size for size in plan.resolutions if size < 1.25 * math.sqrt(math.prod(record.size))]


def bucket_at(record: Record, plan: Plan, size: int) -> Bucket:
    """The nearest aspect at a base size, and the frames that fill the token budget, no more than the clip."""
    aspect = math.log(record.size[0] / record.size[1])
    height, width = min(aspect_shapes(size), key=lambda shape: abs(math.log(shape[0] / shape[1]) - aspect))
    max_frames = min(plan.max_frames, record.num_frames)
    return Bucket(frames_for(plan.max_tokens, height, width, max_frames, plan.latent_multiple), height, width)


def choose_bucket(record: Record, plan: Plan, generator: torch.Generator) -> Bucket:
    """Draw one of the base sizes a sample is sharp enough for; if none is, the smallest is taken."""
    sizes = sizes_for(record, plan) or [min(plan.resolutions)]
    return bucket_at(record, plan, sizes[_integer(generator, 0, len(sizes) - 1)])


def epoch_batches(records: list[Record], plan: Plan, seed: int, epoch: int) -> list[Batch]:
    """One epoch: every record once, in random order, in batches of one shape that follow their first samples.

    Cheap shapes come in larger batches; the last batch of a bucket may be smaller.
    """

    def lot(index: int, purpose: str) -> float:
        return torch.rand((), generator=rng(seed, epoch, index, purpose), dtype=torch.float64).item()

    members: dict[Bucket, list[int]] = {}
    for index in sorted(range(len(records)), key=lambda index: lot(index, "order")):
        bucket = choose_bucket(records[index], plan, rng(seed, epoch, index, "resolution"))
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


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 f h w 3 resized to cover height x width; what sticks out is cut off evenly on both sides."""
    full_height, full_width = frames.shape[1:3]
    scale = min(full_height / height, full_width / width)  # pixels of the file for one of ours
    top, left = (full_height - height * scale) / 2, (full_width - width * scale) / 2
    return resize(frames, height, width, box=(left, top, full_width - left, full_height - top))


# ---------------------------------------------------------------- what is hidden from the network

MASK_KINDS = {  # of a clip, with their share (the reference's); a picture: a box .2, everything .8
    "everything": 0.2,
    "after the start": 0.2,  # all frames from k on, k = 1 … 4
    "between start and end": 0.2,  # frames k … f-k
    "ellipse": 0.1,
    "circle": 0.05,
    "box": 0.05,
    "box for a while": 0.05,
    "boxes here and there": 0.05,
    "pixels": 0.05,
    "frames": 0.05,
}


def random_mask(generator: torch.Generator, num_frames: int, height: int, width: int) -> Tensor:
    """What the network is to generate in one training sample, bool f h w, True = generate.

    Kinds and shares are those of the reference (data/dataset_image_video.py). What is equal over frames or
    pixels is an expanded view, so most draws cost nothing of the full size.
    """
    if num_frames == 1:
        kind = "box" if _chance(generator, 0.2) else "everything"
    else:
        shares = torch.tensor(list(MASK_KINDS.values()))
        kind = list(MASK_KINDS)[int(torch.multinomial(shares, 1, generator=generator))]
    return _mask_of_kind(kind, generator, num_frames, height, width).expand(num_frames, height, width)


def _mask_of_kind(kind: str, generator: torch.Generator, f: int, h: int, w: int) -> Tensor:
    """bool, broadcastable to f h w"""
    frame = torch.arange(f).view(f, 1, 1)
    if kind in ("after the start", "between start and end"):
        keep = _integer(generator, 1, 4) if f >= 9 else 1
        shown = (frame >= keep) & (frame < (f if kind == "after the start" else f - keep))
        return shown if shown.any() else ~shown  # two frames have nothing between them: everything
    if kind in ("ellipse", "circle"):
        axes = [_integer(generator, min(h, w) // 8, min(h, w) // 4) for _ in range(2)]
        return _disc(generator, h, w, axes[0], axes[0] if kind == "circle" else axes[1])
    if kind == "box":
        return _box(generator, h, w)
    if kind == "box for a while":
        begin, end = _integer(generator, 0, f // 2 - 1), _integer(generator, f // 2, f - 1)
        return (frame >= begin) & (frame < end) & _box(generator, h, w)
    if kind == "boxes here and there":
        mask = torch.zeros(f, h, w, dtype=torch.bool)
        for i in torch.randperm(f, generator=generator)[: _integer(generator, 1, f // 2)]:
            rows, columns = _integer(generator, 1, h // 4), _integer(generator, 1, w // 4)
            top, left = _integer(generator, 0, h - rows), _integer(generator, 0, w - columns)
            mask[i, top : top + rows, left : left + columns] = True
        return mask
    if kind == "pixels":
        packed = torch.randint(0, 256, (f * h * w // 8 + 1,), generator=generator, dtype=torch.uint8)
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=f * h * w)).view(torch.bool).view(f, h, w)
    if kind == "frames":
        return torch.rand(f, 1, 1, generator=generator) < 0.5
    assert kind == "everything"
    return torch.ones(1, 1, 1, dtype=torch.bool)


def _box(generator: torch.Generator, h: int, w: int) -> Tensor:
    """bool h w: a box with sides of 1/4 … 3/4 of the frame around a random centre, cut at the border."""
    inside = []
    for length in (h, w):
        side, centre = _integer(generator, length // 4, 3 * length // 4), _integer(generator, 0, length - 1)
        begin = centre - side // 2
        inside.append((torch.arange(length) >= begin) & (torch.arange(length) < begin + side))
    return inside[0][:, None] & inside[1]


def _disc(generator: torch.Generator, h: int, w: int, half_height: int, half_width: int) -> Tensor:
    y = (torch.arange(h) - _integer(generator, 0, h - 1)) / half_height
    x = (torch.arange(w) - _integer(generator, 0, w - 1)) / half_width
    return (y**2)[:, None] + x**2 <= 1


def draw_noise_sigma(generator: torch.Generator) -> float:
    """The strength of the noise on a sample's reference pixels, exp(N(-3, 1/2)): mostly .02 … .13."""
    return torch.randn((), generator=generator).mul(0.5).sub(3).exp().item()


def add_reference_noise(pixels: Tensor, sigma: float | Tensor, noise: Tensor) -> Tensor:
    """Blur what a known frame tells, so that the model does not copy it blindly: pixels + sigma · noise,
    except where pixels are exactly −1 (masked, or black), which stays the sign for "unknown"."""
    return torch.where(pixels == -1, pixels, pixels + sigma * noise)


# ---------------------------------------------------------------- loading

CAPTION_DROP = 0.1  # unconditional samples, for guidance
TEXT_ONLY = 0.9  # of the samples with everything masked have a zero condition


class Sample(NamedTuple):
    """One sample, or a batch of them with a leading b."""

    pixels: Tensor  # 3 f h w, float in [−1, 1]
    caption: str  # "" where dropped
    mask: Tensor  # f h w, bool, True = generate
    zero_if_all_masked: bool  # see vae.inpaint_condition
    control: Tensor | None  # 3 f h w


def draw_start(record: Record, bucket: Bucket, seed: int, epoch: int, index: int) -> int:
    """The frame of a record, counted at the rate we train at, with which a sample begins."""
    return _integer(rng(seed, epoch, index, "start"), 0, record.num_frames - bucket.num_frames)


def drops_caption(seed: int, epoch: int, index: int) -> bool:
    return _chance(rng(seed, epoch, index, "caption"), CAPTION_DROP)


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
        mask=random_mask(rng(seed, epoch, index, "mask"), num_frames, height, width),
        zero_if_all_masked=_chance(rng(seed, epoch, index, "text only"), TEXT_ONLY),
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


# ---------------------------------------------------------------- python data.py check META


def check_entry(entry: Entry, plan: Plan, fps: float) -> dict:
    """Decode everything about a sample, and say what training would make of it.

    returns: file; frames and fps as stored; size; the buckets it may be drawn for; lost: why training would
        lose it, or ""; odd: what one may want to look at
    """
    found = {"file": str(entry.path), "frames": None, "fps": None, "size": None, "buckets": [], "lost": ""}
    found["odd"] = odd = [] if entry.caption.strip() else ["no caption"]
    try:
        record = open_record(entry, fps)
        sizes = sizes_for(record, plan)
        odd += [] if sizes else [f"tiny: it is enlarged to {min(plan.resolutions)}² pixels"]
        sizes = sizes or [min(plan.resolutions)]
        found |= {"size": record.size, "buckets": [bucket_at(record, plan, size) for size in sizes]}
        room = bucket_at(replace(record, num_frames=plan.max_frames), plan, sizes[0]).num_frames
        if not entry.is_image and record.num_frames < room:
            odd.append(f"short: {record.num_frames} frames at {fps:g} fps, where {room} have room")
        for path in filter(None, (entry.path, entry.control)):
            num_frames, seconds, notes = 1, math.inf, []
            if not entry.is_image:
                num_frames, seconds, notes = _look_through(path, record.num_frames, fps)
            elif _is_flat(read_image(path)):
                notes = ["one flat colour"]
            if path == entry.path:
                found |= {"frames": num_frames, "fps": round(num_frames / seconds, 3) or None}
            odd += [note if path == entry.path else f"{path}: {note}" for note in notes]
    except (ValueError, OSError) as error:
        found["lost"] = str(error)
    return found


def _look_through(path: Path, num_frames: int, fps: float) -> tuple[int, float, list[str]]:
    """(frames, seconds, what is odd) of a clip; ValueError unless it has num_frames at fps, of one size."""
    sizes, gaps, end, missing, num_damaged, is_flat = set(), [], 0.0, num_frames, 0, True
    with _open_clip(path) as (container, stream):
        for seconds, end, until, frame in _shown(path, container, stream, 0.0):
            sizes.add(f"{frame.width}x{frame.height}")
            gaps.append(1000 * (end - seconds))
            missing = num_frames - math.ceil(until * fps)
            num_damaged += frame.is_corrupt
            is_flat = is_flat and _is_flat(frame.reformat(64, 64, "rgb24").to_ndarray())
    if len(sizes) > 1:
        raise ValueError(f"{path} changes its size on the way ({', '.join(sorted(sizes))}); encode it anew")
    if missing > 0:
        raise ValueError(f"{path} ends {missing} frames before its header says; encode it anew")
    odd = [f"{num_damaged} frames are damaged"] if num_damaged else []
    if max(gaps) > 1.5 * min(gaps) + 11:  # GIF counts in 1/100 s
        odd.append(f"its rate varies: frames last {min(gaps):.0f} … {max(gaps):.0f} ms")
    return len(gaps), end, odd + ["one flat colour"] * is_flat


def _is_flat(pixels: np.ndarray) -> bool:
    """Of one colour; in each channel, as grey alone would not tell red from blue."""
    return int(np.ptp(pixels, axis=(0, 1)).max()) < 16


def _as_text(file: dict) -> str:
    frames = "1 frame" if file["frames"] == 1 else f"{file['frames'] or '?'} frames"
    fps = f" at {file['fps']:g} fps" if file["fps"] else ""
    size, *buckets = ("x".join(map(str, shape)) for shape in (file["size"] or "?", *file["buckets"]))
    line = f"{file['file']}: {frames}{fps}, {size}, for {', '.join(buckets) or 'nothing'}"
    return "\n  ".join(
        [line] + [f"LOST: {file['lost']}"] * bool(file["lost"]) + [f"odd: {x}" for x in file["odd"]]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 if training would lose nothing, 1 if it would lose some, 2 for misuse."""
    description = "Decode a whole data set, and report what training would lose or one may want to look at."
    parser = argparse.ArgumentParser("data.py", description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.error = lambda text: parser.exit(2, f"data.py: error: {' '.join(text.split())}; see --help\n")
    add = parser.add_argument
    add("command", choices=["check"])
    add("meta", metavar="META", type=Path, help="metadata .json or .jsonl, or a folder")
    add("--resolutions", type=int, nargs="+", default=list(range(512, 1025, 128)), help="base sizes")
    add("--max-tokens", type=int, default=13312, help="tokens of a clip")
    add("--num-frames", type=int, default=49, help="most frames of a clip")
    add("--fps", type=float, default=8.0, help="frames a second training reads at")
    add("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    if bad := [size for size in args.resolutions if size < 16 or size % 16]:
        parser.error(f"--resolutions {bad[0]} is not a multiple of 16")
    if args.num_frames < 1 or args.num_frames % 4 != 1:
        parser.error(f"--num-frames {args.num_frames}; the VAE needs 4k+1, try 49")
    if args.max_tokens < 1 or not 0.1 <= args.fps <= 1000:
        parser.error(f"--max-tokens {args.max_tokens} is below 1, or --fps {args.fps:g} outside 0.1 … 1000")
    plan = Plan(tuple(sorted(args.resolutions)), args.max_tokens, args.max_tokens, args.num_frames)
    try:
        entries, mistakes = _scan_metadata(args.meta)
    except OSError as error:
        parser.error(str(error))
    if not entries:
        parser.error(f"{args.meta} cannot be used: {'; '.join(mistakes[:3])}")
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(check_entry, entry, plan, args.fps) for entry in entries]
        try:
            files = [job.result() for job in tqdm(jobs, "decoding", unit="file", disable=None)]
        finally:
            pool.shutdown(cancel_futures=True)  # or control-c would wait for all of them
    num_lost, num_odd = (sum(bool(file[key]) for file in files) for key in ("lost", "odd"))
    counts = {"samples": len(files), "lost": num_lost, "odd": num_odd, "mistakes": len(mistakes)}
    lines = [*map(_as_text, files), *(f"{args.meta}: {mistake}" for mistake in mistakes)]
    lines.append(", ".join(f"{name}: {count}" for name, count in counts.items()))
    as_json = json.dumps(counts | {"mistakes": mistakes, "files": files}, indent=2)
    try:
        print(
            as_json if args.json else "\n".join(lines).encode(errors="backslashreplace").decode(), flush=True
        )
    except BrokenPipeError:  # a reader such as head has seen enough; nothing is left to be said at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(bool(num_lost or mistakes))


if __name__ == "__main__":
    sys.exit(main())
