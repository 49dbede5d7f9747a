"""How much memory a training run will take, said before it takes it.

    frozen weights   2 bytes a number in bfloat16, norms and biases 4
    what learns      4 each for weight, gradient, average, and each moment (AdamW has two, Muon one)
    activations      what the backward pass needs: tokens · width numbers, so many times for each block
    VAE, T5          while clips and captions are encoded; without a cache, in every step

All but the activations is plain counting. A GPU takes about half a GiB more for its kernels, and PyTorch up
to a tenth for gaps between tensors.
"""

import re
import sys
from pathlib import Path

import torch

import sample
from presets import Config, Phase
from runtime import NUM_RANKS, as_size, listed
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
    num_beside: int = 0,
) -> dict[str, int]:
    """What one process holds in a step that trains a transformer, by part.

    num_tokens: of a micro-batch, text included
    num_beside: numbers that learn beside the transformer's, a text encoder's
    """
    learns = frozen = 0
    for param in dit.parameters():
        if param.requires_grad:
            learns += param.numel()
        else:
            frozen += param.numel() * (dtype.itemsize if param.ndim > 1 else 4)
    rounded = 0  # copies of weights, for the backward pass
    if dtype != torch.float32 and not dit.activation_checkpointing:
        rounded = dtype.itemsize * (learns + num_beside)
    learns = learns // NUM_RANKS + num_beside
    kept, at_work = ACTIVATIONS[dtype][dit.activation_checkpointing]
    size = num_tokens * dit.config.dim
    return {
        "weights": frozen // NUM_RANKS + 4 * learns,
        "gradients": 4 * learns,
        "moments": 4 * num_moments * learns,
        "EMA": 4 * learns * has_ema,
        "activations": (kept * dit.config.num_layers + at_work) * size + rounded,
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
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo.read_text())[1])


def gib_used(device: torch.device) -> float:
    """At most so far: of the device's memory, or of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # of bytes there, of KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def describe(
    dit: VideoTransformer,
    models: sample.Models,
    config: Config,
    phases: tuple[Phase, ...],
    is_offloaded: bool,
) -> str:
    """What the steps of some phases will hold and what is free, before any of it is taken."""
    tokens = max(phase.max_tokens for phase in phases) // (dit.config.patch_size_t or 1)
    t5_learns = any(phase.train_text for phase in phases)
    parts = step_bytes(
        dit,
        config.batch_size * config.noises_per_clip * (tokens + dit.config.max_text_seq_length),
        models.dtype,
        num_moments=1 if config.optimizer == "muon" else 2,
        has_ema=config.ema_decay > 0,
        num_beside=models.num_parameters["text_encoder"] * t5_learns,
    )
    is_cached = config.cached_draws > 0
    side = max(size for phase in phases for size in phase.resolutions)
    encoding = encoding_bytes(models, config.batch_size, side, is_cached)
    if t5_learns:
        encoding["T5"] = 0  # it is counted already
    total = sum(parts.values())
    if not is_cached:  # a clip is encoded before, not while, the transformer is at work
        total += encoding["T5"] + max(0, encoding["VAE"] - parts["activations"])
    free = free_bytes(models.device)
    where = ", all but the last in the host's memory" if is_offloaded else ""
    when = "before the first step" if is_cached else "in each step"
    text = f"memory: about {as_size(total)} ({listed(parts)}{where}); to encode, {when}, {listed(encoding)}"
    if free is None:
        return text
    text += f"; free {as_size(free)}"
    if total > free and not is_offloaded:
        text += "\nnote: that is more than is free. --activation-checkpointing, --cache-latents, --lora-rank "
        text += "and a smaller --max-tokens or --batch-size take less; --offload moves most to the host"
    return text
