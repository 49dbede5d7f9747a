"""Mutated command lines, media, checkpoint folders and latents: no traceback, no hang, nothing left behind.

Every case is a seeded mutation of a command that works. It may still work, or it must stop with exit status 2
and one line on stderr, and leave no file or folder. FUZZ=1000 runs that many cases in place of a few seconds'
worth, FUZZ_SEED=7 other ones.
"""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FUN, GOLDENS, PLAIN
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from media import write_video

NUM_CASES = int(os.environ.get("FUZZ", 120))
SEED = int(os.environ.get("FUZZ_SEED", 0))
SECONDS = 20  # a case takes 0.1 s; more than this counts as a hang, on a busy machine too
HOSTILE = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "7",
    "48",
    "1e9",
    "nan",
    "inf",
    "-inf",
    "0x10",
    "٣",
    "1_0",
    "9" * 5000,
]
HOSTILE += [
    "99999999999999999999",
    "\x1b[31m",
    "a\nb",
    "a\u2028b",
    "\udcff\udcfe",
    "\ud800",
    "-",
    "--",
    "%s{}",
    "None",
]
HOSTILE += [".", "..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "~", "x" * 300, "a/" * 2000, "nul\0"]


# ---------------------------------------------------------------- commands that work


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good files of every kind, and latents of every model."""
    folder = tmp_path_factory.mktemp("good")
    drawn = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), dtype=np.uint8)
    for name in ("clip.mp4", "clip.gif"):
        write_video(drawn, folder / name)
    for name in ("picture.png", "picture.jpg"):
        Image.fromarray(drawn[0]).save(folder / name)
    Image.fromarray((drawn[0] > 128)[..., 0].astype(np.uint8) * 255).save(folder / "mask.png")
    for variant in FUN + PLAIN:
        torch.manual_seed(0)
        record = json.dumps({"model": str(GOLDENS / variant), "fps": 8.0, "dtype": "float32"})
        save_file(
            {"latents": torch.randn(1, 16, 2, 4, 6)}, folder / f"{variant}.safetensors", {"record": record}
        )
    return folder


def command(rng: random.Random, good: Path) -> dict[str, list[str]]:
    """{flag: values} of a command that works; the prompt under the empty flag."""
    variant = rng.choice(FUN + PLAIN)
    clip = [str(good / rng.choice(["clip.mp4", "clip.gif"]))]
    picture = [str(good / rng.choice(["picture.png", "picture.jpg"]))]
    flags = {"": ["a cat"], "--model": [str(GOLDENS / variant)], "--num-steps": ["2"], "--num-frames": ["5"]}
    flags |= {
        "--seed": ["1"],
        "--height": ["32"],
        "--width": ["48"],
        "--out": [rng.choice(["out/a.png", "out"])],
    }
    if "control" in variant:
        return flags | {"--control-video": clip}
    if "i2v" in variant:
        return flags | {"--image": picture}
    if variant in PLAIN:
        return flags | rng.choice([{}, {"--video": clip, "--strength": ["0.5"]}])
    mask = [str(good / rng.choice(["mask.png", "clip.mp4"]))]
    return flags | rng.choice(
        [
            {},
            {"--image": picture},
            {"--image": picture, "--end-image": picture},
            {"--video": clip, "--mask": mask},
            {"--video": clip, "--strength": ["0.5"]},
        ]
    )


# ---------------------------------------------------------------- mutations


def mutate_flags(rng: random.Random, flags: dict, good: Path, folder: Path) -> None:
    """Another value, another flag, or one less."""
    others = [
        "--negative-prompt",
        "--image",
        "--end-image",
        "--video",
        "--mask",
        "--control-video",
        "--strength",
    ]
    others += [
        "--height",
        "--width",
        "--num-frames",
        "--num-steps",
        "--guidance-scale",
        "--noise-aug-strength",
    ]
    others += [
        "--sampler",
        "--seed",
        "--num-videos",
        "--fps",
        "--dtype",
        "--device",
        "--out",
        "--model",
        "--quiet",
    ]
    others += ["--dynamic-guidance", "--guidance-interval", "--from-latents", "--unknown", "-x", ""]
    files = [str(path) for path in sorted(good.iterdir())] + [str(good), str(GOLDENS / FUN[0])]
    for _ in range(rng.choice([1, 1, 2, 3])):
        flag = rng.choice([*flags, *others])
        values = [
            rng.choice([*HOSTILE, *files, "0.3", "5", "16", "17", "64"])
            for _ in range(rng.choice([0, 1, 1, 1, 2]))
        ]
        if rng.random() < 0.1:
            flags.pop(flag, None)
        elif flag != "--num-videos" or values != ["48"]:  # which would work, and take its time
            flags[flag] = values


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    content, kind = bytearray(content), rng.randrange(7)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        return rng.choice(
            [b"", b"\0", b"\0" * 5000, b"<html>", pickle.dumps({}), rng.randbytes(500), b"PK\3\4" * 9]
        )
    if kind == 2:  # cut a piece out, or put one in
        start = rng.randrange(len(content))
        content[start : start + rng.randrange(1, 100)] = rng.randbytes(rng.choice([0, 50]))
        return bytes(content)
    near_start = rng.random() < 0.5  # where the headers are
    for _ in range(rng.choice([1, 4, 30])):
        i = rng.randrange(min(len(content), 200) if near_start else len(content))
        content[i] = rng.choice([0, 255, content[i] ^ 1 << rng.randrange(8), rng.randrange(256)])
    return bytes(content)


def mutate_media(rng: random.Random, flags: dict, good: Path, folder: Path) -> None:
    """Damage one of the pictures and clips, or hand over another file under its name."""
    flag = rng.choice([f for f in flags if flags[f] and flags[f][0].startswith(str(good))] or ["--video"])
    path = Path(flags.get(flag, [str(good / "clip.mp4")])[0])
    other = rng.choice(sorted(p for p in good.iterdir() if p.suffix != ".safetensors"))
    content = other.read_bytes() if rng.random() < 0.3 else mutate_bytes(rng, path.read_bytes())
    bad = folder / rng.choice([path.name, "bad" + other.suffix, "ä\udcff" + path.suffix, "no-ending"])
    bad.write_bytes(content)
    flags[flag] = [str(bad)]


def mutate_json(rng: random.Random, value: object, depth: int = 0) -> object:
    if isinstance(value, dict) and value and depth < 3 and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutate_json(rng, value[key], depth + 1)}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and rng.random() < 0.4:
        return rng.choice(
            [value + 1, value * 2, -value, value * 1000, value / 3 if abs(value) < 1e9 else 0.5]
        )
    choices = [
        None,
        True,
        "",
        "x",
        [],
        {},
        [1, 2],
        0,
        1,
        -1,
        3,
        16,
        1000,
        10**6,
        10**12,
        10**400,
        1e30,
        1e-30,
    ]
    return rng.choice([*choices, float("nan"), float("inf"), [[]], "\ud800", {"a": 1}])


def mutate_tensors(rng: random.Random, content: bytes) -> bytes:
    """Lie in the header of a safetensors file, or put numbers that are none behind it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        return (
            struct.pack("<Q", rng.choice([0, 1, length + 1, length - 1, 2**40, 2**63, len(content)]))
            + content[8:]
        )
    if kind == 1:  # NaN, infinite or huge
        number = struct.pack("<f", rng.choice([float("nan"), float("inf"), 3e38]))
        start = rng.randrange(len(data) // 4) * 4
        count = rng.choice([1, 50, len(data)])
        data = (
            data[:start] + (number * count)[: len(data) - start] + data[min(start + 4 * count, len(data)) :]
        )
    else:
        name = rng.choice(sorted(header.keys() - {"__metadata__"}))
        field = rng.choice(["dtype", "shape", "data_offsets"])
        if kind == 2:
            header[name] = mutate_json(rng, header[name])
        elif kind == 3:
            header[name] = header[rng.choice(sorted(header))]  # overlapping offsets
        elif kind == 4:
            header[rng.choice(["x", "", "__metadata__"])] = header.pop(name)
        else:
            values = {"dtype": ["F16", "I32", "F8_E4M3", "X", 1], "shape": [[0], [2**62, 4], [-1], [], [1]]}
            values["data_offsets"] = [[0, 0], [0, 2**62], [4, 0], [0, 4], None]
            header[name] = header[name] | {field: rng.choice(values[field])}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def mutate_checkpoint(rng: random.Random, flags: dict, good: Path, folder: Path) -> None:
    """Damage one file of the model's folder, or swap a component for another model's."""
    model, source = folder / "model", Path(flags["--model"][0])
    shutil.copytree(source, model, ignore=shutil.ignore_patterns("expected*", "assets", "prompts.json"))
    files = sorted(p for p in model.rglob("*") if p.is_file() and p.name != "model_index.json")
    path, kind = rng.choice(files), rng.random()
    if kind < 0.1:
        path.unlink()
        if rng.random() < 0.5:
            path.mkdir()
        elif rng.random() < 0.5:
            path.with_suffix(".bin").write_bytes(pickle.dumps({"a": 1}))
    elif kind < 0.2:
        part = rng.choice(["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
        shutil.rmtree(model / part)
        if rng.random() < 0.8:
            shutil.copytree(GOLDENS / rng.choice(FUN + PLAIN) / part, model / part)
    elif path.suffix == ".json" and kind < 0.9:
        changed = json.loads(path.read_text())
        for _ in range(rng.choice([1, 1, 3])):
            changed = mutate_json(rng, changed)
        path.write_text(json.dumps(changed))
    elif path.suffix == ".safetensors" and kind < 0.9:
        path.write_bytes(mutate_tensors(rng, path.read_bytes()))
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    flags["--model"] = [str(model)]


def mutate_latents(rng: random.Random, flags: dict, good: Path, folder: Path) -> None:
    """Decode from a damaged file, or from one that is not the model's."""
    model, out, bad = flags["--model"], flags["--out"], folder / "bad.safetensors"
    content = (good / (Path(model[0]).name + ".safetensors")).read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        content = mutate_bytes(rng, content)
    elif kind == 1:
        content = mutate_tensors(rng, content)
    elif kind == 2:
        content = rng.choice(sorted(good.iterdir())).read_bytes()
    else:
        bad.write_bytes(content)
        record = mutate_json(rng, {"model": model[0], "fps": 8.0, "dtype": "float32"})
        text = rng.choice(
            [json.dumps(record), "[" * 10**5, '{"fps": NaN}', '{"fps": 1e-9, "model": "a\\u0000"}']
        )
        save_file(load_file(bad), bad, {"record": text})
        content = bad.read_bytes()
    bad.write_bytes(content)
    flags.clear()
    flags |= {"--from-latents": [str(bad)], "--out": out} | rng.choice([{}, {"--model": model}])


# ---------------------------------------------------------------- one case


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*")}


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise Hang(f"longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class Hang(BaseException):
    pass


MUTATIONS = [
    mutate_flags,
    mutate_flags,
    mutate_media,
    mutate_media,
    mutate_checkpoint,
    mutate_checkpoint,
    mutate_latents,
]


@pytest.mark.parametrize("part", range(8))
def test_whatever_is_mutated_stops_in_one_line_or_works(part, good, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for case in range(part, NUM_CASES, 8):
        rng = random.Random(f"{SEED} {case}")
        folder = tmp_path / str(case)
        folder.mkdir()
        os.chdir(folder)
        flags = command(rng, good)
        rng.choice(MUTATIONS)(rng, flags, good, folder)
        argv = [*flags.pop("", []), *(word for flag, values in flags.items() for word in (flag, *values))]
        before = tree(folder)
        try:
            with time_limit(SECONDS):
                status = sample.main(argv)
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            pytest.fail(f"case {case}: {argv!r:.2000} raised {type(error).__name__}: {error}")
        out, err = capfd.readouterr()
        shown = f"case {case}: {argv!r:.2000} gave {status}, {out!r:.500} and {err!r:.1500}"
        left = {path for path in tree(folder) - before}
        if status == 0:
            assert not err, shown
        else:
            assert status == 2, shown
            assert len(err.splitlines()) == 1 and err.startswith("sample.py: error: ") and len(err) > 30, (
                shown
            )
            if "decoded frames are not finite" in err:  # the latents are good and have been kept
                left = {path for path in left if path.suffix != ".safetensors" and path.name != "out"}
            assert not left, f"{shown} and left {left}"
        os.chdir(tmp_path)
        shutil.rmtree(folder)


def test_nothing_here_ever_unpickles(tmp_path, capfd, monkeypatch):
    """A pickle that would write a file when read, in each place where weights may lie."""

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("transformer", "vae", "text_encoder"):
        model = tmp_path / name
        shutil.copytree(GOLDENS / FUN[0], model, ignore=shutil.ignore_patterns("expected*"))
        [weights] = (model / name).glob("*.safetensors")
        for file in (weights, weights.with_suffix(".bin"), weights.with_suffix(".ckpt")):
            weights.unlink(missing_ok=True)
            file.write_bytes(pickle.dumps(Bomb()))
            assert sample.main(["x", "--model", str(model), "--out", str(tmp_path / "o.png")]) == 2
            assert len(capfd.readouterr().err.splitlines()) == 1
            file.unlink()
    assert not (tmp_path / "exploded").exists() and "torch.load" not in sys.modules
