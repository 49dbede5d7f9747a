"""Pictures and clips from and to files, and masks from either.

    .mp4 .gif .mkv …  ─read_video─► uint8 f h w 3 ─resize, or fit in training─to_pixels─► 3 f h w ∈ [−1, 1]
    .png .jpg …       ─read_image─► uint8   h w 3
    mask picture/clip ─read_mask──► bool  f h w, True = generate here (white)
    float 3 f h w ─to_uint8─► uint8 f h w 3 ─write_video─► .mp4 .gif .png

A clip is a function of time: reading it means choosing instants start + i/fps and taking the frame nearest to
each, so a 30 fps clip read at 8 fps keeps its speed, and variable frame rates need no special case.

Errors a user can cause are one sentence with the path in it: OSError where the file system refuses, and
ValueError where the contents are at fault. Dimension key: f frames, h height, w width, c = 3 colours.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from runtime import atomic_write

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


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 f h w 3 resized to cover height x width; what sticks out is cut off evenly on both sides."""
    full_height, full_width = frames.shape[1:3]
    scale = min(full_height / height, full_width / width)  # pixels of the file for one of ours
    top, left = (full_height - height * scale) / 2, (full_width - width * scale) / 2
    return resize(frames, height, width, box=(left, top, full_width - left, full_height - top))


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
