"""vae_fast.py against vae.py and the goldens: the rewritings change nothing but rounding."""

import copy

import pytest
import torch
from conftest import GOLDENS, VARIANTS, assert_close, expected
from test_vae import FP32, flat_clips, pixels_of

import vae
from vae import VAEConfig, VideoVAE
from vae_fast import CausalConv3d, Upsample, speed_up


def fast(plain: VideoVAE) -> VideoVAE:
    model = copy.deepcopy(plain)
    speed_up(model)
    return model


@pytest.fixture(scope="module")
def wide() -> VideoVAE:
    """Of 64 channels, from which on frames are convolved in pairs where they have 256 pixels."""
    torch.manual_seed(0)
    model = VideoVAE(
        VAEConfig(block_out_channels=[64] * 4, layers_per_block=1, sample_height=64, sample_width=64)
    )
    return model.requires_grad_(False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sped_up_vae_equals_the_reference(variant):
    want, model = expected(variant), fast(VideoVAE.from_pretrained(GOLDENS / variant))
    pixels, latents = pixels_of(want["vae.video_u8"]), want["vae.z"] * model.config.scaling_factor
    compared = 0
    for name, theirs in want.items():
        kind, _, count = name.rpartition(".")
        if kind == "vae.encode":
            ours = torch.cat(model.moments(pixels[:, :, : int(count[1:])]), dim=1)
        elif kind in ("vae.decode", "vae.decode_autosplit"):
            first_alone = variant.startswith("fun") and kind == "vae.decode"
            ours = model.decode(latents[:, :, : int(count[1:])], first_alone=first_alone)
        else:
            continue
        assert_close(ours, theirs, FP32)
        compared += 1
    assert compared >= 2


def test_a_wide_one_equals_the_plain_one(wide):
    pixels = torch.rand(2, 3, 17, 32, 32) * 2 - 1
    latents = torch.randn(2, 16, 4, 4, 4)
    assert_close(torch.cat(fast(wide).moments(pixels)), torch.cat(wide.moments(pixels)), FP32)
    for first_alone in (True, False):
        theirs = wide.decode(latents, first_alone=first_alone)
        assert_close(fast(wide).decode(latents, first_alone=first_alone), theirs, FP32)
        streamed = list(fast(wide).decode_stream(latents, first_alone=first_alone))
        assert_close(torch.cat(streamed, dim=2), theirs, FP32)


def test_tiles_of_it_equal_those_of_the_plain_one(wide):
    pixels, latents = torch.rand(1, 3, 5, 40, 48) * 2 - 1, torch.randn(1, 16, 2, 5, 6)
    ours, theirs = (torch.cat(vae.moments(pixels, tiled=True)) for vae in (fast(wide), wide))
    assert_close(ours, theirs, FP32)
    assert_close(fast(wide).decode(latents, tiled=True), wide.decode(latents, tiled=True), FP32)


@pytest.mark.parametrize("name", flat_clips())
def test_flat_pictures_keep_their_digits_as_in_the_plain_one(name):
    """3e-5 against float64, as of vae.py: careless sums of equal fp32 numbers would give 1e-3 or worse."""
    pixels = flat_clips()[name]
    model = fast(VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp"))
    exact = VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp", dtype=torch.float64)
    with torch.no_grad():
        theirs = torch.cat(exact.moments(pixels))
    assert_close(torch.cat(model.moments(pixels)), theirs, 3e-5)


def test_flat_pictures_keep_their_digits_in_pairs(wide):
    for pixels in flat_clips().values():
        pixels = pixels[:, :, :9, :32, :32]
        theirs = torch.cat(copy.deepcopy(wide).double().moments(pixels))
        assert_close(torch.cat(fast(wide).moments(pixels)), theirs, 3e-5)


def test_bf16_is_as_close_to_fp32_as_in_the_plain_one(wide):
    """1.3 times the plain one's mean error: pairs add frames in bf16 before they are convolved."""
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    exact = wide.moments(pixels)[0], wide.decode(wide.encode(pixels))
    errors = []
    for model in (copy.deepcopy(wide).bfloat16(), fast(wide).bfloat16()):
        ours = model.moments(pixels)[0], model.decode(model.encode(pixels))
        assert ours[0].dtype == ours[1].dtype == torch.bfloat16
        errors.append([(a.float() - b).abs().mean().item() for a, b in zip(ours, exact)])
    (plain_encode, plain_decode), (fast_encode, fast_decode) = errors
    assert fast_encode < 1.3 * plain_encode and fast_decode < 1.3 * plain_decode, errors


def test_frames_convolved_in_pairs_equal_frames_convolved_alone():
    layer = CausalConv3d(64, 8).requires_grad_(False)
    for frames in (torch.randn(2, 64, 6, 32, 40), torch.randn(1, 64, 14, 16, 16)):
        assert_close(layer.convolve(frames, is_start=False), layer.conv(frames), 1e-5)


def test_the_start_of_a_video_equals_three_frames_that_are_the_same():
    layer, frames = CausalConv3d(6, 8).requires_grad_(False), torch.randn(2, 6, 5, 7, 4)
    for num_frames in (1, 5):
        frames_behind_past = torch.cat([frames[:, :, :1]] * 2 + [frames[:, :, :num_frames]], dim=2)
        assert_close(layer.convolve(frames_behind_past, is_start=True), layer.conv(frames_behind_past), 1e-5)


def test_one_transposed_convolution_equals_nearest_and_a_convolution():
    layer, frames = Upsample(6, time=True), torch.randn(2, 6, 3, 5, 4)
    assert_close(layer.enlarge(frames), vae.Upsample.enlarge(layer, frames), 1e-5)


def test_a_sped_up_vae_refuses_gradients_in_one_sentence(wide):
    model, latents = fast(wide), torch.randn(1, 16, 1, 2, 2)
    assert not model.decode(latents).requires_grad
    with pytest.raises(RuntimeError, match="load it anew"):
        model.decode(latents.requires_grad_())
    with pytest.raises(RuntimeError, match="load it anew"):
        model.requires_grad_().moments(torch.zeros(1, 3, 1, 16, 16))


def test_a_sped_up_vae_is_saved_as_it_was_loaded(wide, tmp_path):
    fast(wide).save_pretrained(tmp_path)
    again = VideoVAE.from_pretrained(tmp_path)
    assert type(again.encoder) is vae.Encoder
    for (name, a), (_, b) in zip(wide.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
