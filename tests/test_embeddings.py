"""Timesteps, patches, positions: against formulas written another way and against the reference's tables."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, VARIANTS, assert_close, expected

from embeddings import (
    crop_region,
    patchify,
    rope_table,
    rotate,
    sincos_table,
    timestep_embedding,
    unpatchify,
)

CPU = torch.device("cpu")


def test_timesteps_become_cosines_then_sines_of_slowing_frequencies():
    ours = timestep_embedding(torch.tensor([0, 7, 999]), 8)
    for row, t in zip(ours, (0, 7, 999)):
        angles = [t / 10000 ** (i / 4) for i in range(4)]
        theirs = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        assert_close(row, theirs, 1e-4)  # float32 angles up to 999: 999 * 6e-8
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("p_t", [1, 2])
def test_unpatchify_undoes_patchify(p_t):
    x = torch.randn(2, 3, 4, 6, 10)
    tokens = patchify(x, p_t, 2)
    assert tokens.shape == (2, 4 // p_t * 3 * 5, 3 * p_t * 4)
    assert torch.equal(unpatchify(tokens, (4 // p_t, 3, 5), p_t, 2), x)


def test_patches_run_frame_row_column_and_inside_channel_frame_row_column():
    x = torch.arange(2 * 2 * 4 * 6).view(1, 2, 2, 4, 6).float()
    tokens = patchify(x, 2, 2)  # 1 frame, 2 rows, 3 columns
    assert torch.equal(tokens[0, 4], x[0, :, :, 2:4, 2:4].flatten())  # row 1, column 1
    assert torch.equal(patchify(x, 1, 2)[0, 6], x[0, :, 1, 0:2, 0:2].flatten())  # frame 1, row 0, column 0


def test_sincos_gives_frame_column_row_their_channels():
    table = sincos_table(16, (2, 3, 4), (3, 4), 5, 2.0, 1.0, CPU)
    assert table.shape == (5 + 24, 16) and not table[:5].any()  # text has no position
    frame, row, col = 1, 2, 3
    expected_row = []
    for place, dim in ((frame, 4), (col / 2, 6), (row / 2, 6)):
        angles = [place / 10000 ** (2 * i / dim) for i in range(dim // 2)]
        expected_row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    place = table[5 + frame * 12 + row * 4 + col]
    assert_close(place, torch.tensor(expected_row), 1e-6)  # float32 of float64


def test_sincos_is_computed_in_float64():
    table = sincos_table(16, (1, 1, 9999), (1, 9999), 0, 1.0, 1.0, CPU)
    theirs = torch.outer(torch.arange(9999.0).double(), 10000 ** -(torch.arange(3).double() / 3)).sin()
    assert_close(table[:, 4:7], theirs, 1e-7)  # float32 angles would be off by 9999 * 6e-8


@pytest.mark.parametrize("rows, cols", [(3, 5), (8, 2), (4, 6), (1, 1), (13, 17)])
def test_stretching_each_axis_is_stretching_the_table_trilinearly(rows, cols):
    native = sincos_table(32, (3, 4, 6), (4, 6), 0, 1.875, 1.0, CPU).view(1, 3, 4, 6, 32).movedim(-1, 1)
    theirs = F.interpolate(native, size=(3, rows, cols), mode="trilinear", align_corners=False)
    ours = sincos_table(32, (3, rows, cols), (4, 6), 0, 1.875, 1.0, CPU)
    assert_close(ours, theirs.movedim(1, -1).reshape(-1, 32), 1e-6)  # float32 rounding of values up to 1


def test_the_crop_region_keeps_the_aspect_ratio_centred_in_the_native_grid():
    assert crop_region(30, 45, (30, 45)) == (0, 30, 0, 45)
    assert crop_region(24, 42, (30, 45)) == (2, 28, 0, 45)  # wider: full width, 45/42*24 = 25.7 rows
    assert crop_region(42, 24, (30, 45)) == (0, 30, 14, 31)  # narrower: full height, 30/42*24 = 17.1 columns
    assert crop_region(40, 25, (30, 45)) == (0, 30, 13, 32)  # 30/40*25 = 18.75 columns round up
    assert crop_region(60, 90, (30, 45)) == (0, 30, 0, 45)  # any resolution covers the same region
    assert crop_region(2, 5, (4, 5)) == (1, 3, 0, 5)
    assert crop_region(1, 5, (4, 5)) == (2, 3, 0, 5)  # offset 1.5 rounds to even
    assert crop_region(2, 1, (5, 5)) == (0, 5, 2, 4)  # width 2.5 rounds to even, so does the offset 1.5


def test_rope_places_divide_the_crop_region_evenly_without_its_end():
    cos, _ = rope_table(16, (3, 5, 1), (4, 4), 0, CPU)  # crop region: rows 0…4, columns 2…3
    cos = cos.view(3, 5, 8)
    assert_close(cos[:, 0, 0], torch.tensor([0.0, 1.0, 2.0]).cos(), 1e-6)  # frames count 0, 1, 2
    assert_close(cos[0, :, 2], torch.tensor([0.0, 0.8, 1.6, 2.4, 3.2]).cos(), 1e-6)
    assert_close(cos[0, :, 5], torch.full((5,), 2.0).cos(), 1e-6)


def test_rope_without_a_native_grid_counts_patches():
    cos, _ = rope_table(16, (1, 2, 4), None, 0, CPU)
    assert_close(cos.view(2, 4, 8)[1, :, 5], torch.arange(4.0).cos(), 1e-6)
    assert_close(cos.view(2, 4, 8)[:, 3, 2], torch.arange(2.0).cos(), 1e-6)


def test_rotating_happens_in_float32_and_returns_the_dtype_it_got():
    x, rope = torch.randn(1, 1, 4, 16).bfloat16(), rope_table(16, (1, 2, 2), None, 0, CPU)
    ours = rotate(x, rope)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, rotate(x.float(), rope).bfloat16())


def test_tables_left_by_a_preview_can_be_used_in_training():
    with torch.inference_mode():
        tables = [
            sincos_table(16, (1, 3, 3), (3, 3), 0, 1.0, 1.0, CPU),
            *rope_table(16, (1, 3, 3), None, 0, CPU),
        ]
    assert not any(table.is_inference() for table in tables)
    assert rope_table(16, (1, 3, 3), None, 0, CPU)[0] is tables[1]  # and they are not built again


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_equal_the_reference(variant):
    config = json.loads((GOLDENS / variant / "transformer/config.json").read_text())
    g, checked = expected(variant), 0
    p, p_t = config["patch_size"], config.get("patch_size_t") or 1
    native = config["sample_height"] // p, config["sample_width"] // p
    for i in range(sum(key.endswith(".x") and key.startswith("tr.") for key in g)):
        f, _, h, w = g[f"tr.g{i}.x"].shape[1:]
        grid = (math.ceil(f / p_t), h // p, w // p)
        if f"tr.g{i}.rope_cos" in g:
            rope = rope_table(config["attention_head_dim"], grid, native if p_t == 1 else None, 0, CPU)
            for ours, name in zip(rope, ("cos", "sin")):
                theirs = g[f"tr.g{i}.rope_{name}"]  # each pair's number is stored twice
                assert_close(ours.repeat_interleave(2, dim=-1), theirs, 1e-6)  # both float32
                checked += 1
        if f"pos.g{i}" in g:
            dim = config["num_attention_heads"] * config["attention_head_dim"]
            stretched = native if config["in_channels"] != config["out_channels"] else grid[1:]
            ours = sincos_table(dim, grid, stretched, 0, 1.875, 1.0, CPU)
            assert_close(ours, g[f"pos.g{i}"], 1e-6)  # theirs is the difference of two float32 tensors
            checked += 1
    if "pos.native" in g:
        grid = ((config["sample_frames"] - 1) // 4 + 1, *native)
        ours = sincos_table(dim, grid, native, 0, 1.875, 1.0, CPU)
        assert_close(ours, g["pos.native"], 1e-7)  # float32 of the same float64
    assert checked >= 2
