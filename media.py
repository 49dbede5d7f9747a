"""Pictures and clips from and to files, and masks from either.

    .mp4 .gif .mkv …  ─read_video─► uint8 f h w 3 ─resize, or fit in training─to_pixels─► 3 f h w ∈ [−1, 1]
    .png .jpg …       ─read_image─► uint8   h w 3
    mask picture/clip ─read_mask──► bool  f h w, True = generate here (white)
    float 3 f h w ─to_uint8─► uint8 f h w 3 ─write_video─► .mp4 .gif .png

Everything comes as it is meant to be seen: upright, with square pixels, in sRGB, transparent parts on white.
Content tells a picture from a clip. Pillow reads pictures and their animations, FFmpeg (by PyAV) the others.

A clip is a function of time: reading it means choosing instants start + i/fps and taking the frame nearest to
each, so a 30 fps clip read at 8 fps keeps its speed, and variable frame rates need no special case.

Dimension key: f frames, h height, w width, c = 3 colours.
"""

import contextlib
import functools
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from runtime import atomic_write

Picture = str | Path | Image.Image | np.ndarray | Tensor  # arrays are uint8
Clip = str | Path | np.ndarray | Tensor
PICTURE_ENDINGS = set(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .avif .gif .bmp .tif .tiff .jp2 .j2k .ppm .pgm .pbm .qoi"
    " .tga".split()
)
CLIP_ENDINGS = set(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m1v .m2v .vob .ts .mts .m2ts .wmv .asf .flv .f4v .3gp .3g2"
    " .ogv .mxf .dv .h264 .264 .hevc .h265 .ivf .y4m".split()
)
WHITE, BLACK = 255, 0
notes: dict[str, str] = {}  # {file: what was changed in it that one may want to know}


def _note(path: object, text: str) -> None:
    """Said once on stderr, as stdout may be a report."""
    if str(path) not in notes:
        notes[str(path)] = text
        sys.stderr.write(f"note: {path} {text}\n".encode(errors="backslashreplace").decode())


def must_exist(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path or 'an empty name'} does not exist as a file; is the path right?")


# ---------------------------------------------------------------- pictures


def _open_picture(path: str | Path) -> Image.Image:
    is_tga = Path(path).suffix.lower() == ".tga"  # which its content does not tell from, say, an .mpg
    formats = ["TGA"] if is_tga else "PNG JPEG WEBP AVIF GIF BMP TIFF JPEG2000 PPM QOI".split()
    return Image.open(path, formats=formats)


def _picture_kind(path: str | Path) -> str:
    """What Pillow sees in the header of a file: a "still", an "animation", or "" if it is no picture."""
    try:
        with _open_picture(path) as picture:
            moves = picture.format in ("PNG", "WEBP", "AVIF", "GIF") and getattr(picture, "n_frames", 1) > 1
            return "animation" if moves else "still"
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return ""


def is_clip(path: str | Path) -> bool:
    """By the content of a file; where that says nothing, by the ending."""
    kind = _picture_kind(path)
    return kind == "animation" or kind == "" and Path(path).suffix.lower() not in PICTURE_ENDINGS


def read_image(source: Picture, background: int = WHITE) -> np.ndarray:
    """A picture as it is meant to be seen, uint8 h w 3: EXIF orientation and colour profile applied.

    source: path, PIL picture, or uint8 array h w, h w 3 or h w 4. Grey and palette pictures become RGB, 16
    bits become 8. Transparency lets the background through; the reference shows the colour hidden beneath.
    raises OSError if the file is missing, ValueError if it is damaged, a clip, or does not say what is white
    """
    if not isinstance(source, (str, Path)):
        picture = source if isinstance(source, Image.Image) else _from_array(np.asarray(source))
        return _to_rgb(picture, "the picture", background)
    must_exist(source)
    if is_clip(source):
        raise ValueError(f"{source} is a clip or no picture; give a .png or .jpg, its first frame say")
    try:
        with _open_picture(source) as picture:
            picture.load()
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{source} is damaged or no picture ({reason}); give a .png or .jpg") from None
    return _to_rgb(picture, source, background)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"a picture is uint8 h w, h w 3 or h w 4, not {array.dtype} {list(array.shape)}")
    return Image.fromarray(array)


def _to_rgb(picture: Image.Image, name: object, background: int) -> np.ndarray:
    picture = picture.copy()
    with contextlib.suppress(Exception):  # what some programs write as EXIF is none
        ImageOps.exif_transpose(picture, in_place=True)  # turns it first, then minds the other tags
    if picture.mode in ("I", "F"):
        problem = f"{name} has pixels of 32 bits, which do not say what is white"
        raise ValueError(f"{problem}; save it as 8-bit .png")
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if not picture.has_transparency_data:
        return np.asarray(_to_srgb(picture))  # h w 3
    picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    if background == WHITE and alpha.getextrema()[0] < 255:
        _note(name, "is transparent in parts; they are put on white")
    under = Image.new("RGB", picture.size, (background,) * 3)
    return np.asarray(Image.composite(_to_srgb(picture), under, alpha))


def _to_srgb(picture: Image.Image) -> Image.Image:
    """RGB in the colours that a picture's own profile means; what is sRGB keeps its bytes."""
    if "icc_profile" in picture.info:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # damaged, or for another kind of pixels
            profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
            if "sRGB" not in ImageCms.getProfileDescription(profile):
                plain = picture if picture.mode in ("L", "CMYK") else picture.convert("RGB")
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(plain, profile, srgb, outputMode="RGB")
    return picture.convert("RGB")


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
    if (full_height, full_width) == (height, width):
        return frames
    scale = min(full_height / height, full_width / width)  # pixels of the file for one of ours
    top = max(0.0, (full_height - height * scale) / 2)  # rounding may leave -1e-13, which PIL refuses
    left = max(0.0, (full_width - width * scale) / 2)
    return resize(frames, height, width, box=(left, top, full_width - left, full_height - top))


# ---------------------------------------------------------------- clips: frames and their times

MILLISECOND = 1e-3  # what containers round timestamps to: instants closer than that are the same
JUMP = 10  # frames; times of bad files step back by a few, those of streams that were joined by more
HDR_CURVES = (16, 18)  # PQ and HLG, as FFmpeg numbers them


class OpenClip(NamedTuple):
    container: object  # PyAV's
    stream: object
    step: float  # seconds of a frame, where nothing else is said
    has_times: bool  # AVI and raw streams only count frames, in the order of decoding
    can_seek: bool  # .ts and .mpg may be cut and joined anywhere, so they are read from the beginning

    def seconds(self, stamp: int | None) -> float | None:
        """A timestamp of the stream, counted from its first frame."""
        if stamp is None or not self.has_times:
            return None
        return float((stamp - (self.stream.start_time or 0)) * self.stream.time_base)


@contextlib.contextmanager
def _open_clip(path: str | Path) -> Iterator[OpenClip]:
    """The largest video stream; whatever FFmpeg raises in the block comes out as one sentence."""
    import av  # here and below: a clip may not be needed, and it is slow to import

    try:
        absolute = str(Path(path).absolute())  # so that FFmpeg never takes a name for a protocol
        with av.open(absolute, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is not None and stream.frames == 1:  # a cover that is not marked as one?
                stream = next((other for other in container.streams.video if other.frames > 1), stream)
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise ValueError(f"{path} holds no video; give an .mp4 or .gif")
            if stream.codec_context is None:  # a camera's raw format, say
                raise ValueError(f"{path} holds video that FFmpeg cannot decode; convert it to .mp4")
            if container.metadata.get("major_brand", "").startswith(("hei", "mif1")):  # FFmpeg shows a tile
                raise ValueError(f"{path} is a HEIC picture, which is not read here; convert it to .jpg")
            stream.thread_count = 1  # threads read ahead, and may fail beyond the span
            step = float(1 / (stream.guessed_rate or stream.average_rate or 25))
            flags = av.format.Flags(container.format.flags)
            has_times = container.format.name != "avi" and av.format.Flags.no_timestamps not in flags
            can_seek = has_times and av.format.Flags.ts_discont not in flags
            yield OpenClip(container, stream, step, has_times, can_seek)
    except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV's, where a stream appears on the way
        reason = f"{path} is empty, damaged or no clip ({getattr(error, 'strerror', error)})"
        raise ValueError(f"{reason}; make it again, for instance as .mp4") from None


def _decode(clip: OpenClip) -> Iterator:
    """PyAV's frames, in order."""
    import av

    decoder = clip.stream.codec_context
    tags = {name.lower(): value for name, value in clip.stream.metadata.items()}
    libraries = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
    if tags.get("alpha_mode") == "1" and decoder.name in libraries:  # FFmpeg's own leave transparency out
        decoder = av.CodecContext.create(libraries[decoder.name], "r")
    for packet in clip.container.demux(clip.stream):
        yield from decoder.decode(packet if packet.size else None)


def _as_shown(frame, aspect: Fraction | None, path: str | Path, background: int) -> np.ndarray:
    """uint8 h w 3 with square pixels, turned and mirrored by the display matrix of a phone."""
    if frame.color_trc in HDR_CURVES:
        _note(path, "is HDR (PQ or HLG) and will look flat and grey; convert it to SDR first")
    width = max(1, round(frame.width * (aspect or 1)))
    if any(part.is_alpha for part in frame.format.components):
        picture = Image.fromarray(frame.to_ndarray(format="rgba", width=width, threads=1))
        pixels = _to_rgb(picture, path, background)
    else:
        pixels = frame.to_ndarray(format="rgb24", width=width, threads=1)
    if matrix := frame.side_data.get("DISPLAYMATRIX"):
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]  # shown x = a x + c y, y = b x + d y
        if abs(b) > abs(a):  # a quarter turn: x and y change places
            pixels = pixels.swapaxes(0, 1)
            a, d = c, b
        if a < 0:
            pixels = pixels[:, ::-1]
        if d < 0:
            pixels = pixels[::-1]
    return pixels


class Timed(NamedTuple):
    """A frame of a clip and when it begins; the last one only says when the clip ends."""

    seconds: float  # from the clip's first frame
    is_damaged: bool = False
    read: Callable[[], np.ndarray] | None = None  # uint8 h w 3


def _stream_frames(path: str | Path, start: float, background: int) -> Iterator[Timed]:
    """From a frame before `start` on, or from wherever a seek happens to lead."""
    import av

    with _open_clip(path) as clip:
        stream = clip.stream
        if start > 0 and clip.can_seek:
            stamp = (stream.start_time or 0) + int(start / stream.time_base)
            with contextlib.suppress(av.FFmpegError):  # not every format can: then from the beginning
                clip.container.seek(stamp, stream=stream)
        expected = 0.0  # a frame's length after the last
        late = 0.0  # seconds by which the present stream is, if streams were joined
        duration = 0.0
        for frame in _decode(clip):
            seconds = clip.seconds(frame.pts)
            seconds = expected if seconds is None else seconds + late
            if seconds < expected - JUMP * clip.step:  # another stream's first frame
                late += expected - seconds
                seconds = expected
            expected = seconds + clip.step
            duration = float((frame.duration or 0) * stream.time_base)
            read = functools.partial(_as_shown, frame, stream.sample_aspect_ratio, path, background)
            yield Timed(seconds, frame.is_corrupt, read)
        if duration > MILLISECOND:  # less is what writers put who do not know
            expected += duration - clip.step
        yield Timed(expected)


def _animation_frames(path: str | Path, background: int) -> Iterator[Timed]:
    """The same of an animated .gif, .png, .webp or .avif, always from the beginning."""
    try:
        with _open_picture(path) as picture:
            seconds = 0.0
            first = int(picture.info.get("default_image", False))  # for programs that show no animations
            for index in range(first, picture.n_frames):
                picture.seek(index)
                read = functools.partial(_to_rgb, picture.copy(), path, background)
                yield Timed(seconds, read=read)
                seconds += (picture.info.get("duration") or 100) / 1000
            rounding = 0.005 if picture.format == "GIF" else 0  # it counts in 1/100 s
            yield Timed(seconds - rounding)
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise ValueError(f"{path} is damaged ({error}); make it again, for instance as .mp4") from None


class Shown(NamedTuple):
    """A frame of a clip, with times in seconds."""

    begin: float
    end: float
    until: float  # up to here it is the nearest: half-way to its successor, which loses a tie
    is_damaged: bool
    read: Callable[[], np.ndarray]  # uint8 h w 3


def shown_frames(path: str | Path, start: float = 0.0, background: int = WHITE) -> Iterator[Shown]:
    """The frames of a clip in order, from one at or before `start` on.

    raises OSError if the file is missing, ValueError if it is damaged or a picture
    """
    must_exist(path)
    kind = _picture_kind(path)
    if kind == "still":
        raise ValueError(f"{path} is a picture; a clip (.mp4, .gif, …) is needed here")
    frames = _animation_frames(path, background) if kind else _stream_frames(path, start, background)
    first = next(frames)
    if start > 0 and (first.seconds > start or first.read is None):  # the seek led past it
        frames.close()
        frames = _stream_frames(path, 0, background)
        first = next(frames)
    for frame, following in itertools.pairwise(itertools.chain([first], frames)):
        begin, end = frame.seconds, following.seconds
        until = (begin + end + MILLISECOND) / 2 if following.read else end - MILLISECOND
        yield Shown(begin, end, until, frame.is_damaged, frame.read)


def _measure(path: str | Path) -> tuple[int, float]:
    """Frames and seconds of a clip, from its header, else by going through its packets."""
    if _picture_kind(path) == "animation":
        times = [frame.seconds for frame in _animation_frames(path, WHITE)]
        return len(times) - 1, times[-1]  # the last one only says when the clip ends
    with _open_clip(path) as clip:
        stream = clip.stream
        if stream.frames > 0 and (stream.duration or 0) > 0:
            num_cut = sum(entry.is_discard for entry in stream.index_entries)  # a trimmed .mp4 keeps them
            # The header of a fragmented .mp4 counts the frames of the first fragment alone.
            num_frames = max(stream.frames, len(stream.index_entries))
            return max(1, num_frames - num_cut), float(stream.duration * stream.time_base)
        num_frames = 0
        seconds = 0.0
        last = None  # the time of the packet before
        for packet in clip.container.demux(stream):
            if packet.size:
                num_frames += 1
                time = clip.seconds(packet.dts)
                gap = clip.step if time is None or last is None else time - last
                seconds += clip.step if gap < -JUMP * clip.step else gap
                last = time
    return num_frames, seconds


# ---------------------------------------------------------------- clips in


class ClipInfo(NamedTuple):
    num_frames: int
    fps: float  # average
    height: int  # as shown
    width: int
    seconds: float


def probe_video(path: str | Path) -> ClipInfo:
    """Length, rate and size of a clip; one frame is decoded."""
    first = next(shown_frames(path), None)
    if first is None:
        raise ValueError(f"{path} has no frames; make it again")
    height, width = first.read().shape[:2]
    num_frames, seconds = _measure(path)
    return ClipInfo(num_frames, num_frames / seconds, height, width, seconds)


def check_fps(fps: float) -> None:
    """ValueError for a rate that no clip can be read at."""
    if not 0.1 <= fps <= 1000:  # true of NaN, too
        raise ValueError(f"fps={fps} is outside 0.1 … 1000; the models like 8 or 16")


def read_video(
    source: Clip,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    background: int = WHITE,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """The frames nearest to the instants start + i/fps of a clip, uint8 f h w 3.

    num_frames: at most so many; a shorter clip gives what it has   start: seconds
    fps: frames a second to read at (a slow clip repeats frames); None takes every frame as it is stored
    source: path, or uint8 array f h w 3, which is taken to be at the wanted rate already
    size: height and width that the frames of a file are fitted to, each as it comes: 49 of 8K are 5 GB
    raises OSError if the file is missing, ValueError if it is damaged, a picture, or over before `start`
    """
    if not isinstance(source, (str, Path)):
        frames = np.asarray(source)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
            raise ValueError(f"a clip is uint8 f h w 3, not {frames.dtype} {list(frames.shape)}")
        return frames[:num_frames]
    frames: list[np.ndarray] = []
    sizes = set()
    for shown in shown_frames(source, start, background):
        if fps is None:
            count = int(shown.begin > start - MILLISECOND)
        else:  # of the instants up to `until`, those that are not yet taken
            count = max(0, math.ceil((shown.until - start) * fps) - len(frames))
        if num_frames is not None:
            count = min(count, num_frames - len(frames))
        if count:
            frame = shown.read()
            sizes.add(frame.shape)
            if size:
                frame = fit(frame[None], *size)[0]
            frames += [frame] * count
        if len(frames) == num_frames:
            break
    if not frames:
        raise ValueError(f"{source} has no frame at {start:g} s; it is empty or shorter than that")
    if len(sizes) > 1:
        raise ValueError(f"{source} changes its size on the way; encode it anew at one size")
    return np.stack(frames)


def read_mask(source: Picture, num_frames: int, height: int, width: int, fps: float | None = None) -> Tensor:
    """Where to generate, bool f h w: True where a picture (held over all frames) or a clip is white, ≥ 240.

    Transparent is not white, whatever colour it hides: masks are painted on transparent layers.
    source: path, PIL picture, or array (f) h w, (f) h w 3, h w 4 or f h w 1, uint8 or bool; resized to fit
    raises ValueError if a mask of several frames has fewer than `num_frames`
    """
    if isinstance(source, (str, Path)) and is_clip(source):
        frames = read_video(source, num_frames, fps, background=BLACK)
    elif isinstance(source, (str, Path, Image.Image)):
        frames = read_image(source, BLACK)[None]
    else:
        frames = np.asarray(source)
        if frames.dtype == bool:
            frames = frames.astype(np.uint8) * 255
        if frames.ndim == 2 or frames.ndim == 3 and frames.shape[-1] in (3, 4):
            frames = read_image(frames, BLACK)[None]
        if frames.ndim == 4 and frames.shape[-1] == 1:
            frames = frames[..., 0]
    if 1 < len(frames) < num_frames:
        name = source if isinstance(source, (str, Path)) else "the mask"
        raise ValueError(f"{name} has {len(frames)} frames, the clip {num_frames}; give a picture or as many")
    grey = [np.asarray(_from_array(frame).convert("L")) for frame in frames[:num_frames]]
    white = torch.from_numpy(np.stack([resize(frame, height, width) >= 240 for frame in grey]))
    return white.expand(num_frames, -1, -1)


# ---------------------------------------------------------------- between files and the network


def to_pixels(frames: np.ndarray | Tensor) -> Tensor:
    """uint8 … f h w 3 -> float … 3 f h w in [−1, 1]; a tensor stays on its device.

    The same bits as the reference's u8/255·2 − 1, because doubling is exact.
    """
    frames = frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
    return frames.movedim(-1, -4).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> np.ndarray:
    """float … 3 f h w in [−1, 1] -> uint8 … f h w 3, the inverse of `to_pixels`.

    Rounds to nearest as diffusers' export does; the reference's truncates, which darkens by half a step.
    """
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).movedim(-4, -1).cpu().numpy()


# ---------------------------------------------------------------- clips out


def write_video(frames: np.ndarray | Tensor | Iterable[np.ndarray], path: str | Path, fps: float = 8) -> None:
    """Write uint8 f h w 3 by the ending: .mp4 (H.264), .gif (looped), .png (a strip of at most 8 frames).

    frames: all at once, or an iterable of chunks in order; an mp4 then never holds more than one chunk.
    Written under a temporary name and renamed; equal frames give equal bytes.
    raises ValueError for another ending or odd sizes, OSError if the place cannot be written
    """
    import av

    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{path} should end in {', '.join(WRITERS)}")
    write = WRITERS[path.suffix.lower()]
    if isinstance(frames, (np.ndarray, Tensor)):
        frames = [np.asarray(frames)]
    chunks = iter(frames)
    first = next(chunks)  # what fails before there is a frame is no failure of writing
    try:
        with atomic_write(path) as temporary:
            write(temporary, first, chunks, fps)
    except (OSError, av.FFmpegError) as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}); choose another place") from None


def _write_mp4(path: Path, first: np.ndarray, chunks: Iterator[np.ndarray], fps: float) -> None:
    import av

    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} frames do not fit .mp4, which needs even sizes; write a .gif")
    with av.open(str(path.absolute()), "w", options={"movflags": "faststart"}) as container:
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


def _write_gif(path: Path, first: np.ndarray, chunks: Iterator[np.ndarray], fps: float) -> None:
    frames = np.concatenate([first, *chunks])
    sample = Image.fromarray(frames[:, ::2, ::2].reshape(len(frames), -1, 3))
    palette = sample.quantize(256)  # one for all frames: a palette each would flicker
    pictures = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    ends = [round(100 * i / fps) for i in range(len(pictures) + 1)]  # GIF counts hundredths of a second
    durations = [10 * (end - begin) for begin, end in zip(ends, ends[1:])]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _write_strip(path: Path, first: np.ndarray, chunks: Iterator[np.ndarray], fps: float) -> None:
    frames = np.concatenate([first, *chunks])
    shown = np.linspace(0, len(frames) - 1, min(len(frames), 8)).round().astype(int)
    Image.fromarray(np.concatenate(frames[shown], axis=1)).save(path)


WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_strip}
