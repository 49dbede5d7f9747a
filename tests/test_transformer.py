"""The transformer: the reference's outputs and gradients, its folder in and out."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, PLAIN, ROUNDS_ALIKE, V15, VARIANTS, assert_close, expected
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import transformer
from kinds import check_size, choose_size, legal_num_frames, native_size, num_padding
from transformer import TransformerConfig, VideoTransformer, grow_input_channels

CASES = [
    (variant, int(key[4:-2]))
    for variant in VARIANTS + V15
    for key in sorted(expected(variant))
    if key.startswith("tr.g") and key.endswith(".x")
]
TINY = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    time_embed_dim=16,
    text_embed_dim=8,
    max_text_seq_length=5,
    sample_width=6,
    sample_height=4,
    sample_frames=9,
)


def load(variant: str) -> VideoTransformer:
    return VideoTransformer.from_pretrained(GOLDENS / variant)


def case(variant: str, index: int) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """The tensors of one recorded call, and its arguments in our layout."""
    g = {key.split(".", 2)[2]: t for key, t in expected(variant).items() if key.startswith(f"tr.g{index}.")}
    condition = g["extra"].transpose(1, 2) if "extra" in g else None
    return g, [g["x"].transpose(1, 2), g["t"], g["text"], condition]


def random_model(config: TransformerConfig, std: float = 0.2) -> VideoTransformer:
    """All parameters random: those that start at zero would hide mistakes."""
    dit = VideoTransformer(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return dit


def random_inputs(dit: VideoTransformer, f: int = 3, h: int = 4, w: int = 6) -> list[Tensor | None]:
    c = dit.config
    condition = torch.randn(2, c.in_channels - 16, f, h, w) if c.in_channels > 16 else None
    text = torch.randn(2, c.max_text_seq_length, c.text_embed_dim)
    return [torch.randn(2, 16, f, h, w), torch.tensor([3, 999]), text, condition]


# Outputs are of order 4, computed in float32 through two blocks; other summation orders move them by 2e-6.
TOLERANCE = 1e-5 if ROUNDS_ALIKE else 2e-5


@pytest.mark.parametrize("variant, index", CASES)
def test_velocity_equals_the_reference(variant, index):
    g, inputs = case(variant, index)
    with torch.no_grad():
        velocity = load(variant)(*inputs)
    assert_close(velocity.transpose(1, 2), g["out"], TOLERANCE)


@pytest.mark.parametrize("variant, index", [c for c in CASES if "loss" in case(*c)[0]])
def test_loss_and_gradients_equal_the_reference(variant, index):
    g, inputs = case(variant, index)
    dit = load(variant)
    loss = F.mse_loss(dit(*inputs).transpose(1, 2), g["target"])
    loss.backward()
    parameters = dict(dit.named_parameters())
    assert_close(loss.detach(), g["loss"], TOLERANCE)
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert_close(norm, g["grad_norm"], TOLERANCE)
    names = [key.removeprefix("grad.") for key in g if key.startswith("grad.")]
    assert len(names) >= 3
    for name in names:
        theirs = g[f"grad.{name}"]
        largest = theirs.abs().max().item()
        assert_close(parameters[name].grad, theirs, 1e-4 * largest)  # float32 sums over tokens


@pytest.mark.parametrize("variant", ["fun-2b-inp", "fun-5b-inp", "fun-1.5-5b-inp"])
def test_the_training_prediction_equals_the_reference(variant):
    g = {key: t[:2] for key, t in expected(variant).items() if t.dim()}
    noisy, condition = g["train.noisy"].transpose(1, 2), g["train.inpaint_latents"].transpose(1, 2)
    with torch.no_grad():
        velocity = load(variant)(noisy, g["train.t"], g["text.prompt_embeds"], condition)
    assert_close(velocity.transpose(1, 2), g["train.pred"], TOLERANCE)


# The last: learned positions give way to sincos at another length.
@pytest.mark.parametrize("variant, f", [(v, None) for v in VARIANTS + V15] + [("cogvideox-5b-i2v", 2)])
def test_what_we_save_gives_the_same_velocity_in_diffusers(variant, f, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = load(variant)
    ours.save_pretrained(tmp_path)
    original, written = (
        json.loads((folder / "transformer" / "config.json").read_text())
        for folder in (GOLDENS / variant, tmp_path)
    )
    assert original.items() <= written.items()
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer")
    c = ours.config
    native, rows, cols = c.native_grid
    f = f or (native // 2 * 2 if c.patch_size_t else native)  # it pads no frames
    noisy, t, text, condition = random_inputs(ours, f, rows * c.patch_size, cols * c.patch_size)
    latents = noisy if condition is None else torch.cat([noisy, condition], dim=1)
    num_text = c.max_text_seq_length
    ofs = {"ofs": torch.tensor([2.0, 2.0])} if c.ofs_embed_dim else {}
    with torch.no_grad():
        _, rope = ours._positions((f // (c.patch_size_t or 1), rows, cols), num_text, noisy.device)
        rope = rope and tuple(part[num_text:].repeat_interleave(2, dim=-1) for part in rope)
        theirs = theirs(latents.transpose(1, 2), text, t, image_rotary_emb=rope, **ofs).sample.transpose(1, 2)
        assert_close(ours(noisy, t, text, condition), theirs, TOLERANCE)


OTHER = {"patch_bias": False, "attention_bias": False, "norm_eps": 1e-3, "norm_elementwise_affine": False}


@pytest.mark.parametrize("size", [0.02, 0.3])  # small weights make the norms' eps visible
@pytest.mark.parametrize("changes", [{}, OTHER])
def test_random_weights_give_the_same_velocity_in_diffusers(changes, size, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = random_model(replace(TINY, **changes), std=size)
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert written["_class_name"] == "CogVideoXTransformer3DModel"
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer")
    noisy, t, text, _ = random_inputs(ours)
    with torch.no_grad():
        theirs = theirs(noisy.transpose(1, 2), text, t).sample.transpose(1, 2)
        velocity = ours(noisy, t, text)
    assert_close(velocity, theirs, 1e-5 * theirs.abs().max().item())  # float32, other summation orders


def test_norms_of_q_and_k_have_their_own_eps():
    dit = VideoTransformer(replace(TINY, norm_eps=1e-3))
    eps = {name: m.eps for name, m in dit.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert all(each == (1e-6 if name.endswith(("norm_q", "norm_k")) else 1e-3) for name, each in eps.items())


def test_the_position_rule_can_be_overridden_and_matters_off_the_native_grid():
    dit = load("fun-2b-inp")
    native, wide = random_inputs(dit), random_inputs(dit, w=10)
    with torch.no_grad():
        before = dit(*native), dit(*wide)
        dit.position = "regenerate"
        assert torch.equal(dit(*native), before[0])
        assert (dit(*wide) - before[1]).abs().max() > 0.1
        dit(*random_inputs(dit, f=7))  # and any number of frames fits
        dit.position = "slice"  # row by row of the native width, whatever the width at hand
        assert torch.equal(dit(*native), before[0])
        frames, rows, cols = dit.config.native_grid
        whole = dit._sincos((frames, rows, cols), 3)
        assert torch.equal(dit._sincos((1, rows, cols - 1), 3), whole[: 3 + rows * (cols - 1)])


@pytest.mark.parametrize("variant", ["fun-2b-inp", "fun-1.5-5b-inp", "cogvideox-5b-i2v"])
def test_recomputing_activations_changes_no_gradient(variant):
    dit = load(variant)
    inputs, gradients = random_inputs(dit, f=2), []
    for dit.activation_checkpointing in (None, *transformer.CHECKPOINTING):
        dit.zero_grad()
        dit(*inputs).square().mean().backward()
        gradients.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients))


@pytest.mark.parametrize("how, num_runs", [(None, 1), ("full", 2), ("attention", 1)])
def test_attention_is_computed_again_only_where_its_output_is_not_kept(how, num_runs):
    dit, kernels = random_model(TINY), []
    dit.activation_checkpointing = how

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            kernels.append(op)
            return op(*args, **(kwargs or {}))

    with Watch():
        dit(*random_inputs(dit)).square().mean().backward()
    assert sum(op in transformer.ATTENTION_KERNELS for op in kernels) == num_runs * TINY.num_layers


@pytest.mark.parametrize("variant", ["fun-2b-inp", "fun-5b-inp", "cogvideox-5b-i2v"])
def test_half_precision_stays_half_precision_and_near(variant):
    dit = load(variant)
    inputs = random_inputs(dit)
    half = [x if x is None or not x.is_floating_point() else x.bfloat16() for x in inputs]
    with torch.no_grad():
        velocity = dit(*inputs)
        ours = VideoTransformer.from_pretrained(GOLDENS / variant, torch.bfloat16)(*half)
    assert ours.dtype == torch.bfloat16
    assert_close(ours.float(), velocity, 0.15)  # 8 bits of outputs of order 4, through two blocks


@pytest.mark.parametrize("variant", ["fun-2b-inp", "fun-1.5-5b-inp"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_model_compiles_in_one_graph(variant):
    dit = load(variant)
    del dit.transformer_blocks[1:]
    inputs = random_inputs(dit, f=2)
    with torch.no_grad():
        compiled = torch.compile(dit, backend="eager", fullgraph=True)
        assert_close(compiled(*inputs), dit(*inputs), TOLERANCE)


@pytest.mark.parametrize("learned", [False, True])
def test_a_new_model_predicts_zero_and_every_weight_learns_within_three_steps(learned):
    extra = {"use_learned_positional_embeddings": learned, "use_rotary_positional_embeddings": learned}
    dit = VideoTransformer(replace(TINY, **extra))
    if learned:  # its table starts as sincos, without positions for text
        table = dit.patch_embed.pos_embedding[0]
        assert torch.equal(table, VideoTransformer(TINY)._positions((3, 2, 3), 5, table.device)[0])
    inputs = random_inputs(dit)
    assert not dit(*inputs).any()
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(3):  # the output layer moves first, then the gates, then what is behind them
        optimizer.zero_grad()
        (dit(*inputs) - 1).square().mean().backward()
        optimizer.step()
    still = [name for name, p in dit.named_parameters() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize("variant", [*PLAIN, "fun-1.5-5b-inp"])
def test_new_input_channels_change_nothing_until_trained(variant, tmp_path):
    dit = load(variant)
    inputs = random_inputs(dit, f=dit.config.native_grid[0] // 2 * 2)
    with torch.no_grad():
        before = dit(*inputs)
        grow_input_channels(dit, 40)
        more = torch.randn(2, 40 - 16, *inputs[0].shape[2:])
        if inputs[3] is not None:
            more[:, : inputs[3].shape[1]] = inputs[3]
        assert_close(dit(*inputs[:3], more), before, TOLERANCE)
    dit(*inputs[:3], more).square().mean().backward()
    gradient = dit.patch_embed.proj.weight.grad
    assert gradient is not None and gradient.flatten(1).bool().any(0).all()  # the new weights learn
    dit.save_pretrained(tmp_path)
    again = VideoTransformer.from_pretrained(tmp_path)
    assert again.config == dit.config and again.position == dit.position
    assert_close(again(*inputs[:3], more), before, TOLERANCE)


def test_learned_positions_are_not_used_on_another_grid_of_as_many_tokens():
    dit = load("cogvideox-5b-i2v")
    with pytest.raises(ValueError, match="learned positions only fit"):
        dit(*random_inputs(dit, h=6, w=4))


def test_cogvideox15_has_its_own_native_size_and_padding():
    text = replace(load("cogvideox-1.5-5b-t2v").config, sample_height=300, sample_width=300, sample_frames=81)
    assert native_size(replace(text, sample_height=96, sample_width=170)) == (768, 1360, 81)
    assert choose_size(text, None, None, (1080, 1920)) == (768, 1360)
    assert choose_size(text, None, None, (1920, 1080)) == (1360, 768)
    assert [legal_num_frames(text, f) for f in (1, 5, 9, 81, 85)] == [1, 5, 9, 81, 85]
    assert [legal_num_frames(text, f, from_clip=True) for f in (1, 5, 9, 81, 85)] == [1, 5, 5, 77, 85]
    assert [num_padding(text, f) for f in (1, 2, 3, 21, 22)] == [0, 0, 1, 1, 0]
    assert not num_padding(replace(text, in_channels=33), 21)
    check_size(text, 1360, 768, 81)  # positions are counted from the corner: portrait is as good
