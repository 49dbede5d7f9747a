"""Patches and positions: properties, and the reference's tables; test_transformer.py compares the rest."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, VARIANTS, assert_close, expected

from embeddings import crop_region, patchify, rope_table, rotate, sincos_table, unpatchify

CPU = torch.device("cpu")


@pytest.mark.parametrize("p_t", [1, 2])
def test_unpatchify_undoes_patchify(p_t):
    x = torch.randn(2, 3, 4, 6, 10)
    tokens = patchify(x, p_t, 2)
    assert tokens.shape == (2, 4 // p_t * 3 * 5, 3 * p_t * 4)
    assert torch.equal(unpatchify(tokens, (4 // p_t, 3, 5), p_t, 2), x)


def test_sincos_is_computed_in_float64():
    table = sincos_table(16, (1, 1, 9999), (1, 9999), 0, 1.0, 1.0, CPU)
    theirs = torch.outer(torch.arange(9999.0).double(), 10000 ** -(torch.arange(3).double() / 3)).sin()
    assert_close(table[:, 4:7], theirs, 1e-7)  # float32 angles would be off by 9999 * 6e-8


@pytest.mark.parametrize("rows, cols", [(3, 5), (8, 2), (4, 6), (1, 1)])
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


def test_rotating_happens_in_float32_and_returns_the_dtype_it_got():
    x, rope = torch.randn(1, 1, 4, 16).bfloat16(), rope_table(16, (1, 2, 2), None, 0, CPU)
    ours = rotate(x, rope)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, rotate(x.float(), rope).bfloat16())


def test_tables_left_by_a_preview_can_be_used_in_training():
    with torch.inference_mode():
        sincos = sincos_table(16, (1, 3, 3), (3, 3), 0, 1.0, 1.0, CPU)
        cos, sin = rope_table(16, (1, 3, 3), None, 0, CPU)
    assert not any(table.is_inference() for table in (sincos, cos, sin))
    assert rope_table(16, (1, 3, 3), None, 0, CPU)[0] is cos  # and they are not built again


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
