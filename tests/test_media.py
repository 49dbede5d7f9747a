"""Pictures and clips against the reference's prepared ones, and against real files encoded here."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import GOLDENS, expected
from PIL import Image, ImageCms

import media

ASSETS = GOLDENS / "fun-2b-inp" / "assets"
CASES = Path(__file__).parent / "cases"


def encode(
    path: Path, num_frames=30, fps=30, height=32, width=48, stamps=None, gop=12, codec="libx264", aspect=1,
    movflags="faststart",
) -> Path:  # fmt: skip
    """A clip whose frame i is grey i * 8, top left quarter white."""
    with av.open(path, "w", options={"movflags": movflags} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop), "b": "4M"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.sample_aspect_ratio = media.Fraction(aspect)
        stream.codec_context.time_base = tick = media.Fraction(1, 600 if stamps else fps)
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


def test_pictures_are_resized_to_the_same_bytes_as_by_the_reference():
    def resized(name: str, height: int, width: int) -> np.ndarray:
        return media.resize(media.read_image(ASSETS / name), height, width).transpose(2, 0, 1)  # 3 h w

    tensors = expected("fun-2b-inp")
    assert np.array_equal(tensors["pre.start.video_u8"][0, :, 7], resized("start.png", 32, 48))
    both = tensors["pre.start_end.video_u8"][0]
    assert np.array_equal(both[:, 0], resized("start.png", 64, 32))
    assert np.array_equal(both[:, -1], resized("end.png", 64, 32))
    for i in range(3):
        assert np.array_equal(tensors["pre.list3.video_u8"][0, :, i], resized(f"list{i}.png", 32, 48))


def test_a_mask_picture_is_white_in_the_same_pixels_as_in_the_reference():
    theirs = expected("fun-2b-inp")["pre.v2v_mask.mask"][0] / 255
    ours = media.read_mask(ASSETS / "mask.png", 9, 32, 48)
    as_array = np.asarray(Image.open(ASSETS / "mask.png").convert("RGBA"))
    assert torch.equal(media.read_mask(as_array, 9, 32, 48), ours)
    assert ours.shape == (9, 32, 48) and ours.dtype == torch.bool
    assert torch.equal(ours.float(), theirs.expand(9, -1, -1))


def test_a_mask_of_several_frames_follows_the_clip_and_must_last_as_long(tmp_path):
    moving = np.zeros((6, 16, 16), np.uint8)
    moving[3:] = 255
    for source in (moving, moving > 0, moving[..., None], moving[..., None].repeat(3, -1)):
        assert media.read_mask(source, 5, 32, 16)[:, 0, 0].tolist() == [False] * 3 + [True] * 2
    media.write_video(moving[..., None].repeat(3, -1), tmp_path / "mask.mp4", fps=4)
    assert media.read_mask(tmp_path / "mask.mp4", 3, 16, 16, fps=2)[:, 5, 5].tolist() == [False, False, True]
    with pytest.raises(ValueError, match="6 frames, the clip 9"):
        media.read_mask(moving, 9, 16, 16)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK", "1"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[..., 0], colour[0] = 200, 10
    picture = Image.fromarray(colour).convert(mode)
    picture.save(tmp_path / "picture.tif")
    assert np.array_equal(media.read_image(tmp_path / "picture.tif"), picture.convert("RGB"))
    assert np.array_equal(media.read_image(torch.from_numpy(colour)), colour)


def test_a_photograph_is_turned_upright_and_what_is_no_exif_is_not_minded(tmp_path):
    picture = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    picture.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(media.read_image(tmp_path / "turned.png"), np.rot90(np.asarray(picture), -1))
    entries = struct.pack("<HHIIHHI4s", 0x0112, 3, 1, 6, 0x011A, 2, 3, b"72\0\0")  # a resolution that is text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    picture.save(tmp_path / "odd.png", exif=exif)
    assert np.array_equal(media.read_image(tmp_path / "odd.png"), np.rot90(np.asarray(picture), -1))
    picture.save(tmp_path / "prompt.png", exif=b"a red circle")  # programs that make pictures write such
    assert np.array_equal(media.read_image(tmp_path / "prompt.png"), picture)


ENDINGS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "ts": "libx264"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_clip_is_read_at_the_nearest_frames_of_any_rate(tmp_path, ending):
    path = encode(tmp_path / f"clip.{ending}", codec=ENDINGS[ending], gop=5)
    nearest = [0, 4, 7, 11, 15, 19, 22, 26]  # 30 fps at t = i/8: 0, 3.75, 7.5 (earlier), 11.25 …
    assert frame_numbers(media.read_video(path)) == list(range(30))
    assert frame_numbers(media.read_video(path, fps=8)) == nearest
    assert frame_numbers(media.read_video(path, 3, fps=8)) == nearest[:3]
    assert frame_numbers(media.read_video(path, 3, fps=8, start=0.5)) == [15, 19, 22]
    assert frame_numbers(media.read_video(path, 2, fps=60, start=0.1)) == [3, 3]
    info = media.probe_video(path)
    assert (info.num_frames, info.height, info.width) == (30, 32, 48)
    assert abs(info.fps - 30) < 0.1 and abs(info.seconds - 1) < 0.01  # mkv counts milliseconds


def test_a_clip_in_fragments_is_as_long_as_all_of_them_and_an_unknown_codec_is_named(tmp_path):
    path = encode(tmp_path / "clip.mp4", gop=10, movflags="frag_keyframe")
    assert media.probe_video(path).num_frames == 30
    path = encode(tmp_path / "raw.avi", codec="mpeg4")
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"XRAW"))
    with pytest.raises(ValueError, match="raw.avi holds video that FFmpeg cannot decode"):
        media.read_video(path)


def test_a_clip_is_read_by_its_timestamps_and_gains_no_frame_by_rounding(tmp_path):
    path = encode(tmp_path / "varies.mp4", 5, stamps=[0, 60, 120, 600, 660])  # at 0, .1, .2, 1, 1.1 s
    assert frame_numbers(media.read_video(path, 5, fps=4)) == [0, 2, 2, 3, 3]  # at 0, .25, .5, .75, 1 s
    assert media.probe_video(path).num_frames == 5
    path = encode(tmp_path / "clip.mp4", 14, fps=5)  # its end comes out as 2.8000000000000003 s
    assert frame_numbers(media.read_video(path, fps=5)) == list(range(14))


def test_only_the_needed_span_is_decoded(tmp_path):
    path = encode(tmp_path / "clip.mp4", 240, gop=20)
    content = bytearray(path.read_bytes())
    begin, end = len(content) // 2, int(0.6 * len(content))
    content[begin:end] = np.random.default_rng(0).bytes(end - begin)
    path.write_bytes(content)
    assert frame_numbers(media.read_video(path, 5, fps=30)) == [0, 1, 2, 3, 4]  # before the damage
    late = frame_numbers(media.read_video(path, 5, fps=30, start=7.5))  # behind it
    assert late == [i % 30 for i in range(225, 230)]
    with pytest.raises(ValueError, match="clip.mp4"):
        media.read_video(path)


def test_pixels_have_the_bits_of_the_reference_and_come_back_unchanged():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1) + np.array([0, 50, 100], np.uint8)
    pixels = media.to_pixels(frames)
    assert torch.equal(pixels, (torch.from_numpy(frames).movedim(-1, 0) / 255) * 2 - 1)
    assert np.array_equal(media.to_uint8(pixels), frames)
    outside = torch.tensor([-3.0, 3.0, 0.9999 / 255]).view(3, 1, 1, 1)
    assert media.to_uint8(outside).flatten().tolist() == [0, 255, 128]


def colourful(num_frames: int = 12) -> np.ndarray:
    frames = np.zeros((num_frames, 32, 48, 3), np.uint8)
    frames[:, :, 16:32], frames[:, :, 32:] = (220, 30, 30), (30, 60, 200)
    frames[:, :, :16] = np.linspace(0, 250, num_frames).astype(np.uint8)[:, None, None, None]
    return frames


def test_an_mp4_keeps_rate_colours_and_bytes_whether_whole_or_in_chunks(tmp_path):
    frames, path = colourful(), tmp_path / "a.mp4"
    media.write_video(frames, path, fps=8)
    media.write_video((frames[i : i + 5] for i in range(0, 12, 5)), tmp_path / "b.mp4", fps=8)
    assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert media.probe_video(path) == (12, 8.0, 32, 48, 1.5)
    back = media.read_video(path)
    error = np.abs(back.astype(int) - frames)[:, 4:-4, [6, 7, 8, 22, 23, 24, 40, 41, 42]]
    assert error.max() <= 4  # 8-bit YUV and crf 17, away from edges; the wrong colour matrix errs by 20
    with av.open(path) as container:
        picture = next(container.decode(video=0))
        assert (picture.colorspace, picture.color_range) == (1, 1)  # said to be BT.709, limited range


def test_a_gif_keeps_frames_and_speed_and_a_png_is_a_strip(tmp_path):
    media.write_video(colourful(), tmp_path / "a.gif", fps=8)
    back = media.read_video(tmp_path / "a.gif", fps=8)
    assert np.array_equal(back, colourful())  # it has fewer colours than a palette holds
    assert abs(media.probe_video(tmp_path / "a.gif").seconds - 1.5) < 0.011
    assert Image.open(tmp_path / "a.gif").info["loop"] == 0
    for num_frames, shown in ((1, 1), (5, 5), (49, 8)):  # with the first and the last frame
        media.write_video(colourful(num_frames), tmp_path / "a.png")
        strip = media.read_image(tmp_path / "a.png")
        assert strip.shape == (32, 48 * shown, 3)
        assert np.array_equal(strip[:, -48:], colourful(num_frames)[-1]) and strip[0, 0, 0] == 0


def test_fitting_covers_the_shape_and_cuts_evenly():
    ramp = np.arange(200, dtype=np.uint8)[None, None, :, None].repeat(100, 1).repeat(3, -1)  # 1 100 200 3
    wide = media.fit(ramp, 50, 50)
    assert wide.shape == (1, 50, 50, 3) and abs(int(wide[0, 25, 0, 0]) - 51) <= 1
    assert abs(int(wide[0, 25, -1, 0]) - 148) <= 1 and wide[0, 0, 25, 0] == wide[0, -1, 25, 0]
    assert np.array_equal(media.fit(ramp.swapaxes(1, 2), 50, 50), wide.swapaxes(1, 2))
    assert np.array_equal(media.fit(ramp, 100, 100), ramp[:, :, 50:150])
    assert media.fit(np.zeros((1, 42, 21, 3), np.uint8), 16, 304).shape == (1, 16, 304, 3)  # rounds below 0
    fitted = media.fit(media.read_video(CASES / "hflip.mp4", 3), 24, 40)
    assert np.array_equal(media.read_video(CASES / "hflip.mp4", 3, size=(24, 40)), fitted)


def test_a_mirrored_and_turned_clip_is_shown_as_a_player_shows_it(tmp_path):
    """All eight display matrices, as angle and mirror, on quadrants red, green / blue, white."""
    source = media.read_video(CASES / "hflip.mp4", 1)[0][:, ::-1]  # as stored
    content = bytearray((CASES / "hflip.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44
    turns = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 3, (-1, 0, 0, -1): 2, (0, -1, 1, 0): 1}  # quarters, to the left
    for (a, b, c, d), quarters in turns.items():
        for mirror in (1, -1):  # left and right change places after turning
            numbers = [mirror * a, b, 0, mirror * c, d, 0, 0, 0, 2**14]
            content[matrix : matrix + 36] = struct.pack(">9i", *(number << 16 for number in numbers))
            (tmp_path / "clip.mp4").write_bytes(content)
            shown = media.read_video(tmp_path / "clip.mp4", 1)[0]
            assert np.array_equal(shown, np.rot90(source, quarters)[:, ::mirror]), (a, b, c, d, mirror)
            assert media.probe_video(tmp_path / "clip.mp4")[2:4] == shown.shape[:2]
    colours = media.read_video(CASES / "hflip.mp4", 1)[0][[12, 12, -12, -12], [16, -16, 16, -16]]
    wanted = [(0, 255, 0), (255, 0, 0), (255, 255, 255), (0, 0, 255)]  # green, red / white, blue
    assert ((colours > 128) == (np.array(wanted) > 128)).all()


def test_a_cover_is_not_the_clip(tmp_path):
    info = media.probe_video(CASES / "cover_itunes.mp4")
    assert info == (60, 24, 48, 64, 2.5) and len(media.read_video(CASES / "cover_itunes.mp4", fps=8)) == 20
    encode(tmp_path / "plain.mp4", 24, fps=8)
    for name in ("unmarked.mkv", "unmarked.mov"):
        with av.open(tmp_path / name, "w") as out, av.open(tmp_path / "plain.mp4") as clip:
            cover = out.add_stream("mjpeg", rate=8, width=96, height=96, pix_fmt="yuvj420p")
            copied = out.add_stream_from_template(clip.streams.video[0])
            out.mux(cover.encode(av.VideoFrame(96, 96, "yuvj420p")))
            out.mux(cover.encode(None))
            for packet in clip.demux(video=0):
                if packet.size:
                    packet.stream = copied
                    out.mux(packet)
        assert media.read_video(tmp_path / name, fps=8).shape == (24, 32, 48, 3)


@pytest.mark.parametrize("name", ["onekey.ts", "raw.h264", "ms.mkv", "still90.mkv", "cover_itunes.mp4"])
def test_a_start_on_the_way_gives_what_reading_from_the_beginning_gives(name):
    whole = media.read_video(CASES / name, 40, fps=8)
    assert len(whole) == {"onekey.ts": 40, "still90.mkv": 40}.get(name, 20)
    for start in (1, 9, 16):
        assert np.array_equal(media.read_video(CASES / name, 3, 8, start / 8), whole[start : start + 3])


@pytest.mark.parametrize("ending", ["ts", "mpg", "h264", "mkv"])
def test_streams_that_were_joined_are_read_one_after_the_other(tmp_path, ending):
    codec = "mpeg2video" if ending == "mpg" else "libx264"
    part = encode(tmp_path / f"part.{ending}", 24, fps=24, codec=codec, gop=6).read_bytes()
    path = tmp_path / f"joined.{ending}"
    path.write_bytes(part + part)
    assert frame_numbers(media.read_video(path, fps=24)) == 2 * list(range(24))
    assert frame_numbers(media.read_video(path, 3, fps=24, start=1.25)) == [6, 7, 8]
    info = media.probe_video(path)
    assert info.num_frames == 48 and abs(info.seconds - 2) < 0.09


def test_pixels_that_are_not_square_are_shown_square(tmp_path):
    path = encode(tmp_path / "wide.mp4", 3, aspect=2)
    assert media.probe_video(path)[2:4] == (32, 96)
    assert media.read_video(path).shape == (3, 32, 96, 3)


def test_hdr_is_said_to_look_flat(capsys):
    media.notes.clear()
    for _ in range(2):
        assert media.read_video(CASES / "pq.mp4", 2).shape == (2, 48, 64, 3)
    assert capsys.readouterr().err.count("pq.mp4 is HDR (PQ or HLG) and will look flat") == 1


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "avif"])
def test_animations_of_every_kind_are_clips(tmp_path, capsys, ending):
    frames = [Image.new("RGBA", (32, 16), (i * 80, 0, 0, 255)) for i in range(3)]
    for frame in frames:
        frame.paste((255, 0, 255, 0), (0, 0, 16, 16))  # a hidden colour
    path = tmp_path / f"a.{ending}"
    options = {"duration": [100, 300, 100], "disposal": 2, "append_images": frames[1:]}
    options |= {"lossless": True} if ending == "webp" else {}
    frames[0].save(path, save_all=True, **options)
    assert media.is_clip(path)
    shown = media.read_video(path, fps=10)
    assert shown.shape == (5, 16, 32, 3) and media.probe_video(path)[2:4] == (16, 32)
    levels = shown[:, 8, 24, 0].astype(int)
    assert np.abs(levels - [0, 80, 80, 160, 160]).max() < 4 and (shown[2, 4:12, 4:12] > 250).all()
    assert f"a.{ending} is transparent in parts; they are put on white" in capsys.readouterr().err


@pytest.mark.parametrize("tags", [{}, {"alpha_mode": "1"}])  # the second is what guides advise
def test_a_webm_keeps_its_transparency(tmp_path, tags):
    pixels = np.zeros((16, 32, 4), np.uint8)
    pixels[:, 16:] = (200, 0, 0, 255)
    with av.open(tmp_path / "a.webm", "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8, width=32, height=16, pix_fmt="yuva420p")
        stream.codec_context.options = {"crf": "10", "b": "0"}
        stream.metadata.update(tags)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode(None))
    shown = media.read_video(tmp_path / "a.webm").astype(int)
    assert (shown[:, :, :12] > 245).all() and np.abs(shown[:, 8, 24] - (200, 0, 0)).max() < 10


def test_content_tells_a_picture_from_a_clip(tmp_path):
    Image.new("RGB", (32, 16), "red").save(tmp_path / "photo.mp4", format="jpeg")
    encode(tmp_path / "clip.mp4", 5).rename(tmp_path / "clip.jpg")
    assert not media.is_clip(tmp_path / "photo.mp4") and media.is_clip(CASES / "raw.h264")
    assert media.read_image(tmp_path / "photo.mp4").shape == (16, 32, 3)
    assert media.read_video(tmp_path / "clip.jpg").shape == (5, 32, 48, 3)


def test_colours_are_those_that_profile_and_transparency_mean(tmp_path):
    pixels = media.read_image(CASES / "alpha_magenta.png")  # transparency shows white and no hidden colour
    assert not ((pixels[..., 0] > 200) & (pixels[..., 1] < 100) & (pixels[..., 2] > 200)).any()
    assert (pixels == 255).all(-1).any()
    left, right = media.read_image(CASES / "icc_p3.png")[24, [8, -8]].astype(int)
    assert np.abs(left - (200, 60, 60)).max() <= 1 and np.abs(right - (60, 160, 60)).max() <= 1
    picture = Image.new("RGB", (8, 8), (200, 60, 60))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile at all"):
        picture.save(tmp_path / "a.png", icc_profile=profile)
        assert media.read_image(tmp_path / "a.png")[0, 0].tolist() == [200, 60, 60]


def test_a_mask_is_white_times_alpha(tmp_path):
    mask = media.read_mask(CASES / "brush_over_white.png", 3, 16, 32)
    assert mask[:, :, :14].all() and not mask[:, :, 18:].any()
    layer = np.full((16, 32, 4), 255, np.uint8)
    layer[:, 16:, 3] = 0
    assert media.read_mask(Image.fromarray(layer), 1, 16, 32)[0, 0].tolist() == [True] * 16 + [False] * 16
    frames = [Image.fromarray(np.roll(layer, shift, 1)) for shift in (0, 16)]
    path, options = tmp_path / "mask.webp", {"duration": 125, "lossless": True}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert media.read_mask(path, 2, 16, 32, fps=8)[:, 8, 8].tolist() == [True, False]


@pytest.mark.parametrize("ending", ["png", "tif", "jp2"])
def test_pictures_of_more_than_8_bits_are_scaled(tmp_path, ending):
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257)[None])
    deep.save(tmp_path / f"deep.{ending}")
    assert media.read_image(tmp_path / f"deep.{ending}")[0, :, 0].tolist() == list(range(256))
