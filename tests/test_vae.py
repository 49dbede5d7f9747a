"""vae.py against the reference: moments, decodes in both chunkings, tiles, gradients, inpaint condition."""

import json

import pytest
import torch
from conftest import GOLDENS, VARIANTS, assert_close, expected
from torch import nn

from inpaint import inpaint_condition, resize_mask
from vae import (
    CausalConv3d,
    Downsample,
    Upsample,
    VAEConfig,
    VideoVAE,
    decode_chunks,
    encode_chunks,
    group_statistics,
)

FP32 = 2e-5  # outputs are of order 1 and pass some 60 layers; we measured at most 2.3e-6


def tiny(**changes) -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(
        VAEConfig(block_out_channels=[8, 8, 8, 16], layers_per_block=1, norm_num_groups=4, **changes)
    )


def pixels_of(video_u8):
    return video_u8.float() / 255 * 2 - 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
def test_moments_and_decodes_equal_the_reference(variant, grad):
    want, vae = expected(variant), VideoVAE.from_pretrained(GOLDENS / variant)
    pixels, scale = pixels_of(want["vae.video_u8"]), vae.config.scaling_factor
    compared = 0
    with torch.set_grad_enabled(grad):  # recording gradients takes the other branch of norm_silu
        for name, theirs in want.items():
            kind, _, count = name.rpartition(".")
            if kind == "vae.encode":
                ours = torch.cat(vae.moments(pixels[:, :, : int(count[1:])]), dim=1)
            elif kind == "vae.decode":
                latents = want["vae.z"][:, :, : int(count[1:])] * scale
                ours = vae.decode(latents, first_alone=variant.startswith("fun"))
            elif kind == "vae.decode_autosplit":
                ours = vae.decode(want["vae.z"][:, :, : int(count[1:])] * scale, first_alone=False)
            else:
                continue
            assert_close(ours, theirs, FP32)
            compared += 1
    assert compared >= 2


def test_a_batch_gives_each_sample_its_own_result():
    want, vae = expected("fun-2b-inp"), VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp")
    pixels = pixels_of(want["vae.video_u8"])
    pair = torch.cat([pixels[:, :, 0:5], -pixels[:, :, 1:6]])
    assert_close(torch.cat(vae.moments(pair), dim=1), want["vae.slicing.encode"], FP32)
    latents = torch.cat([want["vae.z"][:, :, 0:1], want["vae.z"][:, :, 1:2]]) * vae.config.scaling_factor
    assert_close(vae.decode(latents), want["vae.slicing.decode"], FP32)


def test_tiles_equal_the_reference():
    want, vae = expected("fun-2b-inp"), VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp")
    moments = torch.cat(vae.moments(pixels_of(want["vae.tiling.video_u8"]), tiled=True), dim=1)
    assert_close(moments, want["vae.tiling.encode"], FP32)
    latents = want["vae.tiling.z"] * vae.config.scaling_factor
    assert_close(vae.decode(latents, tiled=True), want["vae.tiling.decode"], FP32)
    streamed = torch.cat(list(vae.decode_stream(latents, tiled=True)), dim=2)
    assert_close(streamed, want["vae.tiling.decode"], FP32)


@pytest.mark.parametrize("first_alone", [True, False])
def test_decode_stream_yields_the_chunks_of_decode_in_order(first_alone):
    vae, latents = tiny(), torch.randn(2, 16, 5, 2, 4)
    chunks = list(vae.decode_stream(latents, first_alone=first_alone))
    assert [c.shape[2] for c in chunks] == ([1, 8, 8] if first_alone else [9, 8])
    assert not any(c.requires_grad for c in chunks)  # else its graph would keep every chunk alive
    with torch.no_grad():
        whole = vae.decode(latents, first_alone=first_alone)
    assert_close(torch.cat(chunks, dim=2), whole, 1e-6)


def test_chunk_rules():
    assert [encode_chunks(f) for f in (1, 5, 8, 13, 16, 17, 49)] == [
        [1],
        [5],
        [8],
        [13],
        [8, 8],
        [9, 8],
        [9] + [8] * 5,
    ]
    assert [decode_chunks(f, True) for f in (1, 2, 3, 4, 5)] == [[1], [1, 1], [1, 2], [1, 2, 1], [1, 2, 2]]
    assert [decode_chunks(f, False) for f in (1, 2, 3, 4, 5)] == [[1], [2], [3], [2, 2], [3, 2]]


def test_gradients_reach_every_parameter_and_equal_diffusers():
    """1e-3 of each tensor's largest value, the project's tolerance; measured below 1e-5."""
    diffusers = pytest.importorskip("diffusers")
    folder = GOLDENS / "fun-2b-inp"
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    ours = VideoVAE.from_pretrained(folder)
    pixels = torch.rand(1, 3, 17, 16, 24) * 2 - 1
    mean = theirs.encode(pixels).latent_dist.mean
    (theirs.decode(mean).sample - pixels).square().mean().backward()
    mean, _ = ours.moments(pixels)
    latents = mean * ours.config.scaling_factor
    (ours.decode(latents, first_alone=False) - pixels).square().mean().backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, reference[name].grad, 1e-3 * reference[name].grad.abs().max().item())


def test_what_we_save_gives_the_same_in_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = tiny(scaling_factor=0.9)
    ours.save_pretrained(tmp_path)
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path, subfolder="vae")
    pixels = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    moments = theirs.encode(pixels).latent_dist.parameters
    assert_close(torch.cat(ours.moments(pixels), dim=1), moments, FP32)
    decoded = theirs.decode(moments[:, :16]).sample
    assert_close(ours.decode(moments[:, :16] * 0.9, first_alone=False), decoded, FP32)


def test_saving_keeps_unknown_config_keys_and_weights(tmp_path):
    vae = VideoVAE.from_pretrained(GOLDENS / "fun-5b-inp")
    vae.save_pretrained(tmp_path)
    before = json.loads((GOLDENS / "fun-5b-inp/vae/config.json").read_text())
    after = json.loads((tmp_path / "vae/config.json").read_text())
    assert after == before
    again = VideoVAE.from_pretrained(tmp_path / "vae")  # the component's own folder works too
    for (name, a), (_, b) in zip(vae.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


def test_encode_scales_the_mode_or_a_sample():
    vae, pixels = tiny(scaling_factor=0.7), torch.rand(1, 3, 5, 16, 16) * 2 - 1
    mean, logvar = vae.moments(pixels)
    assert_close(vae.encode(pixels), mean * 0.7, 1e-6)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    sample = (mean + (logvar.clamp(-30, 20) / 2).exp() * noise) * 0.7
    assert_close(vae.encode(pixels, generator=torch.Generator().manual_seed(3)), sample, 1e-6)
    assert (sample - mean * 0.7).abs().max() > 1e-3


def test_log_variances_are_clamped_only_for_the_standard_deviation():
    vae = tiny(scaling_factor=1.0)
    mean, noise = torch.zeros(1, 16, 1, 1, 1), torch.ones(1, 16, 1, 1, 1)
    assert_close(vae.posterior(mean, mean + 100, noise), mean + torch.tensor(10.0).exp(), 0.1)
    assert_close(vae.posterior(mean, mean - 100, noise), mean + torch.tensor(-15.0).exp(), 1e-12)


def test_frames_convolved_in_pairs_equal_frames_convolved_alone():
    torch.manual_seed(0)
    layer, x = CausalConv3d(64, 8), torch.randn(2, 64, 6, 32, 40)
    with torch.no_grad():
        assert_close(layer.convolve(x), layer.conv(x), 1e-5)
        assert_close(layer.convolve_pairs(x[..., :4, :5]), layer.conv(x[..., :4, :5]), 1e-5)


def test_the_upsampler_equals_nearest_then_convolution():
    up = Upsample(6, time=True)
    x = torch.randn(2, 6, 3, 5, 4)
    big = nn.functional.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0)
    plain = up.conv(big).unflatten(0, (2, 3)).transpose(1, 2)
    assert_close(up(x, is_start=True), plain[:, :, [0, 1, 1, 2, 2]], 1e-5)
    assert_close(up(x, is_start=False), plain[:, :, [0, 0, 1, 1, 2, 2]], 1e-5)


def test_the_downsampler_averages_pairs_after_an_odd_first_frame():
    down, x = Downsample(4, time=True), torch.randn(1, 4, 5, 4, 4)
    still = Downsample(4, time=False)
    still.conv = down.conv
    pooled = torch.stack([x[:, :, 0], (x[:, :, 1] + x[:, :, 2]) / 2, (x[:, :, 3] + x[:, :, 4]) / 2], dim=2)
    assert_close(down(x), still(pooled), 1e-6)
    assert_close(down(x[:, :, 1:]), still(pooled[:, :, 1:]), 1e-6)


def test_the_future_never_changes_the_past():
    vae, latents = tiny(), torch.randn(1, 16, 5, 2, 2)
    changed = latents.clone()
    changed[:, :, 3:] += 1
    # Latents 3 and 4 are the last chunk (1 + 2 + 2), so the first 9 frames cannot know of them.
    assert torch.equal(vae.decode(latents)[:, :, :9], vae.decode(changed)[:, :, :9])
    assert not torch.equal(vae.decode(latents)[:, :, 9:], vae.decode(changed)[:, :, 9:])


def test_group_statistics_survive_a_large_mean_and_uneven_parts():
    """1e-3: the kernel forms E[x²] − E[x]² from fp32 sums of 2¹⁴ pixels."""
    x = torch.randn(2, 8, 9, 40, 50) + 3  # 18000 pixels: one full part and a shorter one
    x[:, :, 1:3] += 2  # so that the parts' means differ
    for exact, ours in ((x, x), (x.bfloat16().float(), x.bfloat16())):
        mean, variance = group_statistics(ours, 4)
        exact = exact.double().unflatten(1, (4, 2)).flatten(2)
        assert_close(mean, exact.mean(2), 1e-3)
        assert_close(variance, exact.var(2, correction=0), 1e-3)


def test_bf16_stays_within_rounding_of_fp32():
    vae, pixels = tiny(), torch.rand(1, 3, 9, 16, 16) * 2 - 1
    exact = vae.decode(vae.encode(pixels))
    rough = vae.to(torch.bfloat16)
    rough._to_channels_last()
    ours = rough.decode(rough.encode(pixels))
    assert ours.dtype == torch.bfloat16
    assert_close(ours.float(), exact, 0.1 * exact.abs().max().item())  # 60 layers of 3 significant digits


# ---------------------------------------------------------------- the inpaint condition


def test_a_known_start_frame_reads_one_and_a_lone_end_frame_zero():
    known = torch.zeros(1, 1, 9, 16, 16)
    known[:, :, 0] = 1
    known[:, :, -1] = 1
    resized = resize_mask(known, (3, 2, 2))
    assert resized[0, 0, :, 0, 0].tolist() == [1, 0, 0]
    assert resize_mask(torch.ones(1, 1, 1, 16, 16), (1, 2, 2)).shape == (1, 1, 1, 2, 2)


def test_start_and_end_masks_resize_as_in_the_reference():
    want = expected("fun-2b-inp")
    known = (want["pre.start_end.mask_t"] == 0).float()[None, None, :, None, None].expand(1, 1, 9, 64, 32)
    assert_close(resize_mask(known, (3, 8, 4)), want["pre.start_end.resized_mask"], 1e-6)


@pytest.mark.parametrize("variant", ["fun-2b-inp", "fun-5b-inp", "fun-1.5-5b-inp"])
def test_training_conditions_equal_the_reference(variant, monkeypatch):
    """pixels, masks, the 90 % rule and every posterior draw as recorded from the reference's train.py."""
    want, vae = expected(variant), VideoVAE.from_pretrained(GOLDENS / variant)
    pixels = pixels_of(want["train.pixels_u8"]).transpose(1, 2)
    mask = want["train.mask_u8"].float().transpose(1, 2)
    draws = iter([want["train.eps_latents"], want["train.eps_masked"]])
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: next(draws))
    latents = vae.encode(pixels, generator=torch.Generator())
    assert_close(latents.transpose(1, 2), want["train.latents"], 1e-5)
    if "train.ref_noise" in want:  # the caller's part: noise on the reference, not on black
        noise = 0.0563 * want["train.ref_noise"].transpose(1, 2)
        pixels = torch.where(pixels == -1, pixels, pixels + noise)
    condition = inpaint_condition(vae, pixels, mask, torch.Generator(), want["train.t2v_flag"] == 0)
    assert_close(condition.transpose(1, 2), want["train.inpaint_latents"], 1e-5)


def test_the_condition_of_a_start_picture_is_precise_on_flat_black_frames():
    """3e-5: all frames but the first are exactly -1, where careless fp32 sums would cost 1e-4."""
    want, vae = expected("fun-2b-inp"), VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp")
    pixels = pixels_of(want["pre.start.video_u8"])
    mask = (want["pre.start.mask_t"] > 0).float()[None, None, :, None, None].expand(1, 1, 13, 32, 48)
    assert_close(inpaint_condition(vae, pixels, mask), want["pipe.i2v.extra"][:1].transpose(1, 2), 3e-5)


def test_an_all_masked_sample_is_zeroed_only_when_told_so():
    vae, pixels = tiny(), torch.rand(3, 3, 5, 16, 16)
    mask = torch.ones(3, 1, 5, 16, 16)
    mask[2, :, 0] = 0
    condition = inpaint_condition(vae, pixels, mask, zero_if_all_masked=torch.tensor([True, False, True]))
    assert condition.shape == (3, 17, 2, 2, 2)
    assert (condition[0] == 0).all() and (condition[1, 0] == 0).all() and condition[1, 1:].abs().max() > 0
    scale = vae.config.scaling_factor
    assert condition[2, 0, 0, 0, 0] == scale and (condition[2, 0, 1] == 0).all()  # the mask is scaled too
    blacked = torch.cat([pixels[2:, :, :1], -torch.ones(1, 3, 4, 16, 16)], dim=2)
    assert_close(condition[2:, 1:], vae.encode(blacked), 1e-5)
    assert (inpaint_condition(vae, pixels[:2], mask[:2]) == 0).all()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"act_fn": "gelu"}, "silu"),
        ({"temporal_compression_ratio": 8}, "must be 4"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
    ],
)
def test_a_config_we_cannot_honour_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**changes)


def test_shapes_that_cannot_work_are_named():
    vae = tiny()
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.moments(torch.zeros(1, 3, 5, 20, 16))
    with pytest.raises(ValueError, match="latents of shape"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="does not fit"):
        inpaint_condition(vae, torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 1, 1, 16, 16))
