"""The schedule, guidance and the samplers against the reference's tables and trajectories."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROUNDS_ALIKE, VARIANTS, assert_close, assert_same, expected

from diffusion import SAMPLER_OF_CLASS, SAMPLERS, SNR_SHIFTED, Schedule, ScheduleConfig, guidance_at, guide

THEIR_NAME = {
    "ddim": "ddim_origin",
    "ddim-cog": "ddim_cog",
    "dpm-cog": "dpm_cog",
    "euler": "euler",
    "euler-a": "euler_a",
    "dpm++": "dpmpp",
}
CLASSES = {name: class_name for class_name, name in SAMPLER_OF_CLASS.items()}
TRAJECTORIES = [
    (variant, name, num_steps)
    for variant in VARIANTS
    for name, theirs in THEIR_NAME.items()
    for num_steps in (4, 7, 10)
    if f"sched.{theirs}.traj{num_steps}" in expected(variant)
]


def schedule_for(name: str, variant: str = "fun-2b-inp") -> Schedule:
    return Schedule.from_pretrained(GOLDENS / variant, snr_shift=name in SNR_SHIFTED)


def used_draws(name: str, noise: list, num_steps: int) -> list:
    """Of two draws in one step of CogVideoXDPMScheduler the first is dropped: keep what enters the result."""
    if name != "dpm-cog":
        return noise
    draws_in_step = [1] + [2] * (num_steps - 1)
    if sum(draws_in_step) > len(noise):  # a last step to clean draws once
        draws_in_step[-1] = 1
    ends = torch.tensor(draws_in_step).cumsum(0)
    assert ends[-1] == len(noise)
    return [noise[end - 1] for end in ends]


@pytest.mark.parametrize("variant", dict.fromkeys(variant for variant, _, _ in TRAJECTORIES))
def test_tables_equal_the_reference_bit_for_bit(variant):
    want = expected(variant)
    shifted, plain = (Schedule.from_pretrained(GOLDENS / variant, snr_shift=s) for s in (True, False))
    for ours, theirs in ((shifted, "ddim_cog"), (plain, "ddpm")):
        table = want[f"sched.{theirs}.alphas_cumprod"]
        assert ours.alphas_cumprod.dtype == table.dtype
        assert_same(ours.alphas_cumprod, table, 5e-7)
        assert ours.alphas_cumprod[-1] == 0  # nothing but noise at 999


def test_timesteps_round_like_numpy_for_every_count():
    for num_steps in range(1, 1001):
        theirs = np.round(np.arange(1000, 0, -1000 / num_steps)) - 1
        assert Schedule().timesteps(num_steps).tolist() == theirs[:num_steps].tolist(), num_steps


@pytest.mark.parametrize("snr_shift, theirs", [(True, "ddim_cog"), (False, "ddpm")])
def test_add_noise_and_velocity_equal_the_reference(snr_shift, theirs):
    want = expected("fun-2b-inp")
    x0, noise, t = (want[f"sched.addnoise.{key}"] for key in ("x", "noise", "t"))
    schedule = Schedule.from_pretrained(GOLDENS / "fun-2b-inp", snr_shift=snr_shift)
    noisy, velocity = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    assert_same(noisy, want[f"sched.addnoise.{theirs}"], 2e-6)
    assert_same(velocity, want[f"sched.velocity.{theirs}"], 2e-6)
    for i, one in enumerate(t.tolist()):  # an int is the same timestep for every sample
        assert torch.equal(schedule.add_noise(x0[i : i + 1], noise[i : i + 1], one), noisy[i : i + 1])


def test_short_dtypes_round_the_table_before_the_root():
    schedule, t = Schedule(), torch.tensor([400])
    x0, noise = torch.zeros(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    a = schedule.alphas_cumprod[t].bfloat16()
    assert torch.equal(schedule.add_noise(x0, noise, t), ((1 - a) ** 0.5 * noise))


def test_timesteps_outside_the_schedule_are_refused_and_those_elsewhere_not_waited_for():
    x = torch.zeros(2, 3)
    for t in (-1, torch.tensor([3, 1000]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="integers from 0 to 999"):
            Schedule().add_noise(x, x, t)
    x = torch.zeros(2, 3, device="meta")  # a device whose numbers cannot be read
    t = torch.zeros(2, dtype=torch.long, device="meta")
    assert Schedule().add_noise(x, x, t).is_meta and Schedule().velocity(x, x, t).is_meta


FILE = "scheduler/scheduler_config.json"


def test_saving_keeps_unknown_keys_and_numbers(tmp_path):
    official = json.loads((GOLDENS / "fun-2b-inp" / FILE).read_text())
    other = {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0, "made_up": [1, 2]}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / FILE).write_text(json.dumps(official | other))
    Schedule.from_pretrained(tmp_path).save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / FILE).read_text()) == official | other


def test_the_defaults_are_the_official_2b_values_and_load_in_diffusers(tmp_path):
    Schedule(ScheduleConfig()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / FILE).read_text())
    official = json.loads((GOLDENS / "cogvideox-2b-t2v" / FILE).read_text())
    assert saved.items() <= official.items()
    diffusers = pytest.importorskip("diffusers")
    for name, snr_shift in (("CogVideoXDDIMScheduler", True), ("DDIMScheduler", False)):
        theirs = getattr(diffusers, name).from_pretrained(tmp_path, subfolder="scheduler")
        assert torch.equal(theirs.alphas_cumprod, Schedule(snr_shift=snr_shift).alphas_cumprod)


@pytest.mark.parametrize("variant, name, num_steps", TRAJECTORIES)
def test_timesteps_and_trajectories_equal_the_reference(variant, name, num_steps):
    want, theirs = expected(variant), f"sched.{THEIR_NAME[name]}"
    schedule = schedule_for(name, variant)
    draws = iter(used_draws(name, list(want.get(f"{theirs}.noise{num_steps}", [])), num_steps))
    constants = iter(want["sched.c"])
    timesteps, seen = schedule.timesteps(num_steps), []
    assert torch.equal(timesteps, want[f"{theirs}.timesteps{num_steps}"].long())

    def denoise(x, t):
        seen.append(t)
        return 0.5 * x + next(constants)

    ours = list(SAMPLERS[name](denoise, want["sched.x0"], schedule, timesteps, lambda: next(draws)))
    assert seen == timesteps.tolist()
    assert next(draws, None) is None  # every draw was used
    for x, x_want in zip(ours, want[f"{theirs}.traj{num_steps}"][1:], strict=True):
        assert x.dtype == torch.float32
        # float32 rounding, measured 7e-7, of each step's largest value; Euler starts at 4096 times the noise
        rounding = 0 if ROUNDS_ALIKE else 2e-3
        assert_close(x, x_want, 2e-6 * x_want.abs().max().item() + rounding)


@pytest.mark.filterwarnings("ignore:__array__")  # diffusers with a new numpy
@pytest.mark.parametrize("num_steps, kept", [(10, 7), (7, 4), (7, 1), (20, 20)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_starting_part_of_the_way_continues_as_diffusers_does(name, num_steps, kept, monkeypatch):
    """`kept` of `num_steps` steps from add_noise output: the stride stays 1000//num_steps."""
    theirs = getattr(pytest.importorskip("diffusers"), CLASSES[name])
    scheduler = theirs.from_pretrained(GOLDENS / "fun-2b-inp", subfolder="scheduler")
    scheduler.set_timesteps(num_steps)
    schedule = schedule_for(name)
    timesteps = scheduler.timesteps[num_steps - kept :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(num_steps - kept)
    clean, noise = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    start = schedule.add_noise(clean, noise, int(timesteps[0]))
    x = scheduler.add_noise(clean, noise, timesteps[:1])
    if kept == num_steps:
        start, x = noise, noise * scheduler.init_noise_sigma

    def network(x):
        return 0.3 * x + 0.1

    fresh = torch.randn(2 * num_steps, 1, 2, 3, 4)  # of step i: one for both places the reference draws at
    steps, old = [], None
    for i, t in enumerate(timesteps):
        module = type(scheduler).__module__
        if name in ("dpm-cog", "euler-a"):
            monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, i=i, **__: fresh[i])
        velocity = network(scheduler.scale_model_input(x, t))
        if name == "dpm-cog":
            before = int(timesteps[i - 1]) if i else None
            x, old = scheduler.step(velocity, old, int(t), before, x, return_dict=False)
        else:
            x = scheduler.step(velocity, t if name.startswith("euler") else int(t), x, return_dict=False)[0]
        steps.append(x)

    draws = iter(fresh).__next__
    sampler = SAMPLERS[name](lambda x, t: network(x), start, schedule, timesteps.long(), draws, num_steps)
    for ours, theirs in zip(sampler, steps, strict=True):
        assert_close(ours, theirs, 4e-6 * theirs.abs().max().item())  # float32 rounding, 20 steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_velocity_leads_to_the_exact_sample(name):
    schedule = schedule_for(name)
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def exact(x, t):  # the velocity at x of a distribution that is `clean` alone
        a = schedule.alphas_cumprod[t].float()
        return a**0.5 * (x - a**0.5 * clean) / (1 - a) ** 0.5 - (1 - a) ** 0.5 * clean

    for strength in (10, 6):
        timesteps = schedule.timesteps(10)[-strength:]
        start = schedule.add_noise(clean, noise, int(timesteps[0]))
        *_, x = SAMPLERS[name](exact, start, schedule, timesteps, lambda: torch.randn(2, 3, 4), 10)
        assert_close(x, clean, 1e-5)  # rounding divided by √(1−ā) = 0.2 … 1 at the last step


def test_guidance_moves_from_the_unconditional_velocity_through_the_text_one_in_float32():
    uncond, text = torch.tensor([1.0]).bfloat16(), torch.tensor([3.0]).bfloat16()
    assert guide(uncond, text, 6.0).item() == 13.0
    assert guide(uncond, text, 6.0).dtype == torch.float32


def test_guidance_acts_inside_its_interval_only():
    inside = [guidance_at(t, 6.0, 50, interval=(200, 800)) for t in (199, 200, 800, 801)]
    assert inside == [1.0, 6.0, 6.0, 1.0]
    assert guidance_at(999, 6.0, 4) == guidance_at(0, 6.0, 4) == 6.0  # by default everywhere
    assert guidance_at(749, 6.0, 4, dynamic=True, interval=(0, 700)) == 1.0
    assert guidance_at(500, 0.5, 4) == 1.0  # one or less: none
