"""data.py against the reference's prepared pictures, and against real clips encoded here."""

import json
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import GOLDENS, expected
from PIL import Image

import check_data
import data
import inpaint
import media
from runtime import generator
from sizes import Bucket, aspect_shapes, frames_for

ASSETS = GOLDENS / "fun-2b-inp" / "assets"


def encode(
    path: Path, num_frames=30, fps=30, height=32, width=48, stamps=None, gop=12, codec="libx264"
) -> Path:
    """A clip whose frame i is grey i * 8, top left quarter white."""
    with av.open(path, "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop), "b": "4M"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        tick = media.Fraction(1, 600 if stamps else fps)
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
    start = media.resize(media.read_image(ASSETS / "start.png"), 32, 48)
    assert np.array_equal(tensors["pre.start.video_u8"][0, :, 7].permute(1, 2, 0), start)
    both = [media.resize(media.read_image(ASSETS / name), 64, 32) for name in ("start.png", "end.png")]
    theirs = tensors["pre.start_end.video_u8"][0].permute(1, 2, 3, 0)
    assert np.array_equal(theirs[0], both[0]) and np.array_equal(theirs[-1], both[1])
    for i in range(3):
        ours = media.resize(media.read_image(ASSETS / f"list{i}.png"), 32, 48)
        assert np.array_equal(tensors["pre.list3.video_u8"][0, :, i].permute(1, 2, 0), ours)


def test_a_mask_picture_is_white_in_the_same_pixels_as_in_the_reference():
    theirs = expected("fun-2b-inp")["pre.v2v_mask.mask"][0] / 255
    ours = media.read_mask(ASSETS / "mask.png", 9, 32, 48)
    assert ours.shape == (9, 32, 48) and ours.dtype == torch.bool
    assert torch.equal(ours.float(), theirs.expand(9, -1, -1))


def test_a_mask_is_white_from_240_up():
    grey = np.array([[0, 128, 239, 240, 255]], np.uint8).repeat(2, 0)
    assert media.read_mask(grey, 1, 2, 5)[0, 0].tolist() == [False, False, False, True, True]
    assert media.read_mask(grey == 255, 1, 2, 5)[0, 0].tolist() == [False] * 4 + [True]


def test_a_mask_of_several_frames_follows_the_clip_and_must_last_as_long(tmp_path):
    moving = np.zeros((6, 16, 16), np.uint8)
    moving[3:] = 255
    for source in (moving, moving[..., None], moving[..., None].repeat(3, -1)):
        assert media.read_mask(source, 5, 32, 16)[:, 0, 0].tolist() == [False] * 3 + [True] * 2
    media.write_video(moving[..., None].repeat(3, -1), tmp_path / "mask.mp4", fps=4)
    assert media.read_mask(tmp_path / "mask.mp4", 3, 16, 16, fps=2)[:, 5, 5].tolist() == [False, False, True]
    with pytest.raises(ValueError, match="6 frames, the clip 9"):
        media.read_mask(moving, 9, 16, 16)


def test_pictures_of_every_mode_become_rgb(tmp_path):
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[..., 0], colour[0] = 200, 10
    for mode in ("RGB", "RGBA", "P", "L", "LA", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.fromarray(colour).convert(mode).save(path)
        assert np.array_equal(media.read_image(path), Image.fromarray(colour).convert(mode).convert("RGB"))
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert media.read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 255]
    assert np.array_equal(media.read_image(torch.from_numpy(colour)), colour)
    with pytest.raises(ValueError, match="float32"):
        media.read_image(np.zeros((4, 4, 3), np.float32))


def test_a_photograph_is_turned_upright(tmp_path):
    picture = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    picture.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(media.read_image(tmp_path / "turned.png"), np.rot90(np.asarray(picture), -1))


# ---------------------------------------------------------------- clips in


@pytest.mark.parametrize(
    "ending, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264")]
)
def test_a_clip_is_read_at_the_nearest_frames_of_any_rate(tmp_path, ending, codec):
    path = encode(tmp_path / f"clip.{ending}", codec=codec, gop=5)
    nearest = [0, 4, 7, 11, 15, 19, 22, 26]  # 30 fps at t = i/8: 0, 3.75, 7.5 (earlier), 11.25 …
    assert frame_numbers(media.read_video(path)) == [i % 30 for i in range(30)]
    assert frame_numbers(media.read_video(path, fps=8)) == nearest
    assert frame_numbers(media.read_video(path, 3, fps=8)) == nearest[:3]
    assert frame_numbers(media.read_video(path, 3, fps=8, start=0.5)) == [15, 19, 22]
    assert frame_numbers(media.read_video(path, 2, fps=60, start=0.1)) == [3, 3]
    info = media.probe_video(path)
    assert (info.num_frames, info.height, info.width) == (30, 32, 48)
    assert abs(info.fps - 30) < 0.1 and abs(info.seconds - 1) < 0.01  # mkv counts milliseconds


def test_a_variable_rate_clip_is_read_by_its_timestamps(tmp_path):
    path = encode(tmp_path / "clip.mp4", 5, stamps=[0, 60, 120, 600, 660])  # at 0, .1, .2, 1, 1.1 s
    assert frame_numbers(media.read_video(path, 5, fps=4)) == [0, 2, 2, 3, 3]  # at 0, .25, .5, .75, 1 s
    assert media.probe_video(path).num_frames == 5


def test_a_clip_read_at_its_own_rate_gains_no_frame_by_rounding(tmp_path):
    path = encode(tmp_path / "clip.mp4", 14, fps=5)  # its end comes out as 2.8000000000000003 s
    assert frame_numbers(media.read_video(path, fps=5)) == list(range(14))
    assert len(media.read_video(path, fps=10)) == 28


def test_only_the_needed_span_is_decoded(tmp_path):
    path = damage(encode(tmp_path / "clip.mp4", 240, gop=20), 0.5, 0.6)
    assert frame_numbers(media.read_video(path, 5, fps=30)) == [0, 1, 2, 3, 4]  # before the damage
    late = frame_numbers(media.read_video(path, 5, fps=30, start=7.5))  # behind it
    assert late == [i % 30 for i in range(225, 230)]
    with pytest.raises(ValueError, match="clip.mp4"):
        media.read_video(path)


def test_a_phone_clip_is_turned_upright(tmp_path):
    path = encode(tmp_path / "clip.mp4", 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30]  # a quarter turn clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", *turn)
    path.write_bytes(content)
    frames = media.read_video(path)
    assert frames.shape == (3, 48, 32, 3) and media.probe_video(path)[2:4] == (48, 32)
    assert frames[0, 5, -5, 0] > 200 and frames[0, 5, 5, 0] < 50  # the white corner went from left to right


def test_unreadable_media_give_one_sentence_with_the_name(tmp_path):
    encode(tmp_path / "whole.mp4")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "picture.png")
    (tmp_path / "half.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:1500])
    (tmp_path / "half.png").write_bytes((tmp_path / "picture.png").read_bytes()[:60])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a clip\n" * 50)
    (tmp_path / "disguised.mp4").write_bytes((tmp_path / "picture.png").read_bytes())
    media.write_video(
        np.zeros((3, 16, 16, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None],
        tmp_path / "c.gif",
    )
    for name in ("half.mp4", "empty.mp4", "text.mp4", "disguised.mp4", "picture.png", "missing.mp4", "."):
        for read in (media.read_video, media.probe_video):
            with pytest.raises((ValueError, OSError), match=str(tmp_path / name)) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value) and not isinstance(caught.value, av.FFmpegError)
    for name in ("whole.mp4", "half.png", "empty.mp4", "missing.png", "c.gif"):
        with pytest.raises((ValueError, OSError), match=name):
            media.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="is a picture"):
        media.read_video(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="no frame at 9 s"):
        media.read_video(tmp_path / "whole.mp4", 5, fps=8, start=9)


# ---------------------------------------------------------------- clips out


def test_pixels_have_the_bits_of_the_reference_and_come_back_unchanged():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1) + np.array([0, 50, 100], np.uint8)
    pixels = media.to_pixels(frames)
    assert torch.equal(pixels, (torch.from_numpy(frames).movedim(-1, 0) / 255) * 2 - 1)
    assert (
        pixels.shape == (3, 1, 16, 16) and pixels[0, 0, 0, 0] == -1 and pixels[0, 0, -1, -1] == 1
    )  # c f h w
    assert np.array_equal(media.to_uint8(pixels), frames)
    assert media.to_uint8(torch.tensor([-3.0, 3.0, 0.9999 / 255]).view(3, 1, 1, 1)).tolist() == [
        [[[0, 255, 128]]]
    ]
    assert media.to_uint8(pixels[None].expand(2, -1, -1, -1, -1)).shape == (2, 1, 16, 16, 3)


def colourful(num_frames: int = 12) -> np.ndarray:
    frames = np.zeros((num_frames, 32, 48, 3), np.uint8)
    frames[:, :, 16:32], frames[:, :, 32:] = (220, 30, 30), (30, 60, 200)
    frames[:, :, :16] = np.linspace(0, 250, num_frames).astype(np.uint8)[:, None, None, None]
    return frames


def test_an_mp4_keeps_rate_colours_and_bytes_whether_whole_or_in_chunks(tmp_path):
    frames = colourful()
    media.write_video(frames, tmp_path / "a.mp4", fps=8)
    media.write_video((frames[i : i + 5] for i in range(0, 12, 5)), tmp_path / "b.mp4", fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert media.probe_video(tmp_path / "a.mp4") == (12, 8.0, 32, 48, 1.5)
    back = media.read_video(tmp_path / "a.mp4")
    error = np.abs(back.astype(int) - frames)[:, 4:-4, [6, 7, 8, 22, 23, 24, 40, 41, 42]]
    assert error.max() <= 4  # 8-bit YUV and crf 17, away from edges; the wrong colour matrix errs by 20
    with av.open(tmp_path / "a.mp4") as container:
        picture = next(container.decode(video=0))
        assert (picture.colorspace, picture.color_range) == (1, 1)  # said to be BT.709, limited range


def test_an_mp4_loses_nothing_one_would_see(tmp_path):
    photo = media.resize(media.read_image(ASSETS / "start.png"), 64, 96)[..., 1:2].repeat(3, -1)  # luma only
    media.write_video(photo[None].repeat(5, 0), tmp_path / "a.mp4")
    error = media.read_video(tmp_path / "a.mp4").astype(float) - photo
    assert (error**2).mean() < 4  # 2.4 at crf 17, 8 at x264's own 23


def test_a_gif_keeps_frames_and_speed(tmp_path):
    media.write_video(colourful(), tmp_path / "a.gif", fps=8)
    back = media.read_video(tmp_path / "a.gif", fps=8)
    assert np.array_equal(back, colourful())  # it has fewer colours than a palette holds
    assert abs(media.probe_video(tmp_path / "a.gif").seconds - 1.5) < 0.011
    assert Image.open(tmp_path / "a.gif").info["loop"] == 0


def test_a_png_is_a_strip_with_the_first_and_last_frame(tmp_path):
    for num_frames, shown in ((1, 1), (5, 5), (49, 8)):
        media.write_video(colourful(num_frames), tmp_path / "a.png")
        strip = media.read_image(tmp_path / "a.png")
        assert strip.shape == (32, 48 * shown, 3)
        assert np.array_equal(strip[:, -48:], colourful(num_frames)[-1]) and strip[0, 0, 0] == 0


def test_what_cannot_be_written_gives_one_sentence_and_leaves_nothing(tmp_path):
    frames = colourful(2)
    with pytest.raises(ValueError, match=r"\.mp4, \.gif, \.png"):
        media.write_video(frames, tmp_path / "a.webm")
    with pytest.raises(ValueError, match="even"):
        media.write_video(frames[:, :31], tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="float32"):
        media.write_video(frames.astype(np.float32), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="no frames"):
        media.write_video(iter(()), tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("a.mp4", "a.gif", "a.png"):
        with pytest.raises(OSError, match="cannot write"):
            media.write_video(frames, tmp_path / "file" / name)


# ---------------------------------------------------------------- metadata


def make_files(folder: Path) -> None:
    encode(folder / "a.mp4", 90, height=48, width=64)  # 3 s: 24 frames at 8 fps
    encode(folder / "b.mp4", 20, fps=10, height=64, width=48)
    Image.fromarray(np.full((40, 80, 3), 90, np.uint8)).save(folder / "c.png")


def items() -> list[dict]:
    return [
        {"file_path": "a.mp4", "text": "first", "type": "video"},
        {"file_path": "b.mp4", "text": "second", "type": "video", "width": 48},
        {"file_path": "c.png", "text": "third", "type": "image"},
    ]


def test_json_jsonl_and_a_folder_list_the_same_samples(tmp_path):
    make_files(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(items()))
    (tmp_path / "meta.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(item) for item in items()))
    absolute = [{**item, "file_path": str(tmp_path / item["file_path"])} for item in items()]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "absolute.json").write_text(json.dumps(absolute))
    for item in items():
        (tmp_path / item["file_path"]).with_suffix(".txt").write_text(item["text"] + "\n")
    wanted = [(tmp_path / item["file_path"], item["text"], item["type"] == "image", None) for item in items()]
    for name in ("meta.json", "meta.jsonl", "sub/absolute.json", "."):
        assert data.read_metadata(tmp_path / name) == wanted
    records, failures = data.open_records(data.read_metadata(tmp_path), fps=8)
    assert [(r.num_frames, r.size) for r in records] == [(24, (48, 64)), (16, (64, 48)), (1, (40, 80))]
    assert [r.caption(1) for r in records] == ["first", "second", "third"] and not failures


def test_every_mistake_in_a_metadata_file_is_named_in_a_line_of_its_own(tmp_path):
    make_files(tmp_path)
    good = items()[0]
    mistakes = {
        "item 2: file_path is missing": {"text": "", "type": "video"},
        "item 3: text is missing": {"file_path": "b.mp4", "type": "video"},
        "item 4: type is missing": {"file_path": "b.mp4", "text": ""},
        "item 5: text = 7 should be a string": {**good, "text": 7},
        "item 6: file_path = null should be a string": {**good, "file_path": None},
        'item 7: type = "film" should be "video" or "image"': {**good, "type": "film"},
        f"item 8: file_path: {tmp_path / 'x.mp4'} does not exist": {**good, "file_path": "x.mp4"},
        f"item 9: file_path: {tmp_path / '.'} is a folder": {**good, "file_path": "."},
        f"item 10: file_path: {tmp_path / 'c.png'} is no video": {**good, "file_path": "c.png"},
        f"item 11: file_path: {tmp_path / 'a.mp4'} is no image": {**good, "type": "image"},
        "item 12: says the same as item 1": good,
        "item 13: should be an object": ["a.mp4", "first", "video"],
        "item 14: control_file_path: ": {**good, "control_file_path": "y.mp4"},
        "item 15: control_file_path = 1 should be a string": {**good, "control_file_path": 1},
    }
    (tmp_path / "meta.json").write_text(json.dumps([good, *mistakes.values()]))
    with pytest.raises(ValueError) as caught:
        data.read_metadata(tmp_path / "meta.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + len(mistakes) and "meta.json" in lines[0] and "14" in lines[0]
    for line, start in zip(lines[1:], mistakes):
        assert line.strip().startswith(start), line
    two = {"type": "film", "text": None}  # three mistakes in one line of JSONL
    (tmp_path / "meta.jsonl").write_text(json.dumps(good) + '\n{"file_path": \n' + json.dumps(two))
    with pytest.raises(ValueError) as caught:
        data.read_metadata(tmp_path / "meta.jsonl")
    lines = [line.strip()[:20] for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "line 2: not JSON in ",
        "line 3: file_path is",
        "line 3: text = null ",
        'line 3: type = "film',
    ]


def test_a_metadata_file_that_is_none_says_so(tmp_path):
    for content, message in (
        ("[]", "no samples"),
        ("", "not JSON"),
        ('{"a": 1}', "should be a list"),
        ("[" * 100_000, "not JSON"),
        ("\xff\xfe", "not JSON"),
    ):
        (tmp_path / "meta.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            data.read_metadata(tmp_path / "meta.json")
    with pytest.raises(OSError, match="missing.json does not exist"):
        data.read_metadata(tmp_path / "missing.json")
    (tmp_path / "meta.json").unlink()
    with pytest.raises(ValueError, match="no samples"):
        data.read_metadata(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "lonely.png")
    with pytest.raises(ValueError, match="lonely.png: its caption lonely.txt is missing"):
        data.read_metadata(tmp_path)


# ---------------------------------------------------------------- buckets


def record(num_frames=100, height=512, width=512, name="", read=None) -> data.Record:
    return data.Record(name, lambda num_frames: f"{name} in {num_frames}", num_frames, (height, width), read)


def test_frames_for_gives_the_table_of_the_report():
    sizes = (512, 640, 768, 896, 1024, 1152, 1280)
    table = {
        13312: [49, 29, 21, 13, 9, 9, 5],
        29952: [49, 49, 49, 37, 25, 21, 17],
        53248: [49, 49, 49, 49, 49, 37, 29],
    }
    for budget, frames in table.items():
        assert [frames_for(budget, size, size) for size in sizes] == frames
    for budget, frames in {80: [17, 5, 1], 180: [17, 17, 9], 320: [17, 17, 17]}.items():  # the tiny preset
        assert [frames_for(budget, size, size, max_frames=17) for size in (64, 96, 128)] == frames
    for budget in table:
        for size in range(512, 1281, 16):
            latent_frames = (frames_for(budget, size, size, 10_000) - 1) // 4 + 1
            assert latent_frames * (size // 16) ** 2 <= 1.2 * budget
    assert frames_for(13312, 256, 1024) == 49 and frames_for(1, 512, 512) == 1
    in_pairs = [frames_for(b, s, s, 85, frames_per_token=2) for b in table for s in (512, 1024, 1280)]
    assert in_pairs == [45, 5, 5, 85, 21, 13, 85, 45, 29]
    assert frames_for(1, 512, 512, frames_per_token=2) == 1


@pytest.mark.parametrize("size, num_shapes", [(64, 9), (512, 41), (768, 41), (1024, 41)])
def test_shapes_reach_from_1_to_4_to_4_to_1_at_equal_area(size, num_shapes):
    shapes = aspect_shapes(size)
    assert len(shapes) == num_shapes and (size, size) in shapes
    assert {(size // 2, size * 2), (size * 2, size // 2)} <= set(shapes)
    for height, width in shapes:
        assert height % 16 == 0 == width % 16 and (width, height) in shapes
        assert abs(height * width / size**2 - 1) < (0.13 if size == 64 else 0.03)  # half a step of 16


def test_a_bucket_is_never_much_larger_than_the_sample_nor_longer():
    plan = data.Plan((512, 768, 1024), max_tokens=29952, batch_tokens=29952)

    def drawn(**sample) -> set:
        return {
            data.choose_bucket(record(**sample), plan, generator(0, 0, i, "resolution")) for i in range(50)
        }

    assert drawn(height=600, width=600) == {(49, 512, 512)}  # 750 is below 768
    assert drawn(height=620, width=620) == {(49, 512, 512), (49, 768, 768)}
    assert drawn(height=2000, width=2000) == {(49, 512, 512), (49, 768, 768), (25, 1024, 1024)}
    assert drawn(height=100, width=100) == {(49, 512, 512)}  # nothing fits: the smallest
    assert drawn(height=400, width=640) == {(49, 400, 656)}
    assert drawn(height=64, width=4096) == {(49, 256, 1024)}
    assert drawn(num_frames=30) == {(29, 512, 512)} and drawn(num_frames=4) == {(1, 512, 512)}
    counts = [
        data.choose_bucket(record(height=2000, width=2000), plan, generator(0, 0, i, "")) for i in range(1500)
    ]
    for height in (512, 768, 1024):
        assert abs(sum(bucket.height == height for bucket in counts) - 500) < 5 * 18  # 5 standard deviations


def test_an_epoch_holds_every_sample_once_in_batches_of_one_shape():
    records = [
        record(*shape) for shape in ((100, 300, 300), (1, 640, 360), (20, 720, 1280), (9, 600, 600)) * 25
    ]
    plan = data.Plan((256, 512), max_tokens=13312, batch_tokens=13312)
    epochs = [data.epoch_batches(records, plan, seed=3, epoch=epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch.indices) == list(range(100))
        full = {}
        for batch in batches:
            assert all(records[index].num_frames >= batch.bucket.num_frames for index in batch.indices)
            assert len(batch.indices) <= max(1, 13312 // batch.bucket.tokens)
            full.setdefault(batch.bucket, []).append(
                len(batch.indices) == max(1, 13312 // batch.bucket.tokens)
            )
        assert all(flags.count(False) <= 1 for flags in full.values())  # one short batch a bucket
    assert epochs[0] == data.epoch_batches(records, plan, seed=3, epoch=0)
    assert all(batches != sorted(batches, key=lambda batch: batch.indices) for batches in epochs)
    assert any(batch.indices != sorted(batch.indices) for batch in epochs[0])
    assert epochs[0] != epochs[1] and epochs[0] != data.epoch_batches(records, plan, seed=4, epoch=0)
    assert Bucket(9, 512, 256).tokens == 3 * 32 * 16
    table = data.bucket_table(epochs[0]).splitlines()
    assert sum(int(line.split()[5]) for line in table[1:]) == 100 and len(table) == 1 + len(
        {b.bucket for b in epochs[0]}
    )


def test_fitting_covers_the_shape_and_cuts_evenly():
    ramp = np.arange(200, dtype=np.uint8)[None, None, :, None].repeat(100, 1).repeat(3, -1)  # 1 100 200 3
    wide = media.fit(ramp, 50, 50)
    assert wide.shape == (1, 50, 50, 3) and abs(int(wide[0, 25, 0, 0]) - 51) <= 1
    assert abs(int(wide[0, 25, -1, 0]) - 148) <= 1 and wide[0, 0, 25, 0] == wide[0, -1, 25, 0]
    assert np.array_equal(media.fit(ramp.swapaxes(1, 2), 50, 50), wide.swapaxes(1, 2))
    assert np.array_equal(media.fit(ramp, 100, 200), ramp)
    assert np.array_equal(media.fit(ramp, 100, 100), ramp[:, :, 50:150])


# ---------------------------------------------------------------- draws


def test_a_draw_depends_on_what_it_is_for_and_on_nothing_else():
    def number(*key):
        return torch.rand((), generator=generator(*key)).item()

    keys = [(s, e, i, p) for s in range(3) for e in range(3) for i in range(12) for p in ("mask", "noise")]
    first = {key: number(*key) for key in keys}
    assert len(set(first.values())) == len(keys) and all(number(*key) == first[key] for key in reversed(keys))
    assert first[0, 0, 11, "mask"] != number(0, 0, 1, "1mask")
    # pinned: a run must resume on another machine and version with the same draws
    assert torch.randint(1000, (3,), generator=generator(1, 2, 3, "mask")).tolist() == [393, 535, 926]


def masks(num: int, *shape: int) -> list[torch.Tensor]:
    return [inpaint.random_mask(generator(0, 0, i, "mask"), *shape) for i in range(num)]


def kind_of(mask: torch.Tensor) -> str:
    """Which kind of mask this is, told from the mask alone."""
    f = len(mask)
    whole, empty = mask.flatten(1).all(1), ~mask.flatten(1).any(1)
    equal = bool((mask == mask[:1]).all())
    if whole.all():
        return "everything"
    if (whole | empty).all():
        kept = empty.nonzero().flatten().tolist()
        k = len(kept)
        if kept == list(range(k)) and k <= 4:
            return "after the start"
        if k % 2 == 0 and k <= 8 and kept == [*range(k // 2), *range(f - k // 2, f)]:
            return "between start and end"
        return "frames"
    some = mask[(~empty).nonzero()[0, 0]]
    rows, columns = some.any(1), some.any(0)
    is_box = bool((some == rows[:, None] & columns).all())
    if equal:
        return "box" if is_box else "disc"
    inner = (~empty).nonzero().flatten()
    if (mask[inner] == some).all() and is_box and inner[-1] - inner[0] + 1 == len(inner):
        return "box for a while" if len(inner) > 1 else "boxes"
    return "boxes" if mask.float().mean() < 0.25 else "pixels"


def test_masks_of_clips_come_in_the_shares_of_the_reference():
    num = 4000
    kinds = Counter(kind_of(mask) for mask in masks(num, 17, 32, 48))
    shares = {
        "everything": 0.2,
        "after the start": 0.2,
        "between start and end": 0.2,
        "disc": 0.15,  # ellipse .1, circle .05
        "box": 0.05,
        "box for a while": 0.05,
        "boxes": 0.05,
        "pixels": 0.05,
        "frames": 0.05,
    }
    assert kinds.keys() <= shares.keys()
    for kind, share in shares.items():
        # five standard deviations, and six for the rare draws that look like another kind
        assert abs(kinds[kind] - num * share) < 5 * (num * share * (1 - share)) ** 0.5 + 6, (kind, kinds)


def of_kind(kind: str, num: int, f: int, h: int, w: int) -> torch.Tensor:
    draws = [
        inpaint._mask_of_kind(kind, generator(1, 0, i, kind), f, h, w).expand(f, h, w) for i in range(num)
    ]
    return torch.stack(draws)  # num f h w


def test_masks_keep_one_to_four_frames_at_the_start_or_at_both_ends():
    after = of_kind("after the start", 200, 9, 2, 2)[..., 0, 0]
    assert {tuple(m.int().tolist()) for m in after} == {(0,) * k + (1,) * (9 - k) for k in (1, 2, 3, 4)}
    between = of_kind("between start and end", 200, 9, 2, 2)[..., 0, 0]
    assert {tuple(m.int().tolist()) for m in between} == {
        (0,) * k + (1,) * (9 - 2 * k) + (0,) * k for k in (1, 2, 3, 4)
    }
    for f in (2, 5, 8):  # too short for more than one
        assert of_kind("after the start", 20, f, 2, 2)[..., 0, 0].sum(1).tolist() == [f - 1] * 20
        assert of_kind("between start and end", 20, f, 2, 2)[..., 0, 0].sum(1).tolist() == [f - 2 or f] * 20


def off_border(mask: torch.Tensor) -> torch.Tensor:
    """Those of num h w masks that no border cuts."""
    return mask[~(mask[:, [0, -1]].flatten(1).any(1) | mask[:, :, [0, -1]].flatten(1).any(1))]


def extents(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heights and widths of num h w masks."""
    return mask.any(2).sum(1), mask.any(1).sum(1)


def test_boxes_have_the_sizes_of_the_reference_and_lie_anywhere():
    h, w = 64, 96
    box = of_kind("box", 1000, 1, h, w)[:, 0]
    heights, widths = extents(box)
    assert heights.max() == 3 * h // 4 and widths.max() == 3 * w // 4  # nothing larger, and it is reached
    assert off_border(box).any(2).sum(1).min() == h // 4 and off_border(box).any(1).sum(1).min() == w // 4
    assert box[:, 0].any() and box[:, -1].any()  # a box near the border is cut
    for rows in (box.any(2), box.any(1)):  # around its centre: no side is preferred
        assert abs(rows[:, : rows.shape[1] // 2].sum() / rows.sum() - 0.5) < 0.03


def test_discs_have_the_sizes_of_the_reference_and_lie_anywhere():
    h, w = 64, 96
    circle, ellipse = (of_kind(kind, 600, 1, h, w)[:, 0] for kind in ("circle", "ellipse"))
    for disc in (circle, ellipse):
        assert disc.any(0)[[0, 0, -1, -1], [0, -1, 0, -1]].all()  # all four corners were reached
        for extent in extents(off_border(disc)):
            assert extent.min() == 2 * (h // 8) + 1 and extent.max() == 2 * (h // 4) + 1
    heights, widths = extents(off_border(circle))
    assert torch.equal(heights, widths)
    heights, widths = extents(off_border(ellipse))
    assert (heights > widths + 8).any() and (heights < widths - 8).any()
    fill = off_border(ellipse).flatten(1).sum(1) / ((heights - 1) * (widths - 1))
    assert ((fill - torch.pi / 4).abs() < 0.04).all()  # pixels of a disc in its bounding box


def test_masks_of_a_span_a_few_frames_and_single_pixels_are_as_described():
    f, h, w = 16, 32, 32
    span = of_kind("box for a while", 300, f, h, w).flatten(2).any(2)  # 300 f
    first = span.int().argmax(1)
    last = f - 1 - span.int().flip(1).argmax(1)
    assert first.max() == 7 and first.min() == 0 and last.min() >= 7 and last.max() == f - 2
    assert (span.sum(1) == last - first + 1).all()
    boxes = of_kind("boxes here and there", 300, f, h, w)
    frames = boxes.flatten(2).any(2).sum(1)
    assert frames.min() == 1 and frames.max() == f // 2
    for extent, side in ((boxes.any(3).sum(2), h), (boxes.any(2).sum(2), w)):
        assert extent.max() == side // 4 and extent[extent > 0].min() == 1
    pixels = of_kind("pixels", 4, f, h, w).float()
    assert abs(pixels.mean() - 0.5) < 5 * 0.5 / (4 * f * h * w) ** 0.5
    assert abs((pixels[:, 1:] * pixels[:, :-1]).mean() - 0.25) < 0.01  # neighbours in time know nothing
    assert abs((pixels[..., 1:] * pixels[..., :-1]).mean() - 0.25) < 0.01
    whole = of_kind("frames", 300, f, 2, 2)
    assert abs(whole.float().mean() - 0.5) < 5 * 0.5 / (300 * f) ** 0.5
    assert (whole == whole[..., :1, :1]).all()


def test_masks_of_pictures_are_a_box_or_everything():
    drawn = masks(2000, 1, 32, 32)
    assert all(mask.shape == (1, 32, 32) and mask.dtype == torch.bool for mask in drawn)
    kinds = Counter(kind_of(mask) for mask in drawn)
    assert kinds.keys() == {"everything", "box"} and abs(kinds["box"] - 400) < 5 * 18


def test_a_mask_costs_little_more_than_writing_it():
    """A few times a fill of its size, about 2 in all here: ten thousand a minute of 512×512×49."""

    def cpu_seconds(work) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    fill = cpu_seconds(lambda: [torch.ones(49, 512, 512, dtype=torch.bool) for _ in range(200)])
    assert cpu_seconds(lambda: masks(200, 49, 512, 512)) < 6 * fill


def test_noise_on_the_reference_is_log_normal_and_spares_what_is_masked():
    logs = torch.tensor([inpaint.draw_noise_sigma(generator(0, 0, i, "sigma")) for i in range(2000)]).log()
    assert abs(logs.mean() + 3) < 5 * 0.5 / 2000**0.5 and abs(logs.std() - 0.5) < 5 * 0.5 / 4000**0.5
    pixels = torch.tensor([-1.0, -0.999, 0.0, 1.0])
    noisy = inpaint.add_reference_noise(pixels, 0.1, torch.tensor([1.0, 2.0, -3.0, 4.0]))
    assert torch.equal(noisy, torch.tensor([-1.0, -0.999 + 0.1 * 2, 0.1 * -3, 1 + 0.1 * 4]))


# ---------------------------------------------------------------- loading


def test_a_sample_is_drawn_from_its_key_alone(tmp_path):
    make_files(tmp_path)
    for item in items():
        (tmp_path / item["file_path"]).with_suffix(".txt").write_text(item["text"])
    records, _ = data.open_records(data.read_metadata(tmp_path))
    bucket = Bucket(17, 32, 32)
    sample = data.load_sample(records[0], bucket, 1, 2, 0)
    again = data.load_sample(records[0], bucket, 1, 2, 0)
    assert sample.pixels.shape == (3, 17, 32, 32) and sample.mask.shape == (17, 32, 32)
    assert torch.equal(sample.pixels, again.pixels) and torch.equal(sample.mask, again.mask)
    starts, captions, flags = Counter(), Counter(), Counter()
    seen = []
    drawing = record(
        20,
        32,
        32,
        "d",
        lambda start, n, size: seen.append((start, size)) or np.zeros((n, *size, 3), np.uint8),
    )
    for index in range(1000):
        sample = data.load_sample(drawing, bucket, 1, 2, index)
        captions[sample.caption] += 1
        flags[sample.zero_if_all_masked] += 1
    starts = Counter(start for start, _ in seen)
    assert {size for _, size in seen} == {(32, 32)} and sorted(starts) == [0, 1, 2, 3]
    assert min(starts.values()) > 180  # 250 ± 5 standard deviations of 14
    assert captions.keys() == {"", "d in 17"} and 53 < captions[""] < 147 and 53 < flags[False] < 147


def test_control_clips_are_cut_like_their_clips(tmp_path):
    make_files(tmp_path)
    item = {"file_path": "a.mp4", "text": "", "type": "video", "control_file_path": "a.mp4"}
    (tmp_path / "meta.json").write_text(json.dumps([item]))
    records, _ = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    sample = data.load_sample(records[0], Bucket(9, 32, 48), 0, 0, 5)
    assert torch.equal(sample.control, sample.pixels)  # the same frames and the same cut
    (tmp_path / "meta.json").write_text(json.dumps([{**item, "control_file_path": "b.mp4"}]))
    records, _ = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    assert records[0].num_frames == 16 and records[0].size == (48, 64)  # what both fill, the clip's own size
    assert not torch.equal(data.load_sample(records[0], Bucket(9, 32, 48), 0, 0, 5).control, sample.control)


def still(name: str, fails: bool = False) -> data.Record:
    def read(start, num_frames, size):
        if fails:
            raise ValueError(f"{name} is damaged")
        return np.full((num_frames, *size, 3), int(name), np.uint8)

    return record(1, 32, 32, name, read)


def load_all(loader: data.Loader, seed: int = 0, epochs: int = 2) -> list:
    plan = data.Plan((32,), max_tokens=4, batch_tokens=12)  # three pictures of four tokens
    batches = [(e, b) for e in range(epochs) for b in data.epoch_batches(loader.records, plan, seed, e)]
    loaded = list(loader.batches(batches))
    assert [(epoch, batch) for epoch, batch, _ in loaded] == batches
    return [media.to_uint8(sample.pixels)[:, 0, 0, 0, 0].tolist() for _, _, sample in loaded]


def test_batches_come_in_order_whatever_the_number_of_threads():
    records = [still(str(i)) for i in range(40)]
    one = load_all(data.Loader(records, 0, num_workers=1))
    assert one == load_all(data.Loader(records, 0, num_workers=7))
    assert Counter(sum(one, [])) == {i: 2 for i in range(40)}
    _, batch, sample = next(data.Loader(records, 0).batches([(0, data.Batch(Bucket(1, 32, 32), [3, 4]))]))
    assert sample.pixels.shape == (2, 3, 1, 32, 32) and sample.mask.shape == (2, 1, 32, 32)
    assert (
        len(sample.caption) == 2 and sample.zero_if_all_masked.dtype == torch.bool and sample.control is None
    )


def test_batches_are_loaded_ahead_of_their_use():
    records = [still(str(i)) for i in range(20)]
    loader, loaded = data.Loader(records, 0), []
    loader.load = lambda bucket, epoch, index: (
        loaded.append(index) or data.Loader.load(loader, bucket, epoch, index)
    )
    todo = [(0, data.Batch(Bucket(1, 32, 32), [i])) for i in range(20)]
    batches = loader.batches(todo, ahead=3)
    next(batches)
    begin = time.time()
    while len(loaded) < 4 and time.time() - begin < 10:
        time.sleep(0.01)
    assert sorted(loaded) == [0, 1, 2, 3]
    batches.close()


def test_a_broken_file_is_named_once_and_replaced_by_the_next_that_is_long_enough():
    records = [still(str(i), fails=i in (3, 4)) for i in range(40)]
    said = []
    loader = data.Loader(records, 0, say=said.append)
    counts = Counter(sum(load_all(loader), []))
    assert counts == {i: 6 if i == 5 else 2 for i in range(40) if i not in (3, 4)}
    assert sorted(said) == ["skipped: 3 is damaged", "skipped: 4 is damaged"] and set(loader.failures) == {
        "3",
        "4",
    }
    long = [record(9, 32, 32, "7", lambda start, n, size: np.full((n, *size, 3), 7, np.uint8))]
    loader = data.Loader([still("0", fails=True), still("1"), *long], 0, say=said.append)
    pixels = loader.load(Bucket(9, 32, 32), 0, 0).pixels
    assert pixels.shape[1] == 9 and (media.to_uint8(pixels) == 7).all()


def test_too_many_broken_files_stop_the_run_with_the_list():
    records = [still(str(i), fails=i < 3) for i in range(40)]
    with pytest.raises(ValueError, match=r"0 is damaged\n  1 is damaged\n  2 is damaged"):
        load_all(data.Loader(records, 0, say=lambda line: None))
    half = [still(str(i), fails=i < 2) for i in range(30)]
    with pytest.raises(ValueError, match="2 of 30"):
        load_all(data.Loader(half, 0, say=lambda line: None))
    load_all(data.Loader(half[1:5], 0, say=lambda line: None))  # one is forgiven in the smallest set
    with pytest.raises(ValueError, match="3 of 40 (.|\n)*2no.mp4 is empty"):
        data.Loader(
            records[3:], 0, {f"{i}no.mp4": f"{i}no.mp4 is empty" for i in range(3)}, say=lambda line: None
        )


def test_a_clip_that_ends_before_its_header_says_is_a_broken_file(tmp_path):
    make_files(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(items()[:1]))
    records, _ = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    encode(tmp_path / "a.mp4", 30)
    with pytest.raises(ValueError, match="a.mp4 ends 9 frames before its header says"):
        data.load_sample(records[0], Bucket(17, 32, 32), 0, 0, index=6)
    (tmp_path / "a.mp4").write_bytes(b"")
    records, failures = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    assert records == [] and "a.mp4" in failures[str(tmp_path / "a.mp4")]


# ---------------------------------------------------------------- the check of a data set


def check(capsys, *argv: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of python data.py check …"""
    try:
        status = check_data.main([*map(str, argv)])
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


SMALL = ("--resolutions", 32, 48, "--max-tokens", 24, "--num-frames", 9)


def write_metadata(folder: Path, *names: str, **more: str) -> Path:
    kinds = {name: "image" if name.endswith("png") else "video" for name in names}
    listed = [{"file_path": name, "text": "words", "type": kind} | more for name, kind in kinds.items()]
    (folder / "meta.json").write_text(json.dumps(listed))
    return folder / "meta.json"


def test_a_good_data_set_is_reported_file_by_file_with_its_buckets(tmp_path, capsys):
    encode(tmp_path / "a.mp4", num_frames=30, fps=15)
    Image.fromarray(colourful()[0]).save(tmp_path / "b.png")
    height, width = colourful().shape[1:3]
    meta = write_metadata(tmp_path, "a.mp4", "b.png")
    status, text, _ = check(capsys, meta, *SMALL, "--fps", 7.5)
    assert status == 0 and text.endswith("samples: 2, lost: 0, odd: 0, mistakes: 0\n")
    assert f"{tmp_path / 'a.mp4'}: 30 frames at 15 fps, 32x48, for 9x32x32, 9x32x64\n" in text
    assert f"{tmp_path / 'b.png'}: 1 frame, {height}x{width}, for 1x32x32" in text
    status, text, _ = check(capsys, meta, *SMALL, "--fps", 7.5, "--json")
    report = json.loads(text)
    assert status == 0 and (report["samples"], report["lost"], report["mistakes"]) == (2, 0, [])
    clip, picture = report["files"]
    assert (clip["frames"], clip["fps"], clip["size"], clip["odd"]) == (30, 15, [32, 48], [])
    assert (picture["frames"], picture["fps"], picture["size"]) == (1, None, [height, width])
    plan = data.Plan((32, 48), 24, 24, 9)
    for file, num_frames in ((clip, 15), (picture, 1)):
        drawn = {
            data.choose_bucket(record(num_frames, *file["size"]), plan, generator(0, 0, i, "resolution"))
            for i in range(30)
        }
        assert sorted(map(tuple, file["buckets"])) == sorted(drawn)  # what training draws


def test_the_check_has_the_plan_of_the_first_phase(tmp_path, capsys):
    grey = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    status, text, _ = check(capsys, write_metadata(tmp_path, "a.png"))
    assert status == 0 and "for 1x512x512, 1x640x640, 1x768x768, 1x896x896, 1x1024x1024\n" in text
    plan = data.Plan(tuple(range(512, 1025, 128)), 13312, 13312, 49)
    frames = [data.bucket_at(record(100, 1024, 1024), plan, size).num_frames for size in plan.resolutions]
    assert frames == [49, 29, 21, 13, 9]


def test_what_training_would_lose_is_found_by_decoding(tmp_path, capsys):
    for name in ("good", "torn", "short", "jumps", "grows"):
        encode(tmp_path / f"{name}.mp4", num_frames=40, height=64, width=64)
    damage(tmp_path / "torn.mp4", 0, 0.3)
    content = (tmp_path / "short.mp4").read_bytes()  # its header, in front, still tells of 40 frames
    (tmp_path / "short.mp4").write_bytes(content[: len(content) * 3 // 5])
    encode(tmp_path / "jumps.mkv", num_frames=4, stamps=[0, 20, 40, 600 * 90])
    for size in (32, 64):
        encode(tmp_path / f"{size}.ts", height=size, width=size)
    (tmp_path / "grows.ts").write_bytes((tmp_path / "32.ts").read_bytes() + (tmp_path / "64.ts").read_bytes())
    names = ["good.mp4", "torn.mp4", "short.mp4", "jumps.mkv", "grows.ts"]
    status, text, _ = check(capsys, write_metadata(tmp_path, *names), *SMALL, "--json")
    files = {Path(file["file"]).name: file for file in json.loads(text)["files"]}
    assert status == 1 and json.loads(text)["lost"] == 4 and files["good.mp4"]["lost"] == ""
    reasons = {
        "torn.mp4": "damaged",
        "short.mp4": "",
        "jumps.mkv": "jump by 90 s",
        "grows.ts": "changes its size",
    }
    for name, reason in reasons.items():
        assert name in files[name]["lost"] and reason in files[name]["lost"], files[name]
    status, text, _ = check(capsys, tmp_path / "meta.json", *SMALL)
    assert status == 1 and text.count("\n  LOST: ") == 4


def test_a_clip_that_ends_before_its_header_says_is_found(tmp_path):
    path = encode(tmp_path / "a.mp4", num_frames=30, fps=30)
    assert check_data._look_through(path, 8, 8)[:2] == (30, pytest.approx(1))
    with pytest.raises(ValueError, match="a.mp4 ends 2 frames before its header says"):
        check_data._look_through(path, 10, 8)


def test_what_is_odd_is_named_and_lost_by_nobody(tmp_path, capsys):
    encode(
        tmp_path / "varies.mp4", num_frames=12, stamps=[0, 20, 40, 60, 80, 100, 200, 220, 240, 260, 280, 300]
    )
    media.write_video(np.full((40, 32, 48, 3), 3, np.uint8), tmp_path / "black.mp4", fps=8)
    media.write_video(np.tile(colourful()[:1, :16, :16], (40, 1, 1, 1)), tmp_path / "tiny.mp4", fps=8)
    encode(tmp_path / "short.mp4", num_frames=5, fps=8)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    encode(tmp_path / "silent.mp4", num_frames=40, fps=8)
    odd = {
        "varies.mp4": "its rate varies: frames last 33 … 167 ms",
        "black.mp4": "one flat colour",
        "tiny.mp4": "tiny: it is enlarged to 32² pixels",
        "short.mp4": "short: 5 frames at 8 fps, where 9 have room",
        "black.png": "one flat colour",
    }
    meta = write_metadata(tmp_path, *odd)
    items = json.loads(meta.read_text()) + [{"file_path": "silent.mp4", "text": " ", "type": "video"}]
    meta.write_text(json.dumps(items))
    status, text, _ = check(capsys, meta, *SMALL, "--json")
    files = {Path(file["file"]).name: file["odd"] for file in json.loads(text)["files"]}
    assert status == 0 and json.loads(text)["lost"] == 0
    for name, note in {**odd, "silent.mp4": "no caption"}.items():
        assert note in files[name], (name, files[name])
    assert files["silent.mp4"] == ["no caption"]


def test_flat_is_what_has_one_colour_whatever_its_grey(tmp_path, capsys):
    """A red field beside a blue one of the same grey is none, a red field alone is one."""
    red, blue = ((220, 30, 30), (40, 100, 150))
    one, two = np.full((9, 64, 64, 3), red, np.uint8), np.full((9, 64, 64, 3), red, np.uint8)
    two[:, :, :32] = blue
    for name, frames in (("one", one), ("two", two)):
        media.write_video(frames, tmp_path / f"{name}.mp4", fps=8)
        Image.fromarray(frames[0]).save(tmp_path / f"{name}.png")
    meta = write_metadata(tmp_path, "one.mp4", "two.mp4", "one.png", "two.png")
    files = json.loads(check(capsys, meta, *SMALL, "--json")[1])["files"]
    assert [file["odd"] for file in files] == [["one flat colour"], []] * 2


def test_a_report_that_is_cut_short_by_its_reader_is_no_error(tmp_path):
    Image.fromarray(colourful()[0]).save(tmp_path / "a.png")
    command = [sys.executable, data.__file__, "check", str(write_metadata(tmp_path, "a.png")), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (process.returncode, process.stderr.count("Error")) == (0, 0), process.stderr


def test_control_clips_are_checked_as_well(tmp_path, capsys):
    encode(tmp_path / "a.mp4", num_frames=40, fps=8)
    media.write_video(np.zeros((40, 32, 48, 3), np.uint8), tmp_path / "c.mp4", fps=8)
    meta = write_metadata(tmp_path, "a.mp4", control_file_path="c.mp4")
    assert f"odd: {tmp_path / 'c.mp4'}: one flat colour" in check(capsys, meta, *SMALL)[1]
    damage(tmp_path / "c.mp4", 0, 1)
    status, text, _ = check(capsys, meta, *SMALL)
    assert status == 1 and f"LOST: {tmp_path / 'c.mp4'} is empty, damaged" in text


def test_mistakes_in_the_list_are_reported_beside_what_can_be_decoded(tmp_path, capsys):
    encode(tmp_path / "a.mp4", num_frames=40, fps=8)
    (tmp_path / "b.png").write_bytes(b"")  # without a caption: training refuses such a folder
    (tmp_path / "a.txt").write_text("words")
    status, text, _ = check(capsys, tmp_path, *SMALL)
    assert (
        status == 1 and "b.png: its caption b.txt is missing" in text and "a.mp4: 40 frames at 8 fps" in text
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere.json"], "nowhere.json does not exist"),
        ([".", "--num-frames", 48], "--num-frames 48; the VAE needs 4k+1"),
        ([".", "--resolutions", 100], "--resolutions 100 is not a multiple of 16"),
        ([".", "--max-tokens", 0], "--max-tokens 0 is below 1"),
        ([".", "--fps", 0], "--fps 0 outside"),
        ([".", "--frames", 9], "unrecognized arguments: --frames"),
        ([], "required: META"),
        (["."], "cannot be used: it lists no samples"),
    ],
)
def test_misuse_of_the_check_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, errors = check(capsys, *argv)
    assert status == 2 and out == "" and message in errors and errors.count("\n") == 1
