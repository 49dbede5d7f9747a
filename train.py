"""Train the video VAE, or train and fine-tune the diffusion transformer: one loop for both.

    epoch_batches ─deal─► global batch: a fixed list of micro-batches, each of one shape
    micro-batch ─► pixels, captions, masks ─► a loss for each sample ─sum ÷ samples of the step─► gradient
    gradient ─clip─► AdamW ─► weights ─lerp─► EMA ─► validation, previews, checkpoint

    --train dit   pixels ─VAE─► latents ─noise at a drawn timestep─► noisy ─DiT─► velocity;  MSE to its target
    --train vae   pixels ─encoder─► posterior ─sample─► decoder─► pixels;  reconstruction + a little KL

Every draw is a function of (seed, epoch, sample index), see `data.rng`; a timestep also of the sample's place
in its global batch. So the state of a run is a few counters beside weights, moments and EMA; a run that is
killed and resumed ends with the same bytes as one that is not.

    OUT/  transformer/ vae/ text_encoder/ …    a checkpoint of EMA weights: sample.py --model OUT
          lora.safetensors                     in place of new weights, with --lora-rank
          checkpoints/step-000200/             the same, and training/ for --resume
          log.jsonl  loss.png  previews/

Where to look: the loop is `train`, near the end. Losses: `denoising_losses`, `reconstruction_losses`. Masks:
applied in `Denoising.encode`. Learning rate: `learning_rate`. Checkpoints: `Run.save`, `Learner.state`. A new
preset goes into `PRESETS`.

Reports: CogVideoX-Fun v1 (token lengths, phases); reference: CogVideoX-Fun scripts/train.py.
Dimension key: b batch, c channels, f frames, h w height and width, L text tokens, d text width.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import operator
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import checkpoint
import data
import sample
from data import Batch, Loader, Plan, Record, Sample, epoch_batches
from diffusion import NUM_TIMESTEPS, Schedule, ScheduleConfig
from inpaint import add_reference_noise, draw_noise_sigma, encode_known, join_condition
from media import to_uint8, write_video
from runtime import (
    NUM_RANKS,
    RANK,
    atomic_write,
    computes_bfloat16,
    in_one_line,
    join_ranks,
    say,
    sum_over_ranks,
    wait_for_ranks,
)
from runtime import choose_device as find_device
from runtime import generator as rng
from text_encoder import T5Config, T5Encoder, Tokenizer
from transformer import (
    CHECKPOINTING,
    POSITIONS,
    TransformerConfig,
    VideoTransformer,
    grow_input_channels,
    max_num_frames,
    model_kind,
)
from vae import VAEConfig, VideoVAE, sample_posterior

Key = tuple[int, int, int]  # (seed, epoch, sample index): what every draw is a function of
VALIDATION_EPOCH = -1  # so that validation never shares a draw with training
BANDS = (100, 300, 500, 700, 900)  # timesteps validated at: the middles of five bands
LORA = "lora.safetensors"


# ---------------------------------------------------------------- what a run is


def check(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one token budget."""

    resolutions: tuple[int, ...]  # base sizes, mixed
    max_tokens: int  # of one clip
    global_batch: int  # clips of max_tokens in a step; cheaper shapes come in larger numbers
    num_steps: int
    lr: float
    final_lr: float  # reached by a half cosine; the same as lr: constant
    train_text: bool = False  # the text encoder as well


@dataclass(frozen=True)
class Config:
    """All settings the numbers of a run depend on."""

    phases: tuple[Phase, ...]
    train: str = "dit"  # or "vae"
    max_frames: int = 49
    fps: float = 8.0
    batch_size: int = 1  # clips of max_tokens in a micro-batch; global_batch / batch_size of them are a step
    draws_per_clip: int = 1  # noises and timesteps for each: encoding a clip costs more than a small DiT
    timestep_shift: float = 1.0  # above 1: more of the noisy timesteps, see `stratified_timesteps`
    text_only: float = (
        0.0  # share of samples whose mask becomes everything, beyond those of `data.MASK_KINDS`
    )
    optimizer: str = "adamw"  # or "muon": that for vectors and tables, Muon for matrices; see `Learner`
    warmup_steps: int = 100  # in each phase
    weight_decay: float = 0.03
    adam_eps: float = 1e-10
    max_grad_norm: float = 0.05
    wide_clip_steps: int | None = None  # the reference's clipping over time, see `clip_norm`; None: constant
    ema_decay: float = 0.9999  # less at first, see `Learner.update_ema`; 0: no EMA
    position: str | None = None  # sincos off the native grid, see transformer.position_rule; None: as it is
    in_channels: int | None = None  # of the transformer, grown with zeros; None: as it is
    lora_rank: int | None = None  # learn thin matrices beside the transformer's, not its weights; see lora.py
    lora_alpha: float | None = None  # None: the rank
    cached_draws: int = (
        0  # masks and their like of a clip that epochs take in turn, see cache.py; 0: new ones
    )
    kl_weight: float = 1e-5  # of --train vae
    keep_encoder: bool = False  # only its decoder learns: transformers trained on its latents stay valid
    seed: int = 0
    num_shapes: int = 20_000  # clips in an epoch of --data shapes
    dit: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)  # if there is none yet
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)  # likewise
    vae: VAEConfig | None = None  # likewise; None: there has to be one
    t5: T5Config | None = None


SIZES_512, SIZES_768, SIZES_1024 = (tuple(range(low, 1025, 128)) for low in (512, 768, 1024))
FUN_2B = Config(
    phases=(  # the report's
        Phase(SIZES_512, 13312, 128, 7000, 2e-5, 2e-5),
        Phase(SIZES_768, 29952, 256, 6500, 2e-5, 2e-5),
        Phase(SIZES_1024, 53248, 128, 5000, 2e-5, 2e-5),
    ),
    # This and the defaults above are what the reference's commands train its models with (README_TRAIN.md and
    # scripts/train.sh: lr 2e-5, constant after 100 steps of warm-up; weight decay 3e-2, eps 1e-10, norm 0.05)
    # and the clipping of its train.py, whose own defaults (1e-4, 500, 1e-2, 1e-8, 1.0) they override.
    wide_clip_steps=1000,
    dit=TransformerConfig(in_channels=33),
)
FUN_5B_DIT = replace(FUN_2B.dit, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
FUN_5B = replace(FUN_2B, dit=FUN_5B_DIT)
FUN_VAE = replace(FUN_2B, train="vae", phases=(Phase(SIZES_512, 13312, 8, 7000, 2e-5, 2e-6),),
                  max_grad_norm=1.0, wide_clip_steps=None)  # fmt: skip
TINY = Config(
    phases=(
        Phase((64, 96, 128), 80, 8, 10_000, 3e-3, 1e-3, train_text=True),
        Phase((64, 96, 128), 180, 8, 4000, 1e-3, 5e-4),
        Phase((64, 96, 128), 320, 8, 2000, 5e-4, 1e-5),
    ),
    max_frames=17, batch_size=8, draws_per_clip=4, timestep_shift=3.0, text_only=0.2,
    optimizer="muon", adam_eps=1e-8, weight_decay=0.01, max_grad_norm=1.0, ema_decay=0.999,
    dit=TransformerConfig(in_channels=33, num_attention_heads=4, num_layers=6, time_embed_dim=128,
                          text_embed_dim=128, max_text_seq_length=24,
                          sample_width=8, sample_height=8, sample_frames=17,
                          spatial_interpolation_scale=0.9375),  # at 1.875 a table of 4x4 hides the aspect
    vae=VAEConfig(block_out_channels=[16, 32, 32, 64], layers_per_block=1, norm_num_groups=8,
                  sample_height=256, sample_width=256, scaling_factor=1.0),
    t5=T5Config(vocab_size=27, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),  # 27: shapes.WORDS
    schedule=ScheduleConfig(extra={"guidance_scale": 2.0}),  # 3 makes worse end pictures, 6 worse shapes
)  # fmt: skip
# Small clips first: their steps are cheap, and edges are all there is to learn; 64 pixels show fast ones.
# The KL term is large enough to keep channels near zero and to leave noise in what pixels do not need.
TINY_VAE = replace(
    TINY, train="vae", batch_size=1, draws_per_clip=1, weight_decay=0.0, timestep_shift=1.0, text_only=0.0,
    kl_weight=1e-3,
    phases=(
        Phase((32, 64), 48, 2, 5000, 5e-3, 2e-3),
        Phase((32, 48, 64, 96, 128), 128, 1, 2000, 1.5e-3, 1e-5),
    ),
)  # fmt: skip
PRESETS = {  # --preset, --train
    "tiny": {"dit": TINY, "vae": TINY_VAE},
    "fun-2b": {"dit": FUN_2B, "vae": FUN_VAE},
    "fun-5b": {"dit": FUN_5B, "vae": FUN_VAE},
}


# ---------------------------------------------------------------- several processes: torchrun
#
# All of them run the same program. The transformer's weights, gradients, moments and EMA are cut into as many
# parts as there are ranks (FSDP2); text encoder and VAE, where they learn, are small and whole in each rank,
# and with --replicate the transformer too.
# A rank works on its share of the micro-batches of a step; gradients are averaged. Rank 0 writes.


def average_over_ranks(tensors: list[Tensor]) -> None:
    """In place, in one message in place of a hundred."""
    if NUM_RANKS > 1 and tensors:
        joined = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / NUM_RANKS
        for tensor, average in zip(tensors, joined.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(average.view_as(tensor))


def shard(dit: VideoTransformer, device: torch.device) -> None:
    """Cut a transformer's parameters over the ranks; each layer is whole only while it computes."""
    if NUM_RANKS > 1:
        mesh = init_device_mesh(device.type, (NUM_RANKS,))
        for module in (*dit.transformer_blocks, dit):
            fully_shard(module, mesh=mesh)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # it is not written to
        register_fsdp_forward_method(dit, "project_text")


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU of rank 0; every rank has to call it. Elsewhere nothing is kept."""
    pairs = ((name, whole(tensor)) for name, tensor in state.items())
    return {name: tensor.cpu() for name, tensor in pairs if RANK == 0}


def spread_like(param: Tensor, tensor: Tensor) -> Tensor:
    """A rank's part of a whole tensor, cut as `param` is."""
    tensor = tensor.to(param.device, copy=True)
    if not isinstance(param, DTensor) or tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


# ---------------------------------------------------------------- draws


def generators(keys: list[Key], purpose: str, device: str | torch.device = "cpu") -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(rng(*key, purpose).initial_seed()) for key in keys]


def normal(shape: Iterable[int], keys: list[Key], purpose: str, device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise, b and then `shape`; each sample's is a function of its key alone.

    Drawn on the device, where it is wanted: the noise of a large video is slow to draw on the CPU.
    """
    draws = generators(keys, purpose, device)
    return torch.stack([torch.randn(tuple(shape), generator=draw, device=device) for draw in draws])


def stratified_timesteps(keys: list[Key], shift: float = 1.0) -> Tensor:
    """One timestep for each sample of a global batch: 0 … 999 is cut into so many parts, each has one.

    Each alone is uniform; together they cover all noise levels, so the loss of a step jumps less. Which part
    a sample gets is shuffled, as neighbours share a shape. A shift s moves t/1000 = u to su / (1 + (s − 1)u),
    so with s > 1 there are more noisy ones, where text decides. (Esser et al. 2024, arXiv 2403.03206, eq. 23)
    """
    parts = torch.randperm(len(keys), generator=rng(*keys[0], "order of timesteps"))
    draws = generators(keys, "timestep")
    places = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])
    uniform = (parts + places) / len(keys)
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    return (shifted * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)


def repeated(keys: list[Key], draws: int) -> list[Key]:
    """A key for each of several draws of a sample: (seed, epoch, sample · draws + draw)."""
    return [(seed, epoch, index * draws + draw) for seed, epoch, index in keys for draw in range(draws)]


# ---------------------------------------------------------------- the two things that can be trained


def denoising_losses(
    dit: VideoTransformer,
    schedule: Schedule,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: Tensor,
    condition: Tensor | None,
) -> Tensor:
    """Velocity MSE in fp32, one number a sample: mean (velocity − target)².

    latents, noise: b 16 f h w    timesteps: b    text: b L d    condition: b c f h w or None    returns: b
    """
    noisy = schedule.add_noise(latents, noise, timesteps)
    velocity = dit(noisy, timesteps.to(noisy.device), text, condition)
    target = schedule.velocity(latents, noise, timesteps)
    return (velocity.float() - target.float()).square().mean((1, 2, 3, 4))


def reconstruction_losses(pixels: Tensor, target: Tensor) -> Tensor:
    """|e| + e² + |∇e|/2 + colour, one number a sample, for e = pixels − target: twice b 3 f h w -> b.

    The square finds small objects, which the absolute value alone would first leave out; the gradient
    (differences of neighbouring pixels) sharpens edges. colour is the square of what e changes between the
    three channels, counted up to five times where the target is colourful, since colour is else learnt late.
    """
    error = pixels.float() - target.float()
    chroma = error - error.mean(1, keepdim=True)
    colorful = (target - target.mean(1, keepdim=True)).abs().mean(1, keepdim=True)  # 0 … 8/9
    terms = [error.abs(), error.square(), 0.25 * error.diff(dim=3).abs(), 0.25 * error.diff(dim=4).abs()]
    terms.append((1 + 4.5 * colorful) * chroma.square())
    return sum(term.mean((1, 2, 3, 4)) for term in terms)


class Denoising:
    """--train dit: the transformer (and in some phases the text encoder) learns, the VAE is fixed."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.dit = VideoTransformer.from_pretrained(model_dir, torch.float32, device)
        if config.in_channels:
            grow_input_channels(self.dit, config.in_channels)
        if config.lora_rank:
            from lora import add_lora  # here and in `save` only: without the file all else still works

            torch.manual_seed(config.seed)  # where its matrices start
            add_lora(self.dit, config.lora_rank, config.lora_alpha)
        self.kind = model_kind(self.dit.config)
        check(self.kind != "image", f"{model_dir} is an image-to-video model, which is not trained here")
        is_legal = self.dit.position or not config.position
        check(is_legal, f"--position {config.position}: this model has rotary positions")
        if config.position:
            self.dit.config.extra["position"] = self.dit.position = config.position
        if not self.dit.config.use_rotary_positional_embeddings:
            # What all k have in common the softmax does not see: its gradient is nothing but rounding, which
            # AdamW would enlarge to whole steps, other ones with each number of ranks.
            for block in self.dit.transformer_blocks:
                block.attn1.norm_k.bias.requires_grad_(False)
        self.model_dir, self.train_text = model_dir, False
        self.vae_config = checkpoint.read_config(
            VAEConfig, checkpoint.component_dir(model_dir, "vae") / "config.json"
        )
        self.tokenizer = Tokenizer.from_pretrained(model_dir)
        self.schedule = Schedule.from_pretrained(model_dir)

    # Both are loaded when they are needed first: with a full cache never.
    @functools.cached_property
    def vae(self) -> VideoVAE:
        return VideoVAE.from_pretrained(self.model_dir, self.dtype, self.device).requires_grad_(False)

    @functools.cached_property
    def t5(self) -> T5Encoder:
        dtype = torch.float32 if self.train_text else self.dtype
        return T5Encoder.from_pretrained(self.model_dir, dtype, self.device).requires_grad_(self.train_text)

    def plan(self, phase: Phase) -> Plan:
        """What a phase asks of the data."""
        most = self.config.max_frames
        if self.dit.position == "interpolate":  # a table of positions has an end
            most = min(most, max_num_frames(self.dit.config))
        tokens, pairs = phase.max_tokens, self.dit.config.patch_size_t or 1
        return Plan(phase.resolutions, tokens, self.config.batch_size * tokens, most, pairs)

    def begin(self, phase: Phase, held_out: list[tuple[Sample, list[Key]]]) -> dict[str, nn.Module]:
        """What learns in a phase, by component; held-out samples are encoded once, as the VAE is fixed."""
        self.train_text = phase.train_text
        if "t5" in vars(self):
            self.t5.to(torch.float32 if phase.train_text else self.dtype).requires_grad_(phase.train_text)
        self.held_out = [(self.encode(batch, keys), batch.caption, keys) for batch, keys in held_out]
        return {"transformer": self.dit} | ({"text_encoder": self.t5} if phase.train_text else {})

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def clip_moments(self, batch: Sample) -> dict[str, Tensor]:
        """Posteriors of the clips (and controls) as b 32 f' h' w', means and then log-variances."""
        clips = {"latents": batch.pixels, "control": batch.control if self.kind == "control" else None}
        return {
            name: torch.cat(self.vae.moments(clip.to(self.device)), dim=1)
            for name, clip in clips.items()
            if clip is not None
        }

    @torch.no_grad()
    def condition_moments(self, batch: Sample, keys: list[Key]) -> dict[str, Tensor]:
        """The same of what an inpaint model is shown, beside the mask: known b 1 f' h' w', zero b."""
        if self.kind != "inpaint":
            return {}
        pixels = batch.pixels.to(self.device)
        if self.dit.config.add_noise_in_inpaint_model:
            noise = normal(pixels.shape[1:], keys, "reference noise", self.device)
            sigmas = [draw_noise_sigma(rng(*key, "reference sigma")) for key in keys]
            sigma = pixels.new_tensor(sigmas).view(-1, 1, 1, 1, 1)
            pixels = add_reference_noise(pixels, sigma, noise)
        chances = torch.cat([torch.rand(1, generator=rng(*key, "mask dropped")) for key in keys])
        dropped = chances < self.config.text_only
        mask = (batch.mask | dropped[:, None, None, None])[:, None].to(pixels)
        return encode_known(self.vae, pixels, mask, (batch.zero_if_all_masked | dropped).to(self.device))

    def text(self, captions: list[str]) -> Tensor:
        """b L d"""
        ids = self.tokenizer(captions, self.dit.config.max_text_seq_length).to(self.device)
        with self.autocast(), torch.set_grad_enabled(self.train_text and torch.is_grad_enabled()):
            return self.t5(ids)

    def encode(self, batch: Sample, keys: list[Key]) -> tuple[Tensor, Tensor | None]:
        """(clean latents b 16 f h w, condition b c f h w or None), both fp32, sampled from the posteriors.

        batch: pixels and masks, or a `cache.Moments` with the moments found for them before
        """

        def latents(name: str, purpose: str) -> Tensor:
            mean, logvar = moments[name].chunk(2, dim=1)
            noise = normal(mean.shape[1:], keys, purpose, self.device)
            return sample_posterior(mean, logvar, noise, self.vae_config)

        if isinstance(batch, Sample):
            moments = self.clip_moments(batch) | self.condition_moments(batch, keys)
        else:
            moments = {name: tensor.to(self.device) for name, tensor in batch.tensors.items()}
        clean, condition = latents("latents", "posterior").float(), None
        if self.kind == "control":
            condition = latents("control", "control posterior").float()
        if self.kind == "inpaint":
            shape = moments["latents"].shape[1] // 2, *moments["latents"].shape[2:]
            noise = normal(shape, keys, "masked posterior", self.device)
            shown = {name: moments[name] for name in ("masked", "known", "zero")}
            condition = join_condition(**shown, noise=noise, config=self.vae_config).float()
        return clean, condition

    def losses(self, batch: Sample, keys: list[Key], timesteps: Tensor) -> Tensor:
        """One loss for each timestep; there are draws_per_clip of them for each sample."""
        return self.predict(self.encode(batch, keys), batch.caption, keys, timesteps)

    def predict(
        self, encoded: tuple, captions: list[str] | Tensor, keys: list[Key], timesteps: Tensor
    ) -> Tensor:
        """`denoising_losses` of encoded samples, each with as many noises as it has timesteps.

        captions: words, or what T5 made of them, b L d
        """
        draws = len(timesteps) // len(keys)
        text = (self.text(captions) if isinstance(captions, list) else captions.to(self.device)).float()
        inputs = [x if x is None else x.repeat_interleave(draws, 0) for x in (*encoded, text)]
        latents, condition, text = inputs
        noise = normal(latents.shape[1:], repeated(keys, draws), "noise", self.device)
        with self.autocast():
            return denoising_losses(self.dit, self.schedule, latents, noise, timesteps, text, condition)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out samples at fixed timesteps and noise, in all and in each band of timesteps."""
        bands = {}
        for t in BANDS:
            losses = [self.predict(*held, torch.full((len(held[-1]),), t)) for held in self.held_out]
            bands[f"val_loss_{t}"] = torch.cat(losses).mean().item()
        return {"val_loss": sum(bands.values()) / len(bands), **bands}

    def preview(self, model_dir: Path, path: Path, shown: Sample, num_steps: int) -> None:
        """Make a sample from its caption (and control), as gif and as png strip."""
        models = sample.Models(model_dir, self.dtype, self.device)
        models.config = self.dit.config
        there = {"text_encoder": "t5", "vae": "vae"}
        there = {name: vars(self)[attribute] for name, attribute in there.items() if attribute in vars(self)}
        models.loaded = {"transformer": self.dit, **there}  # what a cache made needless comes and goes
        _, f, height, width = shown.pixels.shape
        settings = {"num_frames": f, "height": height, "width": width, "num_steps": num_steps, "seed": 0}
        if self.kind == "control":
            settings["control_video"] = to_uint8(shown.control)
        with self.autocast():
            frames = sample.generate(models, shown.caption, **settings)
        write_clip(frames, path, self.config.fps)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """What learnt, with the transformer's gathered `state`; all else stays the files it was."""
        if self.config.lora_rank:
            from lora import save_lora

            save_lora(self.dit, folder / LORA, state)
        else:
            self.dit.save_pretrained(folder, state=state)
        if self.train_text:
            self.t5.save_pretrained(folder)


class Reconstruction:
    """--train vae: encoder and decoder learn to give back the pixels through a small posterior."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.vae = VideoVAE.from_pretrained(model_dir, torch.float32, device)
        self.vae.encoder.requires_grad_(not config.keep_encoder)
        self.scaling_factor = self.vae.config.scaling_factor  # of the latents that are kept
        self.vae.config.scaling_factor = 1.0  # until it is measured, see `save`

    def plan(self, phase: Phase) -> Plan:
        batch_tokens = self.config.batch_size * phase.max_tokens
        return Plan(phase.resolutions, phase.max_tokens, batch_tokens, self.config.max_frames)

    def begin(self, phase: Phase, held_out: list[tuple[Sample, list[Key]]]) -> dict[str, nn.Module]:
        self.held_out = [batch.pixels for batch, _ in held_out]
        return {"vae": self.vae}

    autocast = Denoising.autocast

    def losses(self, batch: Sample, keys: list[Key], timesteps: Tensor) -> Tensor:
        """Reconstruction, decoded in Fun's chunks, + kl_weight · KL(posterior, normal) a latent number: b."""
        pixels = batch.pixels.to(self.device)
        with self.autocast():
            mean, logvar = (moment.float() for moment in self.vae.moments(pixels))
            noise = normal(mean.shape[1:], keys, "posterior", self.device)
            reconstructed = self.vae.decode(self.vae.posterior(mean, logvar, noise))
        logvar = logvar.clamp(-30, 20)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3, 4))
        return reconstruction_losses(reconstructed, pixels) + self.config.kl_weight * kl

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            return self.vae.encode(pixels.to(self.device))

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            return self.vae.decode(self.encode(pixels)).float().cpu().clamp(-1, 1)

    def validate(self) -> dict[str, float]:
        """PSNR in dB on held-out samples, the mean over all of them and over each size."""
        by_size: dict[str, list[float]] = {}
        for pixels in self.held_out:
            mse = (self.reconstruct(pixels) - pixels).square().mean((1, 2, 3, 4))
            size = f"psnr_{pixels.shape[3]}x{pixels.shape[4]}"
            by_size.setdefault(size, []).extend((10 * torch.log10(4 / mse)).tolist())
        by_size = {"psnr": sum(by_size.values(), []), **dict(sorted(by_size.items()))}
        return {size: sum(values) / len(values) for size, values in by_size.items()}

    def preview(self, model_dir: Path, path: Path, shown: Sample, num_steps: int) -> None:
        """A sample above its reconstruction."""
        pixels = shown.pixels[None]
        both = torch.cat([pixels, self.reconstruct(pixels)], dim=3)
        write_clip(to_uint8(both[0]), path, self.config.fps)

    def save(self, folder: Path, _) -> None:
        """With a scaling factor that gives the latents of the held-out samples a standard deviation of 1."""
        if not self.config.keep_encoder:
            latents = torch.cat([self.encode(pixels).float().flatten() for pixels in self.held_out])
            self.scaling_factor = round(1 / latents.std().item(), 6)
        self.vae.config.scaling_factor = self.scaling_factor
        self.vae.save_pretrained(folder)
        self.vae.config.scaling_factor = 1.0


def write_clip(frames, path: Path, fps: float) -> None:
    for suffix in (".gif", ".png") if RANK == 0 else ():
        write_video(frames, path.with_suffix(suffix), fps)


# ---------------------------------------------------------------- what learns, and how


def learning_rate(phase: Phase, warmup_steps: int, step: int) -> float:
    """Linear warm-up, times half a cosine from lr to final_lr over the phase."""
    progress = min(step / phase.num_steps, 1)
    decayed = phase.final_lr + (phase.lr - phase.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return decayed * min(1, (step + 1) / max(1, warmup_steps))


def clip_norm(config: Config, step: int, norm: float) -> float:
    """The gradient norm to cut to: max_grad_norm, or with wide_clip_steps what the reference's train.py does.

    It allows five times as much at first, falling to max_grad_norm over so many steps; after them a spike of
    more than five times that is cut below it, by as much as it is too large, ten times at most.
    """
    limit, wide_steps = config.max_grad_norm, config.wide_clip_steps
    if wide_steps is None:
        return limit
    limit *= 5 - 4 * min(step / wide_steps, 1)
    is_spike = step > wide_steps and norm > 5 * limit
    return limit / min(norm / limit, 10) if is_spike else limit


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices ... m n with all singular values moved near 1 (0.7 … 1.2), by five Newton-Schulz steps.

    Each step multiplies x by a polynomial of x xᵀ, so steps need only that small square: the product of the
    polynomials is applied to x once, at the end. In float32: bfloat16 would do, but its rounding, enlarged in
    the weakest directions, would depend on how many ranks have added up the gradient.
    """
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if is_wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = identity = torch.eye(x.shape[-2], device=x.device)
    for _ in range(5):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram = factor @ gram @ factor
        product = factor @ product
    x = product @ x
    return x if is_wide else x.mT


class Muon(torch.optim.Optimizer):
    """Turns the momentum of a matrix (or kernel, with its inputs flattened) into the nearest orthogonal one,
    so that all its directions learn alike; from scratch that saves most of the steps. Its updates are as
    large as AdamW's, so one learning rate serves both. (Jordan et al. 2024; arXiv 2502.16982, sec. 2.2)

    Beyond torch.optim.Muon it takes kernels and sharded parameters, whose gradient each rank gathers, and
    works on equal shapes together, several at a time: alone a small matrix does not keep two cores busy.
    """

    def __init__(self, params: Iterable[Tensor], weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        [group] = self.param_groups
        shape = operator.attrgetter("shape")
        learning = sorted((param for param in group["params"] if param.grad is not None), key=shape)
        for _, alike in itertools.groupby(learning, shape):
            while params := list(itertools.islice(alike, 8)):  # no more: whole, they take memory
                update = orthogonal(torch.stack([self.direction(param).flatten(1) for param in params]))
                update *= 0.2 * max(update.shape[1:]) ** 0.5  # to AdamW's root mean square
                for param, change in zip(params, update):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(group["lr"] * spread_like(param, change.view(param.shape)))

    def direction(self, param: Tensor) -> Tensor:
        """Nesterov's momentum, whole."""
        [group] = self.param_groups
        average = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param.grad))
        average.lerp_(param.grad, 1 - group["momentum"])
        return whole(param.grad.lerp(average, group["momentum"])).float()


class Learner:
    """The weights that learn (fp32), their optimizers and their EMA, each by the name component/key."""

    def __init__(self, modules: dict[str, nn.Module], config: Config):
        self.modules, self.config = modules, config
        params = ((f"{name}/{key}", p) for name, m in modules.items() for key, p in m.named_parameters())
        self.params = {name: param for name, param in params if param.requires_grad}
        for param in self.params.values():
            if not isinstance(param, DTensor):
                param.data = param.data.clone()  # not a view of the file it was loaded from
        tables = {m.weight for top in modules.values() for m in top.modules() if isinstance(m, nn.Embedding)}
        matrices, sharded, others = {}, {}, {}  # one fused AdamW cannot have the latter two
        for name, param in self.params.items():
            if config.optimizer == "muon" and param.ndim > 1 and param not in tables:
                matrices[name] = param
            else:
                (sharded if isinstance(param, DTensor) else others)[name] = param
        decay = {"weight_decay": config.weight_decay}
        adamw = {"eps": config.adam_eps, "fused": True}
        self.optimizers, self.moments = [], {}
        for kind, settings, members in (
            (torch.optim.AdamW, adamw, others),
            (torch.optim.AdamW, adamw, sharded),
            (Muon, {}, matrices),
        ):
            if members:
                self.optimizers.append(kind(members.values(), **settings, **decay))
                self.moments |= {name: self.optimizers[-1].state[p] for name, p in members.items()}
        self.ema = {name: p.detach().clone() for name, p in self.params.items()} if config.ema_decay else {}

    def inherit(self, before: "Learner") -> None:
        """Moments and EMA of the phase before; what learns no more becomes its EMA."""
        for name, param in before.params.items():
            if name in self.params:
                self.moments[name].update(before.moments[name])
                self.ema.update({name: before.ema[name]} if before.ema else {})
            elif before.ema:
                param.data.copy_(before.ema[name])

    def clip(self, step: int) -> float:
        """Average the gradient over ranks and shorten it if it is too long; returns its norm before that."""
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        average_over_ranks([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
        kinds = ([g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (True, False))
        norms = [whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
        norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
        limit = clip_norm(self.config, step, norm.item())
        for gradient in gradients:
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1))
        return norm.item()

    def step(self, lr: float) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for param in self.params.values():
            param.grad = None

    def update_ema(self, step: int) -> None:
        """Over the last tenth of the steps at first, so that a short run shows what it learnt."""
        if self.ema:
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
            averages = [part(average) for average in self.ema.values()]
            weights = [part(param.detach()) for param in self.params.values()]
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules hold the EMA weights inside the block."""

        @torch.no_grad()
        def swap() -> None:  # in place, as a sharded parameter cannot be exchanged for another tensor
            for name, average in self.ema.items():
                weight = self.params[name].detach().clone()
                self.params[name].copy_(average)
                average.copy_(weight)

        swap()
        try:
            yield
        finally:
            swap()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint's component folders do not hold. They hold the EMA weights; but LoRA's file has
        alpha/rank multiplied in, which rounds."""
        is_lora = self.config.lora_rank is not None
        state = {f"ema/{name}": average for name, average in self.ema.items()} if is_lora else {}
        for name, param in self.params.items():
            if self.ema or is_lora:
                state[f"weight/{name}"] = param.data
            for key, tensor in self.moments[name].items():  # step, exp_avg, exp_avg_sq; momentum_buffer
                state[f"{key}/{name}"] = tensor
        return state

    def load(self, folder: Path) -> None:
        """The inverse of `state`; the modules have been loaded from the checkpoint, so they hold the EMA."""
        files = checkpoint.weight_files(folder)
        for full_name, tensor in checkpoint.read_tensors(files, list(files)):
            key, _, name = full_name.partition("/")
            param = self.params.get(name)
            if param is None:  # it learnt in the phase that ended here
                continue
            tensor = spread_like(param, tensor)
            if key == "weight":
                param.data.copy_(tensor)
            elif key == "ema":
                self.ema[name].copy_(tensor)
            else:
                self.moments[name][key] = tensor


# ---------------------------------------------------------------- the folder of a run


def make_component(name: str, config: Config, out: Path) -> bool:
    """OUT/name with fresh weights; False if the preset has no config for it."""
    if name == "transformer":
        VideoTransformer(config.dit).save_pretrained(out)
    elif name == "scheduler":
        Schedule(config.schedule).save_pretrained(out)
    elif name == "vae" and config.vae:
        vae = VideoVAE(config.vae)
        # A sharp posterior to start with: at a standard deviation of one the decoder would see only noise.
        vae.encoder.conv_out.conv.bias.data[config.vae.latent_channels :] = -6
        vae.save_pretrained(out)
    elif name == "text_encoder" and config.t5:
        T5Encoder(config.t5).save_pretrained(out)
    elif name == "tokenizer" and config.t5:
        (out / name).mkdir()
        import shapes  # here and below, so that shapes.py can be deleted

        shapes.make_tokenizer().save(str(out / name / "tokenizer.json"))
        notes = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 24}
        notes |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        (out / name / "tokenizer_config.json").write_text(json.dumps(notes) + "\n")
    else:
        return False
    return True


def begin_folder(out: Path, model_dir: Path | None, config: Config, from_scratch: bool) -> None:
    """OUT as a complete checkpoint before the first step: the folders of --model, what it lacks made anew.

    from_scratch: make the component that is trained anew in any case
    raises ValueError if something is lacking for which the preset has no config
    """
    torch.manual_seed(config.seed)
    learns = {"dit": "transformer", "vae": "vae"}[config.train]
    if model_dir and (t5_file := model_dir / "text_encoder" / "config.json").is_file():  # as wide as its text
        width = checkpoint.read_config(T5Config, t5_file).d_model
        config = replace(config, dit=replace(config.dit, text_embed_dim=width))
    for name in checkpoint.COMPONENTS:
        if (out / name).exists():
            shutil.rmtree(out / name)
        if model_dir and (model_dir / name).is_dir() and not (from_scratch and name == learns):
            checkpoint.link(model_dir / name, out / name)
        elif config.train == "dit" or name == learns:
            made = make_component(name, config, out)
            check(made, f"there is no {name}/ to start from; give --model a checkpoint folder that has one")
    checkpoint.write_model_index(out, model_dir, config.in_channels)


@dataclass
class Counters:
    """Where a run is; beside weights, moments and EMA all there is to save."""

    phase: int = 0
    step: int = 0  # of the phase
    total_steps: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch, the next to be used
    log_bytes: int = 0  # length of log.jsonl

    def advance(self, micro_batches: list[tuple[int, Batch]], phases: tuple[Phase, ...]) -> None:
        """Behind a step, and into the next phase (with an epoch of its own) where this one ends."""
        self.step, self.total_steps = self.step + 1, self.total_steps + 1
        for epoch, _ in micro_batches:
            self.epoch, self.batch = epoch, self.batch + 1 if epoch == self.epoch else 1
        if self.step == phases[self.phase].num_steps and self.phase + 1 < len(phases):
            self.phase, self.step, self.epoch, self.batch = self.phase + 1, 0, self.epoch + 1, 0


def begin_or_resume(args: argparse.Namespace, config: Config, settings: dict) -> tuple[Path | None, Counters]:
    """(the checkpoint to go on from, where it is), or (None, the start) after OUT was made ready."""
    newest = checkpoint.newest_checkpoint(args.out)
    if not newest:
        is_model = args.model and args.out.resolve() == args.model.resolve()
        check(not is_model, f"--out {args.out} is the folder to start from; choose another")
        if RANK == 0:
            begin_folder(args.out, args.model, config, args.from_scratch)
        return None, Counters(phase=args.phase - 1)
    check(args.resume, f"{args.out} holds a run ({newest.name}); add --resume, or choose another --out")
    state = checkpoint.read_json(newest / "training" / "state.json")
    for name, value in settings.items():
        before = state["settings"].get(name, value)  # a checkpoint may be older than a setting
        remedy = "repeat the settings to resume, or start a new run from it with --model"
        check(value == before, f"{newest} was trained with {name} = {before}, now it is {value}; {remedy}")
    say(f"resuming from {newest}")
    if RANK == 0:
        checkpoint.publish(args.out, newest, args.keep)  # the kill may have come between saving and this
    return newest, Counters(**state["counters"])


# ---------------------------------------------------------------- data


def shape_record(clip, name: str) -> Record:
    """A `shapes.Clip` as the loader takes it."""
    content = (Path(inspect.getfile(type(clip))), repr(clip))
    return Record(name, clip.scene.caption, clip.num_frames, clip.size, clip.read, content=content)


def open_data(args: argparse.Namespace, config: Config) -> tuple[list[Record], list[Record], dict[str, str]]:
    """(training records, held-out records, files that cannot be opened)

    shapes: half of the samples square, a quarter each 2:3 and 3:2; a third are pictures, which show colours
        and shapes at less cost than clips. Held out are the combinations of `shapes.is_held_out`.
    Files: --val-data, or every tenth sample, at most --num-val.
    """
    if args.data == "shapes":
        import shapes

        num, pictures, seed = config.num_shapes, config.num_shapes // 3, config.seed
        sizes = [(128, 128), (104, 156), (128, 128), (156, 104)]
        clips = shapes.records(num - pictures, seed, sizes=sizes, num_frames=config.max_frames)
        clips += shapes.records(pictures, seed + 1, sizes=sizes, num_frames=1)
        unseen = shapes.records(args.num_val, seed + 2, True, sizes, config.max_frames)
        lists = [[(f"shape {i}: {c.scene.caption()}", c) for i, c in enumerate(cs)] for cs in (clips, unseen)]
        return *[[shape_record(clip, name) for name, clip in named] for named in lists], {}
    records, failures = data.open_records(data.read_metadata(args.data), config.fps)
    if args.val_data:
        held_out, more = data.open_records(data.read_metadata(args.val_data), config.fps)
        return records, held_out[: args.num_val], failures | more
    chosen = set(range(9, len(records), 10)[: args.num_val]) or {len(records) - 1}
    held_out = [record for i, record in enumerate(records) if i in chosen]
    return [r for i, r in enumerate(records) if i not in chosen] or held_out, held_out, failures


# ---------------------------------------------------------------- seeing it learn


def draw_curve(log: Path, path: Path, width: int = 960, height: int = 480) -> None:
    """A log as a picture, on logarithmic scales: the running mean of the losses (blue), and what validation
    found (red): its loss on the same scale, or PSNR on one of its own."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    name = "psnr" if "psnr" in entries[-1] else "val_loss"
    losses, found = ([(e["step"], e[key]) for e in entries if e.get(key, 0) > 0] for key in ("loss", name))
    if len(losses) < 2 or not found:
        return
    steps, values = zip(*losses)
    means = list(zip(steps, itertools.accumulate(values, lambda mean, loss: mean + (loss - mean) / 30)))
    both = means + found
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for label, curve, color in (("loss", means, "#1f5fbf"), (name, found, "#bf1f1f")):
        low, *_, high = sorted(math.log(y) for _, y in (both if name == "val_loss" else curve) * 2)
        up, across = (height - 80) / (high - low or 1), (width - 80) / max(1, steps[-1])
        pen.line([(40 + across * x, height - 40 - up * (math.log(y) - low)) for x, y in curve], color, 2)
        left = 40 if curve is means else width // 2
        pen.text((left, 10), f"{label} {math.exp(high):.4g}", color)
        ends = f"{math.exp(low):.4g}; at step {curve[-1][0]} {curve[-1][1]:.4g}"
        pen.text((left, height - 25), f"{label} {ends}", color)
    with atomic_write(path) as temporary:
        picture.save(temporary)


def gib_used(device: torch.device) -> float:
    """At most so far: of the device's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # counted in KiB


def as_time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


# ---------------------------------------------------------------- a run


class Run:
    """A run: what was asked for, what learns and from which samples, and where it is. Its loop is `train`."""

    def __init__(self, args: argparse.Namespace, config: Config, signals: list[int]):
        self.args, self.config, self.signals, self.out = args, config, signals, args.out
        self.records, self.held_out_records, failures = open_data(args, config)
        self.loader = Loader(self.records, config.seed, failures, args.num_workers, say=say)
        self.loader.say = print  # the above each rank knows, from here on each meets files of its own
        check(self.records and self.held_out_records, "there are no samples to train on")
        device, dtype = choose_device(args)
        settings = {name: str(getattr(args, name)) for name in ("data", "val_data", "num_val")}
        settings |= {"dtype": str(dtype)[6:], **dataclasses.asdict(config)}
        self.settings = json.loads(json.dumps(settings))  # what has to be the same when a run is resumed
        if RANK > 0:
            wait_for_ranks()  # until rank 0 has made the folder ready
        self.resumed, self.at = begin_or_resume(args, config, self.settings)
        if RANK == 0:
            wait_for_ranks()
        kinds = {"dit": Denoising, "vae": Reconstruction}
        self.task = kinds[config.train](config, self.out, device, dtype)
        if config.train == "dit":
            self.task.dit.activation_checkpointing = args.activation_checkpointing
            for block in self.task.dit.transformer_blocks if args.compile else []:
                block.compile()
            if not args.replicate:
                shard(self.task.dit, device)
        needs_control = config.train == "dit" and self.task.kind == "control"
        for record in self.records + self.held_out_records if needs_control else []:
            check(record.read_control, f"{record.name} has no control_file_path, which a control model needs")
        self.log_file = self.out / "log.jsonl"
        if RANK == 0:
            self.log_file.touch()
            os.truncate(self.log_file, min(self.at.log_bytes, self.log_file.stat().st_size))  # as it was then
        steps_left = sum(phase.num_steps for phase in config.phases[self.at.phase :]) - self.at.step
        self.num_steps = min(args.num_steps or math.inf, self.at.total_steps + steps_left)
        self.learner, self.pace = None, 0.0  # seconds a step, lately

    def keys(self, epoch: int, batch: Batch) -> list[Key]:
        return [(self.config.seed, epoch, index) for index in batch.indices]

    def batches(self, records: list[Record], epoch: int) -> list[tuple[int, Batch]]:
        """(epoch, micro-batch) for all of an epoch."""
        return [(epoch, batch) for batch in epoch_batches(records, self.plan, self.config.seed, epoch)]

    def begin_phase(self) -> None:
        """Held-out samples in the shapes of this phase, and what learns in it: resumed, or from the last."""
        self.phase = self.config.phases[self.at.phase]
        self.plan = self.task.plan(self.phase)
        learns_text = [phase.train_text for phase in self.config.phases[self.at.phase :]]
        if self.args.cache_latents:
            from cache import LatentCache  # here, so that cache.py can be deleted

            cache = LatentCache(self.args.cache_latents, self.task, with_text=not any(learns_text))
            self.loader.read, self.loader.join = cache.read, cache.join
        reading = {"read": self.loader.read, "join": self.loader.join}
        loader = Loader(self.held_out_records, self.config.seed, max_failures=1.0, **reading)
        todo = self.batches(self.held_out_records, VALIDATION_EPOCH)  # the same crops and draws each time
        held_out = [(samples, self.keys(*micro_batch)) for *micro_batch, samples in loader.batches(todo)]
        before, self.learner = self.learner, Learner(self.task.begin(self.phase, held_out), self.config)
        if before:
            self.learner.inherit(before)
        elif self.resumed:
            self.learner.load(self.resumed / "training")

    def deal(self) -> Iterator[list[tuple[int, Batch]]]:
        """Global batches from where the run is on, through all epochs: lists of (epoch, micro-batch).

        The list is fixed by plan and seed; of each, a rank works on every NUM_RANKS-th.
        """
        epochs = (self.batches(self.records, epoch) for epoch in itertools.count(self.at.epoch))
        micro_batches = itertools.islice(itertools.chain.from_iterable(epochs), self.at.batch, None)
        while True:
            yield list(itertools.islice(micro_batches, self.phase.global_batch // self.config.batch_size))

    def describe(self) -> None:
        """What will happen, before it does."""
        phase, plan, task, draws = self.phase, self.plan, self.task, self.config.draws_per_clip
        size = sum(param.numel() for param in self.learner.params.values())
        say(
            f"training {', '.join(self.learner.modules)}: {size / 1e6:.2f} M parameters on {task.device} in "
            f"{str(task.dtype)[6:]} -> {self.out}\n"
            f"{len(self.records)} samples; a step is {phase.global_batch // self.config.batch_size} "
            f"micro-batches of up to {plan.batch_tokens} video tokens, x {draws} draws, on {NUM_RANKS} "
            f"rank{'s' * (NUM_RANKS > 1)}\n"
            f"{phase.num_steps} steps at resolutions {', '.join(map(str, phase.resolutions))}, up to "
            f"{phase.max_tokens} tokens and {plan.max_frames} frames; the shapes of epoch {self.at.epoch}:\n"
            + data.bucket_table([batch for _, batch in self.batches(self.records, self.at.epoch)])
        )

    def check_finite(self, value: float, micro_batches: list[tuple[int, Batch]]) -> None:
        names = [self.records[index].name for _, batch in micro_batches for index in batch.indices]
        check(math.isfinite(value),
              f"step {self.at.total_steps + 1}: loss or gradient is not finite; the weights are untouched. "
              f"Lower --lr, or look at the files of this batch: {', '.join(names)}")  # fmt: skip

    def log(self, entry: dict, line: str) -> None:
        if RANK > 0:
            return
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            remedy = "make room and --resume"
            raise OSError(f"cannot write {self.log_file} ({error.strerror}); {remedy}") from None
        print(line, flush=True)

    def log_step(self, micro_batches: list, seconds: float, waited: float, **numbers: float) -> None:
        """numbers: loss, grad_norm, lr"""
        num_tokens = sum(batch.bucket.tokens * len(batch.indices) for _, batch in micro_batches)
        entry = {"step": self.at.total_steps + 1, "phase": self.at.phase + 1, "epoch": micro_batches[-1][0]}
        entry |= numbers | {"tokens_per_s": num_tokens * self.config.draws_per_clip / seconds}
        entry |= {"wait": waited / seconds, "gib": gib_used(self.task.device), "seconds": seconds}
        self.pace = 0.9 * self.pace + 0.1 * seconds if self.pace else seconds
        left = as_time(self.pace * (self.num_steps - entry["step"]))
        text = ("phase {phase} step {step}/{of}  loss {loss:.4f}  grad {grad_norm:.3f}  lr {lr:.2e}  "
                "{tokens_per_s:.0f} tokens/s  wait {wait:.0%}  {gib:.2f} GiB  {left} left")  # fmt: skip
        self.log(entry, text.format(**entry, of=self.num_steps, left=left))

    def validate(self) -> None:
        with self.learner.averaged():
            result = self.task.validate()
        step, shown = self.at.total_steps, "  ".join(f"{name} {value:.4g}" for name, value in result.items())
        self.log({"step": step, **result}, f"held out at step {step}: {shown}")
        if RANK == 0:
            draw_curve(self.log_file, self.out / "loss.png")

    def preview(self) -> None:
        loader = Loader(self.held_out_records, self.config.seed, max_failures=1.0)
        batches = self.batches(self.held_out_records, VALIDATION_EPOCH)
        for i, (epoch, batch) in enumerate(batches[: self.args.num_previews]):
            shown = loader.load(batch.bucket, epoch, batch.indices[0])
            path = self.out / "previews" / f"step-{self.at.total_steps:06d}-{i}"
            with self.learner.averaged():
                self.task.preview(self.out, path, shown, self.args.preview_steps)
            say(f"{path}.gif and .png: {shown.caption}")

    def save(self) -> None:
        """A checkpoint: folders like those of --model with EMA weights, and training/ with all else."""
        self.at.log_bytes = self.log_file.stat().st_size
        state = {"counters": dataclasses.asdict(self.at), "settings": self.settings}
        place = checkpoint.new_checkpoint(self.out, self.at.total_steps, self.args.keep)
        with place if RANK == 0 else contextlib.nullcontext() as folder:
            training = gather(self.learner.state())  # written first: of one rank it is no copy
            if RANK == 0:
                checkpoint.save_weights(training, folder / "training", "state")
                (folder / "training" / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            with self.learner.averaged():
                weights = gather(self.task.dit.state_dict() if self.config.train == "dit" else {})
                if RANK == 0:
                    self.task.save(folder, weights)
        wait_for_ranks()  # as torchrun ends all when one has ended, also one that is still writing
        say(f"saved step {self.at.total_steps} in {self.out / 'checkpoints'}")


# ---------------------------------------------------------------- the command line


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device asked for or the best there is; bfloat16 where it computes in it, else float32."""
    device = find_device(args.device)
    dtype = args.dtype or ("bfloat16" if computes_bfloat16(device) else "float32")
    return device, getattr(torch, dtype)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """The command line, and the preset with what it changes."""
    description = "Train the VAE, or train and fine-tune the transformer, of CogVideoX and CogVideoX-Fun."
    parser = sample.Parser(prog="train.py", description=description, allow_abbrev=False,
                           formatter_class=HelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="tiny", help="settings to start from, see Config")
    add("--train", choices=["dit", "vae"], default="dit", help="what learns")
    add("--data", default="shapes", help="metadata .json or .jsonl, a folder, or shapes: the drawn world")
    add("--val-data", help="held-out samples; else some of --data")
    add("--model", help="folder or hub id to start from; what it lacks is made from the preset")
    add("--from-scratch", action="store_true", help="new weights for what learns, even where --model has it")
    add("--out", type=Path, help="folder to write; default runs/PRESET or runs/PRESET-vae")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--phase", type=int, default=1, help="the phase to start with, 1 … 3")
    add("--num-steps", type=int, help="stop after so many steps in all; else at the end of the last phase")
    add("--phase-steps", type=int, nargs="+", help="steps of each phase (the preset's)")
    add = parser.add_argument_group("in place of the preset's values, in every phase").add_argument
    add("--resolutions", type=int, nargs="+", help="base sizes")
    add("--max-tokens", type=int, help="tokens of a clip")
    add("--num-frames", type=int, dest="max_frames", help="most frames of a clip")
    add("--fps", type=float, help="frames a second to read files at")
    add("--batch-size", type=int, help="clips of max-tokens in a micro-batch; more where they are smaller")
    add("--grad-accum", type=int, help="micro-batches in a step")
    add("--draws-per-clip", type=int, help="noises and timesteps for each encoded clip")
    add("--timestep-shift", type=float, help="above 1: more of the noisy timesteps")
    add(
        "--text-only",
        type=float,
        help="share of inpaint samples that get nothing but text, beyond the report's",
    )
    add("--lr", type=float, nargs="+", help="constant learning rate; or first and last of half a cosine")
    add("--optimizer", choices=["adamw", "muon"])
    add("--warmup-steps", type=int)
    add("--weight-decay", type=float)
    add("--max-grad-norm", type=float)
    add("--ema-decay", type=float, help="0: none")
    add("--kl-weight", type=float)
    add("--keep-encoder", action="store_true", default=None, help="--train vae: only the decoder learns")
    add("--lora-rank", type=int, help=f"learn LoRA of this rank: OUT/{LORA}, for sample.py --lora")
    add("--lora-alpha", type=float, help="how much it counts, as alpha/rank; the rank if not given")
    add("--in-channels", type=int, help="16, 32 or 33: grow the transformer's input")
    add("--position", choices=POSITIONS, help="sincos positions off the native grid")
    add("--num-shapes", type=int, help="clips in an epoch of --data shapes")
    add("--cached-draws", type=int, help="masks kept of each clip, with --cache-latents; 4")
    add("--seed", type=int)
    add("--dtype", choices=["bfloat16", "float32"], help="to compute in; bfloat16 where it is fast")
    add("--num-val", type=int, default=16, help="samples held out")
    add = parser.add_argument_group("without influence on the numbers").add_argument
    add("--device", help="default: the best there is")
    add("--activation-checkpointing", nargs="?", const="full", choices=list(CHECKPOINTING),
        help="less memory, a third more time; attention: keep its output, a little more of both")  # fmt: skip
    add("--cache-latents", type=Path, metavar="DIR", help="keep what VAE and T5 say of the data")
    add("--compile", action="store_true", help="compile the transformer's blocks")
    add(
        "--replicate",
        action="store_true",
        help="no FSDP: each rank has the whole transformer, if it is small",
    )
    add("--num-workers", type=int, default=4, help="threads that load data")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--keep", type=int, default=3, help="how many checkpoints stay")
    add("--val-every", type=int, default=250, help="steps between validations")
    add("--preview-every", type=int, default=1000, help="steps between previews")
    add("--num-previews", type=int, default=3)
    add("--preview-steps", type=int, default=25, help="sampling steps of a preview")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / (args.preset + ("-vae" if args.train == "vae" else ""))
    if not args.model and args.preset == "tiny" and args.train == "dit":
        args.model = "runs/tiny-vae"  # what --train vae makes
        remedy = "run --train vae first, or give --model a folder with vae/"
        check(Path(args.model).is_dir(), f"there is no {args.model} yet; {remedy}")
    args.model = checkpoint.find_model(args.model) if args.model else None
    return args, make_config(args)


AT_LEAST_ONE = """batch_size draws_per_clip max_frames fps num_shapes save_every val_every preview_every keep
num_val num_workers preview_steps num_steps grad_accum max_tokens lora_rank cached_draws""".split()


def make_config(args: argparse.Namespace) -> Config:
    """The preset with the command line's changes; ValueError for what cannot be."""
    preset = PRESETS[args.preset][args.train]
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = {field.name for field in dataclasses.fields(Config)} - {"phases", "train"}
    config = replace(preset, **{name: given[name] for name in names & given.keys()})
    rates = args.lr or [None]
    check(len(rates) <= 2, f"--lr takes one number or two, the first and the last, not {len(rates)}")
    changes = {"lr": rates[0], "final_lr": rates[-1], "max_tokens": args.max_tokens}
    changes["resolutions"] = args.resolutions and tuple(args.resolutions)
    changes["global_batch"] = args.grad_accum and config.batch_size * args.grad_accum
    changes["train_text"] = False if args.lora_rank else None  # its file holds the transformer's part alone
    changes = {name: value for name, value in changes.items() if value is not None}
    steps = args.phase_steps or [phase.num_steps for phase in config.phases]
    phases = [replace(phase, num_steps=n, **changes) for phase, n in zip(config.phases, steps)]

    count = len(phases)
    for name in AT_LEAST_ONE:
        value = given.get(name, 1)
        check(value >= 1, f"--{name.replace('_', '-')} {value} should be at least 1")
    check(len(steps) <= count, f"--phase-steps has {len(steps)} numbers, {args.preset} {count} phases")
    check(min(steps) >= 1, f"--phase-steps {min(steps)} should be at least 1")
    check(1 <= args.phase <= count, f"--phase {args.phase} is not among the {count} phases of {args.preset}")
    nearest = config.max_frames // 4 * 4 + 1
    is_legal = nearest == config.max_frames
    check(is_legal, f"--num-frames {config.max_frames}; the VAE needs 4k+1, try {nearest}")
    check(config.timestep_shift > 0, f"--timestep-shift {config.timestep_shift} should be above 0; 1 is none")
    check(0 <= config.text_only <= 1, f"--text-only {config.text_only} is outside 0 … 1")
    check(0 <= config.ema_decay < 1, f"--ema-decay {config.ema_decay} should be at least 0 and below 1")
    for size in (size for phase in phases for size in phase.resolutions):
        check(size >= 16 and size % 16 == 0, f"--resolutions {size} is not a multiple of 16")
    for phase in phases:
        clips, part = phase.global_batch, config.batch_size
        remedy = "give --grad-accum"
        check(
            clips % part == 0, f"a step of {clips} clips cannot be cut into micro-batches of {part}; {remedy}"
        )
        num = clips // part
        remedy = f"give --grad-accum a multiple of {NUM_RANKS}"
        check(
            num % NUM_RANKS == 0,
            f"the {num} micro-batches of a step cannot be dealt to {NUM_RANKS} ranks; {remedy}",
        )
    is_dit = config.train == "dit"
    check(is_dit or not args.cache_latents, "--cache-latents is for --train dit; leave it out")
    draws = config.cached_draws
    check(args.cache_latents or not draws, f"--cached-draws {draws} needs --cache-latents; give both or none")
    if args.cache_latents and not draws:
        config = replace(config, cached_draws=4)  # each costs encoding every clip once more; not tuned
    remedy = "give --train vae and a --model, and leave out --from-scratch"
    keeps = not is_dit and args.model and not args.from_scratch
    check(keeps or not config.keep_encoder, f"--keep-encoder is for the VAE there is; {remedy}")
    check(is_dit or config.draws_per_clip == 1, "--draws-per-clip is for --train dit; leave it out")
    fits_lora = is_dit and not config.in_channels
    remedy = "leave out --train vae and --in-channels"
    check(fits_lora or not config.lora_rank, f"--lora-rank fine-tunes a transformer as it is; {remedy}")
    has_rank = config.lora_rank or config.lora_alpha is None
    check(has_rank, f"--lora-alpha {config.lora_alpha} needs --lora-rank; give it, or leave both out")
    return replace(config, phases=tuple(phases))


# ---------------------------------------------------------------- the loop


def train(run: Run) -> bool:
    """All phases, from where the run is to its end or to a signal; returns whether it was one."""
    args, config, at, task = run.args, run.config, run.at, run.task
    stop = False
    while at.total_steps < run.num_steps and not stop:
        run.begin_phase()
        run.describe()
        phase, learner = run.phase, run.learner
        if at.total_steps == 0:
            run.validate()  # where it starts
        todo, ahead = itertools.tee(run.deal())
        loaded = run.loader.batches(
            mine for micro_batches in ahead for mine in micro_batches[RANK::NUM_RANKS]
        )

        for micro_batches in todo:  # a global batch, and so one step
            start, waited, loss = time.perf_counter(), 0.0, 0.0
            keys = [run.keys(epoch, batch) for epoch, batch in micro_batches]
            all_keys = repeated(sum(keys, []), config.draws_per_clip)
            timesteps = stratified_timesteps(all_keys, config.timestep_shift)
            parts = timesteps.split([len(part) * config.draws_per_clip for part in keys])
            share_of_rank = list(zip(micro_batches, keys, parts))[RANK::NUM_RANKS]
            for micro_batch, part, t in share_of_rank:
                asked = time.perf_counter()
                _, _, samples = next(loaded)  # decoded in threads, ahead of their use
                waited += time.perf_counter() - asked
                share = task.losses(samples, part, t).sum() / len(timesteps)
                run.check_finite(share.item(), [micro_batch])
                # The gradient is the mean over all samples, however they are cut; over ranks FSDP averages.
                (share * NUM_RANKS).backward()
                loss += share.item()
            grad_norm = learner.clip(at.total_steps)
            run.check_finite(grad_norm, micro_batches)
            lr = learning_rate(phase, config.warmup_steps, at.step)
            learner.step(lr)
            learner.update_ema(at.total_steps)
            loss, stop = sum_over_ranks(torch.tensor([loss, len(run.signals)], dtype=torch.float64)).tolist()
            seconds = time.perf_counter() - start
            run.log_step(micro_batches, seconds, waited, loss=loss, grad_norm=grad_norm, lr=lr)
            at.advance(micro_batches, config.phases)

            is_last = at.total_steps == run.num_steps or at.step == 0  # of the run, or of the phase
            if is_last or at.total_steps % args.val_every == 0:
                run.validate()
            if is_last or at.total_steps % args.preview_every == 0:
                run.preview()
            if is_last or stop or at.total_steps % args.save_every == 0:
                run.save()
            if is_last or stop:
                break
        loaded.close()
    return bool(stop)


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 at the end, 2 with one line on stderr for an error, 128 + n after signal n."""
    signals: list[int] = []

    def stop(number: int, _) -> None:
        if signals:
            raise KeyboardInterrupt  # the second time at once
        signals.append(number)
        say("saving after this step …")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    store = join_ranks()
    try:
        args, config = parse(argv)
        run = Run(args, config, signals)
        stopped = train(run)
        following = f"sample.py PROMPT --model {args.out}"
        if config.lora_rank:
            following += f" --lora {args.out / LORA}"
        if config.train == "vae":
            following = f"train.py --preset {args.preset} --model {args.out}"  # a transformer for its latents
        say(f"{'stopped' if stopped else 'done'}: {run.at.total_steps} steps; now python {following}")
        return 128 + (signals or [signal.SIGTERM])[0] if stopped else 0
    except (Exception, KeyboardInterrupt) as error:
        if store and store.add("failed", 1) > 1:
            return 2  # an error of one rank is soon one of all, but the first alone knows why
        message = in_one_line(
            error, "try a smaller --batch-size or --max-tokens, or --activation-checkpointing"
        )
        if message is None:
            raise
        print(f"train.py: error: {message}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    status = main()
    if dist.is_initialized() and status != 2:  # an error may have left others in the middle of something
        dist.destroy_process_group()
    sys.exit(status)
