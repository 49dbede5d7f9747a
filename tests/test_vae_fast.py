"""vae_fast.py against vae.py and the goldens: the rewritings change nothing but rounding."""

import copy

import pytest
import torch
from conftest import GOLDENS, VARIANTS, assert_close
from test_vae import FP32, assert_equals_the_reference, flat_clips

from vae import VAEConfig, VideoVAE
from vae_fast import speed_up


def fast(plain: VideoVAE) -> VideoVAE:
    model = copy.deepcopy(plain)
    speed_up(model)
    return model


@pytest.fixture(scope="module")
def wide() -> VideoVAE:
    """Of 64 channels, from which on frames are convolved in pairs where they have 256 pixels."""
    torch.manual_seed(0)
    sizes = {"layers_per_block": 1, "sample_height": 64, "sample_width": 64}
    return VideoVAE(VAEConfig(block_out_channels=[64] * 4, **sizes)).requires_grad_(False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sped_up_vae_equals_the_reference(variant):
    assert_equals_the_reference(fast(VideoVAE.from_pretrained(GOLDENS / variant)), variant)


def test_a_wide_one_equals_the_plain_one_and_is_saved_as_it_was_loaded(wide, tmp_path):
    pixels = torch.rand(2, 3, 17, 16, 16) * 2 - 1
    latents = torch.randn(2, 16, 4, 2, 2)
    model = fast(wide)
    assert_close(torch.cat(model.moments(pixels)), torch.cat(wide.moments(pixels)), FP32)
    for first_alone in (True, False):
        theirs = wide.decode(latents, first_alone=first_alone)
        streamed = list(model.decode_stream(latents, first_alone=first_alone))
        assert_close(torch.cat(streamed, dim=2), theirs, FP32)
    model.save_pretrained(tmp_path)
    again = VideoVAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in wide.state_dict().items())


def test_tiles_of_it_equal_those_of_the_plain_one(wide):
    pixels, latents = torch.rand(1, 3, 5, 16, 48) * 2 - 1, torch.randn(1, 16, 2, 2, 6)
    ours, theirs = (torch.cat(model.moments(pixels, tiled=True)) for model in (fast(wide), wide))
    assert_close(ours, theirs, FP32)
    assert_close(fast(wide).decode(latents, tiled=True), wide.decode(latents, tiled=True), FP32)


def test_flat_pictures_keep_their_digits_also_in_pairs(wide):
    """3e-5 against float64, as of vae.py: careless sums of equal fp32 numbers would give 1e-3 or worse."""
    narrow = VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp").requires_grad_(False)
    pixels = flat_clips()
    for plain, shown in ((narrow, pixels), (wide, pixels[..., :16, :16])):
        theirs = torch.cat(copy.deepcopy(plain).double().moments(shown))
        assert_close(torch.cat(fast(plain).moments(shown)), theirs, 3e-5)


def test_bf16_is_as_close_to_fp32_as_in_the_plain_one(wide):
    """1.3 times the plain one's mean error: pairs add frames in bf16 before they are convolved."""
    pixels = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    exact = wide.moments(pixels)[0], wide.decode(wide.encode(pixels))
    errors = []
    for model in (copy.deepcopy(wide).bfloat16(), fast(wide).bfloat16()):
        ours = model.moments(pixels)[0], model.decode(model.encode(pixels))
        assert ours[0].dtype == ours[1].dtype == torch.bfloat16
        errors.append([(a.float() - b).abs().mean().item() for a, b in zip(ours, exact)])
    (plain_encode, plain_decode), (fast_encode, fast_decode) = errors
    assert fast_encode < 1.3 * plain_encode and fast_decode < 1.3 * plain_decode, errors


def test_a_sped_up_vae_refuses_gradients(wide):
    model, latents = fast(wide), torch.randn(1, 16, 1, 2, 2)
    with pytest.raises(RuntimeError, match="load it anew"):
        model.decode(latents.requires_grad_())
    with pytest.raises(RuntimeError, match="load it anew"):
        model.requires_grad_().moments(torch.zeros(1, 3, 1, 16, 16))
