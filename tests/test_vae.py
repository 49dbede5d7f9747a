"""vae.py against the reference: moments, decodes in both chunkings, tiles, gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, VARIANTS, assert_close, expected

from vae import VAEConfig, VideoVAE, run_tiles

FP32 = 2e-5  # outputs are of order 1 and pass some 60 layers; we measured at most 2.3e-6


def tiny(**changes) -> VideoVAE:
    torch.manual_seed(0)
    sizes = {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    return VideoVAE(VAEConfig(**sizes, **changes))


def pixels_of(video_u8):
    return video_u8.float() / 255 * 2 - 1


def assert_equals_the_reference(vae: VideoVAE, variant: str) -> None:
    want = expected(variant)
    pixels, latents = pixels_of(want["vae.video_u8"]), want["vae.z"] * vae.config.scaling_factor
    compared = 0
    for name, theirs in want.items():
        kind, _, count = name.rpartition(".")
        if kind == "vae.encode":
            ours = torch.cat(vae.moments(pixels[:, :, : int(count[1:])]), dim=1)
        elif kind in ("vae.decode", "vae.decode_autosplit"):
            first_alone = variant.startswith("fun") and kind == "vae.decode"
            ours = vae.decode(latents[:, :, : int(count[1:])], first_alone=first_alone)
        else:
            continue
        assert_close(ours, theirs, FP32)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_moments_and_decodes_equal_the_reference(variant):
    assert_equals_the_reference(VideoVAE.from_pretrained(GOLDENS / variant), variant)


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


def test_tiles_meet_whatever_the_sample_size():
    vae = VideoVAE.from_pretrained(GOLDENS / "cogvideox-1.5-5b-i2v")  # 48×64
    pixels = torch.rand(1, 3, 1, 96, 104) * 2 - 1
    noise = torch.zeros(1, 16, 1, 12, 13)
    in_tiles, whole = (vae.encode_first_picture(pixels, noise, tiled) for tiled in (True, False))
    assert in_tiles.shape == whole.shape
    assert F.cosine_similarity(in_tiles.flatten(), whole.flatten(), dim=0) > 0.6  # one latent off: 0.2
    assert vae.decode(whole, tiled=True).shape == pixels.shape


def test_tiles_are_worked_through_one_after_the_other():
    """So layers never remember more than one."""
    seen = []

    def network(chunk, cache):
        seen.append((cache.setdefault("left", chunk[0, 0, 0, 0, 0].item()), chunk.shape[2]))
        return chunk.clone()

    x = torch.arange(80.0).expand(1, 1, 3, 40, 80)
    joined = torch.cat(list(run_tiles(network, x, [1, 2], size=(48, 40), out=(48, 40))), dim=2)
    assert seen == [(left, frames) for left in (0, 32, 64) for frames in (1, 2)]
    assert_close(joined, x, 1e-5)


@pytest.mark.parametrize("first_alone", [True, False])
def test_decode_stream_yields_the_chunks_of_decode_in_order(first_alone):
    vae, latents = tiny(), torch.randn(2, 16, 5, 2, 4)
    chunks = list(vae.decode_stream(latents, first_alone=first_alone))
    assert [c.shape[2] for c in chunks] == ([1, 8, 8] if first_alone else [9, 8])
    assert not any(c.requires_grad for c in chunks)  # else its graph would keep every chunk alive
    with torch.no_grad():
        whole = vae.decode(latents, first_alone=first_alone)
    assert_close(torch.cat(chunks, dim=2), whole, 1e-6)


def test_gradients_reach_every_parameter_and_equal_diffusers():
    """1e-3 of each tensor's largest value, the project's tolerance; measured below 1e-5."""
    diffusers = pytest.importorskip("diffusers")
    folder = GOLDENS / "fun-2b-inp"
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    ours = VideoVAE.from_pretrained(folder)
    pixels = torch.rand(1, 3, 17, 16, 16) * 2 - 1
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


@pytest.mark.parametrize("inverted, scale", [(False, 0.7), (True, 1 / 0.7)])
def test_clips_and_start_pictures_are_modes_or_samples_scaled_their_own_way(inverted, scale):
    vae = tiny(scaling_factor=0.7, invert_scale_latents=inverted)
    pixels = torch.rand(2, 3, 1, 16, 24) * 2 - 1
    mean, logvar = vae.moments(pixels)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    sample = mean + (logvar / 2).exp() * noise
    assert_close(vae.encode(pixels), mean * 0.7, 1e-6)
    assert_close(vae.encode(pixels, generator=torch.Generator().manual_seed(3)), sample * 0.7, 1e-6)
    assert_close(vae.encode_first_picture(pixels, noise), sample * scale, 1e-6)
    zero = torch.zeros_like(noise)  # log-variances are clamped to -30 … 20
    assert_close(vae.posterior(zero, zero + 100, zero + 1), 0.7 * (zero + 10).exp(), 0.1)
    assert_close(vae.posterior(zero, zero - 100, zero + 1), 0.7 * (zero - 15).exp(), 1e-12)


def test_the_future_never_changes_the_past():
    vae, latents = tiny(), torch.randn(1, 16, 5, 2, 2)
    changed = latents.clone()
    changed[:, :, 3:] += 1
    # Latents 3 and 4 are the last chunk (1 + 2 + 2), so the first 9 frames cannot know of them.
    assert torch.equal(vae.decode(latents)[:, :, :9], vae.decode(changed)[:, :, :9])
    assert not torch.equal(vae.decode(latents)[:, :, 9:], vae.decode(changed)[:, :, 9:])


def flat_clips() -> torch.Tensor:
    """3 3 9 64 64 without texture, as an inpaint model is mostly shown: black, grey, only the start known."""
    clips = torch.full((3, 3, 9, 64, 64), -1.0)
    clips[1] = 0.5
    clips[2, :, 0] = torch.rand(3, 64, 64) * 2 - 1
    return clips


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@torch.no_grad()
def test_flat_pictures_keep_their_digits(memory_format):
    """3e-5 against float64: torch's own group norm, on channels-last memory, is 4e-4 to 1e-2 away."""
    pixels = flat_clips()
    vae = VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp")
    exact = VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp", dtype=torch.float64)
    theirs = torch.cat(exact.moments(pixels), dim=1)
    for some in (slice(1), slice(3)):  # one alone, and a batch
        ours = vae.moments(pixels[some].contiguous(memory_format=memory_format))
        assert_close(torch.cat(ours, dim=1), theirs[some], 3e-5)


def test_bf16_stays_within_rounding_of_fp32():
    vae, pixels = tiny(), torch.rand(1, 3, 9, 16, 16) * 2 - 1
    exact = vae.decode(vae.encode(pixels))
    rough = vae.to(torch.bfloat16)
    ours = rough.decode(rough.encode(pixels))
    assert ours.dtype == torch.bfloat16
    assert_close(ours.float(), exact, 0.1 * exact.abs().max().item())  # 60 layers of 3 significant digits
