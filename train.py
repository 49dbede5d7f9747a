"""Train the diffusion transformer, or the video VAE, from nothing or from a checkpoint: one loop for both.

    records ─data.Epochs─► a step: a list of micro-batches, each of one shape, dealt to the ranks
    micro-batch ─Encoders, or cache─► posteriors, condition, text ─noise at drawn timesteps─► a loss for each
    losses ─sum ÷ noises of a step─► gradient ─clip─► AdamW ─► weights ─lerp─► EMA ─► validate, preview, save

Randomness has three levels. All about a sample is a function of (seed, draw, sample), see data.Epochs; the
noise of a micro-batch of (seed, epoch, its number), drawn at once on the device; the timesteps of a step of
(seed, step). So the state of a run is a few counters beside weights, moments and EMA: a run that is
killed and resumed ends with the same bytes, and the number of ranks changes only the rounding of sums.

    OUT/  transformer/ vae/ text_encoder/ …    a checkpoint of EMA weights: sample.py --model OUT
          lora.safetensors                     in place of new weights, with --lora-rank
          checkpoints/step-000200/             the same, and training/ for --resume
          log.jsonl  loss.png  previews/

Where to look: the loop is `train`, near the end; the loss `denoising_losses`; masks `inpaint.random_mask`; a
new preset goes into `PRESETS`. The VAE's own training is train_vae.py.
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
import os
import shutil
import signal
import sys
import time
import typing
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn

import checkpoint
import data
import runtime
import sample
from data import Epochs, Key, Loader, Micro, Plan, Record, Sample, load_sample, pixels_of
from diffusion import NUM_TIMESTEPS, Schedule, ScheduleConfig
from inpaint import MASK_KINDS, add_reference_noise, draw_noise_sigma, encode_masked, join_condition
from kinds import max_num_frames, model_kind
from media import to_pixels, write_video
from optim import Optim, clip_norm, learning_rate
from runtime import NUM_RANKS, RANK, atomic_write, gather, generator, say, sum_over_ranks, wait_for_ranks
from sizes import check_frames, check_side
from text_encoder import T5Config, T5Encoder, Tokenizer
from transformer import (
    CHECKPOINTING,
    TransformerConfig,
    VideoTransformer,
    grow_input_channels,
)
from vae import VAEConfig, VideoVAE, sample_posterior

Batch = dict[str, Tensor]  # a micro-batch as tensors, see Encoders and cache.py
VALIDATION = -1  # the epoch of held-out samples, so that they never share a draw with training
BANDS = (100, 300, 500, 700, 900)  # timesteps validated at: the middles of five bands
LORA = "lora.safetensors"


# ---------------------------------------------------------------- what a run is


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one token budget."""

    resolutions: tuple[int, ...]  # base sizes, mixed
    max_tokens: int  # of one clip
    global_batch: int  # clips of max_tokens in a step; cheaper shapes come in larger numbers
    num_steps: int
    lr: float
    final_lr: float  # reached by half a cosine; the same as lr: constant
    train_text: bool = False  # the text encoder as well
    pictures: bool = False  # one frame of each sample alone


@dataclass(frozen=True)
class Config:
    """All settings the numbers of a run depend on. Each can be changed by a flag or by --set FIELD=VALUE."""

    phases: tuple[Phase, ...]
    train: str = "dit"  # or "vae"
    max_frames: int = 49
    fps: float = 8.0
    batch_size: int = 1  # clips of max_tokens in a micro-batch; global_batch / batch_size of them are a step
    noises_per_clip: int = 1  # with a timestep each: encoding a clip may cost more than a small transformer
    timestep_shift: float = 1.0  # above 1: more of the noisy timesteps, see `stratified_timesteps`
    masks: dict[str, float] = field(default_factory=lambda: dict(MASK_KINDS))  # kinds and their shares
    text_only: float = 0.0  # share of samples whose mask becomes everything, beyond those of `masks`
    optimizer: str = "adamw"  # or "muon": that for matrices, AdamW for vectors and tables, see optim.py
    warmup_steps: int = 100  # in each phase
    weight_decay: float = 0.03
    adam_eps: float = 1e-10
    max_grad_norm: float = 0.05
    wide_clip_steps: int | None = None  # the reference's clipping over time, see `clip_norm`; None: constant
    ema_decay: float = 0.9999  # less at first, see `Optim.update_ema`; 0: no EMA
    position: str | None = None  # sincos off the native grid, see transformer.position_rule; None: as it is
    in_channels: int | None = None  # of the transformer, grown with zeros; None: as it is
    lora_rank: int | None = None  # learn thin matrices beside the transformer's, not its weights; see lora.py
    lora_alpha: float | None = None  # None: the rank
    cached_draws: int = 0  # of each sample, taken in turn by the epochs, see cache.py; 0: nothing is kept
    keep_on_device: bool = False  # the cache, in place of a folder
    kl_weight: float = 1e-5  # of --train vae, as the next two
    equivariance: float = 0.0  # weight of EQ-VAE's penalty, see train_vae.py
    keep_encoder: bool = False  # only the decoder learns: transformers trained on its latents stay valid
    replicate: bool = False  # each rank has the whole transformer, no FSDP
    compile_on_gpu: bool = False  # as if --compile were given, where there is one
    save_dtype: str | None = None  # of the weights in OUT when the run has ended; None: float32
    seed: int = 0
    num_shapes: int = 20_000  # samples in an epoch of --data shapes
    dit: TransformerConfig = field(default_factory=TransformerConfig)  # if there is none yet
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # likewise
    vae: VAEConfig | None = None  # likewise; None: there has to be one
    t5: T5Config | None = None


def sizes_from(low: int, high: int = 1280, step: int = 128) -> tuple[int, ...]:
    return tuple(range(low, high + 1, step))


# The reference's commands (README_TRAIN.md, scripts/train.sh): lr 2e-5, constant after 100 steps of warm-up,
# and the weight decay, eps and norm that are defaults above; its train.py clips wider at first.
FUN_2B = Config(
    phases=(  # resolutions, tokens, clips a step, steps, lr
        Phase(sizes_from(512), 13312, 128, 7000, 2e-5, 2e-5),
        Phase(sizes_from(768), 29952, 256, 6500, 2e-5, 2e-5),
        Phase(sizes_from(1024), 53248, 128, 5000, 2e-5, 2e-5),
    ),
    wide_clip_steps=1000,
    dit=TransformerConfig(in_channels=33),
)
FUN_5B = replace(
    FUN_2B,
    dit=replace(FUN_2B.dit, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
)
FUN_VAE = replace(
    FUN_2B,
    train="vae",
    phases=(Phase(sizes_from(512), 13312, 8, 7000, 2e-5, 2e-6),),
    max_grad_norm=1.0,
    wide_clip_steps=None,
)
# The report at an eighth of its scale, for ten minutes of an H200. Pictures carry the first part: cheap, and
# all there is of shape and colour.
TINY = Config(
    phases=(
        Phase((64, 96), 40, 1024, 1800, 1.5e-3, 1.5e-3, train_text=True, pictures=True),
        Phase((64, 96), 80, 1024, 4000, 1.5e-3, 8e-4, train_text=True),
        Phase((64, 96, 128), 180, 1024, 1800, 8e-4, 4e-4),
        Phase((64, 96, 128), 320, 1024, 1100, 4e-4, 1e-5),
    ),
    max_frames=17,
    batch_size=1024,  # one micro-batch a step: with four, Python took four fifths of an H200's time
    timestep_shift=1.5,
    text_only=0.2,
    adam_eps=1e-8,
    weight_decay=0.01,
    max_grad_norm=1.0,
    ema_decay=0.999,
    cached_draws=1,
    keep_on_device=True,
    save_dtype="bfloat16",
    compile_on_gpu=True,
    num_shapes=20_000,
    dit=TransformerConfig(
        in_channels=33,
        num_attention_heads=4,
        num_layers=8,
        time_embed_dim=128,
        text_embed_dim=128,
        max_text_seq_length=24,
        sample_width=8,
        sample_height=8,
        sample_frames=17,
        spatial_interpolation_scale=0.9375,  # at 1.875 a table of 4x4 hides the aspect
    ),
    vae=VAEConfig(
        block_out_channels=[24, 32, 48, 64],
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=256,
        sample_width=256,
        scaling_factor=1.0,
    ),
    t5=T5Config(vocab_size=27, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),  # 27: shapes.WORDS
    schedule=ScheduleConfig(extra={"guidance_scale": 2.0}),  # 3 makes worse end pictures, 6 worse shapes
)
# Three minutes more. Short clips first: their steps are cheap. The KL term keeps channels near zero and
# leaves noise in what pixels do not need.
TINY_VAE = replace(
    TINY,
    train="vae",
    batch_size=64,
    optimizer="muon",  # AdamW needs about twice the steps here
    cached_draws=0,
    keep_on_device=False,
    weight_decay=0.0,
    timestep_shift=1.0,
    text_only=0.0,
    kl_weight=5e-4,
    equivariance=0.25,
    phases=(
        Phase((64,), 48, 64, 500, 5e-3, 2.5e-3),
        Phase((64, 64, 96, 128), 96, 64, 300, 2.5e-3, 1e-5),
    ),
)


def scaled_down(config: Config, clips: int, num_shapes: int) -> Config:
    """The same preset for a CPU: `clips` times fewer clips in a step and in a micro-batch."""
    phases = [replace(phase, global_batch=phase.global_batch // clips) for phase in config.phases]
    batch_size = max(1, config.batch_size // clips)
    return replace(config, phases=tuple(phases), batch_size=batch_size, num_shapes=num_shapes)


PRESETS = {  # --preset, --train
    "tiny": {"dit": TINY, "vae": TINY_VAE},
    "tiny-cpu": {"dit": scaled_down(TINY, 16, 10_000), "vae": scaled_down(TINY_VAE, 8, 10_000)},
    "fun-2b": {"dit": FUN_2B, "vae": FUN_VAE},
    "fun-5b": {"dit": FUN_5B, "vae": FUN_VAE},
}


# ---------------------------------------------------------------- where the weights lie


def place(
    dit: VideoTransformer, device: torch.device, dtype: torch.dtype, replicate: bool, offload: bool
) -> None:
    """Move a transformer to where it computes: what learns in float32, frozen matrices in the run's dtype.

    Autocast would round the frozen matrices at each use; stored so, the same bytes come out. Of several ranks
    each has a part of every parameter and gathers a block while it computes (FSDP2). offload: the parts, and
    with them gradients and moments, stay in the host's memory.
    """
    for param in dit.parameters():
        is_frozen_matrix = not param.requires_grad and param.ndim > 1
        param.data = param.data.to("cpu" if offload else device, dtype if is_frozen_matrix else torch.float32)
    for name, buffer in dit.named_buffers():
        dit.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer.to(device))
    if offload or (NUM_RANKS > 1 and not replicate):
        shard(dit, device, offload)


def shard(dit: VideoTransformer, device: torch.device, offload: bool) -> None:
    """FSDP2 over all ranks, also over one where it is wanted for its offloading."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    runtime.join_ranks(alone=True)
    mesh = init_device_mesh(device.type, (NUM_RANKS,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in (*dit.transformer_blocks, dit):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # it is not written to
    register_fsdp_forward_method(dit, "project_text")


# ---------------------------------------------------------------- timesteps and the loss


def stratified_timesteps(seed: int, step: int, count: int, shift: float = 1.0) -> Tensor:
    """One timestep for each noise of a step: 0 … 999 is cut into so many parts, each has one.

    Each alone is uniform; together they cover all noise levels, so the loss of a step jumps less. Which part
    a noise gets is shuffled, as neighbours share a shape. A shift s moves t/1000 = u to su / (1 + (s − 1)u),
    so with s > 1 there are more noisy ones, where text decides. (Esser et al. 2024, arXiv 2403.03206, eq. 23)
    """
    draws = generator(seed, step, "timesteps")
    parts = torch.randperm(count, generator=draws)
    places = torch.rand(count, generator=draws, dtype=torch.float64)
    uniform = (parts + places) / count
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    return (shifted * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)


def denoising_losses(
    dit: VideoTransformer,
    schedule: Schedule,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: Tensor,
    condition: Tensor | None,
) -> Tensor:
    """Velocity MSE in fp32, one number a noise: mean (velocity − target)².

    latents, noise: b 16 f h w    timesteps: b    text: b L d    condition: b c f h w or None    returns: b
    """
    noisy = schedule.add_noise(latents, noise, timesteps)
    velocity = dit(noisy, timesteps, text, condition)
    target = schedule.velocity(latents, noise, timesteps)
    return (velocity.float() - target.float()).square().mean((1, 2, 3, 4))


# ---------------------------------------------------------------- samples to tensors


class Encoders:
    """The frozen VAE and T5, each loaded when it is first asked and let go by `free`."""

    def __init__(
        self,
        model_dir: Path,
        config: TransformerConfig,
        dtype: torch.dtype,
        device: torch.device,
        stream: bool = False,
    ):
        """config: of the transformer, which decides what it is shown
        stream: T5's layers are read from the disk at each call, for a few large calls before training
        """
        self.model_dir, self.config, self.dtype, self.device = model_dir, config, dtype, device
        self.stream = stream
        self.kind = model_kind(config)
        self.tokenizer = Tokenizer.from_pretrained(model_dir)

    @functools.cached_property
    def vae(self) -> VideoVAE:
        vae = VideoVAE.from_pretrained(self.model_dir, self.dtype, self.device).requires_grad_(False)
        with contextlib.suppress(ModuleNotFoundError):  # so that vae_fast.py can be deleted
            import vae_fast

            vae_fast.speed_up(vae)
        return vae

    @functools.cached_property
    def t5(self) -> T5Encoder:
        t5 = T5Encoder.from_pretrained(self.model_dir, self.dtype, self.device, stream=self.stream)
        return t5.requires_grad_(False)

    def free(self) -> None:
        for name in ("vae", "t5"):
            vars(self).pop(name, None)

    def ids(self, captions: list[str]) -> Tensor:
        """b L"""
        return self.tokenizer(captions, self.config.max_text_seq_length).to(self.device)

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """b L d"""
        return self.t5(self.ids(captions))

    @torch.no_grad()
    def clips(self, samples: list[Sample]) -> Batch:
        """Samples of one shape: posteriors of the clips b 32 f' h' w', means and then log-variances, and what
        the model is shown beside the noisy latents: the control clip's, or what `encode_masked` gives."""
        pixels = pixels_of(samples, self.device)
        batch = {"latents": torch.cat(self.vae.moments(pixels), dim=1)}
        if self.kind == "control":
            control = to_pixels(torch.stack([one.control for one in samples]).to(self.device))
            batch["control"] = torch.cat(self.vae.moments(control), dim=1)
        if self.kind == "inpaint":
            if self.config.add_noise_in_inpaint_model:
                pixels = torch.stack([self.blurred(p, one.key) for p, one in zip(pixels, samples)])
            mask = torch.stack([one.mask for one in samples])[:, None].to(self.device)
            zero = torch.tensor([one.zero_if_all_masked for one in samples], device=self.device)
            batch |= encode_masked(self.vae, pixels, mask, zero)
        return batch

    def blurred(self, pixels: Tensor, key: Key) -> Tensor:
        """A sample's pixels with the noise that V1.1 and V1.5 are trained to see on what is known."""
        draws = generator(*key, "reference noise", device=self.device)
        noise = torch.randn(pixels.shape, generator=draws, device=self.device)
        return add_reference_noise(pixels, draw_noise_sigma(generator(*key, "reference sigma")), noise)


# ---------------------------------------------------------------- --train dit


class Denoising:
    """The transformer, and in some phases the text encoder, learn; the VAE is fixed."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device, dtype: torch.dtype):
        self.config, self.model_dir, self.device, self.dtype = config, model_dir, device, dtype
        self.dit = VideoTransformer.from_pretrained(model_dir, dtype=None)
        if config.in_channels:
            grow_input_channels(self.dit, config.in_channels)
        if config.lora_rank:
            from lora import add_lora  # here and in `save` only: without the file all else still works

            torch.manual_seed(config.seed)  # where its matrices start
            add_lora(self.dit, config.lora_rank, config.lora_alpha)
        self.kind = model_kind(self.dit.config)
        if self.kind == "image":
            raise ValueError(f"{model_dir} is an image-to-video model, which is not trained here")
        if config.position:
            if not self.dit.position:
                raise ValueError(f"position={config.position}: this model has rotary positions")
            self.dit.config.extra["position"] = self.dit.position = config.position
        if not self.dit.config.use_rotary_positional_embeddings:
            # What all k have in common the softmax does not see: its gradient is nothing but rounding, which
            # AdamW would enlarge to whole steps, other ones with each number of ranks.
            for block in self.dit.transformer_blocks:
                block.attn1.norm_k.bias.requires_grad_(False)
        vae_dir = checkpoint.component_dir(model_dir, "vae")
        self.vae_config = checkpoint.read_config(VAEConfig, vae_dir / "config.json")
        self.schedule = Schedule.from_pretrained(model_dir)
        stream = bool(config.cached_draws)
        self.encoders = Encoders(model_dir, self.dit.config, dtype, device, stream)
        self.t5 = None  # where it learns

    def plan(self, phase: Phase) -> Plan:
        """What a phase asks of the data."""
        max_frames = 1 if phase.pictures else self.config.max_frames
        if self.dit.position == "interpolate":  # a table of positions has an end
            max_frames = min(max_frames, max_num_frames(self.dit.config))
        return Plan(
            resolutions=phase.resolutions,
            max_tokens=phase.max_tokens,
            batch_tokens=self.config.batch_size * phase.max_tokens,
            max_frames=max_frames,
            frames_per_token=self.dit.config.patch_size_t or 1,
            masks=self.config.masks,
            text_only=self.config.text_only,
        )

    def begin(self, phase: Phase) -> dict[str, nn.Module]:
        """What learns in a phase, by component."""
        self.encoders.free()  # T5 may have become another in the last one; it is read anew
        if not phase.train_text:
            self.t5 = None
            return {"transformer": self.dit}
        if self.t5 is None:
            self.t5 = T5Encoder.from_pretrained(self.model_dir, torch.float32, self.device)
        return {"transformer": self.dit, "text_encoder": self.t5}

    def encode_texts(self, captions: list[str]) -> Tensor:
        return self.encoders.ids(captions) if self.t5 else self.encoders.texts(captions)

    def encode(self, samples: list[Sample]) -> Batch:
        """A micro-batch as tensors, where no cache keeps them."""
        return self.encoders.clips(samples) | {"text": self.encode_texts([one.caption for one in samples])}

    def losses(self, batch: Batch, micro: Micro) -> Tensor:
        """One loss for each timestep of the micro-batch: noises_per_clip of them for each sample."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        draws = generator(self.config.seed, micro.epoch, micro.number, "noise", device=self.device)
        timesteps = micro.timesteps.to(self.device, non_blocking=True)
        latents = self.sampled(batch["latents"], draws)
        condition = None
        if self.kind == "control":
            condition = self.sampled(batch["control"], draws)
        if self.kind == "inpaint":
            noise = self.normal(latents.shape, draws)
            shown = {name: batch[name] for name in ("masked", "known", "zero")}
            condition = join_condition(**shown, noise=noise, config=self.vae_config).float()
        text = batch["text"]
        with self.autocast():
            if not text.is_floating_point():  # ids
                text = self.t5(text)
        if "text_row" in batch:  # each caption once
            text = text[batch["text_row"]]
        repeats = len(timesteps) // len(latents)
        if repeats > 1:
            latents, text = latents.repeat_interleave(repeats, 0), text.repeat_interleave(repeats, 0)
            condition = None if condition is None else condition.repeat_interleave(repeats, 0)
        noise = self.normal(latents.shape, draws)
        with self.autocast():
            return denoising_losses(
                self.dit, self.schedule, latents, noise, timesteps, text.float(), condition
            )

    def sampled(self, moments: Tensor, draws: torch.Generator) -> Tensor:
        """Scaled latents b 16 f' h' w', fp32, from means and log-variances b 32 f' h' w'."""
        mean, logvar = moments.chunk(2, dim=1)
        return sample_posterior(mean, logvar, self.normal(mean.shape, draws), self.vae_config).float()

    def normal(self, shape: Iterable[int], draws: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=draws, device=self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def validate(self, held_out: list[tuple[Batch, Micro]]) -> dict[str, float]:
        """Loss on held-out samples at fixed timesteps and noise, in all and in each band of timesteps."""
        timesteps = torch.tensor(BANDS)
        losses = [self.losses(batch, replace(micro, timesteps=timesteps)) for batch, micro in held_out]
        bands = torch.stack(losses).mean(0).tolist()
        return {"val_loss": sum(bands) / len(bands)} | {f"val_loss_{t}": b for t, b in zip(BANDS, bands)}

    def preview(self, shown: Sample, num_steps: int):
        """A video from the caption (and control) of a sample, uint8 f h w 3."""
        models = sample.load_models(self.model_dir, self.dtype, self.device)
        models.config = self.dit.config
        models.loaded = {"transformer": self.dit}
        if self.t5:
            models.loaded["text_encoder"] = self.t5
        f, height, width = shown.mask.shape
        settings = {"num_frames": f, "height": height, "width": width, "num_steps": num_steps, "seed": 0}
        if self.kind == "control":
            settings["control_video"] = shown.control.numpy()
        with self.autocast():
            return sample.generate(models, shown.caption, **settings)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """What learnt, with the transformer's gathered `state`; all else stays the files it was."""
        if self.config.lora_rank:
            from lora import save_lora

            save_lora(self.dit, folder / LORA, state)
        else:
            self.dit.save_pretrained(folder, state=state)
        if self.t5:
            self.t5.save_pretrained(folder)


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
            if not make_component(name, config, out):
                raise ValueError(f"there is no {name}/ to start from; give a --model that has one")
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

    def advance(self, micros: list[Micro], phases: tuple[Phase, ...]) -> None:
        """Behind a step, and into the next phase (with an epoch of its own) where this one ends."""
        self.step += 1
        self.total_steps += 1
        self.epoch, self.batch = micros[-1].epoch, micros[-1].number + 1
        if self.step == phases[self.phase].num_steps and self.phase + 1 < len(phases):
            self.phase, self.step, self.epoch, self.batch = self.phase + 1, 0, self.epoch + 1, 0


STATE_VERSION = 2  # 1 drew the noise of each sample by itself


def begin_or_resume(
    out: Path, model_dir: Path | None, config: Config, settings: dict, options: argparse.Namespace
) -> tuple[Path | None, Counters]:
    """(the checkpoint to go on from, where it is), or (None, the start) after OUT was made ready."""
    newest = checkpoint.newest_checkpoint(out)
    if not newest:
        if model_dir and out.resolve() == model_dir.resolve():
            raise ValueError(f"--out {out} is the folder to start from; choose another")
        if RANK == 0:
            begin_folder(out, model_dir, config, options.from_scratch)
        return None, Counters(phase=options.phase - 1)
    if not options.resume:
        raise ValueError(f"{out} holds a run ({newest.name}); add --resume, or choose another --out")
    state = checkpoint.read_json(newest / "training" / "state.json")
    remedy = "repeat the settings to resume, or start a new run from it with --model"
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"{newest} is of an earlier version; start a new run from it with --model")
    for name, value in settings.items():
        before = state["settings"].get(name, value)  # a checkpoint may be older than a setting
        if value != before:
            raise ValueError(f"{newest} was trained with {name} = {before}, now it is {value}; {remedy}")
    say(f"resuming from {newest}")
    if RANK == 0:
        checkpoint.publish(out, newest, options.keep)  # the kill may have come between saving and this
    return newest, Counters(**state["counters"])


def save(out: Path, keep: int, settings: dict, at: Counters, task, optim: Optim, is_lora: bool) -> None:
    """A checkpoint: folders like those of --model with EMA weights, and training/ with all else."""
    at.log_bytes = (out / "log.jsonl").stat().st_size if RANK == 0 else 0
    state = {"version": STATE_VERSION, "counters": dataclasses.asdict(at), "settings": settings}
    place = contextlib.nullcontext()
    if RANK == 0:
        place = checkpoint.new_checkpoint(out, at.total_steps, keep)
    with place as folder:
        training = gather(optim.state(with_ema=is_lora))  # written first: of one rank it is no copy
        if RANK == 0:
            checkpoint.save_weights(training, folder / "training", "state")
            (folder / "training" / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        with optim.averaged():
            weights = task.dit.state_dict() if hasattr(task, "dit") else {}
            weights = gather({name: w for name, w in weights.items() if not is_lora or ".lora_" in name})
            if RANK == 0:
                task.save(folder, weights)
    wait_for_ranks()  # as torchrun ends all when one has ended, also one that is still writing
    say(f"saved step {at.total_steps} in {out / 'checkpoints'}")


def shorten(out: Path, dtype: torch.dtype) -> None:
    """Round the weights in OUT, which is what is used from now on; checkpoints keep theirs."""
    for network, name in ((VideoTransformer, "transformer"), (VideoVAE, "vae"), (T5Encoder, "text_encoder")):
        if (out / name).is_dir():
            network.from_pretrained(out, dtype).save_pretrained(out)


# ---------------------------------------------------------------- data


def shape_record(clip, name: str) -> Record:
    """A `shapes.Clip` as the loader takes it."""
    content = (Path(inspect.getfile(type(clip))), repr(clip))
    return Record(
        name, clip.scene.caption, clip.num_frames, clip.size, clip.read, content=content, scene=clip.scene
    )


def open_data(
    data_name: str, val_data: str | None, num_val: int, config: Config
) -> tuple[list[Record], list[Record], dict[str, str]]:
    """(training records, held-out records, files that cannot be opened)

    shapes: of ten clips four are square, two each 2:3 and 3:2, one each 1:2 and 2:1. A sixth of the samples
        are pictures, square, as each shape would be micro-batches of its own, and nearly empty ones. Held out
        are the combinations of `shapes.is_held_out`.
    Files: --val-data, or every tenth sample, at most --num-val.
    """
    if data_name == "shapes":
        import shapes

        num, pictures, seed = config.num_shapes, config.num_shapes // 6, config.seed
        sizes = [(128, 128), (104, 156), (128, 128), (156, 104), (90, 180)]
        sizes += [(128, 128), (104, 156), (128, 128), (156, 104), (180, 90)]
        clips = shapes.records(num - pictures, seed, sizes=sizes, num_frames=config.max_frames)
        clips += shapes.records(pictures, seed + 1, sizes=sizes[:1], num_frames=1)
        unseen = shapes.records(num_val, seed + 2, True, sizes, config.max_frames)
        lists = [[shape_record(c, f"shape {i}: {c.scene.caption()}") for i, c in enumerate(cs)]
                 for cs in (clips, unseen)]  # fmt: skip
        return *lists, {}
    records, failures = data.open_records(data.read_metadata(data_name), config.fps)
    if val_data:
        held_out, more = data.open_records(data.read_metadata(val_data), config.fps)
        return records, held_out[:num_val], failures | more
    chosen = set(range(9, len(records), 10)[:num_val]) or {len(records) - 1}
    held_out = [record for i, record in enumerate(records) if i in chosen]
    return [r for i, r in enumerate(records) if i not in chosen] or held_out, held_out, failures


def held_out_micros(records: list[Record], plan: Plan, seed: int) -> list[Micro]:
    """A micro-batch for each held-out sample, of the same crop, mask and noise each time."""
    micros = []
    for index, record in enumerate(records):
        key = (seed, VALIDATION, index)
        bucket = data.choose_bucket(record, plan, generator(*key, "resolution"))
        micros.append(Micro(bucket, [index], [key], VALIDATION, index))
    return micros


def make_cache(
    config: Config, folder: Path | None, digests: list[str], task: Denoising, loader: Loader, plan: Plan
):
    """Where encoded samples are kept: `folder`, with the digests of the records' contents; or the device."""
    from cache import DeviceCache, DiskCache, files_digest  # so that it can be deleted

    read = functools.partial(load_sample, plan=plan)
    encoding = loader, read, task.encoders.clips, task.encode_texts
    if folder is None:
        return DeviceCache(*encoding, device=task.device)
    weights = {name: files_digest(task.model_dir / name) for name in ("vae", "text_encoder", "tokenizer")}
    dit = task.dit.config
    text_settings = (weights["tokenizer"], dit.max_text_seq_length)
    if not task.t5:  # while it learns, ids are all there is to keep
        text_settings += (weights["text_encoder"], str(task.dtype))
    shown = (task.kind, dit.add_noise_in_inpaint_model, config.masks, plan.text_only, data.TEXT_ONLY)
    return DiskCache(
        *encoding,
        folder=folder,
        settings=(weights["vae"], str(task.dtype), config.fps, *shown),
        text_settings=text_settings,
        digests=digests,
    )


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
    """At most so far: of the device's memory, or of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # counted in KiB


def as_time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def describe(task, phase: Phase, config: Config, plan: Plan, optim: Optim, micros: list[Micro], out: Path):
    """What will happen, before it does."""
    size = sum(param.numel() for param in optim.params.values()) / 1e6
    names = ", ".join(dict.fromkeys(name.partition("/")[0] for name in optim.params))
    resolutions = ", ".join(map(str, phase.resolutions))
    say(
        f"training {names}: {size:.2f} M parameters on {task.device} in {str(task.dtype)[6:]} -> {out}\n"
        f"a step is {phase.global_batch // config.batch_size} micro-batches of up to {plan.batch_tokens} "
        f"video tokens, with {config.noises_per_clip} noise(s) a sample, on {NUM_RANKS} rank(s)\n"
        f"{phase.num_steps} steps at resolutions {resolutions}, up to {phase.max_tokens} tokens and "
        f"{plan.max_frames} frames; the shapes of the epoch:\n{data.bucket_table(micros)}"
    )


class Log:
    """OUT/log.jsonl, a line a step, and the same for people on the terminal; on rank 0 alone."""

    def __init__(self, path: Path, length: int, num_steps: int):
        self.path, self.num_steps, self.pace = path, num_steps, 0.0  # pace: seconds a step, lately
        if RANK == 0:
            path.touch()
            os.truncate(path, min(length, path.stat().st_size))  # as it was when the checkpoint was written

    def write(self, entry: dict, line: str) -> None:
        if RANK > 0:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            reason = error.strerror
            raise OSError(f"cannot write {self.path} ({reason}); make room and --resume") from None
        print(line, flush=True)

    def step(self, at: Counters, seconds: float, **numbers: float) -> None:
        """numbers: loss, grad_norm, lr, tokens_per_s, wait, gib"""
        entry = {"step": at.total_steps + 1, "phase": at.phase + 1, **numbers, "seconds": seconds}
        self.pace = 0.9 * self.pace + 0.1 * seconds if self.pace else seconds
        left = as_time(self.pace * (self.num_steps - entry["step"]))
        text = ("phase {phase} step {step}/{of}  loss {loss:.4f}  grad {grad_norm:.3f}  lr {lr:.2e}  "
                "{tokens_per_s:.0f} tokens/s  wait {wait:.0%}  {gib:.2f} GiB  {left} left")  # fmt: skip
        self.write(entry, text.format(**entry, of=self.num_steps, left=left))

    def validation(self, step: int, found: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.write({"step": step, **found}, f"held out at step {step}: {shown}")
        if RANK == 0:
            draw_curve(self.path, self.path.with_name("loss.png"))


def check_finite(numbers: list[float], step: int, micros: list[Micro], records: list[Record]) -> None:
    if not all(map(math.isfinite, numbers)):
        names = [records[index].name for micro in micros for index in micro.indices]
        shown = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
        raise ValueError(
            f"step {step}: loss or gradient is not finite; the weights are untouched. "
            f"Lower --lr, or look at the files of this batch: {shown}"
        )


# ---------------------------------------------------------------- the loop


def train(
    task, config: Config, settings: dict, options, at: Counters, resumed: Path | None, files, signals
) -> bool:
    """All phases, from where the run is to its end or to a signal; returns whether it was one.

    task: Denoising, or train_vae.Reconstruction    files: what `open_data` gave
    """
    out, (records, held_out_records, failures) = options.out, files
    steps_left = sum(phase.num_steps for phase in config.phases[at.phase :]) - at.step
    num_steps = min(options.num_steps or math.inf, at.total_steps + steps_left)
    log = Log(out / "log.jsonl", at.log_bytes, num_steps)
    loader = Loader(records, failures, options.num_workers, say=print)
    held_out_loader = Loader(held_out_records, max_failures=1.0)
    optim, cache, digests, stop = None, None, [], False
    if options.cache_latents:
        from cache import content_digests

        digests = content_digests(records)
    names = [int(digest, 16) for digest in digests]  # so an entry does not depend on its place in the list

    while at.total_steps < num_steps and not stop:
        # ---- a phase begins: what learns, its samples, and the held-out ones in its shapes
        phase = config.phases[at.phase]
        plan = task.plan(phase)
        read = functools.partial(load_sample, plan=plan)
        before = optim
        optim = Optim(
            task.begin(phase), config.optimizer, config.weight_decay, config.adam_eps, config.ema_decay
        )
        if before:
            optim.inherit(before)
        elif resumed:
            optim.load(resumed / "training")
        epochs = Epochs(records, plan, config.seed, config.cached_draws, config.keep_on_device, names)
        micros_per_step = phase.global_batch // config.batch_size
        unseen = held_out_micros(held_out_records, plan, config.seed)
        held_out = [
            (task.encode(samples), m) for m, samples in zip(unseen, held_out_loader.each(unseen, read))
        ]
        if config.cached_draws:
            if not cache or options.cache_latents:  # a folder's texts are named by what T5 has become
                cache = make_cache(config, options.cache_latents, digests, task, loader, plan)
            cache.read = read
            todo = min(phase.num_steps - at.step, num_steps - at.total_steps)
            asked = list(epochs.asked(at.epoch, at.batch, micros_per_step, todo))
            began = time.perf_counter()
            count = cache.fill(asked if options.cache_latents is None else asked[RANK::NUM_RANKS])
            say(f"{count} samples encoded in {as_time(time.perf_counter() - began)}")
            task.encoders.free()
            wait_for_ranks()
        todo, ahead = itertools.tee(epochs.steps(at.epoch, at.batch, micros_per_step))
        mine = (micro for micros in ahead for micro in micros[RANK::NUM_RANKS])
        if cache:
            batches = cache.batches(mine)
        else:
            batches = (task.encode(samples) for samples in loader.each(mine, read))
        describe(task, phase, config, plan, optim, epochs.micros(at.epoch), out)

        if at.total_steps == 0:
            validate(task, optim, held_out, log, 0)  # where it starts

        # ---- its steps; `micros` is the same list on every rank
        for micros in todo:
            start, waited = time.perf_counter(), 0.0
            count = sum(len(micro.keys) for micro in micros) * config.noises_per_clip
            timesteps = stratified_timesteps(config.seed, at.total_steps, count, config.timestep_shift)
            parts = timesteps.split([len(micro.keys) * config.noises_per_clip for micro in micros])
            for micro, part in zip(micros, parts):
                micro.timesteps = part
            loss = torch.zeros((), device=task.device)
            for micro in micros[RANK::NUM_RANKS]:
                asked_at = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked_at
                share = task.losses(batch, micro).sum() / count
                # The gradient is the mean over all noises, however they are cut; over ranks FSDP averages.
                (share * NUM_RANKS).backward()
                loss += share.detach()
            norm = optim.grad_norm()
            loss, norm = torch.stack([loss, norm.to(loss)]).tolist()  # the one wait for the device in a step
            check_finite([loss, norm], at.total_steps + 1, micros, records)
            optim.clip(norm, clip_norm(at.total_steps, norm, config.max_grad_norm, config.wide_clip_steps))
            lr = learning_rate(at.step, phase.num_steps, phase.lr, phase.final_lr, config.warmup_steps)
            optim.step(lr)
            optim.update_ema(at.total_steps)

            sums = torch.tensor([loss, len(signals)], dtype=torch.float64)
            loss, stop = sum_over_ranks(sums).tolist()
            seconds = time.perf_counter() - start
            num_tokens = (
                sum(micro.bucket.tokens * len(micro.keys) for micro in micros) * config.noises_per_clip
            )
            log.step(at, seconds, loss=loss, grad_norm=norm, lr=lr, tokens_per_s=num_tokens / seconds,
                     wait=waited / seconds, gib=gib_used(task.device))  # fmt: skip
            at.advance(micros, config.phases)

            is_last = at.total_steps == num_steps or at.step == 0  # of the run, or of the phase
            if is_last or at.total_steps % options.val_every == 0:
                validate(task, optim, held_out, log, at.total_steps)
            if is_last or stop or at.total_steps % options.save_every == 0:
                save(out, options.keep, settings, at, task, optim, config.lora_rank is not None)
            if is_last or at.total_steps % options.preview_every == 0:
                for micro in unseen[: options.num_previews]:
                    shown = held_out_loader.load(micro.bucket, micro.indices[0], micro.keys[0], read)
                    path = out / "previews" / f"step-{at.total_steps:06d}-{micro.number}"
                    with optim.averaged(), torch.compiler.set_stance("force_eager"):
                        frames = task.preview(shown, options.preview_steps)
                    write_preview(frames, path, config.fps, shown.caption)
            if is_last or stop:
                break
        batches.close()
    if config.save_dtype and not stop and RANK == 0:
        shorten(out, getattr(torch, config.save_dtype))
    return bool(stop)


def validate(task, optim: Optim, held_out: list[tuple[Batch, Micro]], log: Log, step: int) -> None:
    """With the averaged weights; in shapes of their own, which are not worth compiling."""
    with optim.averaged(), torch.compiler.set_stance("force_eager"):
        log.validation(step, task.validate(held_out))


def write_preview(frames, path: Path, fps: float, caption: str) -> None:
    if RANK == 0:
        for suffix in (".gif", ".png"):
            write_video(frames, path.with_suffix(suffix), fps)
    say(f"{path}.gif and .png: {caption}")


# ---------------------------------------------------------------- the command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} should be at least 1")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    description = "Train the VAE, or train and fine-tune the transformer, of CogVideoX and CogVideoX-Fun."
    parser = sample.Parser(
        prog="train.py", description=description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="tiny", help="settings to start from, see Config")
    add("--train", choices=["dit", "vae"], default="dit", help="what learns")
    add("--data", default="shapes", help="metadata .json, .jsonl or .csv, a folder, or shapes: a drawn world")
    add("--val-data", help="held-out samples; else some of --data")
    add("--model", help="folder or hub id to start from; what it lacks is made from the preset")
    add("--from-scratch", action="store_true", help="new weights for what learns, even where --model has it")
    add("--out", type=Path, help="folder to write; default runs/PRESET or runs/PRESET-vae")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    phases = "; ".join(
        f"{name} {', '.join(f'{i}: {p.max_tokens} tokens' for i, p in enumerate(preset['dit'].phases, 1))}"
        for name, preset in PRESETS.items()
    )
    add("--phase", type=positive, default=1, help=f"the phase to start with, of {phases}")
    add("--num-steps", type=positive, help="stop after so many steps in all; else behind the last phase")
    add = parser.add_argument_group("in place of the preset's values; they change the numbers").add_argument
    add("--phase-steps", type=positive, nargs="+", help="steps of each phase")
    add("--resolutions", type=positive, nargs="+", help="base sizes, in every phase")
    add("--max-tokens", type=positive, help="tokens of a clip, in every phase")
    add("--lr", type=float, nargs="+", help="constant learning rate; or first and last of half a cosine")
    add("--grad-accum", type=positive, help="micro-batches in a step")
    add(
        "--batch-size",
        type=positive,
        help="clips of max-tokens in a micro-batch; more where they are smaller",
    )
    add("--num-frames", type=positive, dest="max_frames", help="most frames of a clip")
    add("--fps", type=float, help="frames a second to read files at")
    add("--lora-rank", type=positive, help=f"learn LoRA of this rank: OUT/{LORA}, for sample.py --lora")
    add("--lora-alpha", type=float, help="how much it counts, as alpha/rank; the rank if not given")
    add("--in-channels", type=positive, help="16, 32 or 33: grow the transformer's input")
    add("--cache-latents", type=Path, metavar="DIR",
        help="encode every sample once, under 4 draws of mask and crop, and keep it here")  # fmt: skip
    add("--seed", type=int)
    add("--dtype", choices=["bfloat16", "float32"], help="to compute in; bfloat16 where it is fast")
    add("--num-val", type=positive, default=16, help="samples held out")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="any other field of Config, ema_decay=0 or dit.num_layers=4 for instance")  # fmt: skip
    add = parser.add_argument_group("without influence on the numbers").add_argument
    add("--device", help="default: the best there is")
    add("--activation-checkpointing", nargs="?", const="full", choices=list(CHECKPOINTING),
        help="less memory, a third more time; attention: keep its output, a little more of both")  # fmt: skip
    add("--offload", action="store_true", help="weights, gradients and moments stay in the host's memory")
    add("--compile", action="store_true", help="compile the transformer's blocks")
    add("--num-workers", type=positive, default=4, help="threads that load data")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--keep", type=positive, default=3, help="how many checkpoints stay")
    add("--val-every", type=positive, default=250, help="steps between validations")
    add("--preview-every", type=positive, default=1000, help="steps between previews")
    add("--num-previews", type=int, default=3)
    add("--preview-steps", type=positive, default=25, help="sampling steps of a preview")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / (args.preset + ("-vae" if args.train == "vae" else ""))
    if not args.model and args.preset.startswith("tiny") and args.train == "dit":
        args.model = f"runs/{args.preset}-vae"  # what --train vae makes
        if not Path(args.model).is_dir():
            remedy = "run --train vae first, or give --model a folder with vae/"
            raise ValueError(f"there is no {args.model} yet; {remedy}")
    args.model = checkpoint.find_model(args.model) if args.model else None
    return args


def set_field(config, assignment: str):
    """A dataclass with FIELD=VALUE changed; FIELD may lead into another, as in dit.num_layers."""
    name, is_given, text = assignment.partition("=")
    first, _, rest = name.partition(".")
    if not is_given or not hasattr(config, first) or first == "phases":
        names = ", ".join(f.name for f in dataclasses.fields(config) if f.name not in ("phases", "extra"))
        raise ValueError(f"--set {assignment}: should be FIELD=VALUE, with one of {names}")
    if rest:
        return replace(config, **{first: set_field(getattr(config, first), f"{rest}={text}")})
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    hint = typing.get_type_hints(type(config))[first]
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is dict:
        kinds = (dict,)
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"--set {assignment}: {first} should be of type {names}")
    return replace(config, **{first: value})


def make_config(args: argparse.Namespace) -> Config:
    """The preset with the command line's changes; ValueError for what cannot be."""
    config = PRESETS[args.preset][args.train]
    for assignment in args.set:
        config = set_field(config, assignment)
    names = {f.name for f in dataclasses.fields(Config)} - {"phases", "train"}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    config = replace(config, **given)
    if args.cache_latents:
        config = replace(config, cached_draws=config.cached_draws or 4, keep_on_device=False)  # 4: not tuned

    changes = {}
    if args.lr:
        changes |= {"lr": args.lr[0], "final_lr": args.lr[-1]}
    if args.max_tokens:
        changes["max_tokens"] = args.max_tokens
    if args.resolutions:
        changes["resolutions"] = tuple(args.resolutions)
    if args.grad_accum:
        changes["global_batch"] = config.batch_size * args.grad_accum
    if args.lora_rank:
        changes["train_text"] = False  # its file holds the transformer's part alone
    steps = args.phase_steps or [phase.num_steps for phase in config.phases]
    if len(steps) > len(config.phases):
        raise ValueError(f"--phase-steps has {len(steps)} numbers, {args.preset} {len(config.phases)} phases")
    phases = tuple(replace(phase, num_steps=n, **changes) for phase, n in zip(config.phases, steps))
    config = replace(config, phases=phases)
    check_config(config, args)
    return config


def check_config(config: Config, args: argparse.Namespace) -> None:
    """What would stop a run late, or make it other than asked."""
    check_frames(config.max_frames)
    if args.phase > len(config.phases):
        raise ValueError(f"--phase {args.phase}: {args.preset} has {len(config.phases)}")
    if args.lr and len(args.lr) > 2:
        raise ValueError(f"--lr takes one number or two, the first and the last, not {len(args.lr)}")
    for phase in config.phases:
        for size in phase.resolutions:
            check_side("--resolutions", size)
        num_micros, rest = divmod(phase.global_batch, config.batch_size)
        if rest or num_micros % NUM_RANKS:
            raise ValueError(
                f"a step of {phase.global_batch} clips cannot be cut into micro-batches of "
                f"{config.batch_size} for {NUM_RANKS} ranks; give --grad-accum a multiple of {NUM_RANKS}"
            )
    is_dit = config.train == "dit"
    if not is_dit and (args.cache_latents or config.lora_rank):
        raise ValueError("--cache-latents and --lora-rank are for --train dit; leave them out")
    if config.keep_encoder and (is_dit or not args.model or args.from_scratch):
        raise ValueError("keep_encoder is for the VAE of a --model, with --train vae and no --from-scratch")
    if config.lora_rank and config.in_channels:
        raise ValueError("--lora-rank fine-tunes a transformer as it is; leave out --in-channels")
    if config.lora_alpha and not config.lora_rank:
        raise ValueError(f"--lora-alpha {config.lora_alpha} needs --lora-rank; give it, or leave both out")
    if not set(config.masks) <= set(MASK_KINDS):
        raise ValueError(f"masks are some of {', '.join(MASK_KINDS)}, each with its share")


def run(argv: list[str] | None, signals: list[int]) -> bool:
    """The command line; returns whether a signal ended it."""
    options = parse(argv)
    config = make_config(options)
    device = runtime.choose_device(options.device)
    has_bf16 = runtime.computes_bfloat16(device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if has_bf16 else "float32"))
    files = open_data(options.data, options.val_data, options.num_val, config)
    if not files[0] or not files[1]:
        raise ValueError("there are no samples to train on")
    settings = {"dtype": str(dtype)[6:], **dataclasses.asdict(config)}
    for name, records in zip(("training", "held-out"), files):  # not how the way to them is spelled
        settings[f"digest of the {name} samples"] = data.digest(records)[:16]
    settings = json.loads(json.dumps(settings))  # what has to be the same when a run is resumed
    if RANK > 0:
        wait_for_ranks()  # until rank 0 has made the folder ready
    resumed, at = begin_or_resume(options.out, options.model, config, settings, options)
    if RANK == 0:
        wait_for_ranks()
    if config.train == "vae":
        from train_vae import Reconstruction  # here, so that train_vae.py can be deleted

        task = Reconstruction(config, options.out, device, dtype)
    else:
        task = Denoising(config, options.out, device, dtype)
        if task.kind == "control" and not all(record.read_control for record in files[0] + files[1]):
            raise ValueError("a control model needs a control_file_path for every sample")
        captions = sorted({record.caption(record.num_frames) for record in files[0]})
        length = task.dit.config.max_text_seq_length
        for line in data.caption_report(captions, task.encoders.tokenizer, length):
            say(line)
        task.dit.activation_checkpointing = options.activation_checkpointing
        compiles = options.compile or (config.compile_on_gpu and device.type == "cuda")
        for block in task.dit.transformer_blocks if compiles else []:
            block.compile(dynamic=True)  # one graph: with one for each shape torch gives up after eight
        place(task.dit, device, dtype, config.replicate, options.offload)
    stopped = train(task, config, settings, options, at, resumed, files, signals)
    following = f"sample.py PROMPT --model {options.out}"
    if config.lora_rank:
        following += f" --lora {options.out / LORA}"
    if config.train == "vae":
        following = f"train.py --preset {options.preset} --model {options.out}"
    say(f"{'stopped' if stopped else 'done'}: {at.total_steps} steps; now python {following}")
    return stopped


def main(argv: list[str] | None = None) -> int:
    """0 at the end, 2 with one line on stderr for an error, 128 + n after signal n."""
    signals: list[int] = []

    def stop(number: int, _) -> None:
        if signals:
            raise KeyboardInterrupt  # the second time at once
        signals.append(number)
        say("saving after this step …")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    store = runtime.join_ranks()
    try:
        stopped = run(argv, signals)
        return 128 + (signals or [signal.SIGTERM])[0] if stopped else 0
    except (Exception, KeyboardInterrupt) as error:
        if store and store.add("failed", 1) > 1:
            return 2  # an error of one rank is soon one of all, but the first alone knows why
        remedy = "try a smaller --batch-size or --max-tokens, or --activation-checkpointing"
        message = runtime.in_one_line(error, remedy)
        if message is None:
            raise
        return runtime.fail("train.py", message)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    status = main()
    if dist.is_initialized() and status != 2:  # an error may have left others in the middle of something
        dist.destroy_process_group()
    sys.exit(status)
