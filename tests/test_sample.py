"""generate() against the reference's pipelines: every mode of every variant, from file to final latents.

After four guided steps latents agree to 1e-3 (the project's tolerance; measured: 1e-4 and mostly below 1e-5);
frames to half a grey level, which is the rounding to uint8. On a GPU:

    TEST_DEVICE=cuda pytest tests/test_sample.py -k equal
"""

import json
import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import GOLDENS, assert_close, expected
from PIL import Image

import long_video
import sample
import vae
from kinds import choose_size, native_size
from media import read_video
from sample import generate, load_models

LATENTS = 5e-4
FRAMES = 0.5 / 255 + 1e-4
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False  # of a GPU: float32 with the digits of a CPU


def recorded_draws(draws):
    """A randn that hands out the reference's draws in order, in our layout."""
    left = list(draws)

    def randn(shape):
        draw = left.pop(0)
        draw = draw if tuple(draw.shape) == shape else draw.transpose(1, 2)
        assert tuple(draw.shape) == shape
        return draw

    randn.left = left
    return randn


def recorded_input(variant, name):
    """A recorded tensor as the array a user has, f h w c or h w c; or a file of the variant's assets."""
    if isinstance(name, list):
        return [recorded_input(variant, each) for each in name]
    tensor = expected(variant).get(name)
    if tensor is None:
        return GOLDENS / variant / "assets" / name
    return (tensor if tensor.dim() < 5 else tensor[0].movedim(0, -1)).numpy()


START = {"image": "start.png"}
BOTH = START | {"end_image": "end.png"}
COG = {"sampler": "ddim-cog"}
DYNAMIC = {"dynamic_guidance": True}
CLIP = {"video": "pre.v2v.frames_u8"}  # longer than the run: it is cut
PART = {"video": "pipe.v2v.frames_u8", "strength": 0.7, "num_steps": 6}
PICTURE = {"image": "pipe.image_u8"}
DPM_15 = {"image": "pipe.i2v_dpm.image_u8", "keys": [0, 1, 3, 5, 6]}
RUNS = [
    ("fun-2b-inp", "t2v", {}),
    ("fun-2b-inp", "t2v_ddimcog", COG),
    ("fun-2b-inp", "image", {}),
    ("fun-2b-inp", "i2v", START),
    ("fun-2b-inp", "start_end", BOTH),
    ("fun-2b-inp", "list3", {"image": ["list0.png", "list1.png", "list2.png"]}),
    ("fun-2b-inp", "i2v_euler", START | {"sampler": "euler"}),
    ("fun-2b-inp", "i2v_dpmpp", START | {"sampler": "dpm++"}),
    ("fun-2b-inp", "v2v", CLIP | {"strength": 0.7, "num_steps": 6}),
    ("fun-2b-inp", "inpaint", CLIP | {"mask": "mask.png"}),
    ("fun-2b-inp", "outpaint", CLIP | DYNAMIC | {"mask": "pre.outpaint.mask_u8"}),
    ("fun-5b-inp", "t2v", {}),
    ("fun-5b-inp", "image", {}),
    ("fun-5b-inp", "i2v", START),
    ("fun-5b-inp", "i2v_noiseaug", START | {"noise_aug_strength": 0.0563}),
    ("fun-5b-inp", "i2v_euler_a", START | {"sampler": "euler-a"}),
    # The reference draws twice in the middle steps and drops the first of the two.
    ("fun-5b-inp", "i2v_dpm_cog", START | {"sampler": "dpm-cog", "keys": [1, 3, 5, 6]}),
    ("fun-1.5-5b-inp", "t2v", {}),
    ("fun-1.5-5b-inp", "image", {}),
    ("fun-1.5-5b-inp", "i2v", START),
    ("fun-1.5-5b-inp", "start_end", BOTH),
    ("fun-1.5-5b-inp", "clip", START | {"num_frames": 9}),  # three latent frames: cut to two
    ("fun-2b-control", "ctl_native", {"control_video": "pipe.control_u8"}),
    ("fun-2b-control", "ctl_nn", {"control_video": "pipe.control_nn_u8"} | DYNAMIC),
    ("fun-2b-control", "ctl_nn_ddimcog", {"control_video": "pipe.control_nn_u8"} | COG),
    ("cogvideox-2b-t2v", "t2v", {}),
    ("cogvideox-2b-t2v", "t2v_nn", DYNAMIC),
    ("cogvideox-2b-t2v", "image", {}),
    ("cogvideox-5b-t2v", "t2v", COG),
    ("cogvideox-5b-t2v", "t2v_nn", COG | DYNAMIC),
    ("cogvideox-5b-t2v", "t2v_dpm", DYNAMIC | {"keys": [0, 2, 4, 5]}),
    ("cogvideox-5b-t2v", "t2v_dpm7", {"num_steps": 7, "keys": [0, 2, 4, 6, 8, 10, 12]}),
    ("cogvideox-5b-t2v", "v2v", COG | PART),
    ("cogvideox-5b-i2v", "i2v_ddim", COG | PICTURE),
    ("cogvideox-5b-i2v", "i2v_dpm", PICTURE | DYNAMIC | {"keys": [0, 1, 3, 5, 6]}),
    ("cogvideox-5b-i2v", "i2v_short", COG | PICTURE),
    # An odd number of latent frames is denoised with one more in front, which is dropped.
    ("cogvideox-1.5-5b-t2v", "t2v_ddim", COG),
    ("cogvideox-1.5-5b-t2v", "t2v_dpm", DYNAMIC | {"keys": [0, 2, 4, 5]}),
    ("cogvideox-1.5-5b-t2v", "t2v_short", COG),
    ("cogvideox-1.5-5b-t2v", "v2v", COG | PART),
    ("cogvideox-1.5-5b-i2v", "i2v_ddim", COG | {"image": "pipe.i2v_ddim.image_u8"}),
    ("cogvideox-1.5-5b-i2v", "i2v_dpm", DPM_15 | DYNAMIC),
    ("cogvideox-1.5-5b-i2v", "i2v_short", COG | {"image": "pipe.i2v_short.image_u8"}),
]


@pytest.mark.parametrize("variant, run, settings", RUNS)
def test_latents_and_frames_equal_the_reference(variant, run, settings):
    """Of Fun's pipelines and of diffusers'; every recorded draw is used."""
    want = expected(variant)
    prompts = json.loads((GOLDENS / variant / "prompts.json").read_text())
    final = want[f"pipe.{run}.latents_final"].transpose(1, 2)
    settings = {
        "negative_prompt": prompts["negative_prompt"],
        "num_frames": 4 * final.shape[2] - 3,
        "height": 8 * final.shape[3],
        "width": 8 * final.shape[4],
        "num_steps": 4,
        "noise_aug_strength": 0.0,
    } | settings
    keys = settings.pop("keys", [i for i in range(20) if f"pipe.{run}.rand{i}" in want])
    randn = recorded_draws([want[f"pipe.{run}.rand{i}"] for i in keys])
    if f"pipe.{run}.latents_init" in want:
        settings["latents"] = want[f"pipe.{run}.latents_init"].transpose(1, 2)
    for name in settings.keys() & {"image", "end_image", "video", "mask", "control_video"}:
        settings[name] = recorded_input(variant, settings[name])
    models = load_models(GOLDENS / variant, device=DEVICE)
    latents = generate(models, prompts["prompts"][0], output="latents", randn=randn, **settings)
    assert_close(latents.cpu(), final, LATENTS)
    assert not randn.left and not models.loaded
    if f"pipe.{run}.video" in want:
        frames = np.concatenate(list(sample.decode(models, latents)))
        assert frames.dtype == np.uint8
        assert_close(torch.from_numpy(frames) / 255, want[f"pipe.{run}.video"][0].permute(1, 2, 3, 0), FRAMES)


def shapes_drawn(variant, **settings):
    """Of each random draw in a run of one step; and the shape of the latents."""
    shapes = []

    def randn(shape):
        shapes.append(shape)
        return torch.zeros(shape)

    settings = {"num_steps": 1, "height": 32, "width": 48, "randn": randn, "output": "latents"} | settings
    latents = generate(load_models(GOLDENS / variant), "x", **settings)
    return shapes, tuple(latents.shape)


def latent_shape(frames):
    return (1, 16, frames, 4, 6)


def test_cogvideox15_draws_the_picture_then_padded_noise():
    picture = np.zeros((32, 48, 3), np.uint8)
    drawn, made = shapes_drawn("cogvideox-1.5-5b-i2v", image=picture, num_frames=9, sampler="euler-a")
    assert drawn == [latent_shape(1), latent_shape(4), latent_shape(4)] and made == latent_shape(3)
    drawn, made = shapes_drawn("cogvideox-1.5-5b-t2v", num_frames=1)
    assert drawn[0] == latent_shape(1) == made
    clip = np.zeros((9, 32, 48, 3), np.uint8)  # a clip is not padded but cut
    drawn, made = shapes_drawn("cogvideox-1.5-5b-t2v", video=clip, strength=0.5, num_steps=2, sampler="ddim")
    assert drawn == [latent_shape(2), latent_shape(2)] and made == latent_shape(2)


@pytest.mark.parametrize("variant, frames", [("cogvideox-5b-i2v", 3), ("cogvideox-1.5-5b-i2v", 4)])
def test_an_image_model_is_shown_an_end_picture_in_its_last_latent_frame(variant, frames, monkeypatch):
    conditions = []
    monkeypatch.setattr(sample, "guided", lambda *args: conditions.append(args[4]) or (lambda x, t: x))
    start, end = (np.full((32, 48, 3), level, np.uint8) for level in (200, 20))
    for settings in ({"image": start}, {"image": end}, {"image": start, "end_image": end}):
        drawn, _ = shapes_drawn(variant, num_frames=9, **settings)
        assert drawn[0] == latent_shape(1)
    first, last, both = conditions
    assert both.shape[2] == frames and not both[:, :, 1:-1].any()
    assert torch.equal(both[:, :, 0], first[:, :, 0])
    assert torch.equal(both[:, :, -1], last[:, :, 0]) and not last[:, :, 1:].any()


def run_2b(**settings):
    models = load_models(GOLDENS / "fun-2b-inp")
    settings = {"num_steps": 2, "num_frames": 5, "seed": 1, "output": "latents"} | settings
    return generate(models, "a cat", **settings)


def test_tiles_reach_the_vae_each_time(monkeypatch):
    run_tiles = Mock(wraps=vae.run_tiles)
    monkeypatch.setattr(vae, "run_tiles", run_tiles)
    mask = np.full((32, 48), 255, np.uint8)
    mask[:8] = 0
    clip = np.zeros((5, 32, 48, 3), np.uint8)
    run_2b(video=clip, mask=mask, strength=0.5, tiled=True, output="frames")
    assert run_tiles.call_count == 3  # condition, start, and decoding


def test_no_guidance_is_the_text_alone_and_outside_the_interval_too():
    alone = run_2b(guidance_scale=1.0)
    assert torch.equal(alone, run_2b(guidance_scale=1.0, negative_prompt="a dog"))
    assert_close(run_2b(guidance_interval=(0, 0)), alone, 1e-5)  # steps 999 and 499: never guided
    assert not torch.allclose(run_2b(), alone, atol=1e-3)


def test_one_forward_for_both_prompts_equals_two(monkeypatch):
    """Small grids take one batch of two, large ones two of one; both are the same function."""
    small = run_2b()
    monkeypatch.setattr("sample.SMALL_TOKENS", 0)
    assert_close(run_2b(), small, 1e-5)


def test_sizes_follow_the_input_at_the_native_area():
    config = load_models(GOLDENS / "fun-2b-inp").config  # native 32 x 48
    assert native_size(config) == (32, 48, 13)
    assert choose_size(config, None, None, None) == (32, 48)
    assert choose_size(config, None, None, (1000, 500)) == (48, 32)
    assert choose_size(config, None, None, (500, 500)) == (32, 32)
    assert choose_size(config, 64, None, (500, 1000)) == (64, 128)
    assert choose_size(config, None, 64, (500, 1000)) == (32, 64)
    assert choose_size(config, 64, 64, (500, 1000)) == (64, 64)
    learned = load_models(GOLDENS / "cogvideox-5b-i2v").config
    assert choose_size(learned, None, None, (1000, 500)) == (32, 48)


def test_networks_are_kept_when_asked_for():
    models = load_models(GOLDENS / "fun-2b-inp", keep=True)
    generate(models, "a cat", num_steps=1, num_frames=1, seed=0)
    first = dict(models.loaded)
    generate(models, "a cat", num_steps=1, num_frames=1, seed=0)
    assert models.loaded == first and first.keys() == {"text_encoder", "vae", "transformer"}


def test_segments_fill_any_length_and_always_overlap():
    for num_frames in range(17, 400, 4):
        shared = long_video.segments(num_frames, 17)
        assert shared[0] == 0 and all(long_video.OVERLAP <= n < 17 and n % 4 == 1 for n in shared[1:])
        assert sum(17 - n for n in shared) == num_frames


def test_a_long_video_gives_each_segment_the_last_frames_of_the_one_before(monkeypatch):
    """Exactly num_frames frames; known frames are passed as they are, the end picture to the last alone."""
    models, requests, plain = load_models(GOLDENS / "fun-2b-inp", keep=True), [], sample.generate
    length = native_size(models.config)[2]

    def watched(*args, **settings):
        latents = plain(*args, **settings)
        requests.append((settings, np.concatenate(list(sample.decode(models, latents)))))
        return latents

    monkeypatch.setattr(sample, "generate", watched)
    start, end = (np.full((32, 48, 3), level, np.uint8) for level in (200, 20))
    settings = {"image": start, "end_image": end, "num_steps": 1, "seed": 3}
    num_frames = 2 * length - 1
    video = np.concatenate(list(long_video.generate_long(models, "a cat", num_frames, **settings)))
    assert video.shape == (num_frames, 32, 48, 3)
    overlaps = long_video.segments(num_frames, length)
    (first, before), *later = requests
    assert len(overlaps) == len(requests) == 3
    assert first["image"] is start and first["end_image"] is None
    done = 0
    for n, (settings, frames) in zip(overlaps[1:], later):
        assert np.array_equal(settings["video"][:n], before[-n:])
        assert not settings["mask"][:n].any() and settings["mask"][n:-1].all()
        assert np.array_equal(video[done : done + length - n], before[:-n])
        before, done = long_video.fade(before, frames, n), done + length - n
    assert np.array_equal(video[done:], before)
    (middle, _), (last, _) = later
    assert middle["mask"][-1].all() and not last["mask"][-1].any()
    assert (last["video"][-1] == 20).all()
    assert len({settings["seed"] for settings, _ in requests}) == 3


def test_long_videos_go_on_from_the_segments_beside_them(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (24, 48)).save(tmp_path / "tall.png")  # decides the size of all segments
    flags = ["--num-steps", "1", "--num-frames", "25", "--end-image", str(tmp_path / "tall.png")]
    command = ["a cat", "a dog", *flags, "--model", str(GOLDENS / "fun-2b-inp"), "--out"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert sample.main([*command, str(whole), "--seed", "1"]) == 0
    assert sorted(path.name for path in whole.iterdir()) == ["0001.json", "0001.mp4", "0002.json", "0002.mp4"]
    assert "25 frames in" in capsys.readouterr().out
    record = json.loads((whole / "0001.json").read_text())
    assert (record["height"], record["width"]) == (48, 32) == read_video(whole / "0001.mp4").shape[1:3]
    plain, calls = sample.generate, []

    def stops_at_the_fifth(*args, **settings):
        calls.append(settings["seed"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(*args, **settings)

    monkeypatch.setattr(sample, "generate", stops_at_the_fifth)
    assert sample.main([*command, str(again), "--seed", "1"]) == 2
    capsys.readouterr()
    assert sample.main([*command, str(again), "--seed", "1", "--guidance-scale", "3"]) == 2
    assert "segment-1.safetensors was made with guidance_scale=6.0, not 3.0" in capsys.readouterr().err
    assert sample.main([*command, str(again)]) == 0  # without a seed: with that of the segments
    assert calls == [1, 2, 3, 1, 2, 2, 3]
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("0001.mp4", "0002.mp4"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    (again / "0003-segment-1.safetensors").touch()
    (again / "0004.mp4").touch()  # of another run, which came between
    assert [path.stem for path in long_video.paths_for(again, 2, ".mp4")] == ["0003", "0005"]


def test_a_segment_fades_in_over_the_frames_it_shares():
    before, after = (np.full((6, 2, 2, 3), level, np.uint8) for level in (100, 0))
    assert long_video.fade(before, after, 5)[:, 0, 0, 0].tolist() == [83, 67, 50, 33, 17, 0]


def test_a_sampler_that_is_given_stands_in_for_a_scheduler_we_do_not_have():
    models = sample.load_models(GOLDENS / "cogvideox-2b-t2v")
    models.schedule.config.extra["_class_name"] = "PNDMScheduler"
    assert sample.complete(sample.Request("a", sampler="ddim"), models).sampler == "ddim"
