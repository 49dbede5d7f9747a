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
        lines = mistakes[:100] + [f"and {len(mistakes) - 100} more"] * (len(mistakes) > 100)
        raise ValueError("\n  ".join([f"{path} cannot be used; mistakes: {len(mistakes)}", *lines]))
    for remark in remarks:
        say(f"note: {path}: {remark}")
    return entries


def scan_metadata(path: Path) -> tuple[list[Entry], list[str], list[str]]:
    """(the samples that can be used, a line for each mistake, a line for what else one should know)"""
    entries: dict[Entry, str] = {}
    lines: dict[str, list[str]] = {"mistake": [], "remark": []}
    for kind, where, item in _folder_items(path) if path.is_dir() else _file_items(path):
        if kind != "sample":
            lines[kind].append(f"{where}: {item}")
            continue
        problems, entry = _to_entry(path, item)
        lines["mistake"] += [f"{where}: {problem}" for problem in problems]
        if entry in entries:
            lines["remark"].append(f"{where}: says the same as {entries[entry]}; it is taken once")
        elif entry is not None:
            entries[entry] = where
    if not entries and not lines["mistake"]:
        lines["mistake"].append("it lists no samples")
    return list(entries), lines["mistake"], lines["remark"]


Item = tuple[
    str, str, object
]  # "sample", where it stands, its fields; or "mistake" or "remark", where, a text


def _file_items(path: Path) -> Iterator[Item]:
    must_exist(path)
    ending = path.suffix.lower()
    if ending == ".csv":
        yield from _csv_items(path)
        return
    pieces = path.read_bytes().splitlines() if ending == ".jsonl" else [path.read_bytes()]
    for number, piece in enumerate(pieces, 1):
        where = f"line {number}" if ending == ".jsonl" else "the file"
        if ending == ".jsonl" and not piece.strip():
            continue
        try:
            parsed = json.loads(piece.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield "mistake", where, f"not JSON in UTF-8 ({error}); one object a line is .jsonl"
            continue
        if ending == ".jsonl":
            items = [(where, parsed)]
        elif isinstance(parsed, list):
            items = [(f"item {number}", item) for number, item in enumerate(parsed, 1)]
        else:
            yield "mistake", where, "should be a list […] of objects {…}"
            continue
        for where, item in items:
            is_object = isinstance(item, dict)
            yield ("sample", where, item) if is_object else ("mistake", where, "should be an object {…}")


def _csv_items(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row:
                    yield (
                        "mistake",
                        where,
                        "has more fields than the header; put a text with commas in quotes",
                    )
                else:
                    yield "sample", where, {name: value for name, value in row.items() if value is not None}
        except (csv.Error, ValueError) as error:
            yield "mistake", f"line {reader.line_num + 1}", f"not CSV in UTF-8 ({error})"


def _folder_items(folder: Path) -> Iterator[Item]:
    """Every file is accounted for: a sample, its caption, a mistake, or counted among what is left out."""
    captions, media, others = {}, {}, {}
    for path in _visible_files(folder):
        ending = path.suffix.lower()
        kind = captions if ending == ".txt" else media if ending in PICTURE_ENDINGS | CLIP_ENDINGS else others
        kind.setdefault(path.with_suffix(""), []).append(path)
    for stem, paths in media.items():
        caption = captions.get(stem, [stem.with_suffix(".txt")])[0]
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
        counts = ", ".join(
            f"{count} {ending or 'without ending'}" for ending, count in sorted(endings.items())
        )
        yield "remark", "files", f"left out, as they are neither pictures nor clips: {counts}"


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


def _to_entry(metadata: Path, item: dict) -> tuple[list[str], Entry | None]:
    """(what is wrong with an item, the entry it stands for)"""
    problems = []
    item = {name: value for name, value in item.items() if value != "" or name in ("file_path", "text")}
    for field in ("file_path", "text", "type", "control_file_path"):
        if field not in item and field in ("file_path", "text"):
            problems.append(f"{field} is missing")
        elif not isinstance(item.get(field, ""), str):
            problems.append(f"{field} = {json.dumps(item[field])[:80]} should be a string")
    kind = item.get("type")
    if isinstance(kind, str) and kind not in ("video", "image"):
        problems.append(f'type = "{kind}" should be "video" or "image"')
    paths = {}
    for field in ("file_path", "control_file_path"):
        if isinstance(item.get(field), str):
            paths[field] = path = (metadata if metadata.is_dir() else metadata.parent) / item[field]
            if not path.is_file():
                problems.append(f"{field}: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
            elif kind is None:
                kind = "video" if is_clip(path) else "image"
            elif kind in ("video", "image") and is_clip(path) != (kind == "video"):
                problems.append(f"{field}: {path} is no {kind}, as its type says")
    if problems:
        return problems, None
    return [], Entry(paths["file_path"], item["text"], kind == "image", paths.get("control_file_path"))
