"""Decode a whole data set before training, and say what training would lose or one may want to look at.

    python check_data.py META        metadata .json, .jsonl or .csv, or a folder

This file may be deleted.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Plan, Record, bucket_at, open_record, sizes_for
from media import notes, read_image, shown_frames
from metadata import Entry, scan_metadata
from runtime import generator, integer


def check_entry(entry: Entry, plan: Plan, fps: float) -> dict:
    """Decode everything about a sample, and say what training would make of it.

    returns: file; frames and fps as stored; size; the buckets it may be drawn for; lost: why training would
        lose it, or ""; odd: what one may want to look at
    """
    found = {"file": str(entry.path), "frames": None, "fps": None, "size": None, "buckets": [], "lost": ""}
    found["odd"] = odd = [] if entry.caption.strip() else ["no caption"]
    try:
        record = open_record(entry, fps)
        sizes = sizes_for(record, plan)
        if not sizes:
            odd.append(f"tiny: it is enlarged to {min(plan.resolutions)}² pixels")
            sizes = [min(plan.resolutions)]
        found |= {"size": record.size, "buckets": [bucket_at(record, plan, size) for size in sizes]}
        room = bucket_at(replace(record, num_frames=plan.max_frames), plan, sizes[0]).num_frames
        if not entry.is_image and record.num_frames < room:
            odd.append(f"short: {record.num_frames} frames at {fps:g} fps, where {room} have room")
        for path in filter(None, (entry.path, entry.control)):
            look = _look_at if entry.is_image else _look_through
            num_frames, clip_fps, remarks = look(path)
            if str(path) in notes:
                remarks.append(notes[str(path)])
            if path == entry.path:
                found |= {"frames": num_frames, "fps": clip_fps}
            odd += [remark if path == entry.path else f"{path}: {remark}" for remark in remarks]
        _read_as_training_does(record, max(bucket.num_frames for bucket in found["buckets"]))
    except (ValueError, OSError) as error:
        found["lost"] = str(error)
    return found


def _read_as_training_does(record: Record, num_frames: int) -> None:
    """From the first, a drawn and the last start there is: seeks find what reading in order does not."""
    last = record.num_frames - num_frames
    for start in sorted({0, integer(generator("check", record.name), 0, last), last}):
        for read in filter(None, (record.read, record.read_control)):
            missing = num_frames - len(read(start, num_frames, record.size))
            if missing:
                raise ValueError(
                    f"{record.name} ends {missing} frames before its header says; encode it anew"
                )


def _look_at(path: Path) -> tuple[int, None, list[str]]:
    """(1, no rate, what is odd) of a picture."""
    return 1, None, ["one flat colour"] * _is_flat(read_image(path))


def _look_through(path: Path) -> tuple[int, float, list[str]]:
    """(frames, frames a second, what is odd) of a clip; ValueError if its size changes."""
    sizes, gaps, end, num_damaged, is_flat = set(), [], 0.0, 0, True
    for shown in shown_frames(path):
        pixels, end = shown.read(), shown.end
        sizes.add("{1}x{0}".format(*pixels.shape))
        gaps.append(1000 * (end - shown.begin))
        num_damaged += shown.is_damaged
        is_flat = is_flat and _is_flat(pixels)
    if len(sizes) > 1:
        raise ValueError(f"{path} changes its size on the way ({', '.join(sorted(sizes))}); encode it anew")
    odd = [f"{num_damaged} frames are damaged"] if num_damaged else []
    shortest, longest = min(gaps[:-1], default=0), max(gaps[:-1], default=0)  # the last's end may be a guess
    if longest > 1.5 * shortest + 11:  # GIF counts in 1/100 s
        odd.append(f"its rate varies: frames last {shortest:.0f} … {longest:.0f} ms")
    return len(gaps), round(len(gaps) / end, 3), odd + ["one flat colour"] * is_flat


def _is_flat(pixels: np.ndarray) -> bool:
    """Of one colour; in each channel, as grey alone would not tell red from blue."""
    rows, columns = (max(1, side // 64) for side in pixels.shape[:2])
    return int(np.ptp(pixels[::rows, ::columns], axis=(0, 1)).max()) < 16


def _as_text(file: dict) -> str:
    frames = "1 frame" if file["frames"] == 1 else f"{file['frames'] or '?'} frames"
    fps = f" at {file['fps']:g} fps" if file["fps"] else ""
    size, *buckets = ("x".join(map(str, shape)) for shape in (file["size"] or "?", *file["buckets"]))
    line = f"{file['file']}: {frames}{fps}, {size}, for {', '.join(buckets) or 'nothing'}"
    return "\n  ".join(
        [line] + [f"LOST: {file['lost']}"] * bool(file["lost"]) + [f"odd: {x}" for x in file["odd"]]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 if training would lose nothing, 1 if it would lose some, 2 for misuse."""
    description = "Decode a whole data set, and report what training would lose or one may want to look at."
    parser = argparse.ArgumentParser("check_data.py", description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.error = lambda text: parser.exit(
        2, f"check_data.py: error: {' '.join(text.split())}; see --help\n"
    )
    add = parser.add_argument
    add("meta", metavar="META", type=Path, help="metadata .json, .jsonl or .csv, or a folder")
    add("--resolutions", type=int, nargs="+", default=list(range(512, 1025, 128)), help="base sizes")
    add("--max-tokens", type=int, default=13312, help="tokens of a clip")
    add("--num-frames", type=int, default=49, help="most frames of a clip")
    add("--fps", type=float, default=8.0, help="frames a second training reads at")
    add("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    if bad := [size for size in args.resolutions if size < 16 or size % 16]:
        parser.error(f"--resolutions {bad[0]} is not a multiple of 16")
    if args.num_frames < 1 or args.num_frames % 4 != 1:
        parser.error(f"--num-frames {args.num_frames}; the VAE needs 4k+1, try 49")
    if args.max_tokens < 1 or not 0.1 <= args.fps <= 1000:
        parser.error(f"--max-tokens {args.max_tokens} is below 1, or --fps {args.fps:g} outside 0.1 … 1000")
    plan = Plan(tuple(sorted(args.resolutions)), args.max_tokens, args.max_tokens, args.num_frames)
    try:
        entries, mistakes, remarks = scan_metadata(args.meta)
    except OSError as error:
        parser.error(str(error))
    if not entries:
        parser.error(f"{args.meta} cannot be used: {'; '.join(mistakes[:3])}")
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(check_entry, entry, plan, args.fps) for entry in entries]
        try:
            files = [job.result() for job in tqdm(jobs, "decoding", unit="file", disable=None)]
        finally:
            pool.shutdown(cancel_futures=True)  # or control-c would wait for all of them
    num_lost, num_odd = (sum(bool(file[key]) for file in files) for key in ("lost", "odd"))
    counts = {"samples": len(files), "lost": num_lost, "odd": num_odd, "mistakes": len(mistakes)}
    lines = [*map(_as_text, files), *(f"{args.meta}: {line}" for line in remarks + mistakes)]
    lines.append(", ".join(f"{name}: {count}" for name, count in counts.items()))
    as_json = json.dumps(counts | {"mistakes": mistakes, "remarks": remarks, "files": files}, indent=2)
    try:
        print(
            as_json if args.json else "\n".join(lines).encode(errors="backslashreplace").decode(), flush=True
        )
    except BrokenPipeError:  # a reader such as head has seen enough; nothing is left to be said at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(bool(num_lost or mistakes))


if __name__ == "__main__":
    sys.exit(main())
