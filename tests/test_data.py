"""data.py against the reference's prepared pictures, and against real clips encoded here."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import GOLDENS, expected
from PIL import Image

import data

ASSETS = GOLDENS / "fun-2b-inp" / "assets"


def encode(
    path: Path, num_frames=30, fps=30, height=32, width=48, stamps=None, gop=12, codec="libx264"
) -> Path:
    """A clip whose frame i is grey i * 8, top left quarter white."""
    with av.open(path, "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop), "b": "4M"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        tick = data.Fraction(1, 600 if stamps else fps)
        stream.codec_context.time_base = tick
        for i in range(num_frames):
            picture = np.full((height, width, 3), i * 8 % 240, np.uint8)
            picture[: height // 2, : width // 2] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamps[i] if stamps else i, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def frame_numbers(frames: np.ndarray) -> list[int]:
    return [round(int(frame[-1, -1, 0]) / 8) for frame in frames]


def damage(path: Path, begin: float, end: float) -> Path:
    content = bytearray(path.read_bytes())
    begin, end = int(begin * len(content)), int(end * len(content))
    content[begin:end] = np.random.default_rng(0).bytes(end - begin)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------- pictures


def test_pictures_are_resized_to_the_same_bytes_as_by_the_reference():
    tensors = expected("fun-2b-inp")
    start = data.resize(data.read_image(ASSETS / "start.png"), 32, 48)
    assert np.array_equal(tensors["pre.start.video_u8"][0, :, 7].permute(1, 2, 0), start)
    both = [data.resize(data.read_image(ASSETS / name), 64, 32) for name in ("start.png", "end.png")]
    theirs = tensors["pre.start_end.video_u8"][0].permute(1, 2, 3, 0)
    assert np.array_equal(theirs[0], both[0]) and np.array_equal(theirs[-1], both[1])
    for i in range(3):
        ours = data.resize(data.read_image(ASSETS / f"list{i}.png"), 32, 48)
        assert np.array_equal(tensors["pre.list3.video_u8"][0, :, i].permute(1, 2, 0), ours)


def test_a_mask_picture_is_white_in_the_same_pixels_as_in_the_reference():
    theirs = expected("fun-2b-inp")["pre.v2v_mask.mask"][0] / 255
    ours = data.read_mask(ASSETS / "mask.png", 9, 32, 48)
    assert ours.shape == (9, 32, 48) and ours.dtype == torch.bool
    assert torch.equal(ours.float(), theirs.expand(9, -1, -1))


def test_a_mask_is_white_from_240_up():
    grey = np.array([[0, 128, 239, 240, 255]], np.uint8).repeat(2, 0)
    assert data.read_mask(grey, 1, 2, 5)[0, 0].tolist() == [False, False, False, True, True]
    assert data.read_mask(grey == 255, 1, 2, 5)[0, 0].tolist() == [False] * 4 + [True]


def test_a_mask_of_several_frames_follows_the_clip_and_must_last_as_long(tmp_path):
    moving = np.zeros((6, 16, 16), np.uint8)
    moving[3:] = 255
    for source in (moving, moving[..., None], moving[..., None].repeat(3, -1)):
        assert data.read_mask(source, 5, 32, 16)[:, 0, 0].tolist() == [False] * 3 + [True] * 2
    data.write_video(moving[..., None].repeat(3, -1), tmp_path / "mask.mp4", fps=4)
    assert data.read_mask(tmp_path / "mask.mp4", 3, 16, 16, fps=2)[:, 5, 5].tolist() == [False, False, True]
    with pytest.raises(ValueError, match="6 frames, the clip 9"):
        data.read_mask(moving, 9, 16, 16)


def test_pictures_of_every_mode_become_rgb(tmp_path):
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[..., 0], colour[0] = 200, 10
    for mode in ("RGB", "RGBA", "P", "L", "LA", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.fromarray(colour).convert(mode).save(path)
        assert np.array_equal(data.read_image(path), Image.fromarray(colour).convert(mode).convert("RGB"))
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert data.read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 255]
    assert np.array_equal(data.read_image(torch.from_numpy(colour)), colour)
    with pytest.raises(ValueError, match="float32"):
        data.read_image(np.zeros((4, 4, 3), np.float32))


def test_a_photograph_is_turned_upright(tmp_path):
    picture = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    picture.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "turned.png"), np.rot90(np.asarray(picture), -1))


# ---------------------------------------------------------------- clips in


@pytest.mark.parametrize(
    "ending, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264")]
)
def test_a_clip_is_read_at_the_nearest_frames_of_any_rate(tmp_path, ending, codec):
    path = encode(tmp_path / f"clip.{ending}", codec=codec, gop=5)
    nearest = [0, 4, 7, 11, 15, 19, 22, 26]  # 30 fps at t = i/8: 0, 3.75, 7.5 (earlier), 11.25 …
    assert frame_numbers(data.read_video(path)) == [i % 30 for i in range(30)]
    assert frame_numbers(data.read_video(path, fps=8)) == nearest
    assert frame_numbers(data.read_video(path, 3, fps=8)) == nearest[:3]
    assert frame_numbers(data.read_video(path, 3, fps=8, start=0.5)) == [15, 19, 22]
    assert frame_numbers(data.read_video(path, 2, fps=60, start=0.1)) == [3, 3]
    info = data.probe_video(path)
    assert (info.num_frames, info.height, info.width) == (30, 32, 48)
    assert abs(info.fps - 30) < 0.1 and abs(info.seconds - 1) < 0.01  # mkv counts milliseconds


def test_a_variable_rate_clip_is_read_by_its_timestamps(tmp_path):
    path = encode(tmp_path / "clip.mp4", 5, stamps=[0, 60, 120, 600, 660])  # at 0, .1, .2, 1, 1.1 s
    assert frame_numbers(data.read_video(path, 5, fps=4)) == [0, 2, 2, 3, 3]  # at 0, .25, .5, .75, 1 s
    assert data.probe_video(path).num_frames == 5


def test_only_the_needed_span_is_decoded(tmp_path):
    path = damage(encode(tmp_path / "clip.mp4", 240, gop=20), 0.5, 0.6)
    assert frame_numbers(data.read_video(path, 5, fps=30)) == [0, 1, 2, 3, 4]  # before the damage
    late = frame_numbers(data.read_video(path, 5, fps=30, start=7.5))  # behind it
    assert late == [i % 30 for i in range(225, 230)]
    with pytest.raises(ValueError, match="clip.mp4"):
        data.read_video(path)


def test_a_phone_clip_is_turned_upright(tmp_path):
    path = encode(tmp_path / "clip.mp4", 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30]  # a quarter turn clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", *turn)
    path.write_bytes(content)
    frames = data.read_video(path)
    assert frames.shape == (3, 48, 32, 3) and data.probe_video(path)[2:4] == (48, 32)
    assert frames[0, 5, -5, 0] > 200 and frames[0, 5, 5, 0] < 50  # the white corner went from left to right


def test_unreadable_media_give_one_sentence_with_the_name(tmp_path):
    encode(tmp_path / "whole.mp4")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "picture.png")
    (tmp_path / "half.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:1500])
    (tmp_path / "half.png").write_bytes((tmp_path / "picture.png").read_bytes()[:60])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a clip\n" * 50)
    (tmp_path / "disguised.mp4").write_bytes((tmp_path / "picture.png").read_bytes())
    data.write_video(
        np.zeros((3, 16, 16, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None],
        tmp_path / "c.gif",
    )
    for name in ("half.mp4", "empty.mp4", "text.mp4", "disguised.mp4", "picture.png", "missing.mp4", "."):
        for read in (data.read_video, data.probe_video):
            with pytest.raises((ValueError, OSError), match=str(tmp_path / name)) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value) and not isinstance(caught.value, av.FFmpegError)
    for name in ("whole.mp4", "half.png", "empty.mp4", "missing.png", "c.gif"):
        with pytest.raises((ValueError, OSError), match=name):
            data.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="is a picture"):
        data.read_video(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="no frame at 9 s"):
        data.read_video(tmp_path / "whole.mp4", 5, fps=8, start=9)


# ---------------------------------------------------------------- clips out


def test_pixels_have_the_bits_of_the_reference_and_come_back_unchanged():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    pixels = data.to_pixels(frames)
    assert torch.equal(pixels, (torch.from_numpy(frames).movedim(-1, 0) / 255) * 2 - 1)
    assert pixels.shape == (3, 1, 16, 16) and pixels[0, 0, 0, 0] == -1 and pixels[0, 0, -1, -1] == 1
    assert np.array_equal(data.to_uint8(pixels), frames)
    assert data.to_uint8(torch.tensor([-3.0, 3.0, 0.9999 / 255]).view(3, 1, 1, 1)).tolist() == [
        [[[0, 255, 128]]]
    ]
    assert data.to_uint8(pixels[None].expand(2, -1, -1, -1, -1)).shape == (2, 1, 16, 16, 3)


def colourful(num_frames: int = 12) -> np.ndarray:
    frames = np.zeros((num_frames, 32, 48, 3), np.uint8)
    frames[:, :, 16:32], frames[:, :, 32:] = (220, 30, 30), (30, 60, 200)
    frames[:, :, :16] = np.linspace(0, 250, num_frames).astype(np.uint8)[:, None, None, None]
    return frames


def test_an_mp4_keeps_rate_colours_and_bytes_whether_whole_or_in_chunks(tmp_path):
    frames = colourful()
    data.write_video(frames, tmp_path / "a.mp4", fps=8)
    data.write_video((frames[i : i + 5] for i in range(0, 12, 5)), tmp_path / "b.mp4", fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert data.probe_video(tmp_path / "a.mp4") == (12, 8.0, 32, 48, 1.5)
    back = data.read_video(tmp_path / "a.mp4")
    error = np.abs(back.astype(int) - frames)[:, 4:-4, [6, 7, 8, 22, 23, 24, 40, 41, 42]]
    assert error.max() <= 4  # 8-bit YUV and crf 17, away from edges; the wrong colour matrix errs by 20
    with av.open(tmp_path / "a.mp4") as container:
        picture = next(container.decode(video=0))
        assert (picture.colorspace, picture.color_range) == (1, 1)  # said to be BT.709, limited range


def test_a_gif_keeps_frames_and_speed(tmp_path):
    data.write_video(colourful(), tmp_path / "a.gif", fps=8)
    back = data.read_video(tmp_path / "a.gif", fps=8)
    assert np.array_equal(back, colourful())  # it has fewer colours than a palette holds
    assert abs(data.probe_video(tmp_path / "a.gif").seconds - 1.5) < 0.011
    assert Image.open(tmp_path / "a.gif").info["loop"] == 0


def test_a_png_is_a_strip_with_the_first_and_last_frame(tmp_path):
    for num_frames, shown in ((1, 1), (5, 5), (49, 8)):
        data.write_video(colourful(num_frames), tmp_path / "a.png")
        strip = data.read_image(tmp_path / "a.png")
        assert strip.shape == (32, 48 * shown, 3)
        assert np.array_equal(strip[:, -48:], colourful(num_frames)[-1]) and strip[0, 0, 0] == 0


def test_what_cannot_be_written_gives_one_sentence_and_leaves_nothing(tmp_path):
    frames = colourful(2)
    with pytest.raises(ValueError, match=r"\.mp4, \.gif, \.png"):
        data.write_video(frames, tmp_path / "a.webm")
    with pytest.raises(ValueError, match="even"):
        data.write_video(frames[:, :31], tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="float32"):
        data.write_video(frames.astype(np.float32), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="no frames"):
        data.write_video(iter(()), tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("a.mp4", "a.gif", "a.png"):
        with pytest.raises(OSError, match="cannot write"):
            data.write_video(frames, tmp_path / "file" / name)
