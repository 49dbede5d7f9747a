"""Lists of samples and folders of them: what they hold, and what is wrong with them, to the last file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_media import encode

import data


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
        "file_path is missing": {"text": "", "type": "video"},
        f"file_path: {tmp_path / 'x.mp4'} does not exist": good | {"file_path": "x.mp4"},
        f"file_path: {tmp_path / 'c.png'} is no video": good | {"file_path": "c.png"},
        "control_file_path: ": good | {"control_file_path": "y.mp4"},
    }
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, [good, *mistakes.values()])))
    with pytest.raises(ValueError) as caught:
        data.read_metadata(tmp_path / "meta.jsonl")
    lines = str(caught.value).splitlines()[1:]
    for number, (line, start) in enumerate(zip(lines, mistakes, strict=True), 2):
        assert line.strip().startswith(f"line {number}: {start}"), line


def test_the_lists_of_the_reference_load_as_they_are(tmp_path, capsys):
    make_files(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.mp4", format="png")  # content tells, no ending
    plain = [{"file_path": name, "text": "a, b"} for name in ("a.mp4", "c.png", "photo.mp4", "a.mp4")]
    (tmp_path / "meta.json").write_text(json.dumps(plain))
    entries = data.read_metadata(tmp_path / "meta.json")
    found = [(entry.path.name, entry.is_image) for entry in entries]
    assert found == [("a.mp4", False), ("c.png", True), ("photo.mp4", True)]
    assert "item 4: says the same as item 1; it is taken once" in capsys.readouterr().out
    header = "\ufefffile_path,text,type"
    lines = [header, 'a.mp4,"a, b",video', 'c.png,"a, b",', 'photo.mp4,"a, b"', 'a.mp4,"a, b",video']
    (tmp_path / "meta.csv").write_text("\r\n".join(lines) + "\r\n")
    assert data.read_metadata(tmp_path / "meta.csv") == entries
    assert "line 5: says the same as line 2" in capsys.readouterr().out
    (tmp_path / "meta.csv").write_text("file_path,text,type\na.mp4,a, b,video\n")  # no quotes
    with pytest.raises(ValueError, match="line 2: has more fields than the header"):
        data.read_metadata(tmp_path / "meta.csv")


def test_a_folder_accounts_for_every_file_in_it(tmp_path, capsys):
    def put(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("words")

    picture = Image.new("RGB", (16, 16))
    for name in ("a.jfif", "b.ppm", "c.TGA", "d.jp2", "e.avif", "f.png"):
        picture.save(tmp_path / name)
        put(f"{name[0]}.txt")
    encode(tmp_path / "g.mts", 3).rename(tmp_path / "g.MTS")
    encode(tmp_path / "h.3gp", 3, codec="mpeg4")
    encode(tmp_path / "f.mp4", 3)
    put("g.TXT", "h.txt", "notes.md", "f.npz")
    put(".thumbnails/x.jpg", "__MACOSX/._a.png", "@eaDir/a.png", "._f.png")  # hidden
    outside = tmp_path.with_name(tmp_path.name + "_elsewhere")
    outside.mkdir()
    picture.save(outside / "z.png")
    (tmp_path / "link").symlink_to(outside)
    put("link/z.txt")
    (tmp_path / "link" / "back").symlink_to(tmp_path)  # a circle
    found = [str(entry.path.relative_to(tmp_path)) for entry in data.read_metadata(tmp_path)]
    assert found == "a.jfif b.ppm c.TGA d.jp2 e.avif f.mp4 f.png g.MTS h.3gp link/z.png".split()
    said = capsys.readouterr().out
    assert "f.txt: is the caption of f.mp4 and f.png" in said
    assert "left out, as they are neither pictures nor clips: 1 .md, 1 .npz" in said
    put("k.heic", "k.txt", "l.txt")
    picture.save(tmp_path / "a.v2.png")  # a.txt is not its own
    with pytest.raises(ValueError) as caught:
        data.read_metadata(tmp_path)
    assert "k.txt: is the caption of k.heic, which is not read; convert it" in str(caught.value)
    assert "l.txt: is the caption of no picture or clip" in str(caught.value)
    assert "a.v2.png: its caption a.v2.txt is missing" in str(caught.value)


def test_the_digest_of_the_samples_tells_other_samples_and_not_other_places(tmp_path, monkeypatch):
    def digest(path) -> str:
        return data.digest(data.open_records(data.read_metadata(path))[0])

    here = tmp_path / "here"
    here.mkdir()
    make_files(here)
    (here / "meta.json").write_text(json.dumps(items()))
    shutil.copytree(here, tmp_path / "there" / "deep")
    first = digest(here / "meta.json")
    monkeypatch.chdir(tmp_path)
    assert digest("there/deep/meta.json") == digest("./here/../here/meta.json") == first
    for change in (items()[:2], items()[::-1], [items()[0] | {"text": "x"}, *items()[1:]]):
        (here / "meta.json").write_text(json.dumps(change))
        assert digest("here/meta.json") != first
    Image.new("RGB", (40, 80)).save(tmp_path / "there" / "deep" / "c.png", compress_level=0)
    assert digest("there/deep/meta.json") != first


def test_captions_that_are_cut_or_unknown_are_counted():
    class Words:
        def encode(self, text):
            return list(range(len(text.split())))

        def unknown_words(self, text):
            return [word for word in text.split() if word.startswith("x")]

    assert data.caption_report(["a b", "c"], Words(), 3) == []
    cut, unknown = data.caption_report(["a b c xy", "xy xz", ""], Words(), 4)
    assert cut == "captions cut to 4 tokens: 1 of 3, the longest has 5"
    assert unknown == "words in captions that the model does not know: 2, such as xy (2x), xz (1x)"
