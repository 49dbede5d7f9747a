"""Train the transformer: it learns to say the velocity of noisy latents, beside a frozen VAE and T5.

    clips ─VAE─► posteriors ─sample─► latents ─noise at drawn timesteps─► noisy ┐
    masked clip, control clip or first picture ─VAE─► condition ────────────────┼─► velocity ─► loss
    captions ─T5─► text ────────────────────────────────────────────────────────┘

What is shown beside the noisy latents follows from the kind of model, see kinds.model_kind. Encoding
(`Encoders`) needs no transformer and the losses (`Denoising.losses`) no VAE, so a cache fits in between.
Reference: CogVideoX-Fun scripts/train.py; for image models CogVideo's finetune/.
Dimension key: b batch, c channels, f frames, h w height and width, L text tokens, d text width.
"""

import copy
import functools
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import sample
from data import PICTURE_DROP, ZERO_CONDITION, Batch, Key, Loader, Micro, Plan, Sample, load_sample, pixels_of
from diffusion import Schedule
from inpaint import add_reference_noise, draw_noise_sigma, encode_masked, join_condition
from kinds import is_cogvideox15, max_num_frames, model_kind, native_size, num_padding
from media import to_pixels, to_uint8
from presets import Config, Phase
from runtime import autocast, chance, generator
from text_encoder import T5Encoder
from transformer import VideoTransformer, grow_input_channels
from vae import sample_first_picture, sample_posterior

BANDS = (100, 300, 500, 700, 900)  # timesteps validated at: the middles of five bands


def denoising_losses(
    dit: VideoTransformer,
    schedule: Schedule,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: Tensor,
    condition: Tensor | None,
    motion_sub_loss: float = 0.0,
) -> Tensor:
    """Velocity MSE in fp32, one number a noise: mean (velocity − target)².

    latents, noise: b 16 f h w    timesteps: b    text: b L d    condition: b c f h w or None    returns: b
    motion_sub_loss: the share of the loss that is the MSE of the differences between neighbouring frames
        (VideoX-Fun: 0.25)
    """
    noisy = schedule.add_noise(latents, noise, timesteps)
    velocity = dit(noisy, timesteps, text, condition)
    target = schedule.velocity(latents, noise, timesteps)
    error = velocity.float() - target.float()
    losses = error.square().mean((1, 2, 3, 4))
    if motion_sub_loss and error.shape[2] > 2:
        losses = losses.lerp(error.diff(dim=2).square().mean((1, 2, 3, 4)), motion_sub_loss)
    return losses


# ---------------------------------------------------------------- samples to tensors


class Encoders:
    """What the frozen VAE and T5 of `models` make of samples; each is loaded when it is first asked."""

    def __init__(self, models: sample.Models):
        self.models, self.config, self.device = models, models.config, models.device
        self.kind = models.kind

    def ids(self, captions: list[str]) -> Tensor:
        """b L"""
        return self.models.tokenizer(captions, self.config.max_text_seq_length).to(self.device)

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """b L d"""
        return self.models.load("text_encoder")(self.ids(captions))

    @torch.no_grad()
    def clips(self, samples: list[Sample]) -> Batch:
        """Samples of one shape: posteriors of the clips b 32 f' h' w', means and then log-variances, and what
        the model is shown beside the noisy latents: the control clip's, the first picture's (b 32 1 h' w',
        and zero b where it is dropped), or what `encode_masked` gives."""
        vae = self.models.load("vae")
        pixels = pixels_of(samples, self.device)
        batch = {"latents": torch.cat(vae.moments(pixels), dim=1)}
        if self.kind == "control":
            control = to_pixels(torch.stack([one.control for one in samples]).to(self.device))
            batch["control"] = torch.cat(vae.moments(control), dim=1)
        if self.kind == "image":
            first = [self.with_noise(p, one.key) for p, one in zip(pixels[:, :, :1], samples)]
            batch["picture"] = torch.cat(vae.moments(torch.stack(first)), dim=1)
            zero = [chance(generator(*one.key, "picture"), PICTURE_DROP) for one in samples]
            batch["zero"] = torch.tensor(zero, device=self.device)
        if self.kind == "inpaint":
            if self.config.add_noise_in_inpaint_model:
                pixels = torch.stack([self.with_noise(p, one.key) for p, one in zip(pixels, samples)])
            mask = torch.stack([one.mask for one in samples])[:, None].to(self.device)
            zero = torch.tensor([one.zero_if_all_masked for one in samples], device=self.device)
            batch |= encode_masked(vae, pixels, mask, zero)
        return batch

    def with_noise(self, pixels: Tensor, key: Key) -> Tensor:
        """A sample's pixels with the noise that image models, Fun V1.1 and V1.5 see on what is known."""
        draws = generator(*key, "reference noise", device=self.device)
        noise = torch.randn(pixels.shape, generator=draws, device=self.device)
        sigma = draw_noise_sigma(generator(*key, "reference sigma"))
        if self.kind == "image":  # to which black is no sign
            return pixels + sigma * noise
        return add_reference_noise(pixels, sigma, noise)


# ---------------------------------------------------------------- what learns


class Denoising:
    """The transformer, and in some phases the text encoder, learn; the VAE is fixed."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device, dtype: torch.dtype):
        self.config, self.model_dir, self.device, self.dtype = config, model_dir, device, dtype
        self.dit = VideoTransformer.from_pretrained(model_dir, dtype=None)
        if config.in_channels not in (None, self.dit.config.in_channels):
            before = model_kind(self.dit.config)
            if before != "text":
                what = f"{model_dir} is of kind {before}"
                raise ValueError(f"{what}; only a text model of 16 channels is grown by --in-channels")
            grow_input_channels(self.dit, config.in_channels)
        self.kind = model_kind(self.dit.config)
        if config.lora_rank:
            from lora import add_lora  # here and in `save` only: without the file all else still works

            torch.manual_seed(config.seed)  # where its matrices start
            add_lora(self.dit, config.lora_rank, config.lora_alpha)
        if config.position:
            if not self.dit.position:
                raise ValueError(f"position={config.position}: this model has rotary positions")
            self.dit.config.extra["position"] = self.dit.position = config.position
        if not self.dit.config.use_rotary_positional_embeddings:
            # A bias that all keys share cancels in the softmax. Its gradient is only rounding, which AdamW
            # would enlarge to whole steps, different ones for each number of ranks.
            for block in self.dit.transformer_blocks:
                block.attn1.norm_k.bias.requires_grad_(False)
        # With a cache T5 is asked a few times before the first step: its layers are read from the disk.
        self.models = sample.load_models(model_dir, dtype, device, keep=not config.cached_draws)
        self.models.config = self.dit.config  # as it has grown
        self.encoders = Encoders(self.models)
        self.t5 = None  # where it learns

    def plan(self, phase: Phase) -> Plan:
        """What a phase asks of the data."""
        dit = self.dit.config
        max_frames = 1 if phase.pictures else self.config.max_frames
        return Plan(
            resolutions=phase.resolutions,
            max_tokens=phase.max_tokens,
            batch_tokens=self.config.batch_size * phase.max_tokens,
            max_frames=min(max_frames, max_num_frames(dit)),
            frames_per_token=dit.patch_size_t or 1,
            num_padding=int(is_cogvideox15(dit)),
            size=native_size(dit)[:2] if dit.use_learned_positional_embeddings else None,
            masks=self.config.masks if self.kind == "inpaint" else {},
            text_only=self.config.text_only,
        )

    def begin(self, phase: Phase) -> dict[str, nn.Module]:
        """What learns in a phase, by component."""
        self.models.loaded.clear()  # T5 may have become another in the last one; it is read anew
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

    def losses(self, batch: Batch, micro: Micro, timesteps: Tensor) -> Tensor:
        """One loss for each timestep: noises_per_clip of them for each sample."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        draws = micro.draws(self.config.seed, self.device)
        timesteps = timesteps.to(self.device, non_blocking=True)
        latents = self.sampled(batch["latents"], draws)
        num_copies = num_padding(self.dit.config, latents.shape[2])  # of the first frame, in front
        latents = torch.cat([latents[:, :, :num_copies], latents], dim=2)
        condition = self.condition(batch, latents.shape[2], draws)
        text = self.text(batch)
        repeats = len(timesteps) // len(latents)
        if repeats > 1:
            latents, text = latents.repeat_interleave(repeats, 0), text.repeat_interleave(repeats, 0)
            condition = None if condition is None else condition.repeat_interleave(repeats, 0)
        noise = self.normal(latents.shape, draws)
        dit = self.dit if torch.is_grad_enabled() else self.in_turn
        schedule, share = self.models.schedule, self.config.motion_sub_loss
        with autocast(self.device, self.dtype):
            return denoising_losses(dit, schedule, latents, noise, timesteps, text, condition, share)

    def in_turn(self, noisy: Tensor, timesteps: Tensor, text: Tensor, condition: Tensor | None) -> Tensor:
        """The transformer's velocities; large clips one by one, as the bands of validation take more memory
        together than a step does."""
        size = len(noisy) if noisy[0, 0].numel() <= 4 * sample.SMALL_TOKENS else 1
        velocities = []
        for i in range(0, len(noisy), size):
            rows = slice(i, i + size)
            told = None if condition is None else condition[rows]
            velocities.append(self.dit(noisy[rows], timesteps[rows], text[rows], told))
        return torch.cat(velocities)

    def condition(self, batch: Batch, num_frames: int, draws: torch.Generator) -> Tensor | None:
        """What the model is shown beside num_frames noisy latent frames: b c f' h' w', fp32."""
        if self.kind == "control":
            return self.sampled(batch["control"], draws)
        if self.kind == "inpaint":
            masked, known, zero = batch["masked"], batch["known"], batch["zero"]
            noise = self.normal(masked.chunk(2, dim=1)[0].shape, draws)
            return join_condition(masked, known, zero, noise, self.models.vae_config).float()
        if self.kind == "image":
            mean, logvar = batch["picture"].chunk(2, dim=1)
            noise = self.normal(mean.shape, draws)
            picture = sample_first_picture(mean, logvar, noise, self.models.vae_config).float()
            picture = picture * ~batch["zero"][:, None, None, None, None]
            return F.pad(picture, (0, 0, 0, 0, 0, num_frames - 1))  # zeros in all other frames
        return None

    def text(self, batch: Batch) -> Tensor:
        """b L d, fp32, of what the batch holds: that, or ids where T5 learns; each caption once or often."""
        text = batch["text"]
        if not text.is_floating_point():
            with autocast(self.device, self.dtype):
                text = self.t5(text)
        if "text_row" in batch:
            text = text[batch["text_row"]]
        return text.float()

    def sampled(self, moments: Tensor, draws: torch.Generator) -> Tensor:
        """Scaled latents b 16 f' h' w', fp32, from means and log-variances b 32 f' h' w'."""
        mean, logvar = moments.chunk(2, dim=1)
        return sample_posterior(mean, logvar, self.normal(mean.shape, draws), self.models.vae_config).float()

    def normal(self, shape: Iterable[int], draws: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=draws, device=self.device)

    @torch.no_grad()
    def validate(self, held_out: list[tuple[Batch, Micro]]) -> dict[str, float]:
        """Loss on held-out samples at fixed timesteps and noise, in all and in each band of timesteps."""
        losses = [self.losses(batch, micro, torch.tensor(BANDS)) for batch, micro in held_out]
        bands = torch.stack(losses).mean(0).tolist()
        return {"val_loss": sum(bands) / len(bands)} | {f"val_loss_{t}": b for t, b in zip(BANDS, bands)}

    def preview(self, shown: Sample, num_steps: int):
        """A video from the caption (and control, or first picture) of a sample, uint8 f h w 3."""
        models = copy.copy(self.models)
        models.loaded = models.loaded | {"transformer": self.dit}
        if self.t5:
            models.loaded["text_encoder"] = self.t5
        f, height, width = shown.mask.shape
        settings = {"num_frames": f, "height": height, "width": width, "num_steps": num_steps, "seed": 0}
        if self.kind == "control":
            settings["control_video"] = shown.control.numpy()
        if self.kind == "image":
            settings["image"] = to_uint8(pixels_of([shown], torch.device("cpu"))[0])[0]
        with autocast(self.device, self.dtype):
            return sample.generate(models, shown.caption, **settings)

    def weights(self) -> dict[str, Tensor]:
        """What learnt of the transformer; it may be cut over ranks."""
        weights = self.dit.state_dict()
        if self.config.lora_rank:
            return {name: weight for name, weight in weights.items() if ".lora_" in name}
        return weights

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """weights: as `weights` gives them, but whole. All that did not learn stays the files it was."""
        if self.config.lora_rank:
            from lora import save_lora

            save_lora(self.dit, folder / checkpoint.LORA, weights)
        else:
            self.dit.save_pretrained(folder, state=weights)
        if self.t5:
            self.t5.save_pretrained(folder)

    def cache(self, loader: Loader, plan: Plan, folder: Path | None, digests: list[str]):
        """Where encoded samples are kept: in `folder`, or on the device; digests: of the records' contents"""
        from cache import DeviceCache, DiskCache, files_digest  # so that it can be deleted

        read = functools.partial(load_sample, plan=plan)
        encoding = loader, read, self.encoders.clips, self.encode_texts
        if folder is None:
            return DeviceCache(*encoding, device=self.device)
        dit = self.dit.config
        text_settings = (files_digest(self.model_dir / "tokenizer"), dit.max_text_seq_length)
        if not self.t5:  # while it learns, ids are all there is to keep
            text_settings += (files_digest(self.model_dir / "text_encoder"), str(self.dtype))
        vae = files_digest(self.model_dir / "vae")
        drops = (ZERO_CONDITION, PICTURE_DROP)
        shown = (self.kind, dit.add_noise_in_inpaint_model, plan.masks, plan.text_only, *drops)
        return DiskCache(
            *encoding,
            folder=folder,
            settings=(vae, str(self.dtype), self.config.fps, *shown),
            text_settings=text_settings,
            digests=digests,
        )
