"""Fewer steps computed: blocks are left out of a step where they would add what they added before.

    step i      tokens ─► block 0 ─► block 1 … ─► tokens + added         `added` is kept
    step i + 1  tokens ───────────────────────► tokens + added         the blocks are skipped

Two rules say where. The published weights of text-to-video and image-to-video models have a *plan*, which
looks at the timesteps alone and so is known before the first step: the relative change of the timestep's
vector, through a polynomial fitted to those weights, is summed up, and a step is computed when the sum has
reached the threshold (TeaCache, Liu et al. 2024, arXiv 2411.19108). Other models compute the *first block* of
every step and skip the rest while what this block adds differs by no more than the threshold, relatively,
from what it added when all were computed last (first-block cache, ParaAttention). The video becomes another
one, the more so the higher the threshold: docs/speed.md. This file may be deleted.

b batch · L+n text and video tokens · d model width
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import build, component_dir, read_tensors, weight_files
from kinds import model_kind
from models import Models
from request import Request
from transformer import TransformerConfig, VideoTransformer

POLYNOMIALS = {  # (kind, layers, patch_size_t) -> coefficients, highest power first
    ("text", 30, None): (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -3.61568434e-3),
    ("text", 42, None): (-1538.80483, 843.202495, -134.363087, 7.97131516, -5.23162339e-2),
    ("image", 42, None): (-1538.80483, 843.202495, -134.363087, 7.97131516, -5.23162339e-2),
    ("text", 42, 2): (250.210439, -165.061612, 35.7804877, -0.781551492, 3.58559703e-2),
    ("image", 42, 2): (122.842302, -104.088754, 26.2981677, -0.306009921, 3.71213220e-2),
}


def planned_skips(vectors: Tensor, threshold: float, polynomial: tuple[float, ...]) -> list[bool]:
    """Which steps are skipped, never the first and the last; vectors: of each step's timestep, steps d."""
    vectors = vectors.float()
    skips = [False]
    total = 0.0
    for before, vector in zip(vectors[:-2], vectors[1:-1]):
        change = ((vector - before).abs().mean() / before.abs().mean()).item()
        total += float(np.polyval(polynomial, change))
        skips.append(total < threshold)
        if total >= threshold:
            total = 0.0
    return [*skips, False][: len(vectors)]


def plan(dit: VideoTransformer, threshold: float, timesteps: Tensor) -> set[int] | None:
    """The timesteps at which blocks are skipped; None where the first block decides."""
    polynomial = POLYNOMIALS.get((model_kind(dit.config), dit.config.num_layers, dit.config.patch_size_t))
    if polynomial is None:
        return None
    weight = dit.time_embedding.linear_1.weight
    vectors = dit.time_vector(timesteps.to(weight.device), weight.dtype)
    skips = planned_skips(vectors, threshold, polynomial)
    return {t for t, skip in zip(timesteps.tolist(), skips) if skip}


@torch.inference_mode()
def announce(models: Models, request: Request) -> str:
    """What is known before the transformer is loaded; of its weights only those of the timestep are read."""
    timesteps = models.schedule.timesteps(request.num_steps)[-request.num_taken :]
    folder = component_dir(models.model_dir, "transformer")
    dit = build(VideoTransformer, TransformerConfig, folder)
    files = weight_files(folder)
    keys = [key for key in files if key.startswith(("time_embedding.", "ofs_embedding."))]
    state = {key: tensor.to(models.dtype) for key, tensor in read_tensors(files, keys)}
    dit.load_state_dict(state, strict=False, assign=True)
    skipped = plan(dit, request.step_cache, timesteps)
    if skipped is None:
        rule = "the first block of each step decides"
    else:
        rule = f"{len(timesteps) - len(skipped)} of {len(timesteps)} steps computed"
    return f"threshold {request.step_cache:g}, {rule}"


class StepCache:
    """What the blocks added in the last step that computed them, of each forward of a step by itself."""

    def __init__(self, dit: VideoTransformer, threshold: float, timesteps: Tensor):
        self.threshold = threshold
        self.plain = dit.run_blocks
        self.skipped = plan(dit, threshold, timesteps)
        self.first: dict[int, Tensor] = {}  # what the first block added, by the forward's place in its step
        self.added: dict[int, Tensor] = {}  # and what those did that may be skipped
        self.num_prompts = 0
        self.num_computed = self.num_forwards = 0

    def begin(self, t: int, num_prompts: int) -> None:
        """A step begins, of one prompt, or of two in one or two forwards.

        Where their number changes all is forgotten: of a prompt that was left out it is too old.
        """
        if num_prompts != self.num_prompts:
            self.first.clear()
            self.added.clear()
        self.t = t
        self.num_prompts = num_prompts
        self.place = 0

    def run_blocks(self, blocks: nn.ModuleList, tokens: Tensor, *others) -> Tensor:
        """In place of `transformer.run_blocks`; b L+n d -> b L+n d."""
        place = self.place
        self.place += 1
        self.num_forwards += 1
        if self.skipped is not None:
            can_skip = self.t in self.skipped
        else:
            entered = tokens
            tokens = self.plain(blocks[:1], entered, *others)
            first = tokens - entered
            blocks = blocks[1:]
            can_skip = self.is_near(self.first.get(place), first)
        if can_skip and place in self.added:
            return tokens + self.added[place]
        result = self.plain(blocks, tokens, *others)
        self.num_computed += 1
        self.added[place] = result - tokens
        if self.skipped is None:
            self.first[place] = first
        return result

    def is_near(self, before: Tensor | None, now: Tensor) -> bool:
        if before is None:
            return False
        change = (now - before).abs().mean(dtype=torch.float32)
        return bool(change <= self.threshold * before.abs().mean(dtype=torch.float32))


@contextlib.contextmanager
def skip_steps(dit: VideoTransformer, threshold: float, timesteps: Tensor) -> Iterator[StepCache]:
    """For the block, one run of a sampler over these timesteps, `dit` skips blocks where it may."""
    cache = StepCache(dit, threshold, timesteps)
    dit.run_blocks = cache.run_blocks
    try:
        yield cache
    finally:
        dit.run_blocks = cache.plain
