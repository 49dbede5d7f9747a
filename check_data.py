"""Decode a whole data set before training, and say what training would lose or one may want to look at.

    python check_data.py META        metadata .json, .jsonl or .csv, or a folder

This file may be deleted.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Plan, Record, bucket_at, open_record, read_all, sizes_for
from media import check_fps, notes, read_image, shown_frames
from metadata import Entry, scan_metadata
from runtime import generator, integer, say
from sample import Parser
from sizes import check_frames, check_side


def check_entry(entry: Entry, plan: Plan, fps: float) -> dict:
    """Decode everything about a sample, and say what training would make of it.

    returns: file; frames and fps as stored; size; the buckets it may be drawn for; lost: why training would
        lose it, or ""; odd: what one may want to look at
    """
    odd = [] if entry.caption.strip() else ["no caption"]
    found = {"file": str(entry.path), "frames": None, "fps": None, "size": None, "buckets": []}
    found |= {"lost": "", "odd": odd}
    try:
        record = open_record(entry, fps)
        sizes = sizes_for(record, plan)
        if not sizes:
            odd.append(f"tiny: it is enlarged to {min(plan.resolutions)}² pixels")
            sizes = [min(plan.resolutions)]
        buckets = [bucket_at(record, plan, size) for size in sizes]
        found |= {"size": record.size, "buckets": buckets}
        room = bucket_at(replace(record, num_frames=plan.max_frames), plan, sizes[0]).num_frames
        if not entry.is_image and record.num_frames < room:
            odd.append(f"short: {record.num_frames} frames at {fps:g} fps, where {room} have room")
        look = _look_at if entry.is_image else _look_through
        found["frames"], found["fps"], remarks = look(entry.path)
        odd += remarks
        if entry.control:
            _, _, remarks = look(entry.control)
            odd += [f"{entry.control}: {remark}" for remark in remarks]
        _read_as_training_does(record, max(bucket.num_frames for bucket in buckets))
    except (ValueError, OSError) as error:
        found["lost"] = str(error)
    return found


def _look_at(path: Path) -> tuple[int, None, list[str]]:
    """(1, no rate, what is odd) of a picture."""
    odd = ["one flat colour"] if _is_flat(read_image(path)) else []
    return 1, None, odd + _notes_on(path)


def _look_through(path: Path) -> tuple[int, float, list[str]]:
    """(frames, frames a second, what is odd) of a clip; ValueError if its size changes."""
    sizes = set()
    lengths = []  # of its frames, in ms
    num_damaged = 0
    is_flat = True
    for shown in shown_frames(path):
        pixels = shown.read()
        sizes.add(_shape(pixels.shape[:2]))
        lengths.append(1000 * (shown.end - shown.begin))
        num_damaged += shown.is_damaged
        is_flat = is_flat and _is_flat(pixels)
    if len(sizes) > 1:
        raise ValueError(f"{path} changes its size on the way ({', '.join(sorted(sizes))}); encode it anew")
    odd = []
    if num_damaged:
        odd.append(f"{num_damaged} frames are damaged")
    known = lengths[:-1] or [0]  # when the last one ends may be a guess
    if max(known) > 1.5 * min(known) + 11:  # GIF counts in 1/100 s
        odd.append(f"its rate varies: frames last {min(known):.0f} … {max(known):.0f} ms")
    if is_flat:
        odd.append("one flat colour")
    return len(lengths), round(len(lengths) / shown.end, 3), odd + _notes_on(path)


def _is_flat(pixels: np.ndarray) -> bool:
    """Of one colour; in each channel, as grey alone would not tell red from blue."""
    rows, columns = (max(1, side // 64) for side in pixels.shape[:2])
    return int(np.ptp(pixels[::rows, ::columns], axis=(0, 1)).max()) < 16


def _notes_on(path: Path) -> list[str]:
    """What reading it had to remark."""
    return [notes[str(path)]] if str(path) in notes else []


def _read_as_training_does(record: Record, num_frames: int) -> None:
    """From the first, a drawn and the last start there is: seeks find what reading in order does not."""
    last = record.num_frames - num_frames
    for start in sorted({0, integer(generator("check", record.name), 0, last), last}):
        for read in filter(None, (record.read, record.read_control)):
            read_all(record, read, start, num_frames, (64, 64))  # small, so that little is held


def _as_text(file: dict) -> str:
    frames = "1 frame" if file["frames"] == 1 else f"{file['frames'] or '?'} frames"
    if file["fps"]:
        frames += f" at {file['fps']:g} fps"
    size = _shape(file["size"] or "?")
    buckets = ", ".join(map(_shape, file["buckets"])) or "nothing"
    lines = [f"{file['file']}: {frames}, {size}, for {buckets}"]
    if file["lost"]:
        lines.append(f"LOST: {file['lost']}")
    lines += [f"odd: {remark}" for remark in file["odd"]]
    return "\n  ".join(lines)


def _shape(sizes: tuple) -> str:
    return "x".join(map(str, sizes))


def parse(argv: list[str] | None) -> argparse.Namespace:
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser("check_data.py", description=__doc__.splitlines()[0], formatter_class=with_defaults)
    add = parser.add_argument
    add("meta", metavar="META", type=Path, help="metadata .json, .jsonl or .csv, or a folder")
    add("--resolutions", type=int, nargs="+", default=list(range(512, 1025, 128)), help="base sizes")
    add("--max-tokens", type=int, default=13312, help="tokens of a clip")
    add("--num-frames", type=int, default=49, help="most frames of a clip")
    add("--fps", type=float, default=8.0, help="frames a second training reads at")
    add("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    try:
        check_fps(args.fps)
        check_frames(args.num_frames)
        for size in args.resolutions:
            check_side("--resolutions", size)
        args.entries, args.mistakes, args.remarks = scan_metadata(args.meta)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not args.entries:
        parser.error(f"{args.meta} cannot be used: {'; '.join(args.mistakes[:3])}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 if training would lose nothing, 1 if it would lose some, 2 for misuse."""
    args = parse(argv)
    plan = Plan(tuple(sorted(args.resolutions)), args.max_tokens, args.max_tokens, args.num_frames)
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(check_entry, entry, plan, args.fps) for entry in args.entries]
        try:
            files = [job.result() for job in tqdm(jobs, "decoding", unit="file", disable=None)]
        finally:
            pool.shutdown(cancel_futures=True)  # or control-c would wait for all of them
    num_lost = sum(bool(file["lost"]) for file in files)
    num_odd = sum(bool(file["odd"]) for file in files)
    if args.json:
        report = {"samples": len(files), "lost": num_lost, "odd": num_odd}
        report |= {"mistakes": args.mistakes, "remarks": args.remarks, "files": files}
        say(json.dumps(report, indent=2))
    else:
        for line in map(_as_text, files):
            say(line)
        for line in args.remarks + args.mistakes:
            say(f"{args.meta}: {line}")
        say(f"samples: {len(files)}, lost: {num_lost}, odd: {num_odd}, mistakes: {len(args.mistakes)}")
    return 1 if num_lost or args.mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
