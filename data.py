"""Pictures and clips in and out, and everything that turns a list of them into training batches.

    .mp4 .gif .mkv …  ─read_video─► uint8 f h w 3 ─resize───────────────► ─to_pixels─► float 3 f h w ∈ [−1, 1]
    .png .jpg …       ─read_image─► uint8   h w 3       (or fit: cover + centre crop, in training)
    mask picture/clip ─read_mask──► bool  f h w, True = generate here (white)
    float 3 f h w ─to_uint8─► uint8 f h w 3 ─write_video─► .mp4 .gif .png

A clip is a function of time: reading it means choosing instants start + i/fps and taking the frame nearest to
each, so a 30 fps clip read at 8 fps keeps its speed, and variable frame rates need no special case.

Errors a user can cause are one sentence with the path in it: OSError where the file system refuses, and
ValueError where the contents are at fault. Dimension key: f frames, h height, w width, c = 3 colours.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from checkpoint import atomic_write

MILLISECOND = 1e-3  # what containers round timestamps to: instants closer than that are the same
PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

# ---------------------------------------------------------------- pictures


def read_image(source: str | Path | Image.Image | np.ndarray | Tensor) -> np.ndarray:
    """A picture as uint8 h w 3, upright (EXIF orientation applied).

    source: path, PIL picture, or uint8 array h w, h w 3 or h w 4. Grey and palette pictures become RGB, 16
    bits become 8; transparency is dropped (the colour beneath it shows), as the reference does.
    raises OSError if the file is missing, ValueError if it is damaged or a clip
    """
    if not isinstance(source, (str, Path)):
        return _to_rgb(source if isinstance(source, Image.Image) else _from_array(np.asarray(source)))
    _must_exist(source)
    try:
        with Image.open(source) as picture:
            is_clip = picture.format in ("GIF", "PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1
            rgb = _to_rgb(picture)
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
        raise FileNotFoundError(f"{path} {'is a folder' if Path(path).is_dir() else 'does not exist'}")


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 f h w c (or h w c) at another size: PIL's bicubic, frame by frame, as the reference does."""
    if frames.ndim == 4:
        return np.stack([resize(frame, height, width) for frame in frames])
    if frames.shape[:2] == (height, width):
        return frames
    return np.asarray(Image.fromarray(frames).resize((width, height), Image.Resampling.BICUBIC))


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
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} is empty, damaged or no clip ({error.strerror}); make it again, for instance as .mp4"
        ) from None


def _decode(container, stream, start: float) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """(seconds since the clip's first frame, frame) from the keyframe before `start` on; last (end, None).

    Nothing before that keyframe is decoded. Frames without a timestamp follow at the stream's rate.
    """
    origin = stream.start_time or 0
    step = float(1 / (stream.guessed_rate or stream.average_rate or 25))
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
        yield seconds, frame
    yield (
        seconds + (float(frame.duration * stream.time_base) if seconds >= 0 and frame.duration else step),
        None,
    )


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 h w 3; phones store the sensor's picture and a rotation (degrees counter-clockwise)."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def read_video(
    source: str | Path | np.ndarray | Tensor,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
) -> np.ndarray:
    """The frames nearest to the instants start + i/fps of a clip, uint8 f h w 3.

    num_frames: at most so many; a shorter clip gives what it has   start: seconds
    fps: frames a second to read at, None for the clip's own average rate; a slow clip repeats frames
    source: path, or uint8 array f h w 3, which is taken to be at the wanted rate already
    raises OSError if the file is missing, ValueError if it is damaged, a picture, or over before `start`
    """
    if not isinstance(source, (str, Path)):
        return _checked_frames(np.asarray(source), "a clip")[:num_frames]
    frames: list[np.ndarray] = []
    with _open_clip(source) as (container, stream):
        fps = fps or float(stream.average_rate or stream.guessed_rate or 25)
        previous, previous_seconds = None, 0.0
        for seconds, frame in _decode(container, stream, start):
            if previous is not None and not -1 < seconds - previous_seconds < 60:
                raise ValueError(f"{source} has timestamps that jump by {seconds - previous_seconds:.0f} s")
            rgb = None
            while previous is not None and len(frames) != num_frames:
                instant = start + len(frames) / fps
                if frame is None and instant > seconds - MILLISECOND:
                    break  # the clip is over
                if frame is not None and seconds - instant < instant - previous_seconds - MILLISECOND:
                    break  # the coming frame is nearer
                rgb = _upright_rgb(previous) if rgb is None else rgb
                frames.append(rgb)
            if len(frames) == num_frames:
                break
            previous, previous_seconds = frame, seconds
    if not frames:
        raise ValueError(f"{source} has no frame at {start:g} s; it is empty or shorter than that")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{source} changes its size on the way; encode it anew at one size")
    return np.stack(frames)


def probe_video(path: str | Path) -> ClipInfo:
    """Length, rate and size of a clip: from its header, else by counting packets; one frame is decoded."""
    with _open_clip(path) as (container, stream):
        _, frame = next(_decode(container, stream, 0.0))
        if frame is None:
            raise ValueError(f"{path} has no frames")
        height, width = _upright_rgb(frame).shape[:2]
        num_frames, duration = stream.frames, stream.duration
    with _open_clip(path) as (container, stream):
        if not num_frames or not duration:
            packets = [packet for packet in container.demux(stream) if packet.size]
            stamps = [packet.pts for packet in packets if packet.pts is not None]
            num_frames = len(packets)
            duration = stamps and max(stamps) - min(stamps) + (packets[-1].duration or 0)
        seconds = (
            float(duration * stream.time_base) if duration else num_frames / float(stream.guessed_rate or 25)
        )
    return ClipInfo(num_frames, num_frames / seconds, height, width, seconds)


def read_mask(
    source: str | Path | Image.Image | np.ndarray | Tensor,
    num_frames: int,
    height: int,
    width: int,
    fps: float | None = None,
) -> Tensor:
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


def write_video(frames: np.ndarray | Tensor | Iterable[np.ndarray], path: str | Path, fps: float = 8) -> None:
    """Write uint8 f h w 3 by the ending: .mp4 (H.264), .gif (looped), .png (a strip of at most 8 frames).

    frames: all at once, or an iterable of chunks in order; an mp4 then never holds more than one chunk.
    Written under a temporary name and renamed; equal frames give equal bytes.
    raises ValueError for another ending or odd sizes, OSError if the place cannot be written
    """
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
    first = next(chunks)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} frames do not fit .mp4, which needs even sizes; write a .gif")
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": "17", "threads": "1"},  # no visible loss; the same bytes on any number of cores
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace = stream.codec_context.color_range = (
            1  # say which matrix (BT.709, limited),
        )
        stream.codec_context.color_primaries = stream.codec_context.color_trc = 1  # or players will guess
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
