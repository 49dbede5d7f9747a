"""The noise schedule, the velocity target, guidance, and the samplers as short generator functions.

    x0, noise ─add_noise(t)─► noisy    = √ā·x0 + √(1−ā)·noise      t: 0 nearly clean … 999 only noise, ā = 0
    noisy, t ──network──────► velocity ≈ √ā·noise − √(1−ā)·x0      so x0 ≈ √ā·noisy − √(1−ā)·velocity

    sampler   one step                                    ends at               draws     table
    ddim      x0 and noise, mixed anew                    t − 1000//num_steps   –         plain
    ddim-cog  the same function                           t − 1000//num_steps   –         SNR-shifted
    dpm-cog   second-order multistep, SDE                 t − 1000//num_steps   one/step  SNR-shifted
    dpm++     second-order multistep, ODE                 next in the list      –         plain
    euler     straight in σ = √((1−ā)/ā)                  next in the list      –         plain
    euler-a   straight beyond the mark, back by noise     next in the list      one/step  plain

Papers: Salimans & Ho 2022 (arXiv 2202.00512) for the velocity; Lin et al. 2023 (arXiv 2305.08891) for a table
that ends at ā = 0 and for trailing timesteps; each sampler names its own. Reference: diffusers/schedulers.
Dimension key: b batch; samples are b c f h w, though nothing here looks beyond b.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from checkpoint import component_dir, only, read_config, write_config

NUM_TIMESTEPS = 1000
CONFIG_NAME = "scheduler_config.json"
SNR_SHIFTED = {"ddim-cog", "dpm-cog"}  # these take a Schedule with snr_shift=True, all others one without

SAMPLER_OF_CLASS = {  # the scheduler class a checkpoint names -> our sampler
    "CogVideoXDDIMScheduler": "ddim-cog",
    "CogVideoXDPMScheduler": "dpm-cog",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DPMSolverMultistepScheduler": "dpm++",
}


@dataclass
class ScheduleConfig:
    """scheduler_config.json, and CogVideoX-2B's values; the 5B models have snr_shift_scale 1."""

    beta_start: float = 0.00085  # variance of the noise added by the first step …
    beta_end: float = 0.012  # … and by the last; their roots are spaced evenly
    snr_shift_scale: float = 3.0  # divides the signal-to-noise ratio, for the -cog samplers only
    num_train_timesteps: int = NUM_TIMESTEPS
    beta_schedule: str = "scaled_linear"
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = True  # ā(999) = 0
    prediction_type: str = "v_prediction"
    timestep_spacing: str = "trailing"  # the first step is at 999
    set_alpha_to_one: bool = True  # the last step ends at ā = 1
    clip_sample: bool = False
    extra: dict = field(default_factory=dict)  # keys we do not use, kept for saving; _class_name among them

    def __post_init__(self) -> None:
        """ValueError for what no CogVideoX has; the last four are keys of other schedulers."""
        only(
            self,
            num_train_timesteps=(NUM_TIMESTEPS,),
            beta_schedule=("scaled_linear",),
            trained_betas=(None,),
            rescale_betas_zero_snr=(True,),
            prediction_type=("v_prediction",),
            timestep_spacing=("trailing",),
            set_alpha_to_one=(True,),
            clip_sample=(False,),
            thresholding=(False,),
            use_karras_sigmas=(False,),
            algorithm_type=("dpmsolver++",),
            solver_order=(2,),
        )


# ---------------------------------------------------------------- the schedule


def noise_table(config: ScheduleConfig, snr_shift: bool) -> Tensor:
    """ā(t) for t = 0 … 999: float64 with the SNR shift, float32 without, each as its reference has it.

    snr_shift: ā/(s + (1−s)·ā), which divides the signal-to-noise ratio ā/(1−ā) by s = snr_shift_scale. The
    schedulers CogVideoXDDIM and CogVideoXDPM do so; that of training and those of all other samplers do not.
    In either case √ā is then stretched to end at zero (arXiv 2305.08891, Alg. 1).
    """
    dtype = torch.float64 if snr_shift else torch.float32
    roots = torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, NUM_TIMESTEPS, dtype=dtype, device="cpu"
    )
    table = (1 - roots**2).cumprod(0)
    if snr_shift:
        table = table / (config.snr_shift_scale + (1 - config.snr_shift_scale) * table)
    root = table.sqrt()
    table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    if not snr_shift:  # back to β and forth again, as the reference: the rounding is part of the table
        betas = 1 - torch.cat([table[:1], table[1:] / table[:-1]])
        table = (1 - betas).cumprod(0)
    return table


class Schedule:
    """How much signal and noise there is at each timestep. Timesteps are an int, or long of shape b.

    snr_shift: True for the samplers in SNR_SHIFTED, False for training and all other samplers
    """

    def __init__(self, config: ScheduleConfig | None = None, snr_shift: bool = False) -> None:
        self.config = config or ScheduleConfig()
        self.alphas_cumprod = noise_table(self.config, snr_shift)  # ā, on the CPU
        self._tables = {self.alphas_cumprod.device: self.alphas_cumprod}  # and copies where timesteps are

    def _roots(self, t: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ā and √(1−ā), shaped to multiply `like`; ā gets its dtype before the root, as in the reference.

        Timesteps on a GPU are looked up there and not checked: nothing waits for the device.
        """
        t = torch.as_tensor(t)
        if t.device.type == "cpu" and (t.is_floating_point() or t.min() < 0 or t.max() >= NUM_TIMESTEPS):
            raise ValueError(f"timesteps {t.tolist()} should be integers from 0 to {NUM_TIMESTEPS - 1}")
        if t.device not in self._tables:
            self._tables[t.device] = self.alphas_cumprod.to(t.device)
        a = self._tables[t.device][t].to(like).view(-1, *[1] * (like.ndim - 1))
        return a**0.5, (1 - a) ** 0.5

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """√ā·x0 + √(1−ā)·noise, in x0's dtype."""
        root_a, root_noise = self._roots(t, x0)
        return root_a * x0 + root_noise * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """The training target √ā·noise − √(1−ā)·x0   (arXiv 2202.00512, sec. 4 and app. D)."""
        root_a, root_noise = self._roots(t, x0)
        return root_a * noise - root_noise * x0

    def timesteps(self, num_steps: int) -> Tensor:
        """`num_steps` timesteps from 999 down, evenly spaced, long   ("trailing", arXiv 2305.08891, table 2).

        Differs from the reference for 62 counts such as 61, where its rounding appends a timestep of -1.
        """
        # numpy's, whose rounding of the stride decides ties (num_steps = 48)
        places = np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / num_steps)[:num_steps]
        return torch.from_numpy(places.round().astype(np.int64) - 1)

    @property
    def default_sampler(self) -> str:
        """Our name for the scheduler class the checkpoint names; ValueError for one we do not have."""
        class_name = self.config.extra.get("_class_name", "CogVideoXDDIMScheduler")
        if class_name not in SAMPLER_OF_CLASS:
            choice = ", ".join(SAMPLERS)
            raise ValueError(f"the checkpoint asks for {class_name!r}; choose a sampler from {choice}")
        return SAMPLER_OF_CLASS[class_name]

    @property
    def default_guidance_scale(self) -> float:
        """What the file says suits the model, under a key of ours that official ones lack; else 6."""
        return float(self.config.extra.get("guidance_scale", 6.0))

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, snr_shift: bool = False) -> Self:
        """model_dir: a checkpoint folder that holds scheduler/, or that folder itself."""
        folder = component_dir(model_dir, "scheduler", CONFIG_NAME)
        return cls(read_config(ScheduleConfig, folder / CONFIG_NAME), snr_shift)

    def save_pretrained(self, model_dir: str | Path) -> None:
        path = Path(model_dir) / "scheduler" / CONFIG_NAME
        write_config(self.config, path, _class_name="CogVideoXDDIMScheduler")


# ---------------------------------------------------------------- guidance


def guide(velocity_uncond: Tensor, velocity_text: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, uncond + scale·(text − uncond), in float32   (Ho & Salimans 2022, eq. 6)."""
    return velocity_uncond.float() + scale * (velocity_text.float() - velocity_uncond.float())


def guidance_at(
    t: int,
    guidance_scale: float,
    num_steps: int,
    dynamic: bool = False,
    interval: tuple[int, int] = (0, NUM_TIMESTEPS - 1),
) -> float:
    """The scale of one step. At 1.0 the text alone decides: skip the unconditional forward.

    num_steps: N, the steps really taken
    dynamic: 1 + g·(1 − cos(π·((N − t)/N)⁵))/2. The formula is a ramp over step numbers, but the reference
        puts the timestep 0 … 999 into it, so the scale jumps about between 1 and 1 + g. We keep its numbers.
    interval: lowest and highest timestep that is guided (Kynkäänniemi et al. 2024, arXiv 2404.07724, eq. 5)
    """
    if guidance_scale <= 1 or not interval[0] <= t <= interval[1]:
        return 1.0
    if dynamic:
        return 1 + guidance_scale * (1 - math.cos(math.pi * ((num_steps - t) / num_steps) ** 5)) / 2
    return guidance_scale


# ---------------------------------------------------------------- samplers
# for x in SAMPLERS[name](denoise, x, schedule, timesteps, randn, num_steps=None): …
#   denoise(x, t) -> velocity, float32 if x is a shorter dtype; t is an int
#   randn() -> noise like x
#   x: noise, or what add_noise gave at timesteps[0]; yielded in its dtype after each step, clean at the end
#   num_steps: length of the uncut list, default len(timesteps); strided steps are 1000//num_steps long
# Coefficients are 0-d tensors of the table's precision; they leave dtype and device of x as they are.

Net = Callable[[Tensor, int], Tensor]
Draw = Callable[[], Tensor]
Step = tuple[int, Tensor, Tensor]  # t, ā(t), ā where the step ends


def _strided_steps(schedule: Schedule, timesteps: Tensor, num_steps: int | None) -> Iterator[Step]:
    """Steps that end at t − 1000//num_steps, whatever the list says next; below zero that is ā = 1.

    Where num_steps does not divide 1000 the two differ: seven steps end at ā(0), a hair short of clean.
    """
    table = schedule.alphas_cumprod
    stride = NUM_TIMESTEPS // (num_steps or len(timesteps))
    for t in timesteps.tolist():
        a_next = table[t - stride] if t >= stride else torch.ones_like(table[0])
        yield t, table[t], a_next


def _listed_steps(schedule: Schedule, timesteps: Tensor) -> list[Step]:
    """Steps that end at the next timestep of the list, the last at ā = 1.

    ā(999) = 0 would be an infinite σ; 2⁻²⁴, the smallest float16, makes it 4096, as in the reference. So the
    first step of "dpm++" has a finite length, which means nothing, and the second extrapolates by it. A new
    sampler of second order had better begin with two steps of first order.
    """
    table = schedule.alphas_cumprod.clone()
    table[-1] = 2**-24
    levels = [*table[timesteps], torch.ones_like(table[0])]
    return list(zip(timesteps.tolist(), levels, levels[1:]))


def _x0(x: Tensor, velocity: Tensor, a: Tensor) -> Tensor:
    return a**0.5 * x - (1 - a) ** 0.5 * velocity


def ddim(
    denoise: Net, x: Tensor, schedule: Schedule, timesteps: Tensor, randn: Draw, num_steps: int | None = None
) -> Iterator[Tensor]:
    """DDIM without noise   (Song et al. 2021, arXiv 2010.02502, eq. 12 with σ = 0)."""
    for t, a, a_next in _strided_steps(schedule, timesteps, num_steps):
        velocity = denoise(x, t)
        noise = a**0.5 * velocity + (1 - a) ** 0.5 * x
        x = (a_next**0.5 * _x0(x, velocity, a) + (1 - a_next) ** 0.5 * noise).to(x.dtype)
        yield x


def _log_snr(a: Tensor) -> Tensor:
    """λ = log √(ā/(1−ā)), the time in which the DPM solvers step; ∓∞ at pure noise and at clean."""
    return (a / (1 - a)).sqrt().log()


def dpm(
    denoise: Net,
    x: Tensor,
    schedule: Schedule,
    timesteps: Tensor,
    randn: Draw,
    num_steps: int | None = None,
    sde: bool = False,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M)   (Lu et al. 2022, arXiv 2211.01095, Alg. 2; DPMSolverMultistepScheduler).

    sde: SDE-DPM-Solver++(2M), sec. 5, as in CogVideoXDPMScheduler, with one draw a step, even where it is
    multiplied by zero. (The reference draws twice in most and drops one.)
    """
    steps = _strided_steps(schedule, timesteps, num_steps) if sde else _listed_steps(schedule, timesteps)
    x0_old = level_old = None
    for t, a, a_next in steps:
        x0 = _x0(x, denoise(x, t), a)
        level = _log_snr(a)
        h = _log_snr(a_next) - level
        target = x0
        if x0_old is not None and a_next != 1:  # else first order: no step before it, or h is infinite
            r = (level - level_old) / h
            target = x0 + (x0 - x0_old) / (2 * r)
        keep = ((1 - a_next) / (1 - a)) ** 0.5
        if sde:
            fresh = ((1 - a_next) * -(-2 * h).expm1()) ** 0.5
            mixed = keep * (-h).exp() * x - a_next**0.5 * (-2 * h).expm1() * target + fresh * randn()
        else:
            mixed = keep * x - a_next**0.5 * (-h).expm1() * target
        x = mixed.to(x.dtype)
        x0_old = x0
        level_old = level
        yield x


def _sigma(a: Tensor) -> Tensor:
    return ((1 - a) / a) ** 0.5


def euler(
    denoise: Net,
    x: Tensor,
    schedule: Schedule,
    timesteps: Tensor,
    randn: Draw,
    num_steps: int | None = None,
    ancestral: bool = False,
) -> Iterator[Tensor]:
    """Euler's method on dx/dσ = (x − x0)/σ, x = x0 + σ·noise   (Karras et al. 2022, arXiv 2206.00364).

    ancestral: straight to σ_down, then noise up to σ_next: σ_down² + σ_up² = σ_next²   (k-diffusion)
    """
    steps = _listed_steps(schedule, timesteps)
    x = x / steps[0][1] ** 0.5  # from √ā·x0 + √(1−ā)·noise to x0 + σ·noise
    for t, a, a_next in steps:
        sigma, sigma_end = _sigma(a), _sigma(a_next)
        x_in = a**0.5 * x
        slope = (x - _x0(x_in, denoise(x_in, t), a)) / sigma
        if ancestral:
            sigma_up = (sigma_end**2 * (sigma**2 - sigma_end**2) / sigma**2) ** 0.5
            sigma_end = (sigma_end**2 - sigma_up**2) ** 0.5
        x = (x + slope * (sigma_end - sigma)).to(x.dtype)
        if ancestral:
            x = (x + sigma_up * randn()).to(x.dtype)
        yield x


SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ddim": ddim,
    "ddim-cog": ddim,  # the two differ only in the table of the schedule they are given
    "dpm-cog": partial(dpm, sde=True),
    "euler": euler,
    "euler-a": partial(euler, ancestral=True),
    "dpm++": dpm,
}
