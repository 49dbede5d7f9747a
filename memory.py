"""How much memory a training run will take, said before it takes it.

    frozen weights   2 bytes a number in bfloat16, norms and biases 4
    what learns      4 each for weight, gradient, average, and each moment (AdamW has two, Muon one)
    activations      what the backward pass needs: tokens · width numbers, so many times for each block
    VAE, T5          while clips and captions are encoded; without a cache, in every step

All but the activations is plain counting. A GPU takes about half a GiB more for its kernels, and PyTorch up
to a tenth for gaps between tensors.
"""

import os
from pathlib import Path

import torch

import sample
from transformer import VideoTransformer

# Bytes for each token and unit of width: kept of every block, and more while one is at work. Found by adding
# up the tensors of forward and backward as they come and go, under CUDA's rules of rounding (norms are in
# float32); with LoRA alone and no checkpointing it is a fifth less.
ACTIVATIONS = {
    torch.bfloat16: {"full": (2, 75), "attention": (4, 75), None: (64, 28)},
    torch.float32: {"full": (4, 112), "attention": (8, 112), None: (92, 32)},
}


def step_bytes(
    dit: VideoTransformer,
    num_tokens: int,
    dtype: torch.dtype,
    num_moments: int = 2,
    has_ema: bool = True,
    num_parts: int = 1,
    num_beside: int = 0,
) -> dict[str, int]:
    """What one process holds in a step that trains a transformer, by part.

    num_tokens: of a micro-batch, text included    num_parts: ranks that the weights are cut over
    num_beside: numbers that learn beside the transformer's, a text encoder's
    """
    learns = frozen = 0
    for param in dit.parameters():
        if param.requires_grad:
            learns += param.numel()
        else:
            frozen += param.numel() * (dtype.itemsize if param.ndim > 1 else 4)
    learns = learns // num_parts + num_beside
    kept, at_work = ACTIVATIONS[dtype][dit.activation_checkpointing]
    size = num_tokens * dit.config.dim
    rounded = 0 if dtype == torch.float32 else dtype.itemsize * learns  # copies that autocast keeps meanwhile
    return {
        "weights": frozen // num_parts + 4 * learns,
        "gradients": 4 * learns,
        "moments": 4 * num_moments * learns,
        "EMA": 4 * learns * has_ema,
        "activations": kept * size * dit.config.num_layers + max(at_work * size, rounded),
    }


def encoding_bytes(models: sample.Models, num_clips: int, side: int, is_streamed: bool) -> dict[str, int]:
    """While so many clips of side² pixels are encoded, and captions; is_streamed: T5 a layer at a time."""
    needs = sample.estimate_bytes(models, (1, models.config.out_channels, 1, side // 8, side // 8))
    weights = {name: models.dtype.itemsize * count for name, count in models.num_parameters.items()}
    return {
        "VAE": weights["vae"] + num_clips * (needs["encode"] - weights["vae"]),
        "T5": needs["text"] if is_streamed else weights["text_encoder"],
    }


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU, or of this machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = dict(line.split(":") for line in lines)
        return 1024 * int(found["MemAvailable"].split()[0])
    return None


def gib_used(device: torch.device) -> float:
    """At most so far: of the device's memory, or of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # counted in KiB


def in_gib(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**30:.3g}" for name, size in parts.items() if size)
