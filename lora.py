"""LoRA: fine-tune the transformer with two thin matrices beside each large one (Hu et al. 2021, sec. 4.1).

    x ─┬─► W: in -> out ───────────────────────────── + ─► W x + alpha/rank · B A x
       └─► A: in -> rank ─► B: rank -> out ─ · alpha/rank ┘   B starts at zero, so nothing changes at first

    add_lora ─► train ─► save_lora ─► FILE ─► load_lora: W += weight · alpha/rank · B A, as if W had learnt

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

from checkpoint import first_few, open_safetensors, read_json, save_tensors

TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")

# ---------------------------------------------------------------- training


class LoRALinear(nn.Linear):
    """A linear layer and its two thin ones. Weight and bias keep their names, so the state dict of a model
    with LoRA is the official one and, beside it, `….lora_A.weight` and `….lora_B.weight`."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)  # torch's random start is LoRA's
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(super().forward(x), self.lora_B(self.lora_A(x)), alpha=self.scale)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Freeze a VideoTransformer and put LoRA beside attention and MLP, in place; returns what is to learn.

    alpha: how much it counts, as alpha/rank; by default rank, so that it counts once
    """
    if lora_layers(model):
        raise ValueError("this model has LoRA already; save it, and load it into another")
    model.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if name.endswith(TARGETS)]
    parameters = []
    for name in names:
        layer = LoRALinear(model.get_submodule(name), rank, rank if alpha is None else alpha)
        model.set_submodule(name, layer)
        parameters += [layer.lora_A.weight, layer.lora_B.weight]
    return parameters


@torch.no_grad()
def add_product(layer: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> None:
    """W += scale · up down in fp32, rounded once to the layer's dtype; a new tensor, as W may be a file's."""
    weight = layer.weight
    down = down.to(weight.device, torch.float32)
    up = up.to(weight.device, torch.float32)
    weight.data = (weight.float() + scale * (up @ down).view(weight.shape)).to(weight.dtype)


# ---------------------------------------------------------------- files


def save_lora(model: nn.Module, path: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the LoRA layers of a model as one .safetensors file that diffusers and `load_lora` read.

    state: what `model.state_dict()` is; of a sharded model, with the tensors gathered
    """
    state = state or model.state_dict()
    tensors = {}
    for name, layer in lora_layers(model).items():
        down = state[f"{name}.lora_A.weight"].detach()
        up = layer.scale * state[f"{name}.lora_B.weight"].detach()
        tensors[f"transformer.{name}.lora_A.weight"] = down.cpu().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = up.cpu().contiguous()
    save_tensors(tensors, Path(path), {"format": "pt"})


KEY = re.compile(
    r"""(?: (?: transformer | diffusion_model | base_model\.model | model | module ) \. )*
        (?: lora_unet__? | lora_transformer_ )?  # the name then has _ for each dot
        (?P<layer> .+? ) \.
        (?: (?P<alpha> alpha )
          | lora[._] (?: (?P<A> A | down ) | (?P<B> B | up ) ) (?: \.default )? \.weight )
    """,
    re.VERBOSE,
)


def by_layer(tensors: dict[str, Tensor], layers: dict) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({layer: {"A" | "B" | "alpha": a matrix}}, the keys that are not known)."""
    dotted = {name.replace(".", "_"): name for name in layers}
    found = {}
    unknown = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        name = match and dotted.get(match["layer"], match["layer"])
        if name in layers:
            found.setdefault(name, {})[match.lastgroup] = torch.atleast_2d(tensor).flatten(1)
        else:
            unknown.append(key)
    return found, unknown


def peft_config(path: Path, metadata: dict[str, str]) -> dict:
    """What diffusers notes in the file, or PEFT beside it: alpha/rank is then not folded into the weights."""
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json(beside)
    notes = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return {key.removeprefix("transformer."): value for key, value in notes.items()}


def peft_alpha(config: dict, name: str, rank: int) -> float:
    """A layer's own alpha, by the first pattern its name ends in; else the one for all; else none: rank."""
    for pattern, alpha in config.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return alpha
    return config.get("lora_alpha", rank)


def read_lora(model: nn.Module, path: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer of the model: (A, B, alpha/rank)} of a file in any of the formats above; the model may be meta.

    raises OSError if there is no file, ValueError if it holds no LoRA, or keys or shapes that do not fit
    """
    path = Path(path)
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = peft_config(path, file.metadata() or {})
    shapes = {
        name: list(module.weight.flatten(1).shape)  # out, in (a convolution's: in · height · width)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    }
    found, unknown = by_layer(tensors, shapes)
    loras = {}
    wrong = []
    for name, parts in found.items():
        alpha = parts.pop("alpha", None)
        sizes = {part: list(matrix.shape) for part, matrix in parts.items()}
        rank = sizes.get("A", [0])[0]
        num_out, num_in = shapes[name]
        if sizes != {"A": [rank, num_in], "B": [num_out, rank]}:
            listed = ", ".join(f"{part} {size}" for part, size in sizes.items())
            wrong.append(f"{name} ({listed} for a weight of {shapes[name]})")
            continue
        if alpha is None:
            alpha = peft_alpha(config, name, rank)
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        loras[name] = parts["A"], parts["B"], scale
    if unknown or wrong or not loras:
        problems = {"unknown": unknown, "mis-shaped or incomplete": wrong}
        reasons = [f"{title}: {first_few(names)}" for title, names in problems.items() if names]
        reason = "; ".join(reasons) or "it is empty"
        raise ValueError(f"{path} is no LoRA for this transformer ({reason}); give one made for its model")
    return loras


def load_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> None:
    """Merge a file into the weights of a VideoTransformer: W += weight · alpha/rank · B A. Several add up."""
    for name, (down, up, scale) in read_lora(model, path).items():
        add_product(model.get_submodule(name), down, up, weight * scale)
