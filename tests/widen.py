"""python tests/widen.py MODEL OUT: a transformer of twice the width that begins where MODEL's has ended.

Each channel, head and hidden unit becomes two that compute the same, and what reads them splits its weight
between the two in random shares, so that training can part them (Net2Net; Chen et al., arXiv 1511.05641).
The sinusoids of places alone change: one child keeps the frequency of its parent, the other has one between.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def parents(sizes: list[int]) -> Tensor:
    """The parent of each new channel; sizes: new lengths of the runs of channels that stay side by side."""
    starts = [sum(sizes[:i]) // 2 for i in range(len(sizes))]
    return torch.cat([start + torch.arange(size) // 2 for start, size in zip(starts, sizes)])


def widen(old: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights by official key, for the sincos kind of transformer -> those of one with twice the heads."""
    generator = torch.Generator().manual_seed(seed)
    dim = 2 * old["proj_out.weight"].shape[1]
    hidden = 2 * old["transformer_blocks.0.ff.net.2.weight"].shape[1]
    head = len(old["transformer_blocks.0.attn1.norm_q.weight"])
    thirds = [dim // 4, 3 * dim // 8, 3 * dim // 8]  # of a sincos table: time, height, width
    channels = parents([size // 2 for size in thirds for _ in range(2)])
    heads = torch.cat([torch.arange(head) + i * head for i in range(dim // 2 // head) for _ in range(2)])
    units = parents([hidden])

    def read(weight: Tensor, family: Tensor) -> Tensor:
        """out old -> out new: each parent's column is cut in two, at another random share in every row."""
        noise = 0.3 * torch.randn(weight.shape, generator=generator)
        order = torch.argsort(family, stable=True)  # both children of 0, of 1, …
        elder = torch.zeros(len(family), dtype=torch.bool)
        elder[order[::2]] = True
        return weight[:, family] * torch.where(elder, 0.5 + noise[:, family], 0.5 - noise[:, family])

    def through(weight: Tensor, out: Tensor, into: Tensor) -> Tensor:
        return read(weight[out], into) if weight.ndim == 2 else weight[out]  # a bias reads nothing

    new = {}
    for key, weight in old.items():
        match key.removeprefix("transformer_blocks.").split("."):
            case [_, "norm1" | "norm2", "linear", _]:
                new[key] = torch.cat([part[channels] for part in weight.chunk(6)])
            case ["norm_out", "linear", _]:
                new[key] = torch.cat([part[channels] for part in weight.chunk(2)])
            case [_, "attn1", "to_q" | "to_k" | "to_v", _]:
                new[key] = through(weight, heads, channels)
            case [_, "attn1", "to_out", *_]:
                new[key] = through(weight, channels, heads)
            case [_, "ff", "net", "0", *_]:
                new[key] = through(weight, units, channels)
            case [_, "ff", "net", "2", _]:
                new[key] = through(weight, channels, units)
            case [*_, "norm", _] | ["patch_embed" | "norm_final", *_]:
                new[key] = weight[channels]
            case ["proj_out", "weight"]:
                new[key] = read(weight, channels)
            case ["time_embedding", "linear_1", "weight"]:
                new[key] = torch.zeros(len(weight), dim)
                new[key][:, ::2] = weight  # the sinusoids it knows
            case _:  # text side and time embedding, norms of a head, the last bias
                new[key] = weight
    return {key: weight.contiguous() for key, weight in new.items()}


def main(model: Path, out: Path) -> None:
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("checkpoints", "previews", "log.jsonl"))
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(widen(load_file(model / "transformer" / weights.name)), weights)
    config = json.loads((out / "transformer" / "config.json").read_text())
    config["num_attention_heads"] *= 2
    (out / "transformer" / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("give a model folder and one to make: python tests/widen.py MODEL OUT")
    main(*map(Path, sys.argv[1:]))
