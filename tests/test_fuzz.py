"""Random command lines on the small models: no traceback, no hang, and a result that is what was asked for.

Every case is a seeded change of a command that works. It may still work, and then its record must say what
the flags said; or it stops with exit status 2 and one line on stderr. FUZZ=300 runs that many cases in place
of a few seconds' worth, FUZZ_SEED=7 other ones.
"""

import contextlib
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import FUN, GOLDENS, PLAIN, V15
from PIL import Image

import sample
from media import read_video, write_video

NUM_CASES = int(os.environ.get("FUZZ", 48))
SEED = int(os.environ.get("FUZZ_SEED", 0))
SECONDS = 30  # a case takes a quarter of one; more than this counts as a hang, on a busy machine too
VALUES = ["-1", "0", "1", "2", "7", "48", "9", "13", "1e9", "nan", "inf", "9" * 50, "0.3", "0.9", "16", "32"]
VALUES += ["", " ", "a\nb", "\udcff", "-", "--", ".", "..", "/dev/null", "x" * 300, "dpm-cog", "float16"]
FLAGS = """negative-prompt image end-image video mask control-video strength height width num-frames num-steps
    guidance-scale noise-aug-strength sampler seed num-videos fps dtype device out model quiet tiled
    dynamic-guidance guidance-interval from-latents lora compile unknown""".split()
NUMBERS = "strength height width num_frames num_steps guidance_scale noise_aug_strength seed fps".split()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Good files of every kind."""
    folder = tmp_path_factory.mktemp("media")
    drawn = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), dtype=np.uint8)
    write_video(drawn, folder / "clip.mp4")
    write_video(drawn[:7], folder / "clip.gif")
    Image.fromarray(drawn[0]).save(folder / "picture.png")
    Image.fromarray((drawn[0] > 128)[..., 0].astype(np.uint8) * 255).save(folder / "mask.png")
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:999])
    return {path.name: str(path) for path in folder.iterdir()}


def command(rng: random.Random, media: dict[str, str]) -> dict[str, list[str]]:
    """{flag: values} of a command that works."""
    variant = rng.choice(FUN + PLAIN + V15)
    flags = {"model": [str(GOLDENS / variant)], "num-steps": ["2"], "num-frames": ["5"], "seed": ["1"]}
    flags |= {"height": ["32"], "width": ["48"], "out": ["out.mp4"]}
    clip, picture, mask = [media["clip.mp4"]], [media["picture.png"]], [media["mask.png"]]
    if "control" in variant:
        return flags | {"control-video": clip}
    if "i2v" in variant:
        return flags | rng.choice([{"image": picture}, {"image": picture, "end-image": picture}])
    ways = [{}, {"video": clip, "strength": ["0.5"]}]
    if variant in FUN:
        ways += [{"image": picture, "end-image": picture}, {"video": clip, "mask": mask}]
    return flags | rng.choice(ways)


def change(rng: random.Random, flags: dict[str, list[str]], media: dict[str, str]) -> None:
    for _ in range(rng.choice([1, 1, 2, 3])):
        flag = rng.choice([*flags, *FLAGS])
        if rng.random() < 0.15:
            flags.pop(flag, None)
        elif flag in ("quiet", "tiled", "dynamic-guidance"):
            flags[flag] = []
        elif flag != "compile":  # takes its time
            count = 2 if flag == "guidance-interval" else rng.choice([1, 1, 1, 2])
            files = [] if flag == "out" else media.values()  # which are needed again
            flags[flag] = [rng.choice([*VALUES, *files]) for _ in range(count)]


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise TimeoutError(f"longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def check_result(flags: dict[str, list[str]], said: str) -> None:
    """Every record says what the flags said, and its video has that size."""
    records = [json.loads(path.read_text()) for path in Path().rglob("*.json")]
    assert records or flags.get("out") != ["out.mp4"]
    for name in NUMBERS:
        given = flags.get(name.replace("_", "-"))
        if given and name != "seed" and not (name == "num_frames" and "do not fit" in said):
            assert all(record[name] == pytest.approx(float(given[0])) for record in records), name
    for path in Path().rglob("*.mp4"):
        record = json.loads(path.with_suffix(".json").read_text())
        assert read_video(path).shape[1:3] == (record["height"], record["width"])


def test_what_is_changed_stops_in_one_line_or_does_what_it_says(media, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for case in range(NUM_CASES):
        rng = random.Random(f"{SEED} {case}")
        (tmp_path / str(case)).mkdir()
        monkeypatch.chdir(tmp_path / str(case))
        flags = command(rng, media)
        change(rng, flags, media)
        argv = ["a cat", *(word for flag in flags for word in (f"--{flag}", *flags[flag]))]
        try:
            with time_limit(SECONDS):
                status = sample.main(argv)
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            pytest.fail(f"case {case}: {argv!r:.2000} raised {type(error).__name__}: {error}")
        out, err = capfd.readouterr()
        shown = f"case {case}: {argv!r:.2000} gave {status}, {out!r:.500} and {err!r:.1500}"
        if status == 0:
            assert not err, shown
            check_result(flags, out if "quiet" not in flags else "do not fit")
        else:
            assert status == 2 and len(err.splitlines()) == 1, shown
            assert err.startswith("sample.py: error: ") and len(err) > 30, shown
