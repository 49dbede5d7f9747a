"""A list of samples, from a .json, .jsonl or .csv file, or a folder: `read_metadata`.

Every line and every file is accounted for: a sample, a mistake, which stops, or a remark, which is printed.
"""

import collections
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from media import CLIP_ENDINGS, PICTURE_ENDINGS, is_clip, must_exist
from runtime import say


class Entry(NamedTuple):
    """One line of a metadata file."""

    path: Path
    caption: str
    is_image: bool
    control: Path | None = None


def read_metadata(path: str | Path) -> list[Entry]:
    """The samples listed in a .json (a list), .jsonl or .csv file, or found in a folder with a .txt each.

    An item is {"file_path", "text", "type": "video" | "image"}, as in the reference, and for control models
    "control_file_path"; paths are absolute or relative to the file; without a type the content tells; other
    fields are ignored. Prints what one should know beside.
    raises OSError if there is no such file, ValueError with one line for each mistake in it
    """
    entries, mistakes, remarks = scan_metadata(Path(path))
    if mistakes:
        count = f"{path} cannot be used; mistakes: {len(mistakes)}"
        raise ValueError("\n  ".join([count, *mistakes[:100]]))
    for remark in remarks:
        say(f"note: {path}: {remark}")
    return entries


def scan_metadata(path: Path) -> tuple[list[Entry], list[str], list[str]]:
    """(the samples that can be used, a line for each mistake, a line for what else one should know)"""
    entries: dict[Entry, str] = {}  # and where each stands
    mistakes, remarks = [], []
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    for kind, where, item in _folder_items(path) if is_folder else _file_items(path):
        if kind == "mistake":
            mistakes.append(f"{where}: {item}")
        elif kind == "remark":
            remarks.append(f"{where}: {item}")
        else:
            problems, entry = _to_entry(folder, item)
            mistakes += [f"{where}: {problem}" for problem in problems]
            if entry in entries:
                remarks.append(f"{where}: says the same as {entries[entry]}; it is taken once")
            elif entry:
                entries[entry] = where
    if not entries and not mistakes:
        in_folder = "there is no clip or picture with a .txt of its name"
        mistakes.append(in_folder if is_folder else "it lists no samples")
    return list(entries), mistakes, remarks


Item = tuple[str, str, object]  # "sample", where, its fields; or "mistake" or "remark", where, a text


def _file_items(path: Path) -> Iterator[Item]:
    must_exist(path)
    readers = {".csv": _csv_items, ".jsonl": _jsonl_items}
    return readers.get(path.suffix.lower(), _json_items)(path)


def _json_items(path: Path) -> Iterator[Item]:
    kind, where, parsed = _parsed("the file", path.read_bytes())
    if kind == "mistake":
        yield kind, where, parsed
    elif not isinstance(parsed, list):
        yield "mistake", where, "should be a list […] of objects {…}"
    else:
        for number, item in enumerate(parsed, 1):
            yield "sample", f"item {number}", item


def _jsonl_items(path: Path) -> Iterator[Item]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            yield _parsed(f"line {number}", line)


def _parsed(where: str, content: bytes) -> Item:
    try:
        return "sample", where, json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return "mistake", where, f"not JSON in UTF-8 ({error}); one object a line is .jsonl"


def _csv_items(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row:
                    yield "mistake", where, "has more fields than the header; put texts with commas in quotes"
                else:
                    yield "sample", where, {name: value for name, value in row.items() if value is not None}
        except (csv.Error, ValueError) as error:
            yield "mistake", f"line {reader.line_num + 1}", f"not CSV in UTF-8 ({error})"


def _folder_items(folder: Path) -> Iterator[Item]:
    captions, media, others = {}, {}, {}  # {stem: paths}
    for path in _visible_files(folder):
        ending = path.suffix.lower()
        files = others
        if ending == ".txt":
            files = captions
        elif ending in PICTURE_ENDINGS | CLIP_ENDINGS:
            files = media
        files.setdefault(path.with_suffix(""), []).append(path)
    for stem, paths in media.items():
        caption = captions.get(stem, [Path(f"{stem}.txt")])[0]
        for path in paths:
            where = str(path.relative_to(folder))
            try:
                text = caption.read_text(encoding="utf-8-sig").strip()
                yield "sample", where, {"file_path": where, "text": text}
            except FileNotFoundError:
                yield "mistake", where, f"its caption {caption.name} is missing"
            except (OSError, ValueError) as error:
                yield "mistake", where, f"its caption {caption.name} is unreadable ({error})"
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            yield "remark", str(caption.relative_to(folder)), f"is the caption of {names}"
    for stem in captions.keys() - media.keys():
        where = str(captions[stem][0].relative_to(folder))
        names = " and ".join(path.name for path in others.pop(stem, []))
        what = f"{names}, which is not read; convert it" if names else "no picture or clip; remove it"
        yield "mistake", where, f"is the caption of {what}"
    endings = collections.Counter(path.suffix for paths in others.values() for path in paths)
    if endings:
        counts = [f"{count} {ending or 'without ending'}" for ending, count in sorted(endings.items())]
        yield "remark", "files", f"left out, as they are neither pictures nor clips: {', '.join(counts)}"


def _visible_files(folder: Path) -> list[Path]:
    """Links are followed; what systems and editors leave in hidden folders and files is none of ours."""
    found, seen = [], set()
    for name, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(name) in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(name))
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX", "@eaDir"))]
        found += [Path(name, file) for file in files if not file.startswith(".")]
    return sorted(found)


def _to_entry(folder: Path, item: object) -> tuple[list[str], Entry | None]:
    """(what is wrong with an item, the entry it stands for); folder: that its paths start from"""
    if not isinstance(item, dict):
        return ["should be an object {…}"], None
    problems = []
    fields = {}
    for name in ("file_path", "text", "type", "control_file_path"):
        value = item.get(name, "")
        if not isinstance(value, str):
            problems.append(f"{name} = {json.dumps(value)[:80]} should be a string")
        elif value or (name == "text" and name in item):  # an empty caption is one
            fields[name] = value
        elif name in ("file_path", "text"):
            problems.append(f"{name} is missing")
    kind = fields.get("type")
    if kind not in (None, "video", "image"):
        problems.append(f'type = "{kind}" should be "video" or "image"')
    paths = {name: folder / fields[name] for name in ("file_path", "control_file_path") if name in fields}
    for name, path in paths.items():
        if not path.is_file():
            problems.append(f"{name}: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        elif kind is None:
            kind = "video" if is_clip(path) else "image"
        elif kind in ("video", "image") and is_clip(path) != (kind == "video"):
            problems.append(f"{name}: {path} is no {kind}, as its type says")
    if problems:
        return problems, None
    return [], Entry(paths["file_path"], fields["text"], kind == "image", paths.get("control_file_path"))
