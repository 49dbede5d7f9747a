"""LoRA: unmerged equals merged, files of three formats, diffusers with peft gives the same velocity."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import GOLDENS, assert_close
from safetensors.torch import load_file, save_file
from test_media import CASES
from test_transformer import TINY, random_inputs, random_model
from torch import nn

import sample
from lora import TARGETS, add_lora, load_lora, read_lora, save_lora
from transformer import VideoTransformer

# Velocities are of order 2, in float32 through two blocks: other orders of summation move them by 2e-6.
TOLERANCE = 1e-5
BLOCK = "transformer_blocks.1."


@pytest.fixture
def dit() -> VideoTransformer:
    return random_model(TINY)


def trained(dit: VideoTransformer, rank: int = 3, alpha: float = 1.5) -> VideoTransformer:
    """A model with LoRA that has learnt something."""
    for parameter in add_lora(dit, rank, alpha):
        nn.init.normal_(parameter)
    return dit


@torch.no_grad()
def velocity(dit: VideoTransformer) -> torch.Tensor:
    torch.manual_seed(1)
    return dit(*random_inputs(dit))


def copy(dit: VideoTransformer) -> VideoTransformer:
    twin = VideoTransformer(dit.config)
    twin.load_state_dict({key: t.clone() for key, t in dit.state_dict().items() if ".lora_" not in key})
    return twin


# ---------------------------------------------------------------- training


def test_lora_changes_nothing_until_it_is_trained_and_stands_beside_the_weights(dit):
    before, names = velocity(dit), dit.state_dict().keys()
    parameters = add_lora(dit, rank=4)
    assert torch.equal(velocity(dit), before)
    beside = dit.state_dict().keys() - names
    assert names <= dit.state_dict().keys() and all(".lora_" in name for name in beside)
    assert len(beside) == len(parameters) == 2 * len(TARGETS) * 2
    assert {id(p) for p in dit.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(p.std() > 0.05 for p in parameters[::2]) and not any(p.any() for p in parameters[1::2])


# ---------------------------------------------------------------- files


def test_a_saved_lora_gives_the_same_velocity_when_loaded(dit, tmp_path):
    fresh = copy(trained(dit))
    save_lora(dit, tmp_path / "lora.safetensors")
    with torch.device("meta"):
        empty = VideoTransformer(TINY)
    assert len(read_lora(empty, tmp_path / "lora.safetensors")) == 12  # it can be checked before loading
    before = velocity(fresh)
    load_lora(fresh, tmp_path / "lora.safetensors")
    assert_close(velocity(fresh), velocity(dit), TOLERANCE)
    assert (velocity(fresh) - before).abs().max() > 0.1  # it does something
    fresh.save_pretrained(tmp_path)
    assert torch.equal(velocity(VideoTransformer.from_pretrained(tmp_path)), velocity(fresh))
    load_lora(fresh, tmp_path / "lora.safetensors", -1.0)  # and out again
    assert_close(velocity(fresh), velocity(copy(dit)), TOLERANCE)


def test_merging_into_bfloat16_weights_rounds_once(dit, tmp_path):
    save_lora(trained(copy(dit)), tmp_path / "lora.safetensors")
    layer = dit.bfloat16().get_submodule(BLOCK + "ff.net.2")
    down, up, scale = read_lora(dit, tmp_path / "lora.safetensors")[BLOCK + "ff.net.2"]
    merged = (layer.weight.float() + 2.0 * scale * (up @ down)).bfloat16()
    load_lora(dit, tmp_path / "lora.safetensors", 2.0)
    assert torch.equal(layer.weight, merged)


@pytest.mark.parametrize("prefix", ["lora_unet__", "lora_unet_"])
@pytest.mark.parametrize("alpha", [torch.tensor(3), torch.tensor(1.5, dtype=torch.bfloat16), None])
def test_the_names_of_the_reference_are_read_for_every_linear_layer(dit, tmp_path, prefix, alpha):
    names = [name for name, module in dit.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == 2 * 8 + 5  # two blocks; text, time twice, norm_out, proj_out
    tensors, merged = {}, copy(dit)
    for name in names:
        weight = merged.get_submodule(name).weight
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        key = prefix + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors |= {} if alpha is None else {f"{key}.alpha": alpha.clone()}
        weight.data += 0.1 * (1 if alpha is None else alpha.item() / 2) * up @ down
    save_file(tensors, tmp_path / "kohya.safetensors")
    load_lora(dit, tmp_path / "kohya.safetensors", 0.1)
    for name, parameter in merged.named_parameters():
        assert_close(dit.get_parameter(name), parameter, 1e-6)


def test_peft_names_are_read_with_the_alpha_of_the_config_beside_them(dit, tmp_path):
    name, merged = BLOCK + "ff.net.0.proj", copy(dit)
    down, up = torch.randn(4, 32), torch.randn(128, 4)
    path = tmp_path / "adapter_model.safetensors"
    key = f"base_model.model.{name}"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    for config, scale in (
        ({"lora_alpha": 2}, 0.5),
        ({"lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"lora_alpha": 2, "alpha_pattern": {"net.1": 5, "1.ff.net.0.proj": 1}}, 0.25),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert read_lora(dit, path)[name][2] == scale
    (tmp_path / "adapter_config.json").unlink()
    load_lora(dit, path)
    wanted = merged.get_parameter(name + ".weight") + up @ down
    assert_close(dit.get_parameter(name + ".weight"), wanted, 1e-5)


LAYER = BLOCK + "attn1.to_out.0"


@pytest.mark.parametrize(
    "key",
    [
        f"{LAYER}.lora_A.weight",
        f"base_model.model.transformer.{LAYER}.lora_A.default.weight",
        f"diffusion_model.{LAYER}.lora_down.weight",
        f"model.diffusion_model.{LAYER}.lora_down.weight",
        f"module.{LAYER}.lora_down.weight",
        f"transformer.{LAYER}.lora.down.weight",
        f"lora_transformer_{LAYER.replace('.', '_')}.lora_down.weight",
    ],
)
def test_names_that_only_have_another_prefix_or_ending_are_read(dit, tmp_path, key):
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    other = key.replace("lora_A", "lora_B").replace("down", "up")
    save_file({key: down, other: up}, tmp_path / "lora.safetensors")
    [(name, (ours_down, ours_up, _))] = read_lora(dit, tmp_path / "lora.safetensors").items()
    assert name == LAYER and torch.equal(ours_down, down) and torch.equal(ours_up, up)


@pytest.mark.parametrize("name", ["comfy", "old_diffusers"])
def test_files_of_other_programs_are_read(name):
    wide = dataclasses.replace(TINY, num_attention_heads=64 // TINY.attention_head_dim)
    with torch.device("meta"):
        dit = VideoTransformer(wide)
    layers = read_lora(dit, CASES / f"{name}.safetensors")
    targets = ("attn1.to_out.0", "attn1.to_q", "ff.net.0.proj")
    assert sorted(layers) == [f"transformer_blocks.{i}.{target}" for i in (0, 1) for target in targets]


def test_a_convolution_has_lora_as_well(dit, tmp_path):
    conv = dit.patch_embed.proj
    down, up = torch.randn(2, 16, 2, 2), torch.randn(32, 2, 1, 1)
    key = "transformer.patch_embed.proj"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / "conv.safetensors")
    expected = conv.weight + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    load_lora(dit, tmp_path / "conv.safetensors")
    assert_close(conv.weight, expected, 1e-5)


def test_a_file_that_does_not_fit_is_not_used_in_part(dit, tmp_path):
    before = velocity(dit)
    key, path = f"transformer.{BLOCK}attn1.to_q", tmp_path / "lora.safetensors"
    good = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    cases = [
        (good | {f"{key}.lora_magnitude_vector": torch.ones(32)}, "unknown: .*magnitude_vector"),
        ({f"{key}.lora_A.weight": torch.ones(2, 32)}, "mis-shaped or incomplete: transformer_blocks.1.attn1"),
        (good | {f"{key}.lora_B.weight": torch.ones(32, 3)}, r"B \[32, 3\] for a weight of \[32, 32\]"),
    ]
    for tensors, message in cases:
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            load_lora(dit, path)
    assert torch.equal(velocity(dit), before)


# ---------------------------------------------------------------- diffusers


def diffusers_twin(dit: VideoTransformer, folder):
    """The same model in a diffusers pipeline of which only the transformer is there."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    dit.save_pretrained(folder)
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    return diffusers.CogVideoXPipeline(None, None, None, theirs, None)


@torch.no_grad()
def their_velocity(pipeline, dit: VideoTransformer) -> torch.Tensor:
    torch.manual_seed(1)
    noisy, timesteps, text, _ = random_inputs(dit)
    return pipeline.transformer(noisy.transpose(1, 2), text, timesteps).sample.transpose(1, 2)


def test_diffusers_gives_the_same_with_what_we_save(dit, tmp_path):
    pipeline = diffusers_twin(dit, tmp_path)
    assert_close(velocity(dit), their_velocity(pipeline, dit), TOLERANCE)
    fresh, both = copy(dit), copy(dit)
    save_lora(trained(dit, rank=3, alpha=1.5), tmp_path / "one.safetensors")
    pipeline.load_lora_weights(str(tmp_path), weight_name="one.safetensors", adapter_name="one")
    assert (their_velocity(pipeline, dit) - velocity(fresh)).abs().max() > 0.1
    assert_close(velocity(dit), their_velocity(pipeline, dit), TOLERANCE)
    save_lora(trained(fresh, rank=5, alpha=10), tmp_path / "two.safetensors")
    pipeline.load_lora_weights(str(tmp_path), weight_name="two.safetensors", adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.5, -0.3])
    load_lora(both, tmp_path / "one.safetensors", 0.5)
    load_lora(both, tmp_path / "two.safetensors", -0.3)
    assert_close(velocity(both), their_velocity(pipeline, dit), TOLERANCE)


@pytest.mark.parametrize("with_notes", [False, True])
def test_what_diffusers_saves_gives_the_same_here(dit, tmp_path, with_notes):
    pipeline = diffusers_twin(dit, tmp_path)
    import peft

    targets = ["to_k", "net.2", "norm1.linear"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, alpha_pattern={"net.2": 2}, target_modules=targets, init_lora_weights=False
    )
    theirs = pipeline.transformer
    theirs.add_adapter(config)
    layers = peft.get_peft_model_state_dict(theirs)
    notes = {"transformer_lora_adapter_metadata": config.to_dict()} if with_notes else {}
    pipeline.save_lora_weights(tmp_path / "saved", transformer_lora_layers=layers, **notes)
    path = tmp_path / "saved" / "pytorch_lora_weights.safetensors"
    assert len(load_file(path)) == 2 * 2 * len(targets)
    if not with_notes:  # diffusers takes alpha to be the rank then, and so do we
        theirs.delete_adapters("default")
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    load_lora(dit, path)
    assert_close(velocity(dit), their_velocity(pipeline, dit), TOLERANCE)


# ---------------------------------------------------------------- python sample.py --lora

MODEL = GOLDENS / "fun-2b-inp"


def sampled(path, *argv: object) -> torch.Tensor:
    """The latents a run of sample.py leaves."""
    flags = ["--seed=1", "--num-steps=2", "--num-frames=1", "--out", path.with_suffix(".png")]
    assert sample.main(["a cat", *map(str, flags), *map(str, argv)]) == 0
    return load_file(path.with_suffix(".safetensors"))["latents"]


def test_sampling_with_several_loras_is_sampling_with_the_merged_model(tmp_path, capsys):
    """One of them is found in the folder of its run, where sampling without it says that it lies unused."""
    run = shutil.copytree(MODEL, tmp_path / "run")
    files = [tmp_path / "one.safetensors", tmp_path / "two:2.safetensors", run / "lora.safetensors"]
    named = [f"{files[0]}:0.4321987", files[1], f"{run}:0.5"]  # a colon in a name is no weight
    model = VideoTransformer.from_pretrained(MODEL)
    for file, weight in zip(files, (0.4321987, 1.0, 0.5)):
        save_lora(trained(VideoTransformer.from_pretrained(MODEL)), file)
        load_lora(model, file, weight)
    merged = shutil.copytree(MODEL, tmp_path / "merged")
    model.save_pretrained(merged)
    with_loras = sampled(tmp_path / "a", "--model", run, "--lora", *named)
    assert torch.equal(with_loras, sampled(tmp_path / "b", "--model", merged))
    again = json.loads((tmp_path / "a.json").read_text())["lora"]
    assert torch.equal(with_loras, sampled(tmp_path / "c", "--model", MODEL, "--lora", *again))
    assert "is not used" not in capsys.readouterr().out
    assert not torch.equal(with_loras, sampled(tmp_path / "d", "--model", run))
    assert "lora.safetensors of this folder is not used" in capsys.readouterr().out
