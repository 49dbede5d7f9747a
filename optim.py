"""What learns, and how: learning rate, clipping, AdamW and Muon, the average of the weights, and their state.

    gradients ─clip─► optimizers ─► weights ─lerp─► EMA

Weights are named component/key, transformer/proj_out.weight for instance. They may be cut over ranks.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import read_tensors, weight_files
from runtime import NUM_RANKS, average_over_ranks, cut_like, is_cut, local, whole


def learning_rate(step: int, num_steps: int, lr: float, final_lr: float, warmup_steps: int) -> float:
    """Half a cosine from lr to final_lr over a phase, times a linear warm-up."""
    progress = min(step / num_steps, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    warmup = min(1, (step + 1) / max(1, warmup_steps))
    return (final_lr + (lr - final_lr) * cosine) * warmup


def clip_norm(step: int, norm: float, max_grad_norm: float, wide_steps: int | None) -> float:
    """The gradient norm to cut to: max_grad_norm, or with wide_steps what the reference's train.py does.

    The limit falls from five times max_grad_norm to max_grad_norm over wide_steps. After them a norm above
    five limits is a spike: its limit is divided by norm / limit, or by ten if that is less.
    """
    if wide_steps is None:
        return max_grad_norm
    limit = max_grad_norm * (5 - 4 * min(step / max(1, wide_steps), 1))
    if step > wide_steps and norm > 5 * limit:
        return limit / min(norm / limit, 10)
    return limit


# ---------------------------------------------------------------- Muon


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
    so that all its directions learn alike. Its updates are as large as AdamW's, so one learning rate serves
    both. (Jordan et al. 2024; arXiv 2502.16982, sec. 2.2)

    Beyond torch.optim.Muon it takes kernels and sharded parameters, whose gradient each rank gathers, and
    works on equal shapes together.
    """

    def __init__(self, params: Iterable[Tensor], weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Many of one shape at once: of a small network launching is what takes the time."""
        [group] = self.param_groups
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is not None:
                by_shape.setdefault(param.shape, []).append(param)
        many = 8 if NUM_RANKS > 1 else 64  # whole, they take memory
        for alike in by_shape.values():
            for i in range(0, len(alike), many):
                self._step(alike[i : i + many], group)

    def _step(self, params: list[Tensor], group: dict) -> None:
        momentum = group["momentum"]
        for param in params:
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param.grad)
        gradients = [param.grad for param in params]
        averages = [self.state[param]["momentum_buffer"] for param in params]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov's
        updates = orthogonal(torch.stack([whole(one).float() for one in directions]).flatten(2))
        updates *= 0.2 * max(updates.shape[1:]) ** 0.5  # to AdamW's root mean square
        parts = [local(cut_like(p, update.view(p.shape))) for p, update in zip(params, updates)]
        weights = [local(param) for param in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, parts, alpha=group["lr"])


# ---------------------------------------------------------------- all of it together

OPTIMIZERS = ("adamw", "muon")  # Muon for matrices, AdamW for the rest


class Optim:
    """The weights that learn (fp32), their optimizers and their average."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimizer: str,
        weight_decay: float,
        adam_eps: float,
        ema_decay: float,
    ):
        """modules: by component    optimizer: one of OPTIMIZERS"""
        self.ema_decay = ema_decay
        self.params: dict[str, Tensor] = {}
        for component, module in modules.items():
            for key, param in module.named_parameters():
                if param.requires_grad:
                    self.params[f"{component}/{key}"] = param
        for param in self.params.values():
            if not is_cut(param):
                param.data = param.data.clone()  # not a view of the file it was loaded from

        tables = {m.weight for top in modules.values() for m in top.modules() if isinstance(m, nn.Embedding)}
        matrices, sharded, others = [], [], []  # one fused AdamW cannot have both of the latter
        for param in self.params.values():
            if optimizer == "muon" and param.ndim > 1 and param not in tables:
                matrices.append(param)
            elif is_cut(param):
                sharded.append(param)
            else:
                others.append(param)
        self.optimizers: list[torch.optim.Optimizer] = []
        for params in filter(None, (others, sharded)):
            adamw = torch.optim.AdamW(params, weight_decay=weight_decay, eps=adam_eps, fused=True)
            self.optimizers.append(adamw)
        if matrices:
            self.optimizers.append(Muon(matrices, weight_decay))
        names = {param: name for name, param in self.params.items()}
        self.moments: dict[str, dict] = {}
        for one in self.optimizers:
            for param in one.param_groups[0]["params"]:
                self.moments[names[param]] = one.state[param]
        self.ema = {}
        if ema_decay:
            self.ema = {name: param.detach().clone() for name, param in self.params.items()}

    def inherit(self, before: "Optim") -> None:
        """Moments and average of the phase before."""
        for name in self.params.keys() & before.params.keys():
            self.moments[name].update(before.moments[name])
            if before.ema:
                self.ema[name] = before.ema[name]

    def average_gradients(self) -> Tensor:
        """Average the gradient over ranks, in place; returns its length, still on the device."""
        gradients = self._gradients()
        sharded = [gradient for gradient in gradients if is_cut(gradient)]  # FSDP has averaged
        others = [gradient for gradient in gradients if not is_cut(gradient)]
        average_over_ranks(others)
        norms = [whole(nn.utils.get_total_norm(kind)) for kind in (sharded, others) if kind]
        return torch.stack([norm.to(norms[-1]) for norm in norms]).norm()  # offloaded ones are on the CPU

    def clip(self, norm: float, limit: float) -> None:
        """Shorten the gradient of length `norm` to `limit`, if it is longer."""
        if norm > limit:
            torch._foreach_mul_([local(gradient) for gradient in self._gradients()], limit / (norm + 1e-6))

    def _gradients(self) -> list[Tensor]:
        return [param.grad for param in self.params.values() if param.grad is not None]

    def step(self, lr: float) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for param in self.params.values():
            param.grad = None

    def update_ema(self, step: int) -> None:
        """Over the last tenth of the steps at first, so that a short run shows what it learnt."""
        if self.ema:
            decay = min(self.ema_decay, (1 + step) / (10 + step))
            averages = [local(average) for average in self.ema.values()]
            weights = [local(param.detach()) for param in self.params.values()]
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules hold the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:  # in place, as a sharded parameter cannot be exchanged for another tensor
        for name, average in self.ema.items():
            weight = self.params[name].detach().clone()
            self.params[name].copy_(average)
            average.copy_(weight)

    def state(self, with_ema: bool) -> dict[str, Tensor]:
        """What a checkpoint holds beside the averaged weights, which are in its component folders.

        with_ema: the average too, of LoRA for instance, whose file has alpha/rank multiplied in, which rounds
        """
        state = {f"ema/{name}": average for name, average in self.ema.items()} if with_ema else {}
        for name, param in self.params.items():
            if self.ema or with_ema:
                state[f"weight/{name}"] = param.data
            for key, tensor in self.moments[name].items():  # step, exp_avg, exp_avg_sq; momentum_buffer
                state[f"{key}/{name}"] = tensor
        return state

    def load(self, folder: Path) -> None:
        """The inverse of `state`; the modules were loaded from the checkpoint, so they hold the average."""
        files = weight_files(folder)
        for full_name, tensor in read_tensors(files, list(files)):
            key, _, name = full_name.partition("/")
            param = self.params.get(name)
            if param is None:  # it learnt in the phase that ended here
                continue
            tensor = cut_like(param, tensor)
            if key == "weight":
                param.data.copy_(tensor)
            elif key == "ema":
                self.ema[name].copy_(tensor)
            else:
                self.moments[name][key] = tensor
