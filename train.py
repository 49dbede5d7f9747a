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
          checkpoints/step-000200/             the same folders, and training/ for --resume
          log.jsonl  loss.png  previews/

The tiny preset does one thing more than the report it scales down: its small text encoder is trained together
with the transformer in phase one, and frozen afterwards.

Reports: CogVideoX-Fun v1 (token lengths, phases); reference: CogVideoX-Fun scripts/train.py.
Dimension key: b batch, c channels, f frames, h w height and width, L text tokens, d text width.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import sample
import shapes
from checkpoint import (
    atomic_dir,
    atomic_write,
    link_or_copy,
    read_json,
    read_tensors,
    save_weights,
    weight_files,
)
from data import (
    Batch,
    Loader,
    Plan,
    Record,
    Sample,
    add_reference_noise,
    bucket_table,
    draw_noise_sigma,
    epoch_batches,
    open_records,
    read_metadata,
    rng,
    to_uint8,
    write_video,
)
from diffusion import NUM_TIMESTEPS, Schedule
from sample import Parser, find_model
from text_encoder import T5Config, T5Encoder, Tokenizer
from transformer import (
    TransformerConfig,
    VideoTransformer,
    grow_input_channels,
    max_num_frames,
    model_kind,
)
from vae import VAEConfig, VideoVAE, inpaint_condition

Key = tuple[int, int, int]  # (seed, epoch, sample index): what every draw is a function of
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
VALIDATION_EPOCH = -1  # so that validation never shares a draw with training
BANDS = (100, 300, 500, 700, 900)  # timesteps validated at: the middles of five bands


# ---------------------------------------------------------------- what a run is


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one token budget."""

    resolutions: tuple[int, ...]  # base sizes, mixed
    max_tokens: int  # of one clip
    global_batch: (
        int  # clips of max_tokens in one step of the optimizer; cheaper shapes come in larger numbers
    )
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
    draws_per_clip: int = (
        1  # noises and timesteps per encoded clip: encoding a clip costs more than a small DiT
    )
    warmup_steps: int = 100  # in each phase
    weight_decay: float = 0.03
    adam_eps: float = 1e-10
    max_grad_norm: float = 0.05
    ema_decay: float = 0.9999  # less at first, see `update_ema`; 0: no EMA
    position: str | None = (
        None  # "interpolate" or "regenerate" off the native grid; None: the model's own rule
    )
    in_channels: int | None = None  # of the transformer; None: as it is. More than it has: grown with zeros
    kl_weight: float = 1e-5  # of --train vae
    seed: int = 0
    num_shapes: int = 20_000  # clips in an epoch of --data shapes
    dit: TransformerConfig = dataclasses.field(
        default_factory=TransformerConfig
    )  # where there is none to start from
    vae: VAEConfig | None = None  # likewise; None: there has to be one
    t5: T5Config | None = None


SIZES_512, SIZES_768, SIZES_1024 = ((tuple(range(low, 1025, 128))) for low in (512, 768, 1024))
FUN_2B = Config(
    phases=(  # the report's
        Phase(SIZES_512, 13312, 128, 7000, 2e-5, 2e-5),
        Phase(SIZES_768, 29952, 256, 6500, 2e-5, 2e-5),
        Phase(SIZES_1024, 53248, 128, 5000, 2e-5, 2e-5),
    ),
    dit=TransformerConfig(in_channels=33),
)
FUN_5B = replace(
    FUN_2B,
    dit=TransformerConfig(
        in_channels=33, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
    ),
)
TINY = Config(
    phases=(
        Phase((64, 96, 128), 80, 16, 10_000, 1e-3, 5e-4, train_text=True),
        Phase((64, 96, 128), 180, 16, 4000, 5e-4, 2e-4),
        Phase((64, 96, 128), 320, 16, 2000, 2e-4, 1e-5),
    ),
    max_frames=17,
    batch_size=8,
    draws_per_clip=4,
    adam_eps=1e-8,
    weight_decay=0.01,
    max_grad_norm=1.0,
    ema_decay=0.999,
    dit=TransformerConfig(
        in_channels=33,
        num_attention_heads=4,
        num_layers=6,
        time_embed_dim=128,
        text_embed_dim=128,
        max_text_seq_length=24,
        sample_width=8,
        sample_height=8,
        sample_frames=17,
    ),
    vae=VAEConfig(
        block_out_channels=[16, 32, 32, 64],
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=256,
        sample_width=256,
        scaling_factor=1.0,
    ),
    t5=T5Config(
        vocab_size=shapes.make_tokenizer().get_vocab_size(),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
    ),
)
TINY_VAE = replace(
    TINY,
    train="vae",
    # Mostly 64 x 64, where 80 tokens are a whole clip; small steps, as one video is many pixels.
    phases=(Phase((64, 64, 64, 96, 128), 80, 2, 12_000, 1e-3, 1e-5),),
    batch_size=2,
    draws_per_clip=1,
    weight_decay=0.0,
    ema_decay=0.999,
)
FUN_VAE = replace(
    FUN_2B, train="vae", phases=(Phase(SIZES_512, 13312, 8, 7000, 2e-5, 2e-6),), max_grad_norm=1.0
)
PRESETS = {
    "tiny": {"dit": TINY, "vae": TINY_VAE},
    "fun-2b": {"dit": FUN_2B, "vae": FUN_VAE},
    "fun-5b": {"dit": FUN_5B, "vae": FUN_VAE},
}


# ---------------------------------------------------------------- draws


def normal(shape: Iterable[int], keys: list[Key], purpose: str, device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise, b and then `shape`; each sample's is a function of its key alone.

    Drawn on the device, where it is wanted: the noise of a large video is slow to draw on the CPU.
    """
    seeds = [rng(*key, purpose).initial_seed() for key in keys]
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=g, device=device) for g in generators])


def stratified_timesteps(keys: list[Key]) -> Tensor:
    """One timestep for each sample of a global batch: 0 … 999 is cut into so many parts, each has one.

    Each alone is uniform; together they cover all noise levels, so the loss of a step jumps less. Which part
    a sample gets is shuffled, as neighbours share a shape.
    """
    parts = torch.randperm(len(keys), generator=rng(*keys[0], "order of timesteps"))
    places = torch.stack(
        [torch.rand((), generator=rng(*key, "timestep"), dtype=torch.float64) for key in keys]
    )
    return ((parts + places) * NUM_TIMESTEPS / len(keys)).long().clamp(max=NUM_TIMESTEPS - 1)


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
    terms = [
        error.abs(),
        error.square(),
        0.25 * error.diff(dim=3).abs(),
        0.25 * error.diff(dim=4).abs(),
        (1 + 4.5 * colorful) * chroma.square(),
    ]
    return sum(term.mean((1, 2, 3, 4)) for term in terms)


class Denoising:
    """--train dit: the transformer (and in some phases the text encoder) learns, the VAE is fixed."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.dit = VideoTransformer.from_pretrained(model_dir, torch.float32, device)
        if config.in_channels:
            grow_input_channels(self.dit, config.in_channels)
        self.kind = model_kind(self.dit.config)
        if self.kind == "image":
            raise ValueError(
                f"{model_dir} is an image-to-video model with learned positions; train inpaint models"
            )
        if config.position is not None:
            if self.dit.position is None:
                raise ValueError(
                    f"--position {config.position}: this model has rotary positions and no table to choose"
                )
            self.dit.position = config.position
        self.vae = VideoVAE.from_pretrained(model_dir, dtype, device).requires_grad_(False)
        self.t5 = T5Encoder.from_pretrained(model_dir, torch.float32, device)
        self.tokenizer = Tokenizer.from_pretrained(model_dir)
        self.schedule = Schedule.from_pretrained(model_dir)

    def plan(self, phase: Phase) -> Plan:
        most = max_num_frames(self.dit.config)
        if self.dit.position != "interpolate":
            most = self.config.max_frames
        return Plan(
            phase.resolutions,
            phase.max_tokens,
            self.config.batch_size * phase.max_tokens,
            min(self.config.max_frames, most),
            self.dit.config.patch_size_t or 1,
        )

    def begin(self, phase: Phase, held_out: list[tuple[Sample, list[Key]]]) -> dict[str, nn.Module]:
        """What learns in a phase, by component; held-out samples are encoded once, as the VAE is fixed."""
        self.train_text = phase.train_text
        self.t5.to(torch.float32 if phase.train_text else self.dtype).requires_grad_(phase.train_text)
        self.held_out = [(batch.caption, *self.encode(batch, keys), keys) for batch, keys in held_out]
        return {"transformer": self.dit, **({"text_encoder": self.t5} if phase.train_text else {})}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def encode(self, batch: Sample, keys: list[Key]) -> tuple[Tensor, Tensor | None]:
        """(clean latents b 16 f h w, condition b c f h w or None), both fp32, from pixels and masks."""
        pixels = batch.pixels.to(self.device)
        latents = self.encode_pixels(pixels, keys, "posterior")
        condition = None
        if self.kind == "control":
            condition = self.encode_pixels(batch.control.to(self.device), keys, "control posterior")
        if self.kind == "inpaint":
            if self.dit.config.add_noise_in_inpaint_model:
                sigma = torch.tensor([draw_noise_sigma(rng(*key, "reference sigma")) for key in keys])
                noise = normal(pixels.shape[1:], keys, "reference noise", self.device)
                pixels = add_reference_noise(pixels, sigma.to(pixels)[:, None, None, None, None], noise)
            mask = batch.mask[:, None].to(self.device)
            generators = self.generators(keys, "masked posterior")
            condition = inpaint_condition(
                self.vae, pixels, mask, generators, batch.zero_if_all_masked
            ).float()
        return latents, condition

    def generators(self, keys: list[Key], purpose: str) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(rng(*key, purpose).initial_seed()) for key in keys]

    def encode_pixels(self, pixels: Tensor, keys: list[Key], purpose: str) -> Tensor:
        return self.vae.encode(pixels, self.generators(keys, purpose)).float()

    def encode_text(self, captions: list[str]) -> Tensor:
        with torch.set_grad_enabled(self.train_text and torch.is_grad_enabled()):
            return self.t5(self.tokenizer(captions, self.dit.config.max_text_seq_length).to(self.device))

    def losses(self, batch: Sample, keys: list[Key], timesteps: Tensor) -> Tensor:
        """One loss for each sample and draw, b · draws_per_clip."""
        draws = self.config.draws_per_clip
        latents, condition = self.encode(batch, keys)
        with self.autocast():
            inputs = [latents, self.encode_text(batch.caption).float(), condition]
            latents, text, condition = (x if x is None else x.repeat_interleave(draws, 0) for x in inputs)
            noise = normal(latents.shape[1:], repeated(keys, draws), "noise", self.device)
            return denoising_losses(self.dit, self.schedule, latents, noise, timesteps, text, condition)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on held-out samples at fixed timesteps and noise, in all and in each band of timesteps."""
        bands = {}
        for t in BANDS:
            losses = []
            for captions, latents, condition, keys in self.held_out:
                noise = normal(latents.shape[1:], keys, "noise", self.device)
                timesteps = torch.full((len(keys),), t)
                with self.autocast():
                    text = self.encode_text(captions).float()
                    losses.append(
                        denoising_losses(self.dit, self.schedule, latents, noise, timesteps, text, condition)
                    )
            bands[f"val_loss_{t}"] = torch.cat(losses).mean().item()
        return {"val_loss": sum(bands.values()) / len(bands), **bands}

    def preview(self, model_dir: Path, path: Path, batch: Sample, num_steps: int) -> None:
        """Make the first sample of a batch from its caption (and control), as gif and as png strip."""
        models = sample.Models(model_dir, torch.float32, self.device, keep=True)
        models.transformer_config, models.kind = self.dit.config, self.kind
        models.loaded = {"transformer": self.dit, "vae": self.vae, "text_encoder": self.t5}
        _, f, height, width = batch.pixels[0].shape
        inputs = {"control_video": to_uint8(batch.control[0])} if self.kind == "control" else {}
        with self.autocast():
            frames = sample.generate(
                models,
                batch.caption[0],
                height=height,
                width=width,
                num_frames=f,
                num_steps=num_steps,
                seed=0,
                **inputs,
            )
        write_clip(frames, path, self.config.fps)

    def save(self, folder: Path) -> None:
        self.dit.save_pretrained(folder)
        if self.train_text:
            self.t5.save_pretrained(folder)


class Reconstruction:
    """--train vae: encoder and decoder learn to give back the pixels through a small posterior."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.vae = VideoVAE.from_pretrained(model_dir, torch.float32, device)
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
    def validate(self) -> dict[str, float]:
        """PSNR in dB on held-out samples, the mean over all of them and over each size."""
        by_size: dict[str, list[float]] = {}
        for pixels in self.held_out:
            with self.autocast():
                reconstructed = self.vae.decode(self.vae.encode(pixels.to(self.device))).float().cpu()
            mse = (reconstructed.clamp(-1, 1) - pixels).square().mean((1, 2, 3, 4))
            size = f"psnr_{pixels.shape[3]}x{pixels.shape[4]}"
            by_size.setdefault(size, []).extend((10 * torch.log10(4 / mse)).tolist())
        everything = [value for values in by_size.values() for value in values]
        means = {size: sum(values) / len(values) for size, values in sorted(by_size.items())}
        return {"psnr": sum(everything) / len(everything), **means}

    @torch.no_grad()
    def preview(self, model_dir: Path, path: Path, batch: Sample, num_steps: int) -> None:
        """The first sample of a batch above its reconstruction."""
        pixels = batch.pixels[:1].to(self.device)
        with self.autocast():
            reconstructed = self.vae.decode(self.vae.encode(pixels)).float()
        write_clip(to_uint8(torch.cat([pixels, reconstructed], dim=3)[0]), path, self.config.fps)

    def save(self, folder: Path) -> None:
        """With a scaling factor that gives the latents of the held-out samples a standard deviation of 1."""
        with torch.no_grad(), self.autocast():
            latents = [self.vae.encode(pixels.to(self.device)).float().flatten() for pixels in self.held_out]
        self.vae.config.scaling_factor = round(1 / torch.cat(latents).std().item(), 6)
        self.vae.save_pretrained(folder)
        self.vae.config.scaling_factor = 1.0


def write_clip(frames, path: Path, fps: float) -> None:
    for suffix in (".gif", ".png"):
        write_video(frames, path.with_suffix(suffix), fps)


# ---------------------------------------------------------------- what learns, and how


def learning_rate(phase: Phase, warmup_steps: int, step: int) -> float:
    """Linear warm-up, times half a cosine from lr to final_lr over the phase."""
    progress = min(step / phase.num_steps, 1)
    decayed = phase.final_lr + (phase.lr - phase.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return decayed * min(1, (step + 1) / max(1, warmup_steps))


class Learner:
    """The weights that learn (fp32), their AdamW and their EMA, each by the name component/key."""

    def __init__(self, modules: dict[str, nn.Module], config: Config):
        self.modules, self.config = modules, config
        self.params = {f"{c}/{key}": p for c, m in modules.items() for key, p in m.named_parameters()}
        for param in self.params.values():
            param.data = param.data.clone()  # not a view of the file it was loaded from
        self.optimizer = torch.optim.AdamW(
            self.params.values(), eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
        )
        self.ema = {name: p.detach().clone() for name, p in self.params.items()} if config.ema_decay else {}

    def inherit(self, before: "Learner") -> None:
        """Moments and EMA of the phase before."""
        for name, param in self.params.items():
            if name in before.params:
                self.optimizer.state[param] = before.optimizer.state[before.params[name]]
                self.ema.update({name: before.ema[name]} if name in before.ema else {})

    def step(self, lr: float, total_steps: int) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:  # of the last tenth of the steps at first, so that a short run shows what it learnt
            decay = min(self.config.ema_decay, (1 + total_steps) / (10 + total_steps))
            torch._foreach_lerp_(
                list(self.ema.values()), [p.detach() for p in self.params.values()], 1 - decay
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules hold the EMA weights inside the block."""

        def swap() -> None:
            for name, average in self.ema.items():
                self.params[name].data, self.ema[name] = average, self.params[name].data

        swap()
        try:
            yield
        finally:
            swap()

    def state(self) -> dict[str, Tensor]:
        """Everything but the EMA weights, which stand in the checkpoint's component folders."""
        state = {f"weight/{name}": p.data for name, p in self.params.items()} if self.ema else {}
        for name, param in self.params.items():
            for key, tensor in self.optimizer.state[param].items():  # step, exp_avg, exp_avg_sq
                state[f"{key}/{name}"] = tensor
        return state

    def load(self, folder: Path) -> None:
        """The inverse of `state`; the modules have been loaded from the checkpoint, so they hold the EMA."""
        files = weight_files(folder)
        for full_name, tensor in read_tensors(files, list(files)):
            key, _, name = full_name.partition("/")
            if name not in self.params:
                raise ValueError(f"{folder} holds {full_name}, which this run does not train")
            param = self.params[name]
            if key == "weight":
                param.data.copy_(tensor)
            else:
                like = tensor.clone() if key == "step" else torch.empty_like(param).copy_(tensor)
                self.optimizer.state[param][key] = like


# ---------------------------------------------------------------- folders


def link_folder(source: Path, target: Path) -> None:
    """The same files under another name, without a second copy where the disk allows it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            link_folder(path, target / path.name)
        elif not path.name.startswith("."):
            link_or_copy(path, target / path.name)


MODEL_INDEX = {
    "_class_name": "CogVideoX_Fun_Pipeline_Inpaint",
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def begin_folder(out: Path, model_dir: Path | None, config: Config, from_scratch: bool) -> None:
    """OUT as a complete checkpoint before the first step: the folders of --model, what it lacks made anew.

    from_scratch: make the component that is trained anew in any case
    raises ValueError if something is lacking for which the preset has no config
    """
    torch.manual_seed(config.seed)
    fresh = {"dit": "transformer", "vae": "vae"}[config.train] if from_scratch else None

    def make_tokenizer() -> None:
        (out / "tokenizer").mkdir()
        shapes.make_tokenizer().save(str(out / "tokenizer" / "tokenizer.json"))
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 24, **names})
        (out / "tokenizer" / "tokenizer_config.json").write_text(text + "\n")

    def make_vae() -> None:
        vae = VideoVAE(config.vae)
        # A sharp posterior to start with: at a standard deviation of one the decoder would see only noise.
        vae.encoder.conv_out.conv.bias.data[config.vae.latent_channels :] = -6
        vae.save_pretrained(out)

    make = {
        "transformer": lambda: VideoTransformer(config.dit).save_pretrained(out),
        "vae": make_vae,
        "text_encoder": lambda: T5Encoder(config.t5).save_pretrained(out),
        "tokenizer": make_tokenizer,
        "scheduler": lambda: Schedule().save_pretrained(out),
    }
    if config.vae is None:
        del make["vae"]
    if config.t5 is None:
        del make["text_encoder"], make["tokenizer"]
    out.mkdir(parents=True, exist_ok=True)
    for name in COMPONENTS:
        if (out / name).exists():
            shutil.rmtree(out / name)
        if model_dir and (model_dir / name).is_dir() and name != fresh:
            link_folder(model_dir / name, out / name)
        elif name in make and (config.train == "dit" or name == "vae"):
            make[name]()
        elif config.train == "dit" or name == "vae":
            raise ValueError(
                f"there is no {name}/ to start from; give --model a checkpoint folder that has one"
            )
    index = (
        read_json(model_dir / "model_index.json")
        if model_dir and (model_dir / "model_index.json").is_file()
        else {}
    )
    with atomic_write(out / "model_index.json") as temporary:
        temporary.write_text(json.dumps({**MODEL_INDEX, **index}, indent=2) + "\n")


@dataclass
class Counters:
    """Where a run is; beside weights, moments and EMA all there is to save."""

    phase: int = 0
    step: int = 0  # of the phase
    total_steps: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch, the next to be used
    log_bytes: int = 0  # length of log.jsonl


def save_checkpoint(out: Path, task, learner: Learner, counters: Counters, settings: dict, keep: int) -> Path:
    """OUT/checkpoints/step-… appears complete or not at all; then OUT shows its weights; older ones go.

    raises OSError if there is no room; what was there before is untouched then
    """
    target = out / "checkpoints" / f"step-{counters.total_steps:06d}"
    try:
        with atomic_dir(target) as folder:
            with learner.averaged():
                task.save(folder)
            for path in out.iterdir():
                if path.name in (*COMPONENTS, "model_index.json") and not (folder / path.name).exists():
                    link_folder(path, folder / path.name) if path.is_dir() else link_or_copy(
                        path, folder / path.name
                    )
            save_weights(learner.state(), folder / "training", "state")
            state = {"counters": dataclasses.asdict(counters), "settings": settings}
            (folder / "training" / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    except OSError as error:
        last = newest_checkpoint(out)
        kept = f"{last} is intact: make room and --resume" if last else "there is no earlier checkpoint"
        raise OSError(f"cannot save {target} ({error.strerror or error}); {kept}") from None
    publish(out, target, keep)
    return target


def publish(out: Path, newest: Path, keep: int) -> None:
    """OUT shows the weights of its newest checkpoint, and the last `keep` checkpoints stay."""
    for name in COMPONENTS:
        if (newest / name).is_dir():
            link_folder(newest / name, out / name)
    for path in sorted((out / "checkpoints").glob("step-*"), key=step_of)[:-keep]:
        path = path.rename(path.with_name(f".{path.name}.old"))  # so that half of one is never taken for one
        shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def newest_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint; what a kill left half-written has a dot in front and is removed."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return None
    for torn in folder.glob(".*"):
        shutil.rmtree(torn, ignore_errors=True)
    complete = [path for path in folder.glob("step-*") if (path / "training" / "state.json").is_file()]
    return max(complete, key=step_of, default=None)


# ---------------------------------------------------------------- data


def shape_record(clip: shapes.Clip, name: str) -> Record:
    return Record(name, clip.scene.caption, clip.num_frames, clip.size, clip.read)


def open_data(args: argparse.Namespace, config: Config) -> tuple[list[Record], list[Record], dict[str, str]]:
    """(training records, held-out records, files that cannot be opened)

    shapes: half of the clips square, a quarter each 2:3 and 3:2, one in ten a picture; held out by its rule.
    Files: --val-data, or every tenth sample, at most --num-val.
    """
    if args.data == "shapes":
        sizes = [(128, 128), (104, 156), (128, 128), (156, 104)]
        pictures = config.num_shapes // 10
        clips = shapes.records(
            config.num_shapes - pictures, config.seed, sizes=sizes, num_frames=config.max_frames
        )
        clips += shapes.records(pictures, config.seed + 1, sizes=sizes, num_frames=1)
        held_out = shapes.records(args.num_val, config.seed + 2, True, sizes, config.max_frames)
        named = [
            [shape_record(c, f"shape {i}: {c.scene.caption()}") for i, c in enumerate(cs)]
            for cs in (clips, held_out)
        ]
        return *named, {}
    records, failures = open_records(read_metadata(args.data), config.fps)
    if args.val_data:
        held_out, more = open_records(read_metadata(args.val_data), config.fps)
        return records, held_out[: args.num_val], failures | more
    chosen = set(range(9, len(records), 10)[: args.num_val]) or {len(records) - 1}
    held_out = [record for i, record in enumerate(records) if i in chosen]
    return [r for i, r in enumerate(records) if i not in chosen] or held_out, held_out, failures


def deal(
    records: list[Record], plan: Plan, config: Config, phase: Phase, counters: Counters
) -> Iterator[list]:
    """Global batches from a place on: lists of (epoch, position, micro-batch), through all epochs.

    The list is fixed by plan and seed; a number of processes would take every n-th of each.
    """

    def stream() -> Iterator[tuple[int, int, Batch]]:
        for epoch in itertools.count(counters.epoch):
            for position, batch in enumerate(epoch_batches(records, plan, config.seed, epoch)):
                if (epoch, position) >= (counters.epoch, counters.batch):
                    yield epoch, position, batch

    batches = stream()
    while True:
        yield list(itertools.islice(batches, phase.global_batch // config.batch_size))


def load_held_out(records: list[Record], plan: Plan, config: Config) -> list[tuple[Sample, list[Key]]]:
    """All held-out samples, the same crops and draws each time."""
    loader = Loader(records, config.seed, max_failures=1.0)
    batches = epoch_batches(records, plan, config.seed, VALIDATION_EPOCH)
    todo = ((VALIDATION_EPOCH, batch) for batch in batches)
    return [(loaded, keys_of(config, epoch, batch)) for epoch, batch, loaded in loader.batches(todo)]


def keys_of(config: Config, epoch: int, batch: Batch) -> list[Key]:
    return [(config.seed, epoch, index) for index in batch.indices]


# ---------------------------------------------------------------- seeing it learn


class Log:
    """log.jsonl and the same on the screen; cut back to where a checkpoint was when a run is resumed."""

    def __init__(self, path: Path, num_bytes: int):
        self.path = path
        path.touch()
        os.truncate(path, min(num_bytes, path.stat().st_size))

    def write(self, record: dict, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(line, flush=True)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


def draw_curve(log: Path, path: Path, width: int = 960, height: int = 480) -> None:
    """A log as a picture: the losses (dots) and their running mean (blue), on a logarithmic scale, and what
    validation found (red): its loss on the same scale, or PSNR on one of its own."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    name = "psnr" if "psnr" in entries[-1] else "val_loss"
    losses = [(entry["step"], math.log(entry["loss"])) for entry in entries if entry.get("loss", 0) > 0]
    found = [(entry["step"], entry[name]) for entry in entries if entry.get(name, 0) > 0]
    if len(losses) < 2 or not found:
        return
    if name == "val_loss":
        found = [(step, math.log(value)) for step, value in found]
    means = list(itertools.accumulate((y for _, y in losses), lambda mean, y: mean + (y - mean) / 30))
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)

    def places(
        points: list[tuple[float, float]], scale: list[tuple[float, float]]
    ) -> list[tuple[float, float]]:
        low, high = min(y for _, y in scale), max(y for _, y in scale)
        last = max(1, losses[-1][0])
        return [
            (70 + (width - 140) * x / last, height - 40 - (height - 80) * (y - low) / (high - low or 1))
            for x, y in points
        ]

    scale = losses + (found if name == "val_loss" else [])
    pen.point(places(losses, scale), "#999999")
    pen.line(places([(x, mean) for (x, _), mean in zip(losses, means)], scale), "#1f5fbf", 2)
    pen.line(places(found, scale if name == "val_loss" else found), "#bf1f1f", 2)
    low, high = min(y for _, y in scale), max(y for _, y in scale)
    for i in range(5):
        y = low + (high - low) * i / 4
        pen.text((5, places([(0, y)], scale)[0][1] - 6), f"{math.exp(y):.4g}", "black")
    title = f"loss (blue); {name} on held-out samples (red), last {entries[-1].get(name, 0):.4g}"
    pen.text((70, 10), f"{title}; {losses[-1][0]} steps", "black")
    with atomic_write(path) as temporary:
        picture.save(temporary)


def gib_used(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def as_time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


# ---------------------------------------------------------------- the loop


def accumulate(task, config: Config, micro_batches: list, loaded: Iterator) -> tuple[float, float]:
    """Leave the gradient of a global batch, the mean over its samples, at the weights.

    returns: the loss, and the seconds spent waiting for data
    raises NotFinite at the first micro-batch whose loss is not finite
    """
    draws = config.draws_per_clip
    keys = [repeated(keys_of(config, epoch, batch), draws) for epoch, _, batch in micro_batches]
    num_samples = sum(map(len, keys))
    timesteps = stratified_timesteps(sum(keys, [])).split([len(part) for part in keys])
    loss = waited = 0.0
    for part in timesteps:
        start = time.perf_counter()
        epoch, batch, samples = next(loaded)
        waited += time.perf_counter() - start
        losses = task.losses(samples, keys_of(config, epoch, batch), part)
        share = losses.sum() / num_samples
        share.backward()
        loss += share.item()
        if not math.isfinite(loss):
            raise NotFinite([batch])
    return loss, waited


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; its argument: the batches it comes from."""


def one_step(
    task, learner: Learner, config: Config, phase: Phase, counters: Counters, todo, loaded, records
) -> dict:
    """One step of the optimizer, and what the log says of it; at a NaN the weights stay as they were."""
    start = time.perf_counter()
    micro_batches = next(todo)
    lr = learning_rate(phase, config.warmup_steps, counters.step)
    try:
        loss, waited = accumulate(task, config, micro_batches, loaded)
        grad_norm = nn.utils.clip_grad_norm_(learner.params.values(), config.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise NotFinite([batch for _, _, batch in micro_batches])
    except NotFinite as error:
        names = [records[index].name for batch in error.args[0] for index in batch.indices]
        raise ValueError(
            f"step {counters.total_steps + 1}: loss or gradient is not finite; the weights are untouched. "
            f"Lower --lr, or look at the files of this batch: {', '.join(names)}"
        ) from None
    learner.step(lr, counters.total_steps)
    epoch, position, _ = micro_batches[-1]
    counters.step, counters.total_steps = counters.step + 1, counters.total_steps + 1
    counters.epoch, counters.batch = epoch, position + 1
    seconds = time.perf_counter() - start
    tokens = (
        sum(batch.bucket.tokens * len(batch.indices) for _, _, batch in micro_batches) * config.draws_per_clip
    )
    return {
        "step": counters.total_steps,
        "phase": counters.phase + 1,
        "epoch": epoch,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens_per_s": tokens / seconds,
        "wait": waited / seconds,
        "gib": gib_used(task.device),
        "seconds": seconds,
    }


def log_step(log: Log, entry: dict, num_steps: int, pace: float) -> None:
    """pace: seconds a step, lately"""
    left = as_time(pace * (num_steps - entry["step"]))
    log.write(
        entry,
        f"phase {entry['phase']} step {entry['step']}/{num_steps}  loss {entry['loss']:.4f}  "
        f"grad {entry['grad_norm']:.3f}  lr {entry['lr']:.2e}  {entry['tokens_per_s']:.0f} tokens/s  "
        f"wait {entry['wait']:.0%}  {entry['gib']:.2f} GiB  {left} left",
    )


def describe(
    args: argparse.Namespace, config: Config, phase: Phase, task, learner, records, plan, epoch
) -> None:
    """What will happen, before it does."""
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for name, m in learner.modules.items()
    )
    epoch_list = epoch_batches(records, plan, config.seed, epoch)
    print(
        f"training {sizes} parameters on {task.device} in {str(task.dtype)[6:]} -> {args.out}\n"
        f"{len(records)} samples; a step is {phase.global_batch // config.batch_size} "
        f"micro-batches of up to {plan.batch_tokens} video tokens, x {config.draws_per_clip} draws\n"
        f"{phase.num_steps} steps at resolutions {', '.join(map(str, phase.resolutions))}, up to "
        f"{phase.max_tokens} tokens and {plan.max_frames} frames; an epoch (the {epoch + 1}. here) has\n"
        f"{bucket_table(epoch_list)}",
        flush=True,
    )


def train(args: argparse.Namespace, config: Config, signals: list[int]) -> int:
    """All phases from where the run is to its end. Returns the signal that stopped it, or 0."""
    out, settings = args.out, settings_of(args, config)
    newest = begin_or_resume(args, config, settings)
    counters = Counters(phase=args.phase - 1)
    if newest:
        counters = Counters(**read_json(newest / "training" / "state.json")["counters"])
    device, dtype = choose_device(args)
    task = {"dit": Denoising, "vae": Reconstruction}[config.train](config, newest or out, device, dtype)
    if config.train == "dit":
        task.dit.activation_checkpointing = args.activation_checkpointing
        for block in task.dit.transformer_blocks if args.compile else []:
            block.compile()
    records, held_out_records, failures = open_data(args, config)
    check_records(task, records + held_out_records)
    loader = Loader(records, config.seed, failures, args.num_workers)
    log = Log(out / "log.jsonl", counters.log_bytes)
    num_steps = min(
        args.num_steps or math.inf,
        counters.total_steps - counters.step + sum(p.num_steps for p in config.phases[counters.phase :]),
    )
    learner = None

    while counters.total_steps < num_steps:
        phase = config.phases[counters.phase]
        plan = task.plan(phase)
        held_out = load_held_out(held_out_records, plan, config)
        learner = begin_phase(task, config, phase, held_out, learner)
        if newest:
            learner.load(newest / "training")
            newest = None
        describe(args, config, phase, task, learner, records, plan, counters.epoch)
        if counters.total_steps == 0:
            validate(args, task, learner, log, counters)  # where it starts
        todo, ahead = itertools.tee(deal(records, plan, config, phase, counters))
        loaded = loader.batches(
            (epoch, batch) for micro_batches in ahead for epoch, _, batch in micro_batches
        )
        pace = None
        while counters.step < phase.num_steps and counters.total_steps < num_steps and not signals:
            entry = one_step(task, learner, config, phase, counters, todo, loaded, records)
            pace = entry["seconds"] if pace is None else 0.9 * pace + 0.1 * entry["seconds"]
            log_step(log, entry, num_steps, pace)
            is_last = counters.total_steps == num_steps or counters.step == phase.num_steps
            if is_last or counters.total_steps % args.val_every == 0:
                validate(args, task, learner, log, counters)
            if is_last or counters.total_steps % args.preview_every == 0:
                preview(args, task, learner, counters, held_out)
            if is_last or signals or counters.total_steps % args.save_every == 0:
                counters.log_bytes = log.num_bytes
                path = save_checkpoint(out, task, learner, counters, settings, args.keep)
                print(f"saved {path}", flush=True)
        loaded.close()
        if signals:
            break
        if counters.step == phase.num_steps and counters.phase + 1 < len(config.phases):
            counters.phase, counters.step = counters.phase + 1, 0
            counters.epoch, counters.batch = counters.epoch + 1, 0
    print(f"{'stopped' if signals else 'done'}: {counters.total_steps} steps; python sample.py --model {out}")
    return signals[0] if signals else 0


def begin_phase(task, config: Config, phase: Phase, held_out: list, before: Learner | None) -> Learner:
    """What learns in this phase, with moments and EMA of the last; what learns no more becomes its EMA."""
    if before:
        for name, average in before.ema.items():
            if name.startswith("text_encoder/") and not phase.train_text:
                before.params[name].data.copy_(average)
    learner = Learner(task.begin(phase, held_out), config)
    if before:
        learner.inherit(before)
    return learner


def validate(args: argparse.Namespace, task, learner: Learner, log: Log, counters: Counters) -> None:
    with learner.averaged():
        result = task.validate()
    shown = "  ".join(f"{name} {value:.4g}" for name, value in result.items())
    log.write({"step": counters.total_steps, **result}, f"held out at step {counters.total_steps}: {shown}")
    draw_curve(log.path, args.out / "loss.png")


def preview(args: argparse.Namespace, task, learner: Learner, counters: Counters, held_out: list) -> None:
    for i, (batch, _) in enumerate(held_out[: args.num_previews]):
        path = args.out / "previews" / f"step-{counters.total_steps:06d}-{i}"
        with learner.averaged():
            task.preview(args.out, path, batch, args.preview_steps)
        print(f"{path}.gif and .png: {batch.caption[0]}", flush=True)


# ---------------------------------------------------------------- the command line


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device asked for or the best there is; bfloat16 where it computes in it, else float32."""
    device, _ = sample.choose_device(args.device, None)
    has_bf16 = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": lambda: torch.cpu._is_avx512_bf16_supported(),
    }
    dtype = args.dtype or ("bfloat16" if has_bf16.get(device.type, lambda: False)() else "float32")
    return device, getattr(torch, dtype)


def check_records(task, records: list[Record]) -> None:
    if not records:
        raise ValueError("there are no samples to train on")
    if getattr(task, "kind", None) == "control":
        for record in records:
            if record.read_control is None:
                raise ValueError(
                    f"{record.name} has no control_file_path, which a control model (32 channels) needs"
                )


def settings_of(args: argparse.Namespace, config: Config) -> dict:
    """What has to be the same when a run is resumed, as JSON can hold it."""
    return json.loads(
        json.dumps({"data": str(args.data), "val_data": str(args.val_data), **dataclasses.asdict(config)})
    )


def begin_or_resume(args: argparse.Namespace, config: Config, settings: dict) -> Path | None:
    """The checkpoint to go on from, or None after OUT was made ready to start."""
    newest = newest_checkpoint(args.out)
    if newest and not args.resume:
        raise ValueError(f"{args.out} holds a run ({newest.name}); add --resume, or choose another --out")
    if not newest:
        if args.model and args.out.resolve() == args.model.resolve():
            raise ValueError(f"--out {args.out} is the folder to start from; choose another")
        begin_folder(args.out, args.model, config, args.from_scratch)
        return None
    before = read_json(newest / "training" / "state.json")["settings"]
    if changed := [name for name in settings if settings[name] != before.get(name)]:
        name = changed[0]
        raise ValueError(
            f"{newest} was trained with {name} = {before.get(name)}, now it is {settings[name]}; "
            "repeat the settings to resume, or start a new run from it with --model"
        )
    print(f"resuming from {newest}")
    publish(args.out, newest, args.keep)  # the kill may have come between saving and this
    return newest


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """The command line, and the preset with what it changes."""
    parser = Parser(
        prog="train.py",
        description="Train the VAE, or train and fine-tune the transformer, of CogVideoX and CogVideoX-Fun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
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
    group = parser.add_argument_group("in place of the preset's values, in every phase")
    add = group.add_argument
    add("--resolutions", type=int, nargs="+", help="base sizes")
    add("--max-tokens", type=int, help="tokens of a clip")
    add("--num-frames", type=int, dest="max_frames", help="most frames of a clip")
    add("--fps", type=float, help="frames a second to read files at")
    add("--batch-size", type=int, help="clips of max-tokens in a micro-batch; more where they are smaller")
    add("--grad-accum", type=int, help="micro-batches in a step")
    add("--draws-per-clip", type=int, help="noises and timesteps for each encoded clip")
    add("--lr", type=float, help="constant learning rate")
    add("--warmup-steps", type=int)
    add("--weight-decay", type=float)
    add("--max-grad-norm", type=float)
    add("--ema-decay", type=float, help="0: none")
    add("--kl-weight", type=float)
    add("--in-channels", type=int, help="16, 32 or 33: grow the transformer's input")
    add("--position", choices=["interpolate", "regenerate"], help="sincos positions off the native grid")
    add("--num-shapes", type=int, help="clips in an epoch of --data shapes")
    add("--seed", type=int)
    group = parser.add_argument_group("without influence on the numbers")
    add = group.add_argument
    add("--device", help="default: the best there is")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of the arithmetic; default: bfloat16 where it is fast",
    )
    add("--activation-checkpointing", action="store_true", help="less memory, a third more time")
    add("--compile", action="store_true", help="compile the transformer's blocks")
    add("--num-workers", type=int, default=4, help="threads that load data")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--keep", type=int, default=3, help="how many checkpoints stay")
    add("--val-every", type=int, default=250, help="steps between validations")
    add("--num-val", type=int, default=16, help="samples held out")
    add("--preview-every", type=int, default=1000, help="steps between previews")
    add("--num-previews", type=int, default=3)
    add("--preview-steps", type=int, default=25, help="sampling steps of a preview")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / (args.preset + ("-vae" if args.train == "vae" else ""))
    if not args.model and args.preset == "tiny" and args.train == "dit":
        args.model = "runs/tiny-vae"  # what --train vae makes
        if not Path(args.model).is_dir():
            raise ValueError(
                f"there is no {args.model} yet; run --train vae first, or give --model a folder with vae/"
            )
    args.model = find_model(args.model) if args.model else None
    return args, make_config(args)


def make_config(args: argparse.Namespace) -> Config:
    """The preset with the command line's changes; ValueError for what cannot be."""
    config = PRESETS[args.preset][args.train]
    names = {field.name for field in dataclasses.fields(Config)} - {"phases", "train"}
    config = replace(config, **{k: v for k, v in vars(args).items() if k in names and v is not None})
    positive = {
        name: getattr(config, name)
        for name in ("batch_size", "draws_per_clip", "max_frames", "fps", "num_shapes")
    }
    positive |= {
        name: getattr(args, name)
        for name in ("save_every", "val_every", "preview_every", "keep", "num_val", "num_workers")
    }
    positive |= {
        "num_steps": 1 if args.num_steps is None else args.num_steps,
        "grad_accum": 1 if args.grad_accum is None else args.grad_accum,
        "max_tokens": 1 if args.max_tokens is None else args.max_tokens,
    }
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} should be at least 1")
    phases = list(config.phases)
    if args.phase_steps:
        if len(args.phase_steps) > len(phases):
            raise ValueError(
                f"--phase-steps has {len(args.phase_steps)} numbers, {args.preset} {len(phases)} phases"
            )
        phases = [replace(p, num_steps=n) for p, n in zip(phases, args.phase_steps)]
    for i, phase in enumerate(phases):
        if args.lr is not None:
            phase = replace(phase, lr=args.lr, final_lr=args.lr)
        phase = replace(
            phase,
            resolutions=tuple(args.resolutions or phase.resolutions),
            max_tokens=args.max_tokens or phase.max_tokens,
            global_batch=config.batch_size * args.grad_accum if args.grad_accum else phase.global_batch,
        )
        if phase.global_batch % config.batch_size:
            raise ValueError(f"a step of {phase.global_batch} clips cannot be cut into micro-batches of "
                             f"{config.batch_size}; give --grad-accum")  # fmt: skip
        phases[i] = phase
    if not 1 <= args.phase <= len(phases):
        raise ValueError(f"--phase {args.phase} is not among the {len(phases)} phases of {args.preset}")
    if config.max_frames % 4 != 1:
        raise ValueError(
            f"--num-frames {config.max_frames}; the VAE needs 4k+1, try {config.max_frames // 4 * 4 + 1}"
        )
    if bad := [size for phase in phases for size in phase.resolutions if size < 16 or size % 16]:
        raise ValueError(f"--resolutions {bad[0]} is not a multiple of 16")
    return replace(config, phases=tuple(phases))


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 at the end, 2 with one line on stderr for an error, 128 + n after signal n."""
    signals: list[int] = []

    def stop(number: int, _) -> None:
        if signals:
            raise KeyboardInterrupt  # the second time at once
        signals.append(number)
        print("saving after this step …", flush=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        args, config = parse(argv)
        number = train(args, config, signals)
        return 128 + number if number else 0
    except (ValueError, OSError) as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "out of memory; try a smaller --batch-size or --max-tokens, or --activation-checkpointing"
    except KeyboardInterrupt:
        message = "interrupted; the last checkpoint can be resumed"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"train.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
