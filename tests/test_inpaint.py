"""inpaint.py: masks in the reference's shares and sizes, and the 17 channels it hands an inpaint model."""

from collections import Counter

import pytest
import torch
from conftest import GOLDENS, assert_close, expected
from test_vae import pixels_of, tiny

import inpaint
from inpaint import encode_masked, inpaint_condition, join_condition, resize_mask
from runtime import generator
from vae import VideoVAE, encode_chunks, run_chunks


def test_masks_come_in_their_shares(monkeypatch):
    kinds = Counter()
    whole = torch.ones(1, 1, 1, dtype=torch.bool)
    monkeypatch.setattr(inpaint, "_mask_of_kind", lambda kind, *_: kinds.update([kind]) or whole)
    for num_frames, shares in ((17, inpaint.MASK_KINDS), (1, {"box": 0.2, "everything": 0.8})):
        kinds.clear()
        for i in range(2000):
            inpaint.random_mask(generator(0, 0, i, "mask"), num_frames, 8, 8)
        assert kinds.keys() == shares.keys()
        for kind, share in shares.items():  # to five standard deviations
            assert abs(kinds[kind] - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5, kind


def of_kind(kind: str, num: int, f: int, h: int, w: int) -> torch.Tensor:
    masks = (inpaint._mask_of_kind(kind, generator(1, 0, i, kind), f, h, w) for i in range(num))
    return torch.stack([mask.expand(f, h, w) for mask in masks])  # num f h w


def test_masks_keep_one_to_four_frames_at_the_start_or_at_both_ends():
    def drawn(kind: str, f: int) -> set[tuple[int, ...]]:
        return {tuple(mask) for mask in of_kind(kind, 200, f, 2, 2)[..., 0, 0].int().tolist()}

    assert drawn("after the start", 9) == {(0,) * k + (1,) * (9 - k) for k in (1, 2, 3, 4)}
    both_ends = {(0,) * k + (1,) * (9 - 2 * k) + (0,) * k for k in (1, 2, 3, 4)}
    assert drawn("between start and end", 9) == both_ends
    for f in (2, 5, 8):  # too short for more than one
        assert drawn("after the start", f) == {(0,) + (1,) * (f - 1)}
        assert drawn("between start and end", f) == {(0,) + (1,) * (f - 2) + (0,) if f > 2 else (1, 1)}


def off_border(mask: torch.Tensor) -> torch.Tensor:
    """Those of num h w masks that no border cuts."""
    return mask[~(mask[:, [0, -1]].flatten(1).any(1) | mask[:, :, [0, -1]].flatten(1).any(1))]


def extents(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heights and widths of num h w masks."""
    return mask.any(2).sum(1), mask.any(1).sum(1)


def test_boxes_have_the_sizes_of_the_reference_and_lie_anywhere():
    h, w = 64, 96
    box = of_kind("box", 1000, 1, h, w)[:, 0]
    heights, widths = extents(box)
    assert heights.max() == 3 * h // 4 and widths.max() == 3 * w // 4  # nothing larger, and it is reached
    assert off_border(box).any(2).sum(1).min() == h // 4 and off_border(box).any(1).sum(1).min() == w // 4
    assert box[:, 0].any() and box[:, -1].any()  # a box near the border is cut
    for rows in (box.any(2), box.any(1)):  # around its centre: no side is preferred
        assert abs(rows[:, : rows.shape[1] // 2].sum() / rows.sum() - 0.5) < 0.03


def test_discs_have_the_sizes_of_the_reference_and_lie_anywhere():
    h, w = 64, 96
    circle, ellipse = (of_kind(kind, 600, 1, h, w)[:, 0] for kind in ("circle", "ellipse"))
    for disc in (circle, ellipse):
        assert disc.any(0)[[0, 0, -1, -1], [0, -1, 0, -1]].all()  # all four corners were reached
        for extent in extents(off_border(disc)):
            assert extent.min() == 2 * (h // 8) + 1 and extent.max() == 2 * (h // 4) + 1
    heights, widths = extents(off_border(circle))
    assert torch.equal(heights, widths)
    heights, widths = extents(off_border(ellipse))
    assert (heights > widths + 8).any() and (heights < widths - 8).any()
    fill = off_border(ellipse).flatten(1).sum(1) / ((heights - 1) * (widths - 1))
    assert ((fill - torch.pi / 4).abs() < 0.04).all()  # pixels of a disc in its bounding box


def test_masks_of_a_span_a_few_frames_and_single_pixels_are_as_described():
    f, h, w = 16, 32, 32
    span = of_kind("box for a while", 300, f, h, w).flatten(2).any(2)  # 300 f
    first = span.int().argmax(1)
    last = f - 1 - span.int().flip(1).argmax(1)
    assert first.max() == 7 and first.min() == 0 and last.min() >= 7 and last.max() == f - 2
    assert (span.sum(1) == last - first + 1).all()
    boxes = of_kind("boxes here and there", 300, f, h, w)
    frames = boxes.flatten(2).any(2).sum(1)
    assert frames.min() == 1 and frames.max() == f // 2
    for extent, side in ((boxes.any(3).sum(2), h), (boxes.any(2).sum(2), w)):
        assert extent.max() == side // 4 and extent[extent > 0].min() == 1
    pixels = of_kind("pixels", 4, f, h, w).float()
    assert abs(pixels.mean() - 0.5) < 5 * 0.5 / (4 * f * h * w) ** 0.5
    assert abs((pixels[:, 1:] * pixels[:, :-1]).mean() - 0.25) < 0.01  # neighbours in time know nothing
    assert abs((pixels[..., 1:] * pixels[..., :-1]).mean() - 0.25) < 0.01
    whole = of_kind("frames", 300, f, 2, 2)
    assert abs(whole.float().mean() - 0.5) < 5 * 0.5 / (300 * f) ** 0.5
    assert (whole == whole[..., :1, :1]).all()


def test_noise_on_the_reference_is_log_normal_and_spares_what_is_masked():
    logs = torch.tensor([inpaint.draw_noise_sigma(generator(0, 0, i, "sigma")) for i in range(2000)]).log()
    assert abs(logs.mean() + 3) < 5 * 0.5 / 2000**0.5 and abs(logs.std() - 0.5) < 5 * 0.5 / 4000**0.5
    pixels = torch.tensor([-1.0, -0.999, 0.0, 1.0])
    noisy = inpaint.add_reference_noise(pixels, 0.1, torch.tensor([1.0, 2.0, -3.0, 4.0]))
    assert torch.equal(noisy, torch.tensor([-1.0, -0.999 + 0.1 * 2, 0.1 * -3, 1 + 0.1 * 4]))


def test_start_and_end_masks_resize_as_in_the_reference():
    want = expected("fun-2b-inp")
    known = (want["pre.start_end.mask_t"] == 0).float()[None, None, :, None, None].expand(1, 1, 9, 64, 32)
    assert_close(resize_mask(known, (3, 8, 4)), want["pre.start_end.resized_mask"], 1e-6)


def moments_as_recorded(vae, pixels):
    """On channels-last memory, as the reference's loader handed pixels over.

    Torch's group norm then loses digits where a picture is flat, here 2e-4 against float64. `moments` does
    not, see `test_flat_pictures_keep_their_digits`.
    """
    pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
    moments = torch.cat(list(run_chunks(vae.encoder, pixels, encode_chunks(pixels.shape[2]))), dim=2)
    return moments.chunk(2, dim=1)


def training_case(variant):
    """Of the reference's train.py: its tensors, our VAE, clips, the same as shown (with noise), and masks."""
    want, vae = expected(variant), VideoVAE.from_pretrained(GOLDENS / variant)
    pixels = pixels_of(want["train.pixels_u8"]).transpose(1, 2)
    shown = pixels
    if "train.ref_noise" in want:  # the caller's part: noise on the reference, not on black
        noise = 0.0563 * want["train.ref_noise"].transpose(1, 2)
        shown = torch.where(pixels == -1, pixels, pixels + noise)
    return want, vae, pixels, shown, want["train.mask_u8"].float().transpose(1, 2)


@pytest.mark.parametrize("variant", ["fun-2b-inp", "fun-5b-inp", "fun-1.5-5b-inp"])
def test_training_conditions_equal_the_reference(variant, monkeypatch):
    """pixels, masks, the 90 % rule and every posterior draw as recorded from the reference's train.py."""
    want, vae, pixels, shown, mask = training_case(variant)
    draws = [want["train.eps_latents"], want["train.eps_masked"], want["train.eps_masked"]]
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: draws.pop(0))
    zeroed = want["train.t2v_flag"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(vae, "moments", lambda pixels, tiled=False: moments_as_recorded(vae, pixels))
        latents = vae.encode(pixels, generator=torch.Generator())
        condition = inpaint_condition(vae, shown, mask, torch.Generator(), zeroed)
    assert_close(latents.transpose(1, 2), want["train.latents"], 1e-5)
    assert_close(condition.transpose(1, 2), want["train.inpaint_latents"], 1e-5)
    condition = inpaint_condition(vae, shown, mask, torch.Generator(), zeroed)
    assert_close(condition.transpose(1, 2), want["train.inpaint_latents"], 3e-4)  # theirs are 2e-4 off


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


def test_what_is_kept_of_the_encoder_gives_the_same_condition_without_it():
    """`encode_masked`, and later `join_condition`, are `inpaint_condition` with its draw."""
    vae, pixels = tiny(), torch.rand(2, 3, 5, 16, 16) * 2 - 1
    mask = torch.zeros(2, 1, 5, 16, 16)
    mask[0, :, 1:] = 1
    shown = encode_masked(vae, pixels, mask)
    assert shown["masked"].shape == (2, 32, 2, 2, 2) and shown["known"].shape == (2, 1, 2, 2, 2)
    noise = torch.randn(2, 16, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    drawn = join_condition(**shown, noise=noise, config=vae.config)
    seeded = torch.Generator().manual_seed(5)
    assert torch.equal(drawn, inpaint_condition(vae, pixels, mask, seeded))
    mode = join_condition(**shown, noise=None, config=vae.config)
    assert torch.equal(mode, inpaint_condition(vae, pixels, mask))
    assert not torch.equal(mode, drawn) and torch.equal(mode[:, :1], drawn[:, :1])  # the mask has no noise
