"""How much each tensor matters for the loss, by a trial step that leaves no trace.

    loss_drop:        I_k = - sum(grad_k L(w1) * (w1_k - w0_k)),   w1 = w0 after ONE optimizer step on the same batch
    weight_gradient:  sum |w * g|        gradient_norm: ||g||        fisher: sum g^2

each averaged over batches and divided by the largest |I_k|. The optimizer's own scaling is inside the loss drop. From
"Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation" (arXiv:2309.13192). Weights,
gradients, optimizer state, flags, modes, buffers and random states come back bit for bit, also after an error; both
passes of a batch see the same random numbers (dropout).

What this file does not know: budgets, costs, and who chooses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported, did_you_mean

__all__ = ["Importance", "TrialStep", "normalized", "tensor_importance", "untouched"]

Importance = Literal["loss_drop", "weight_gradient", "gradient_norm", "fisher"]
Loss = Callable[[], Tensor]


def tensor_importance(
    model: nn.Module,
    losses: Sequence[Loss],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    kind: Importance = "loss_drop",
    names: Iterable[str] | None = None,
) -> dict[str, float]:
    """The importance of each floating parameter, normalised; 0 for those outside `names`.

    Args:
        losses: one per batch: runs the model and gives the scalar loss with its graph.
        optimizer: what would step these parameters (`loss_drop` only); its state is used and restored.
        names: the parameters that take part; all others are frozen meanwhile. Default: all.

    Raises `BadInput` for an unknown kind, no loss, a model without parameters, and importance that is not finite;
    `Unsupported` for sharded parameters.
    """
    if kind not in get_args(Importance):
        raise BadInput(f"Unknown importance '{kind}'.{did_you_mean(kind, get_args(Importance))}")
    if not losses:
        raise BadInput("Importance needs at least one batch.")
    named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    taking = dict(named) if names is None else {n: named[n] for n in names if n in named}
    if not taking:
        raise BadInput("The model has no tensor that could train, so there is nothing to weigh.")
    sharded = next((n for n, p in taking.items() if hasattr(p, "full_tensor")), None)
    if sharded is not None:
        raise Unsupported(
            f"'{sharded}' is sharded over processes; a trial step needs whole tensors. Select before sharding (without "
            "select.schedule), or train without sharding."
        )
    if kind == "loss_drop" and optimizer is None:
        raise BadInput("importance 'loss_drop' takes a trial step, so it needs the optimizer.")
    trial = TrialStep(model, taking, optimizer)
    totals = torch.zeros(len(taking), dtype=torch.float64)
    for loss in losses:
        with untouched(model, optimizer, taking.values()) as start:
            trial.only()
            values = trial.loss_drop(loss, start) if kind == "loss_drop" else trial.from_gradient(loss, kind)
            totals += torch.tensor(values, dtype=torch.float64)
    totals = _mean_over_processes(totals / len(losses))
    found = dict(zip(taking, totals.tolist()))
    _check_finite(found)
    return {name: normalized(found).get(name, 0.0) for name in named}


def normalized(values: Mapping[str, float]) -> dict[str, float]:
    """Divided by the largest absolute value (unchanged if all are 0)."""
    largest = max((abs(v) for v in values.values()), default=0.0)
    return {name: v / largest if largest else v for name, v in values.items()}


def _check_finite(values: Mapping[str, float]) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise BadInput(
            f"The importance of '{broken[0]}' is {values[broken[0]]} ({len(broken)} of {len(values)} tensors are not "
            "finite). Lower optim.lr, or look at the calibration rows."
        )


def _mean_over_processes(values: Tensor) -> Tensor:
    """The same importance on every process, whatever rows each of them saw."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    moved = values.to(device)
    dist.all_reduce(moved)
    return (moved / dist.get_world_size()).cpu()


@dataclass
class TrialStep:
    """One batch's trial. Use it inside `untouched`."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None

    def only(self) -> None:
        """Exactly these parameters require a gradient, and none has one."""
        chosen = {id(p) for p in self.parameters.values()}
        for p in self.model.parameters():
            if p.is_floating_point():
                p.requires_grad_(id(p) in chosen)
            p.grad = None

    def loss_drop(self, loss: Loss, start: Mapping[nn.Parameter, Tensor]) -> list[float]:
        """- sum(g1 * (w1 - w0)) per tensor, accumulated in float64. Two passes and one optimizer step."""
        assert self.optimizer is not None
        _awaken(self.optimizer)
        with _same_random():
            loss().backward()
        self.optimizer.step()
        for p in self.parameters.values():
            p.grad = None
        with _same_random():
            loss().backward()
        return [_drop(p, start[p]) for p in self.parameters.values()]

    def from_gradient(self, loss: Loss, kind: str) -> list[float]:
        """|w * g|, the norm of g, or its square's sum, per tensor. One pass."""
        with _same_random():
            loss().backward()
        return [0.0 if p.grad is None else _of_gradient(kind, p.detach(), p.grad) for p in self.parameters.values()]


def _drop(p: nn.Parameter, start: Tensor) -> float:
    if p.grad is None:
        return 0.0
    return -float((p.grad.double() * (p.detach().double() - start.double())).sum())


def _of_gradient(kind: str, weight: Tensor, grad: Tensor) -> float:
    if kind == "weight_gradient":
        return float((weight.double() * grad.double()).abs().sum())
    square = grad.double().square().sum()
    return float(square if kind == "fisher" else square.sqrt())


def _awaken(optimizer: torch.optim.Optimizer) -> None:
    """A rate of 0 (before warm-up) would try nothing: take the peak rate then."""
    for group in optimizer.param_groups:
        if float(group["lr"]) == 0 and group.get("initial_lr"):
            group["lr"] = group["initial_lr"]


# ---- leaving no trace


@contextmanager
def untouched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    moving: Iterable[nn.Parameter] | None = None,
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Weights, gradients, flags, modes, buffers, optimizer state and random states are as before when it ends.

    Args:
        moving: the parameters that may move inside (default: all floating ones); only they are copied.

    Yields their values at the start.
    """
    movers = list(model.parameters() if moving is None else moving)
    start = {p: p.detach().clone() for p in movers if p.is_floating_point()}
    flags = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    kept = None if optimizer is None else _taken(optimizer, start)
    with _same_random():
        try:
            with torch.enable_grad():
                yield start
        finally:
            with torch.no_grad():
                for p, value in start.items():
                    p.copy_(value)
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
            for p, grad, flag in flags:
                p.requires_grad_(flag)
                p.grad = grad
            for module, mode in modes:
                module.training = mode
            if optimizer is not None and kept is not None:
                _put_back(optimizer, *kept)


def _taken(
    optimizer: torch.optim.Optimizer, moving: Iterable[nn.Parameter]
) -> tuple[dict[nn.Parameter, Any], list[dict[str, Any]]]:
    """The state of the parameters that may step (None for one without), and every group's settings."""
    state = {p: copy.deepcopy(optimizer.state[p]) if p in optimizer.state else None for p in moving}
    groups = [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    return state, groups


def _put_back(
    optimizer: torch.optim.Optimizer, state: Mapping[nn.Parameter, Any], groups: list[dict[str, Any]]
) -> None:
    for p, entry in state.items():
        if entry is None:
            optimizer.state.pop(p, None)
        else:
            optimizer.state[p] = entry
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)


@contextmanager
def _same_random() -> Iterator[None]:
    """Random states are as before when it ends, so the same work inside draws the same numbers again."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
