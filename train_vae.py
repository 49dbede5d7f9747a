"""Train the video VAE: encoder and decoder learn to give back the pixels through a small posterior.

    pixels ─encoder─► posterior ─sample─► latents ─decoder─► pixels        python train.py --train vae
    loss = reconstruction + kl_weight · KL(posterior, normal) + equivariance · EQ

EQ, after EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509): from latents averaged to half their size the
decoder has to give the clip at half its size. Latents that scale as pixels do are easier to learn for a
transformer. This file may be deleted; nothing else of training needs it.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, Micro, Plan, Sample, pixels_of
from media import to_uint8
from presets import Config, Phase
from runtime import autocast
from vae import VideoVAE


def reconstruction_losses(pixels: Tensor, target: Tensor) -> Tensor:
    """|e| + e² + (|∂e/∂x| + |∂e/∂y|)/4 + colour for e = pixels − target, a number a sample: b 3 f h w -> b.

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


def halved(x: Tensor) -> Tensor:
    """Pixels or latents: b c f h w -> b c f h/2 w/2."""
    return F.avg_pool3d(x, (1, 2, 2))


class Reconstruction:
    """What train.train asks of what learns; see train_dit.Denoising for the other one."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.autocast = functools.partial(autocast, device, dtype, keeps=True)  # each chunk uses all weights
        self.vae = VideoVAE.from_pretrained(model_dir, torch.float32, device)
        self.vae.encoder.requires_grad_(not config.keep_encoder)
        self.scaling_factor = self.vae.config.scaling_factor  # of the latents that are kept
        self.vae.config.scaling_factor = 1.0  # of those that are learnt with

    def plan(self, phase: Phase) -> Plan:
        batch_tokens = self.config.batch_size * phase.max_tokens
        return Plan(phase.resolutions, phase.max_tokens, batch_tokens, self.config.max_frames, masks={})

    def begin(self, phase: Phase) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def encode(self, samples: list[Sample]) -> Batch:
        """Of this task a micro-batch is nothing but pixels, b 3 f h w."""
        return {"pixels": pixels_of(samples, self.device)}

    def losses(self, batch: Batch, micro: Micro, _) -> Tensor:
        """Reconstruction, decoded in Fun's chunks, + KL a latent number + EQ: b; it has no timesteps."""
        pixels = batch["pixels"]
        draws = micro.draws(self.config.seed, self.device)
        with self.autocast():
            mean, logvar = (moment.float() for moment in self.vae.moments(pixels))
            noise = torch.randn(mean.shape, generator=draws, device=self.device)
            latents = self.vae.posterior(mean, logvar, noise)
            reconstructed = self.vae.decode(latents)
        logvar = logvar.clamp(-30, 20)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3, 4))
        loss = reconstruction_losses(reconstructed, pixels) + self.config.kl_weight * kl
        if self.config.equivariance and micro.number % 2:  # every other one, as it costs a decoding more
            with self.autocast():
                smaller = self.vae.decode(halved(latents))
            loss = loss + self.config.equivariance * reconstruction_losses(smaller, halved(pixels))
        return loss

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            return self.vae.encode(pixels).float()

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        with self.autocast():
            return self.vae.decode(latents).float().clamp(-1, 1)

    def validate(self, held_out: list[tuple[Batch, Micro]]) -> dict[str, float]:
        """PSNR in dB on held-out samples, the mean over all of them and over each size. What is saved from
        now on gets the scaling factor that gives their latents a standard deviation of 1."""
        found: dict[str, list[float]] = {}
        numbers = []
        for batch, _ in held_out:
            pixels = batch["pixels"]
            latents = self.latents(pixels)
            numbers.append(latents.flatten())
            mse = (self.decoded(latents) - pixels).square().mean()
            psnr = (10 * torch.log10(4 / mse)).item()
            height, width = pixels.shape[3:]
            for name in ("psnr", f"psnr_{height}x{width}"):
                found.setdefault(name, []).append(psnr)
        if not self.config.keep_encoder:
            self.scaling_factor = round(1 / torch.cat(numbers).std().item(), 6)
        return {name: sum(values) / len(values) for name, values in sorted(found.items())}

    def preview(self, shown: Sample, num_steps: int):
        """A sample above its reconstruction, uint8 f h w 3."""
        pixels = self.encode([shown])["pixels"]
        reconstructed = self.decoded(self.latents(pixels))
        return to_uint8(torch.cat([pixels, reconstructed], dim=3)[0])

    def weights(self) -> dict[str, Tensor]:
        return {}  # none are cut over ranks

    def save(self, folder: Path, _) -> None:
        self.vae.config.scaling_factor = self.scaling_factor
        self.vae.save_pretrained(folder)
        self.vae.config.scaling_factor = 1.0
