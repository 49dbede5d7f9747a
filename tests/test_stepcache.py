"""The step cache: which steps are skipped, what stands in their place, and that nothing outlives a video."""

import pytest
import torch
from conftest import GOLDENS, assert_close

import sample
import stepcache
from sample import Request, complete, generate, generate_each, load_models, read_inputs
from stepcache import planned_skips, skip_steps
from transformer import VideoTransformer

MODEL = GOLDENS / "fun-2b-inp"  # the rule of the first block; with a polynomial of its own, that of the plan
SETTINGS = {"num_steps": 8, "num_frames": 5, "height": 32, "width": 48, "seed": 1}
ROUNDING = 1e-5  # batches of two and of one add in another order


def latents(models=None, prompt="a cat", **settings):
    return generate(models or load_models(MODEL), prompt, output="latents", **(SETTINGS | settings))


@pytest.fixture
def plan(monkeypatch):
    """Every second step of the golden is skipped, whatever its timestep vectors are."""
    monkeypatch.setitem(stepcache.POLYNOMIALS, ("inpaint", 2, None), (0.06,))


@pytest.fixture(params=["plan", "first block"])
def rule(request):
    if request.param == "plan":
        request.getfixturevalue("plan")
    return request.param


def test_a_plan_sums_up_changes_until_the_threshold_and_starts_anew():
    sizes = torch.tensor([8.0, 12.0, 18.0, 27.0, 40.5, 60.75, 91.125])  # each half as large again
    vectors = sizes[:, None] * torch.tensor([1.0, -2.0])
    unchanged = (1.0, 0.0)  # the polynomial x
    assert planned_skips(vectors, 0.9, unchanged) == [False, True, False, True, False, True, False]
    assert planned_skips(vectors, 1.4, unchanged) == [False, True, True, False, True, True, False]
    assert planned_skips(vectors, 0.5, unchanged) == [False] * 7
    assert planned_skips(vectors, 9.0, unchanged) == [False, True, True, True, True, True, False]
    square_less_a_quarter = (1.0, 0.0, -0.25)  # 0 at a change of a half
    assert planned_skips(vectors, 0.01, square_less_a_quarter) == [False, True, True, True, True, True, False]
    assert planned_skips(vectors[:2], 9.0, unchanged) == [False, False]
    assert planned_skips(vectors[:1], 9.0, unchanged) == [False]


@pytest.mark.parametrize("variant", ["fun-2b-inp", "cogvideox-2b-t2v"])
def test_models_without_a_polynomial_go_by_their_first_block(variant):
    dit = VideoTransformer.from_pretrained(GOLDENS / variant)  # the second has two layers, not thirty
    with skip_steps(dit, 0.1, torch.tensor([999, 499])) as cache:
        assert cache.skipped is None


def test_a_threshold_that_nothing_falls_below_changes_no_bit():
    models = load_models(MODEL)
    assert torch.equal(latents(models, step_cache=1e-9), latents())
    assert models.forwards == [8, 8]


def test_a_higher_threshold_computes_less_and_differs_more():
    exact, computed, differences = latents(), [], []
    for threshold in (0.02, 0.5):
        models = load_models(MODEL)
        differences.append((latents(models, step_cache=threshold) - exact).abs().mean().item())
        computed.append(models.forwards[0])
    assert computed[0] > computed[1]
    assert differences[0] < differences[1] < exact.abs().mean() / 4


def test_a_skipped_step_adds_what_the_blocks_added_last(plan):
    dit = VideoTransformer.from_pretrained(MODEL)
    timesteps = torch.tensor([999, 800, 600, 400, 200])
    text = torch.randn(1, 226, 16)
    inputs = [(torch.randn(1, 16, 2, 4, 6), t, text, torch.randn(1, 17, 2, 4, 6)) for t in timesteps.tolist()]
    cached = []
    with torch.no_grad(), skip_steps(dit, 0.1, timesteps) as cache:
        assert cache.skipped == {800, 400}
        for each in inputs:
            cache.begin(each[1], 1)
            cached.append(dit(*each))
    plain, added = dit.run_blocks, None

    def remember(blocks, tokens, *others):
        nonlocal added
        added = plain(blocks, tokens, *others) - tokens
        return tokens + added

    with torch.no_grad():
        for computed, skipped in ((0, 1), (2, 3)):
            dit.run_blocks = plain
            assert torch.equal(cached[computed], dit(*inputs[computed]))
            dit.run_blocks = remember
            dit(*inputs[computed])
            dit.run_blocks = lambda blocks, tokens, *others: tokens + added
            assert torch.equal(cached[skipped], dit(*inputs[skipped]))


@pytest.mark.parametrize("interval", [(0, 999), (300, 999), (0, 700)])
def test_halves_of_guidance_apart_have_a_memory_each(rule, interval, monkeypatch):
    """Batches of two and of one give the same; a half that was left out for a time is computed anew."""
    together, apart = load_models(MODEL), load_models(MODEL)
    settings = {"step_cache": 0.1 if rule == "plan" else 1e-9, "guidance_interval": interval}
    expected = latents(together, **settings)
    monkeypatch.setattr(sample, "SMALL_TOKENS", 0)
    assert_close(latents(apart, **settings), expected, ROUNDING)
    guided = sum(interval[0] <= t <= interval[1] for t in (999, 874, 749, 624, 499, 374, 249, 124))
    assert together.forwards[1] == 8 and apart.forwards[1] == 8 + guided
    if rule == "plan":
        assert together.forwards[0] < 7


def test_each_of_several_prompts_and_segments_begins_anew(rule):
    models = load_models(MODEL, keep=True)
    prompts = ("a cat", "a dog", "a cat")
    requests = [complete(Request(prompt, step_cache=0.9, **SETTINGS), models) for prompt in prompts]
    made = list(generate_each(models, requests, read_inputs(requests[0], models.config)))
    assert models.forwards[0] < models.forwards[1]
    assert torch.equal(made[0], latents(step_cache=0.9)) and torch.equal(made[2], made[0])
    assert torch.equal(made[1], latents(prompt="a dog", step_cache=0.9))
    assert torch.equal(latents(models), latents()), "the transformer is as it was"


def test_compiled_blocks_are_skipped_too(plan):
    models = load_models(MODEL, keep=True)
    models.loaded["transformer"] = dit = VideoTransformer.from_pretrained(MODEL)
    for block in dit.transformer_blocks:
        block.compile(backend="eager")
    plain = load_models(MODEL)
    assert_close(latents(models, step_cache=0.9), latents(plain, step_cache=0.9), ROUNDING)
    assert models.forwards == plain.forwards and models.forwards[0] < 8


def test_a_plan_is_said_before_the_start_and_what_was_computed_at_the_end(plan, tmp_path, capsys):
    flags = "--num-steps 7 --num-frames 5 --seed 1 --device cpu --step-cache 0.1".split()
    assert sample.main(["a cat", "--model", str(MODEL), *flags, "--out", str(tmp_path / "a.mp4")]) == 0
    said = capsys.readouterr().out
    assert "cache    threshold 0.1, 4 of 7 steps computed" in said
    assert "step cache: 4 of 7 forwards of the transformer computed in full" in said
