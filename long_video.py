"""Videos longer than the model: segments, each of which is given the last frames of the one before.

    segment 1  ├──────────────┤           sampled as usual
    segment 2            ├╌╌╌╌┼─────────┤    ╌ known frames of an inpaint model, over which it fades in
    segment 3                      ├╌╌╌╌┼─────────┤    the last segment is given the end picture

Memory does not grow with the length. The latents of each segment are saved beside the video until it is
written, so the same command goes on where it was broken off. This file may be deleted.

f frames · h w height, width
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

import sample
from kinds import native_size
from media import Picture, read_image, resize
from request import Request, complete
from runtime import wait_for_ranks
from sample import Models, Video
from sizes import check_frames

OVERLAP = 5  # frames that a segment is given of the one before: two latent frames


def segments(num_frames: int, length: int, overlap: int = OVERLAP) -> list[int]:
    """How many frames each segment of `length` has in common with the one before.

    The first has none, the last as many as are needed to fill it.
    """
    check_frames(num_frames)
    shared = [0]
    done = length
    while done < num_frames:
        new = min(length - overlap, num_frames - done)
        shared.append(length - new)
        done += new
    return shared


def generate_long(
    models: Models,
    prompt: str,
    num_frames: int,
    saved: Path | None = None,
    **settings,
) -> Iterator[np.ndarray]:
    """A video of any length, in chunks uint8 f h w 3.

    settings: as for `generate`, without video, mask, control_video and latents
    saved: the video's path; the latents of segment i are kept beside it as …-segment-i.safetensors, and those
        that are there already are not sampled again
    """
    length = min(native_size(models.config)[2], num_frames)
    for name in ("video", "mask", "control_video", "latents"):
        if settings.get(name) is not None:
            raise ValueError(f"num_frames={num_frames} is made in segments of {length} and takes no {name}; "
                             f"leave it out, or make {length} frames")  # fmt: skip
    request = complete(Request(prompt, **settings), models)
    record = sample.make_record(models, request, num_frames, request.height, request.width)
    overlaps = [*segments(num_frames, length), 0]  # and that of the last with one behind it
    frames = None
    for i, (overlap, next_overlap) in enumerate(itertools.pairwise(overlaps)):
        end = request.end_image if next_overlap == 0 else None
        segment = settings | {"end_image": end, "num_frames": length, "seed": request.seed + i}
        if i > 0:
            segment |= continue_from(frames[-overlap:], length, end)
        file = None if saved is None else segment_file(saved, i)
        if file is not None and file.is_file():
            latents = load_segment(file, record)
        else:
            latents = sample.generate(models, prompt, output="latents", **segment)
            if file is not None and models.writes:
                sample.save_latents(file, latents, record)
        before = frames
        frames = np.concatenate(list(sample.decode(models, latents, request.tiled)))
        if i > 0:
            frames = fade(before, frames, overlap)
        yield frames[: length - next_overlap]  # the next segment fades in over the others


def continue_from(known: np.ndarray, length: int, end_image: Picture | None) -> dict:
    """The settings of a segment that begins with the known frames, uint8 f h w 3, and ends with a picture."""
    height, width = known.shape[1:3]
    video = np.zeros((length, height, width, 3), np.uint8)
    mask = np.full_like(video, 255)
    video[: len(known)] = known
    mask[: len(known)] = 0
    if end_image is not None:
        video[-1] = resize(read_image(end_image), height, width)
        mask[-1] = 0
    return {"image": None, "end_image": None, "video": video, "mask": mask, "height": height, "width": width}


def fade(before: np.ndarray, after: np.ndarray, overlap: int) -> np.ndarray:
    """`after`, its first frames mixed with the last of `before`, which show the same: ever less of `before`.

    What the VAE changes of known frames would else be seen as a jump. The weights of the reference
    (predict_i2v.py) are 0, 1/overlap, 2/overlap, …; ours begin a frame earlier and so rise by less.
    """
    weights = np.arange(1, overlap + 1, dtype=np.float32)[:, None, None, None] / (overlap + 1)
    mixed = before[-overlap:] + weights * (after[:overlap] - before[-overlap:].astype(np.float32))
    return np.concatenate([mixed.round().astype(np.uint8), after[overlap:]])


# ---------------------------------------------------------------- segments on disk


def segment_file(path: Path, i: int) -> Path:
    return path.with_name(f"{path.stem}-segment-{i + 1}.safetensors")


def load_segment(file: Path, record: dict) -> Tensor:
    """Its latents; ValueError if they were made with other settings."""
    latents, then = sample.load_latents(file)
    now = json.loads(sample.as_json(record))
    for name in now.keys() | then.keys():
        if name not in ("device", "versions") and now.get(name) != then.get(name):
            raise ValueError(f"{file} was made with {name}={then.get(name)}, not {now.get(name)}; "
                             "give the same settings, delete it, or choose another --out")  # fmt: skip
    return latents


def paths_for(target: Path, count: int, suffix: str) -> list[Path]:
    """As `sample.output_paths`; but in a folder from the first number of a run that was broken
    off there on, past those that other runs have taken."""
    stems = [path.stem.removesuffix("-segment-1") for path in target.glob("*-segment-1.safetensors")]
    unfinished = [int(stem) for stem in stems if stem.isdecimal()]
    if not unfinished:
        return sample.output_paths(target, count, suffix)
    numbered = (target / f"{number:04d}{suffix}" for number in itertools.count(min(unfinished)))
    free = (p for p in numbered if segment_file(p, 0).is_file() or not any(target.glob(f"{p.stem}.*")))
    return list(itertools.islice(free, count))


def make_long_videos(
    models: Models, args: argparse.Namespace, settings: dict, tell: Callable
) -> Iterator[Video]:
    """In place of `sample.make_videos`: each is written while it is made."""
    num_frames = settings.pop("num_frames")
    overlaps = segments(num_frames, native_size(models.config)[2])
    if args.seed is None:  # a run that was broken off goes on with its own
        first, *_ = paths_for(Path(args.out), len(args.prompt), ".mp4")
        if segment_file(first, 0).is_file():
            _, record = sample.load_latents(segment_file(first, 0))
            args.seed = [record.get("seed", 0)]
    known, work = sample.prepare(models, args, settings, tell, paths_for)
    settings |= {"height": known.height, "width": known.width}
    models.load("vae")  # to stay for all segments, as T5 need not
    models.load("transformer")
    tell(f"{num_frames} frames in segments that have {overlaps[1:]} in common with those before")
    for request, path in work:
        settings["seed"] = request.seed
        chunks = generate_long(models, request.prompt, num_frames, path, **settings)
        if not models.writes:
            for _ in chunks:
                pass
            continue
        yield path, chunks, sample.make_record(models, request, num_frames, known.height, known.width)
    wait_for_ranks()  # until all are done the segments say where to go on
    for _, path in work if models.writes else []:
        for i in range(len(overlaps)):
            segment_file(path, i).unlink()
