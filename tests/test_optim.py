"""optim.py: the learning rate, clipping as the reference's, Muon, the average, and the state of a run."""

import pytest
import torch
from conftest import assert_close
from torch import nn

from checkpoint import save_weights
from optim import Muon, Optim, clip_norm, learning_rate, orthogonal


def optim_of(
    modules: dict[str, nn.Module], optimizer: str = "adamw", ema_decay: float = 0.5, weight_decay: float = 0.0
) -> Optim:
    return Optim(modules, optimizer, weight_decay, adam_eps=1e-8, ema_decay=ema_decay)


def step(optim: Optim, number: int, lr: float = 0.1) -> None:
    """With a gradient that is a function of the step."""
    random = torch.Generator().manual_seed(number)
    for param in optim.params.values():
        param.grad = torch.randn(param.shape, generator=random)
    optim.step(lr)
    optim.update_ema(1000)


def small_network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"table": nn.Embedding(5, 4), "layer": nn.Linear(4, 3)})


def test_the_learning_rate_warms_up_and_decays():
    def rate(step: int, warmup_steps: int, final_lr: float = 1.0) -> float:
        return learning_rate(step, 100, 2.0, final_lr, warmup_steps)

    assert rate(0, 10) == pytest.approx(0.2, rel=1e-3) and rate(0, 0) == 2.0
    assert rate(50, 10) == pytest.approx(1.5) and rate(100, 10) == pytest.approx(1.0)
    assert rate(70, 10, final_lr=2.0) == 2.0


def test_a_gradient_is_cut_to_the_limit_and_a_shorter_one_is_left():
    optim = optim_of({"m": small_network()})
    for param in optim.params.values():
        param.grad = torch.ones_like(param)
    norm = optim.average_gradients().item()
    assert norm == pytest.approx((5 * 4 + 4 * 3 + 3) ** 0.5)
    for limit, wanted in ((norm + 1, norm), (0.5, 0.5)):
        optim.clip(norm, limit)
        assert optim.average_gradients().item() == pytest.approx(wanted, rel=1e-5)  # norm + 1e-6, as torch


def test_clipping_over_time_is_the_references():
    """Five times max_grad_norm, falling to it over 1000 steps; spikes of s > 5 are cut to 1 / min(s, 10)."""
    assert [clip_norm(step, 99.0, 2.0, 1000) for step in (0, 500, 1000)] == [10.0, 6.0, 2.0]
    spikes = [clip_norm(1001, norm, 2.0, 1000) for norm in (1.0, 10.0, 12.0, 99.0)]
    assert spikes == [2.0, 2.0, 2 / 6, 0.2]
    assert clip_norm(0, 99.0, 2.0, None) == 2.0


# ---------------------------------------------------------------- Muon


def test_muon_makes_all_singular_values_of_an_update_alike():
    matrix = torch.randn(6, 4) @ torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.03])) @ torch.randn(4, 4)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest = left @ right
    for ours, wanted in ((orthogonal(matrix), nearest), (orthogonal(matrix.T), nearest.T)):
        values = torch.linalg.svdvals(ours)
        assert 0.6 < values.min() and values.max() < 1.3
        assert (ours * wanted).sum() / wanted.norm() ** 2 > 0.8


def test_muon_moves_a_kernel_as_far_as_adamw_would():
    kernel = nn.Parameter(torch.zeros(8, 2, 3, 3))
    optimizer = Muon([kernel], weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.1
    kernel.grad = torch.randn(8, 2, 3, 3)
    optimizer.step()
    assert kernel.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)
    assert (kernel * kernel.grad).sum() < 0


def test_matrices_of_one_shape_are_turned_as_each_alone():
    """Ten of them, so that they go in two groups; 1e-5: products of batches are summed in another order."""
    together, alone = ([nn.Parameter(torch.zeros(6, 4)) for _ in range(10)] for _ in range(2))
    for ours, theirs in zip(together, alone):
        ours.grad = torch.randn(6, 4)
        theirs.grad = ours.grad.clone()
    for params in (together, *([param] for param in alone)):
        optimizer = Muon(params, 0.0)
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer.step()
    for ours, theirs in zip(together, alone):
        assert_close(ours.detach(), theirs.detach(), 1e-5)


def test_muon_gets_matrices_and_adamw_vectors_and_tables():
    optim = optim_of({"m": small_network()}, "muon")
    step(optim, 0)
    with_momentum = {name for name, moments in optim.moments.items() if "momentum_buffer" in moments}
    assert with_momentum == {"m/layer.weight"}
    assert "exp_avg" in optim.moments["m/table.weight"] and "exp_avg" in optim.moments["m/layer.bias"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_decay_by_lr_times_their_share(optimizer):
    module = nn.Linear(4, 3, bias=False)
    start = module.weight.detach().clone()
    optim = optim_of({"m": module}, optimizer, weight_decay=0.5)
    module.weight.grad = torch.zeros_like(start)
    optim.step(0.1)
    assert_close(module.weight.detach(), start * (1 - 0.1 * 0.5), 1e-6)


# ---------------------------------------------------------------- the average, and the state


def test_the_average_follows_and_steps_aside_and_is_at_first_over_a_tenth_of_the_steps():
    module = nn.Linear(2, 2, bias=False)
    optim = optim_of({"m": module}, ema_decay=0.5)
    start = module.weight.detach().clone()
    module.weight.data += 1
    optim.update_ema(1000)
    with optim.averaged():
        assert_close(module.weight.detach(), start + 0.5, 1e-6)
    assert_close(module.weight.detach(), start + 1, 1e-6)
    optim = optim_of({"m": module}, ema_decay=0.9999)
    module.weight.data += 1
    optim.update_ema(0)  # 1/10 of what was, 9/10 of what is
    assert_close(optim.ema["m/weight"], start + 1.9, 1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ema_decay, with_ema", [(0.5, False), (0.5, True), (0.0, False), (0.0, True)])
def test_a_saved_state_goes_on_to_the_same_bytes(tmp_path, optimizer, ema_decay, with_ema):
    """The module of the second run begins with the average, as a checkpoint's folders hold it."""
    whole = optim_of({"m": small_network()}, optimizer, ema_decay)
    for number in range(2):
        step(whole, number)
    state = {name: tensor.clone() for name, tensor in whole.state(with_ema).items()}
    save_weights(state, tmp_path, "state")
    module = small_network()
    for key, param in module.named_parameters():
        param.data.copy_((whole.ema or whole.params)[f"m/{key}"])
    resumed = optim_of({"m": module}, optimizer, ema_decay)
    resumed.load(tmp_path)
    for optim in (whole, resumed):
        step(optim, 2)
    for name, param in whole.params.items():
        assert torch.equal(param, resumed.params[name])
    for name, average in whole.ema.items():
        assert torch.equal(average, resumed.ema[name])


def test_the_next_phase_goes_on_with_moments_and_average():
    goes_on = nn.Linear(3, 2)
    before = optim_of({"dit": goes_on, "t5": nn.Linear(3, 2)})
    for number in range(2):
        step(before, number)
    averages = {name: average.clone() for name, average in before.ema.items()}
    after = optim_of({"dit": goes_on})
    after.inherit(before)
    assert torch.equal(after.ema["dit/weight"], averages["dit/weight"])
    assert after.moments["dit/weight"]["step"] == 2
    step(after, 2)
    assert after.moments["dit/weight"]["step"] == 3  # the optimizer goes on with what it was given
