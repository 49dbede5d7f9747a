"""Weights as float8: how much memory is held, how far the velocity is off, and where it may be used."""

import pytest
import torch
from conftest import GOLDENS
from torch import Tensor, nn

import sample
from float8 import shrink
from transformer import TransformerConfig, VideoTransformer

SMALL = TransformerConfig(
    num_attention_heads=4,
    num_layers=4,
    text_embed_dim=64,
    time_embed_dim=256,
    max_text_seq_length=8,
    sample_width=6,
    sample_height=4,
    sample_frames=9,
    use_rotary_positional_embeddings=True,
)


def random_model(dtype: torch.dtype) -> VideoTransformer:
    """Every matrix keeps the size of what it is given, so that all of them matter."""
    torch.manual_seed(0)
    dit = VideoTransformer(SMALL)
    for parameter in dit.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return dit.to(dtype)


@torch.no_grad()
def velocity(dit: VideoTransformer) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 16, 3, 4, 6, generator=draws).to(dit.proj_out.weight)
    text = torch.randn(2, 8, 64, generator=draws).to(noisy)
    return dit(noisy, torch.tensor([30, 900]), text).float()


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


def held(dit: nn.Module) -> int:
    """Bytes of all memory that its tensors are views of, each counted once."""
    storages = [tensor.untyped_storage() for tensor in (*dit.parameters(), *dit.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.54), (torch.float32, 0.3)])
def test_a_block_s_matrices_take_a_byte_a_number(dtype, most, tmp_path):
    """Of bf16 half, of float32 a quarter, and what stays: a tenth of that in a 5B model."""
    random_model(dtype).save_pretrained(tmp_path)
    dit = VideoTransformer.from_pretrained(tmp_path, dtype)
    before = held(dit)
    shrink(dit, "cpu")
    assert held(dit) < most * before
    matrices = [m.weight for m in dit.transformer_blocks.modules() if isinstance(m, nn.Linear)]
    assert len(matrices) == 4 * (2 + 4 + 2) and {m.dtype for m in matrices} == {torch.float8_e4m3fn}
    for name in ("proj_out.weight", "patch_embed.proj.weight", "transformer_blocks.0.attn1.norm_q.weight"):
        assert dit.get_parameter(name).dtype == dtype
    dit.save_pretrained(tmp_path)  # cannot be loaded as if it were whole
    with pytest.raises(ValueError, match="unexpected: .*scale"):
        VideoTransformer.from_pretrained(tmp_path)


def test_the_velocity_is_off_by_what_three_bits_give():
    """2.6 % of a weight on average, and of what a layer adds; less of what goes past it. bf16: 1 %."""
    exact = velocity(random_model(torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        dit = random_model(dtype)
        plain = velocity(dit)
        shrink(dit, "cpu")
        assert 0.005 < error(velocity(dit), plain) < 0.026
        assert error(velocity(dit), exact) < 0.03


def test_each_row_uses_the_whole_range_of_float8():
    dit = random_model(torch.float32)
    weight = dit.transformer_blocks[0].ff.net[2].weight
    with torch.no_grad():
        weight *= torch.logspace(-8, 8, len(weight))[:, None]
        weight[3] = 0
    before = weight.detach().clone()
    shrink(dit, "cpu")
    layer = dit.transformer_blocks[0].ff.net[2]
    after = layer.weight.float() * layer.scale
    rows = (after - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-30)
    assert rows.max() < 0.03 and not after[3].any()


def test_the_command_line_makes_a_video_like_the_plain_one(tmp_path, capsys):
    flags = "--num-steps 2 --num-frames 5 --seed 1 --device cpu --model".split()
    made = {}
    for name, more in (("plain", []), ("small", ["--low-memory"])):
        out = tmp_path / f"{name}.mp4"
        assert sample.main(["a cat", *flags, str(GOLDENS / "fun-2b-inp"), *more, "--out", str(out)]) == 0
        made[name], record = sample.load_latents(out.with_suffix(".safetensors"))
        assert record["low_memory"] == (name == "small")
    assert "float32, matrices as float8" in capsys.readouterr().out
    assert 0 < error(made["small"], made["plain"]) < 0.2


def test_the_estimate_counts_a_byte_a_weight():
    models = sample.load_models(GOLDENS / "fun-2b-inp")
    plain = sample.estimate_bytes(models, (1, 16, 2, 4, 6))
    models.low_memory = True
    small = sample.estimate_bytes(models, (1, 16, 2, 4, 6))
    count = models.num_parameters["transformer"]
    assert plain["denoise"] - small["denoise"] == 3 * count and plain["decode"] == small["decode"]
