"""LoRA: fine-tune the transformer with two thin matrices beside each large one (Hu et al. 2021, sec. 4.1).

    x ─┬─► W: in -> out ───────────────────────────── + ─► W x + alpha/rank · B A x
       └─► A: in -> rank ─► B: rank -> out ─ · alpha/rank ┘   B starts at zero, so nothing changes at first

    add_lora ─► train ─┬─► save_lora ─► FILE ─► load_lora: W += weight · alpha/rank · B A
                       └─► merge_lora, save_pretrained ─► a checkpoint like any other

Files carry the names diffusers takes (`load_lora_weights`, with peft), with alpha/rank folded into B. Beside
them we read those of PEFT, of ComfyUI, of older diffusers, and of the reference (CogVideoX-Fun
cogvideox/utils/lora_utils.py), which trains every linear layer of the model:

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight   .lora_B.weight                diffusers
    transformer.transformer_blocks.0.attn1.to_q.lora.down.weight   .lora.up.weight            older diffusers
    base_model.model.transformer_blocks.0.attn1.to_q.lora_A.default.weight                    PEFT
    diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight                             ComfyUI
    lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight   .lora_up.weight   .alpha    the reference
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import open_safetensors, read_json, save_tensors

TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "model.", "module.")
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_")  # before a name with _ for each dot
ENDING = re.compile(r"\.(?:(alpha)|lora[._](A|B|down|up)(?:\.default)?\.weight)$")
PARTS = {"A": "down", "down": "down", "B": "up", "up": "up", "alpha": "alpha"}

# ---------------------------------------------------------------- training


class LoRALinear(nn.Linear):
    """A linear layer and its two thin ones. Weight and bias keep their names, so the state dict of a model
    with LoRA is the official one and, beside it, `….lora_A.weight` and `….lora_B.weight`."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)  # torch's random start is LoRA's
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(super().forward(x), self.lora_B(self.lora_A(x)), alpha=self.scale)


def add_lora(model: nn.Module, rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Freeze a VideoTransformer and put LoRA beside attention and MLP, in place; returns what is to learn.

    alpha: how much it counts, as alpha/rank; by default rank, so that it counts once
    raises ValueError if rank or alpha is not positive, or if there is LoRA already
    """
    alpha = rank if alpha is None else alpha
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"rank={rank}, alpha={alpha}: both should be positive; try 64 and 64")
    if _lora_layers(model):
        raise ValueError("the model has LoRA already; merge_lora first")
    model.requires_grad_(False)
    for name in [name for name, _ in model.named_modules() if name.endswith(TARGETS)]:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))
    return [p for layer in _lora_layers(model).values() for p in (layer.lora_A.weight, layer.lora_B.weight)]


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> None:
    """Add what LoRA has learnt to the weights and take its layers out, in place."""
    for name, layer in _lora_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        _add(plain, layer.lora_A.weight, layer.lora_B.weight, layer.scale)
        model.set_submodule(name, plain)


@torch.no_grad()
def _add(layer: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> None:
    """W += scale · up down in fp32, rounded once to the layer's dtype; a new tensor, as W may be a file's."""
    weight = layer.weight
    down, up = (factor.to(weight.device, torch.float32).flatten(1) for factor in (down, up))
    weight.data = (weight.float() + scale * (up @ down).view(weight.shape)).to(weight.dtype)


# ---------------------------------------------------------------- files


def save_lora(model: nn.Module, path: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the LoRA layers of a model as one .safetensors file that diffusers and `load_lora` read.

    state: what `model.state_dict()` is; of a sharded model, with the tensors gathered
    """
    state, tensors = state or model.state_dict(), {}
    for name, layer in _lora_layers(model).items():
        for part, scale in ((f"{name}.lora_A.weight", 1), (f"{name}.lora_B.weight", layer.scale)):
            tensors[f"transformer.{part}"] = (scale * state[part].detach()).cpu().contiguous()
    if not tensors:
        raise ValueError("the model has no LoRA to save; add_lora first")
    save_tensors(tensors, Path(path), {"format": "pt"})


def load_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> None:
    """Merge a file into the weights of a VideoTransformer: W += weight · alpha/rank · B A. Several add up.

    raises ValueError or OSError if it does not fit, see `read_lora`; the model is untouched then
    """
    for name, (down, up, scale) in read_lora(model, path).items():
        _add(model.get_submodule(name), down, up, weight * scale)


def read_lora(model: nn.Module, path: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer of the model: (A, B, alpha/rank)} of a file in any of the formats above; the model may be meta.

    raises OSError if there is no file, ValueError if it holds no LoRA, or keys or shapes that do not fit
    """
    path = Path(path)
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = _peft_config(path, file.metadata() or {})
    shapes = {
        name: module.weight.flatten(1).shape  # out, in (a convolution's: in · height · width)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    }
    found, unknown = _by_layer(tensors, shapes)
    loras, wrong = {}, []
    for name, parts in found.items():
        down, up = (parts.get(part, torch.empty(0, 0)) for part in ("down", "up"))
        rank, (num_out, num_in) = max(1, len(down)), shapes[name]
        alpha = parts["alpha"] if "alpha" in parts else torch.tensor([[_peft_alpha(config, name, rank)]])
        if (down.shape, up.shape, alpha.shape) == ((rank, num_in), (num_out, rank), (1, 1)):
            loras[name] = down, up, alpha.item() / (math.sqrt(rank) if config.get("use_rslora") else rank)
        else:
            what = f"A {list(down.shape)}, B {list(up.shape)}"
            wrong.append(f"{name} ({what} for a weight of {list(shapes[name])})")
    if unknown or wrong or not loras:
        reasons = [_listed("unknown", unknown), _listed("mis-shaped or incomplete", wrong)]
        reason = "; ".join(filter(None, reasons)) or "it is empty"
        raise ValueError(f"{path} is no LoRA for this transformer ({reason}); give one made for its model")
    return loras


def _by_layer(tensors: dict[str, Tensor], layers: dict) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({layer: {"down" | "up" | "alpha": a matrix}}, the keys that are not known and perhaps why)"""
    from_flat = {name.replace(".", "_"): name for name in layers}
    found, unknown = {}, []
    for key, tensor in tensors.items():
        ending = ENDING.search(key)
        part = PARTS[ending[1] or ending[2]] if ending else None
        name = _without_prefix(key[: ending.start()] if ending else key)
        name = from_flat.get(name, name)
        if part and name in layers and (tensor.is_floating_point() or part == "alpha"):
            found.setdefault(name, {})[part] = torch.atleast_2d(tensor).flatten(1)
            continue
        layer = next((layer for layer in layers if part and name.endswith("." + layer)), None)
        unknown.append(f"{key} (its prefix {name.removesuffix(layer)} is none we know)" if layer else key)
    return found, unknown


def _without_prefix(name: str) -> str:
    """Wrapped twice, a model has two of them."""
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    while name.startswith(PREFIXES):
        name = name.removeprefix(next(prefix for prefix in PREFIXES if name.startswith(prefix)))
    return name


def _listed(title: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title}: {', '.join(sorted(names)[:3])}{more}" if names else ""


def _peft_config(path: Path, metadata: dict[str, str]) -> dict:
    """What diffusers notes in the file, or PEFT beside it: alpha/rank is then not folded into the weights."""
    beside = path.with_name("adapter_config.json")
    try:
        notes = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in notes.items()}
        if path.name == "adapter_model.safetensors" and beside.is_file():
            config = read_json(beside)
        _peft_alpha(config, "", 1)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{path}: the notes on its alpha are damaged ({error}); make it again") from None
    return config


def _peft_alpha(config: dict, name: str, rank: int) -> float:
    """A layer's own alpha, by the first pattern its name ends in; else the one for all; else none: rank."""
    alphas = {re.compile(rf"(.*\.)?({key})"): alpha for key, alpha in config.get("alpha_pattern", {}).items()}
    matching = [alpha for pattern, alpha in alphas.items() if pattern.fullmatch(name)]
    return float([*matching, config.get("lora_alpha", rank)][0])
