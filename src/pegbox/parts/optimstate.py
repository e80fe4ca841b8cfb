"""Editing the state of any torch optimizer per entry, when the set of trained entries moves.

    state'[j] = state[source[j]]   where source[j] >= 0,   else `fill` (0)

Every state tensor that has its parameter's shape is per entry (Adam's moments, momentum, Adagrad's sums); scalars such
as the step count are left alone. State that is packed (8-bit, block-wise) can't be edited and is refused.

An optimizer may say more by two attributes: `shared_state`, names of state that belongs to no single entry whatever its
shape; `entry_start`, {state name: number} that entering entries start from (default 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import Unsupported

__all__ = ["drop", "owner_of", "per_entry", "permute", "remap", "replace", "seed", "seed_moments", "unwrapped"]

_PACKED = ("absmax1", "qmap1", "block_scale")


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def owner_of(optimizers: Any, parameter: nn.Parameter) -> torch.optim.Optimizer | None:
    """The optimizer, among one or several, that steps `parameter`."""
    several = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    for optimizer in map(unwrapped, several):
        if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    return None


def per_entry(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: torch.Size | None = None) -> list[str]:
    """Names of the state tensors that hold one number per entry. `shape`: the parameter's when the state was made.

    Raises `Unsupported` for packed state.
    """
    state = optimizer.state.get(parameter, {})
    if any(key in state for key in _PACKED) or any(type(v).__name__.startswith("OptimState") for v in state.values()):
        raise Unsupported(
            f"{type(optimizer).__name__} keeps its state in packed 8-bit blocks, which can't follow entries that move."
            " Use a 32-bit optimizer, or a selection that does not move."
        )
    wanted = parameter.shape if shape is None else shape
    shared: frozenset[str] = getattr(optimizer, "shared_state", frozenset())
    found = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == wanted]
    return [key for key in found if key not in shared]


def drop(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, at: Tensor | None = None) -> None:
    """Forget the state of the entries `at` (positions in the parameter, flat), or all of it, step count included."""
    if at is None:
        optimizer.state.pop(parameter, None)
        return
    for key in per_entry(optimizer, parameter):
        optimizer.state[parameter][key].view(-1)[at.long()] = 0


def seed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, at: Tensor, values: Mapping[str, Tensor]) -> None:
    """Set the state of the entries `at` to given values, by the state's own names ("exp_avg", ...)."""
    known = per_entry(optimizer, parameter)
    for key, value in values.items():
        if key not in known:
            raise Unsupported(f"{type(optimizer).__name__} has no per-entry state '{key}'; it has {known}.")
        held = optimizer.state[parameter][key]
        held.view(-1)[at.long()] = value.to(held)


def seed_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    at: Tensor,
    mean: Tensor,
    square: Tensor,
    samples: int,
) -> None:
    """Start the moments of the entries `at` (n,) from the mean and mean square of their gradients over `samples` steps.

        m = mean (1 - b1^t),   v = square (1 - b2^t)

    so that the bias correction with exponent t gives the means back. t is the entry's age, `samples`, where the
    optimizer counts one, and its step count otherwise. Source: arXiv:2401.16405 (its code).

    Raises `Unsupported` for an optimizer without two moments per entry.
    """
    state = optimizer.state.get(parameter, {})
    known = per_entry(optimizer, parameter)
    if not {"exp_avg", "exp_avg_sq"} <= set(known):
        raise Unsupported(
            f"{type(optimizer).__name__} keeps no first and second moment per entry ({known or 'nothing'}), which"
            " entries that grow by their gradients start from. Use optim: {kind: aged_adamw} or adamw, or another"
            " growth rule."
        )
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    first, second = group["betas"]
    age = samples if "age" in known else int(state["step"])
    values = {"exp_avg": mean * (1 - first**age), "exp_avg_sq": square * (1 - second**age)}
    if "age" in known:
        values["age"] = torch.full_like(mean, float(samples))
    seed(optimizer, parameter, at, values)


def permute(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, order: Tensor) -> None:
    """Reorder the state as the parameter was reordered: new[j] = old[order[j]]."""
    remap(optimizer, parameter, order)


def replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Let the optimizer step `new` where it stepped `old`, with its state as it is (`remap` it afterwards)."""
    if old is new:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def remap(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    source: Tensor,
    shape_before: torch.Size | None = None,
    fill: Mapping[str, float] | None = None,
) -> None:
    """Move the state after the set of entries has moved.

    Args:
        source: (k,) for each entry of the parameter now, its place in the parameter before, or -1 for a new one.
        shape_before: the parameter's shape before, where it has changed.
        fill: what new entries start from, by state name (default: the optimizer's `entry_start`, else 0).

    Shared entries keep their numbers bit for bit; the step count stays.
    """
    here = source >= 0
    place = source.clamp(min=0)
    start = {**getattr(optimizer, "entry_start", {}), **(fill or {})}
    for key in per_entry(optimizer, parameter, shape_before):
        old = optimizer.state[parameter][key]
        moved = torch.full(source.shape, start.get(key, 0.0), dtype=old.dtype, device=old.device)
        if old.numel():
            moved = torch.where(here.to(old.device), old.view(-1)[place.to(old.device)], moved)
        if old.shape == moved.shape:
            old.copy_(moved)
        else:
            optimizer.state[parameter][key] = moved
