"""The command line: what it writes, says and refuses, on the tiny checkpoints, in this process."""

import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image

import sample
from media import read_video, write_video
from transformer import Block, VideoTransformer
from vae import VideoVAE

INPAINT, TEXT = GOLDENS / "fun-2b-inp", GOLDENS / "cogvideox-2b-t2v"
ROPE, CONTROL, IMAGE = GOLDENS / "fun-5b-inp", GOLDENS / "fun-2b-control", GOLDENS / "cogvideox-5b-i2v"
NOISE = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """An empty folder to work in, with media beside it."""
    (tmp_path / "media").mkdir()
    Image.fromarray(NOISE[0]).save(tmp_path / "media/picture.png")
    Image.new("L", (48, 32), 255).save(tmp_path / "media/white.png")
    write_video(NOISE, tmp_path / "media/clip.mp4")
    write_video(NOISE[:3], tmp_path / "media/short.gif")
    (tmp_path / "media/fine-1.safetensors").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def made(*words, model=INPAINT, **changes):
    """Run a command that must work; the names of the files it leaves in this folder."""
    settings = {"model": model, "num-steps": 2, "num-frames": 5, "seed": 1} | changes
    flags = [f"--{name}={value}".removesuffix("=") for name, value in settings.items() if value is not None]
    assert sample.main([*words, *flags]) == 0
    return sorted(path.name for path in Path().rglob("*") if path.is_file())


def refused(capfd, *argv):
    """Run a command that must stop in one line and leave nothing; the line."""
    before = set(Path("..").rglob("*.*"))
    assert sample.main([str(word) for word in argv]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("sample.py: error: "), err
    assert set(Path("..").rglob("*.*")) == before, "something was left behind"
    return err


# ---------------------------------------------------------------- what is written


def test_the_start_says_what_is_made_and_files_without_a_name_are_numbered_their_seed_drawn(capfd):
    made("x", seed=None)
    said, err = capfd.readouterr()
    for words in (
        "fun-2b-inp: inpaint, 33 channels",
        "1 of 48x32, 5 frames -> 2 latent frames -> 12 tokens",
        "ddim, 2 steps, strength 1, guidance 6",
        "memory   about text",
    ):
        assert words in said
    assert not err
    found = made("x", seed=None, quiet="", **{"num-frames": 1})
    assert capfd.readouterr() == ("", "")
    endings = "json", "mp4", "safetensors", "json", "png", "safetensors"
    assert found == [f"000{1 + i // 3}.{ending}" for i, ending in enumerate(endings)]
    first, second = (json.loads(Path(f"outputs/000{i}.json").read_text())["seed"] for i in (1, 2))
    assert first != second
    made("x", out="again.mp4", seed=first)
    assert Path("again.mp4").read_bytes() == Path("outputs/0001.mp4").read_bytes()


def test_compile_compiles_each_block_of_the_transformer(monkeypatch):
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda block: compiled.append(block))
    made("x", model=TEXT, out="a.png", compile="")
    assert len(compiled) == 2


def test_several_prompts_and_seeds_make_a_video_each():
    argv = ["x", "y", "--model", str(TEXT), *"--num-steps 1 --num-frames 1 --seed 3 4 --out a.png".split()]
    assert sample.main(argv) == 0
    records = [json.loads(Path(f"a-{i}.json").read_text()) for i in (1, 2, 3, 4)]
    assert [(r["prompt"], r["seed"]) for r in records] == [("x", 3), ("x", 4), ("y", 3), ("y", 4)]
    pictures = [Path(f"a-{i}.png").read_bytes() for i in (1, 2, 3, 4)]
    assert len(set(pictures)) == 4
    made("y", model=TEXT, seed=4, out="b.png", **{"num-steps": 1, "num-frames": 1})
    assert Path("b.png").read_bytes() == pictures[3], "the same alone as among others"


@pytest.mark.parametrize(
    "model, inputs",
    [
        (INPAINT, {"video": "../media/clip.mp4", "strength": 0.6, "num-steps": 4}),
        (ROPE, {"image": "../media/picture.png", "noise-aug-strength": 0.2, "sampler": "euler-a"}),
        (CONTROL, {"control-video": "../media/clip.mp4", "fps": 4}),
        (TEXT, {"negative-prompt": "rain", "guidance-scale": 3, "dtype": "bfloat16", "height": 48}),
    ],
)
def test_the_record_makes_the_same_video_again(model, inputs):
    made("x", model=model, out="a.mp4", **inputs)
    record = json.loads(Path("a.json").read_text())
    assert record["versions"].keys() == {"torch", "numpy"} and record["kind"]
    argv = [record["prompt"], "--out", "b.mp4"]
    for name in (*sample.Request.__dataclass_fields__, "fps", "model", "dtype", "device"):
        value = record.get(name)
        if name != "prompt" and value not in (None, False):
            argv += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    assert sample.main(argv) == 0
    assert Path("b.mp4").read_bytes() == Path("a.mp4").read_bytes()


def test_a_kill_while_decoding_loses_nothing(monkeypatch, capfd):
    made("x", out="whole.gif")

    def kill(frames, path, fps):
        next(iter(frames))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_video", kill)
        flags = "--num-steps 2 --num-frames 5 --seed 1 --out a.gif".split()
        assert sample.main(["x", f"--model={INPAINT}", *flags]) == 2
    assert capfd.readouterr().err == "sample.py: error: interrupted\n"
    assert [p for p in sorted(os.listdir()) if p.startswith(("a", "."))] == ["a.safetensors"]
    assert sample.main(["--from-latents", "a.safetensors", "--out", "b.gif"]) == 0
    assert Path("b.gif").read_bytes() == Path("whole.gif").read_bytes()
    assert json.loads(Path("b.json").read_text())["prompt"] == "x"
    assert sample.main(["--from-latents", "a.safetensors", "--fps", "nan"]) == 2


# ---------------------------------------------------------------- sizes and clips


def test_clips_are_read_at_the_models_rate():
    """Frame i of a 30 fps clip has grey level 4i; at 8 fps that is every 3.75th frame."""
    grey = np.broadcast_to(4 * np.arange(60, dtype=np.uint8)[:, None, None, None], (60, 32, 48, 3))
    write_video(grey, "clip.mp4", fps=30)
    models = sample.load_models(CONTROL)
    request = sample.complete(sample.Request("x", control_video="clip.mp4"), models)
    known = sample.read_inputs(request, models.config)
    levels = known.frames.mean((1, 2, 3)) / 4
    assert len(levels) == 13
    assert np.abs(levels - 3.75 * np.arange(13)).max() < 1  # nearest frame, and mp4's loss


def test_frames_that_do_not_fit_are_cut_and_said(capfd):
    write_video(NOISE[:7], "clip.mp4")
    made("x", video="clip.mp4", strength=0.5, out="a.mp4", **{"num-frames": None})
    assert len(read_video("a.mp4")) == 5
    assert "7 frames do not fit this model: 5 are made" in capfd.readouterr().out


def test_a_number_that_another_run_has_taken_meanwhile_stays_its_own(monkeypatch):
    denoise = sample.denoise

    def and_meanwhile(*args):
        Path("outputs/0001.safetensors").write_text("theirs")
        return denoise(*args)

    monkeypatch.setattr(sample, "denoise", and_meanwhile)
    found = made("x", model=TEXT, **{"num-steps": 1, "num-frames": 1})
    assert found == ["0001.safetensors", "0002.json", "0002.png", "0002.safetensors"]
    assert Path("outputs/0001.safetensors").read_text() == "theirs"


def test_an_end_picture_of_another_shape_is_said_to_change(capfd):
    Image.new("RGB", (32, 64)).save("tall.png")
    made("x", image="../media/picture.png", out="a.mp4", height=32, width=48, **{"end-image": "tall.png"})
    assert capfd.readouterr().out.count("the input of 32x64 is made at 48x32") == 1


# ---------------------------------------------------------------- what is said, kept and freed


def test_each_network_is_gone_before_the_next_is_loaded(monkeypatch):
    load, alive = sample.Models._load, {}

    def watch(self, name):
        assert [n for n, network in alive.items() if network() is not None] == []
        network = load(self, name)
        alive[name] = weakref.ref(network)
        return network

    monkeypatch.setattr(sample.Models, "_load", watch)
    made("x", image="../media/picture.png", out="a.mp4")
    assert alive.keys() == {"text_encoder", "vae", "transformer"}


def test_a_hub_id_fetches_only_what_is_read(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kw: asked.update(kw, name=name) or INPAINT
    )
    made("x", model="someone/some-model", out="a.png")
    assert asked["name"] == "someone/some-model"
    assert not any(pattern.endswith((".bin", ".ckpt", "*/*")) for pattern in asked["allow_patterns"])
    assert json.loads(Path("a.json").read_text())["model"] == str(INPAINT)


# ---------------------------------------------------------------- numbers that are none


def test_the_step_is_the_one_where_it_happens(monkeypatch, capfd):
    forward, calls = VideoTransformer.forward, []

    def overflow(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs) * (float("inf") if len(calls) == 3 else 1)

    monkeypatch.setattr(VideoTransformer, "forward", overflow)
    message = refused(capfd, "x", "--model", INPAINT, "--num-steps", "4", "--dtype", "float16")
    assert "at step 3 (timestep 499) in float16; try dtype bfloat16 or float32" in message and len(calls) == 3


def test_frames_that_are_not_finite_are_never_written_and_latents_stay(monkeypatch, capfd):
    nothing = torch.full((1, 3, 1, 32, 48), torch.nan)
    monkeypatch.setattr(VideoVAE, "decode_stream", lambda *_, **__: iter([nothing]))
    assert sample.main(["x", "--model", str(INPAINT), "--num-steps", "1", "--out", "a.mp4"]) == 2
    assert "decoded frames are not finite in float32; decode the saved latents" in capfd.readouterr().err
    assert os.listdir() == ["a.safetensors"]


# ---------------------------------------------------------------- what would waste hours, or a file

PICTURE, CLIP = ["--image", "../media/picture.png"], ["--video", "../media/clip.mp4"]
LORA = ["--lora", "../media/fine-1.safetensors"]


@pytest.mark.parametrize(
    "model, flags, words",
    [
        (TEXT, ["--num-frames", "48"], ["num_frames=48", "4k+1", "49 (or 45)"]),
        (CONTROL, ["--control-video", "../media/clip.mp4", "--num-frames", "17"], ["the most is 13"]),
        (IMAGE, [*PICTURE, "--height", "48"], ["height=48", "learned positions", "height=32"]),
        (TEXT, PICTURE, ["16-channel text model takes no image", "33-channel"]),
        (INPAINT, [*PICTURE, *CLIP], ["image and video contradict"]),
        (INPAINT, ["--mask", "../media/white.png"], ["mask needs a video"]),
        (INPAINT, [*CLIP, "--mask", "../media/short.gif"], ["short.gif has 3 frames, the clip 13"]),
        (INPAINT, [*CLIP, "--out", "../media/clip.mp4"], ["clip.mp4 is an input", "another name"]),
        (INPAINT, [*LORA, "--seed", "1", "2", "--out", "../media/fine.mp4"], ["fine-1.safetensors is an"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(model, flags, words, capfd):
    message = refused(capfd, "x", "--model", model, *flags)
    assert all(word in message for word in words), message
