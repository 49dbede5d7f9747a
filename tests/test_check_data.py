"""check_data.py on real files: it loses what training loses, and names what is odd."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from test_data import record
from test_media import CASES, colourful, encode

import check_data
import data
import media
from runtime import generator

SMALL = ("--resolutions", 32, 48, "--max-tokens", 24, "--num-frames", 9)


def damage(path: Path, begin: float, end: float) -> None:
    content = bytearray(path.read_bytes())
    begin, end = int(begin * len(content)), int(end * len(content))
    content[begin:end] = np.random.default_rng(0).bytes(end - begin)
    path.write_bytes(content)


def check(capsys, metadata: Path, *argv: object) -> tuple[int, str]:
    """(exit status, stdout) of python check_data.py …"""
    status = check_data.main([*map(str, (metadata, *SMALL, *argv))])
    return status, capsys.readouterr().out


def check_files(capsys, metadata: Path, *argv: object) -> tuple[int, dict[str, dict]]:
    """(exit status, what is said of each file, by its name)"""
    status, text = check(capsys, metadata, "--json", *argv)
    return status, {Path(file["file"]).name: file for file in json.loads(text)["files"]}


def write_metadata(folder: Path, *names: str, **more: str) -> Path:
    kinds = {name: "image" if name.endswith("png") else "video" for name in names}
    listed = [{"file_path": name, "text": "words", "type": kind} | more for name, kind in kinds.items()]
    (folder / "meta.json").write_text(json.dumps(listed))
    return folder / "meta.json"


def test_a_good_data_set_is_reported_file_by_file_with_its_buckets(tmp_path, capsys):
    encode(tmp_path / "a.mp4", num_frames=30, fps=15)
    Image.fromarray(colourful()[0]).save(tmp_path / "b.png")
    meta = write_metadata(tmp_path, "a.mp4", "b.png")
    status, text = check(capsys, meta, "--fps", 7.5)
    assert status == 0 and text.endswith("samples: 2, lost: 0, odd: 0, mistakes: 0\n")
    assert f"{tmp_path / 'a.mp4'}: 30 frames at 15 fps, 32x48, for 9x32x32, 9x32x64\n" in text
    _, files = check_files(capsys, meta, "--fps", 7.5)
    clip, picture = files["a.mp4"], files["b.png"]
    assert (clip["frames"], clip["fps"], clip["size"], clip["odd"]) == (30, 15, [32, 48], [])
    plan = data.Plan((32, 48), 24, 24, 9)
    for file, num_frames in ((clip, 15), (picture, 1)):
        sample = record(num_frames, *file["size"])
        drawn = {data.choose_bucket(sample, plan, generator(0, 0, i, "resolution")) for i in range(30)}
        assert sorted(map(tuple, file["buckets"])) == sorted(drawn)  # what training draws


def test_what_training_would_lose_is_found_by_decoding(tmp_path, capsys):
    for name in ("good", "torn", "short", "grows"):
        encode(tmp_path / f"{name}.mp4", num_frames=40, height=64, width=64)
    damage(tmp_path / "torn.mp4", 0, 0.3)
    content = (tmp_path / "short.mp4").read_bytes()  # its header, in front, still tells of 40 frames
    (tmp_path / "short.mp4").write_bytes(content[: len(content) * 3 // 5])
    for size in (32, 64):
        encode(tmp_path / f"{size}.ts", height=size, width=size)
    (tmp_path / "grows.ts").write_bytes((tmp_path / "32.ts").read_bytes() + (tmp_path / "64.ts").read_bytes())
    meta = write_metadata(tmp_path, "good.mp4", "torn.mp4", "short.mp4", "grows.ts")
    _, files = check_files(capsys, meta)
    assert files["good.mp4"]["lost"] == ""
    reasons = {"torn.mp4": "damaged", "short.mp4": "", "grows.ts": "changes its size"}
    for name, reason in reasons.items():
        assert name in files[name]["lost"] and reason in files[name]["lost"], files[name]
    status, text = check(capsys, meta)
    assert status == 1 and text.count("\n  LOST: ") == 3


def test_what_the_check_passes_training_reads_from_any_start(tmp_path, capsys):
    """Files as people have them: covers, transport streams with one key frame, held and joined pictures."""
    names = ["hflip.mp4", "cover_itunes.mp4", "onekey.ts", "still90.mkv", "raw.h264", "ms.mkv", "pq.mp4"]
    for name in names:
        shutil.copy(CASES / name, tmp_path / name)
    meta = write_metadata(tmp_path, *names)
    status, files = check_files(capsys, meta)
    assert status == 0, files
    records, failures = data.open_records(data.read_metadata(meta))
    assert len(records) == len(names) and not failures
    for clip in records:
        for start in range(0, min(40, clip.num_frames - 4), 5):
            assert len(clip.read(start, 5, clip.size)) == 5, (clip.name, start)
    assert "rate varies" not in str(files["ms.mkv"]["odd"])
    assert "rate varies" in str(files["still90.mkv"]["odd"])


def test_what_is_odd_is_named_and_lost_by_nobody(tmp_path, capsys):
    stamps = [0, 20, 40, 60, 80, 100, 200, 220, 240, 260, 280, 300]
    encode(tmp_path / "varies.mp4", num_frames=12, stamps=stamps)
    media.write_video(np.full((40, 32, 48, 3), 3, np.uint8), tmp_path / "black.mp4", fps=8)
    media.write_video(np.tile(colourful()[:1, :16, :16], (40, 1, 1, 1)), tmp_path / "tiny.mp4", fps=8)
    encode(tmp_path / "short.mp4", num_frames=5, fps=8)
    encode(tmp_path / "silent.mp4", num_frames=40, fps=8)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    two = Image.new("RGB", (64, 64), (220, 30, 30))
    two.paste((40, 100, 150), (0, 0, 32, 64))  # of the same grey
    two.save(tmp_path / "two.png")
    odd = {
        "varies.mp4": "its rate varies: frames last 33 … 167 ms",
        "black.mp4": "one flat colour",
        "tiny.mp4": "tiny: it is enlarged to 32² pixels",
        "short.mp4": "short: 5 frames at 8 fps, where 9 have room",
        "black.png": "one flat colour",
    }
    meta = write_metadata(tmp_path, *odd, "two.png", "silent.mp4")
    items = json.loads(meta.read_text())
    items[-1]["text"] = " "
    meta.write_text(json.dumps(items))
    status, files = check_files(capsys, meta)
    assert status == 0
    for name, note in odd.items():
        assert note in files[name]["odd"], files[name]
    assert files["silent.mp4"]["odd"] == ["no caption"] and files["two.png"]["odd"] == []


def test_control_clips_are_checked_as_well(tmp_path, capsys):
    encode(tmp_path / "a.mp4", num_frames=40, fps=8)
    media.write_video(np.zeros((40, 32, 48, 3), np.uint8), tmp_path / "c.mp4", fps=8)
    meta = write_metadata(tmp_path, "a.mp4", control_file_path="c.mp4")
    assert f"odd: {tmp_path / 'c.mp4'}: one flat colour" in check(capsys, meta)[1]
    damage(tmp_path / "c.mp4", 0, 1)
    status, text = check(capsys, meta)
    assert status == 1 and f"LOST: {tmp_path / 'c.mp4'} is empty, damaged" in text
