"""Owners of extra trained parameters: an objective, a policy or a step whose state is a module of its own.

Loss-balancing logits or data weights are not part of the model, so the trainer does not know them. Each owner gets its
own optimizer over its own parameters, is clipped, zeroed and stepped right after the model, and saved with it. An owner
may bring its optimizer (`state.make_optimizer()`); otherwise the recipe's step makes one, at `state.lr` if it has that.
Any other state is persisted through `state_dict` / `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pegbox.engine.distributed import mean_over_ranks, world
from pegbox.engine.packing import pack, unpack
from pegbox.errors import Corrupt
from pegbox.optim.base import Step

__all__ = ["Owner", "Owners"]


@dataclass
class Owner:
    """One component's state under its name ("objective", "data.0", "step"), and its optimizer if anything trains."""

    name: str
    state: Any
    optimizer: torch.optim.Optimizer | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        if not isinstance(self.state, nn.Module):
            return []
        return [p for p in self.state.parameters() if p.requires_grad]


class Owners:
    """All component states of a stage: moved, stepped, saved and restored together."""

    def __init__(self, states: Mapping[str, Any], step: Step, device: torch.device):
        self.max_grad_norm, self.device = step.max_grad_norm, device
        self.owners = [Owner(name, state) for name, state in states.items() if state is not None]
        for owner in self.owners:
            if isinstance(owner.state, nn.Module):
                owner.state.to(device)
            if owner.parameters:
                owner.optimizer = _optimizer_of(owner, step)

    def step(self, skip: bool = False) -> None:
        """Average gradients over the processes, clip, step and zero every owner that trains."""
        for owner in self.owners:
            if owner.optimizer is None:
                continue
            parameters = [p for p in owner.parameters if p.grad is not None]
            if parameters and not skip:
                if world() > 1:
                    for p in parameters:
                        p.grad = mean_over_ranks(p.grad)  # type: ignore[arg-type]
                if self.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                owner.optimizer.step()
            owner.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """States and gradients of all owners are as before when the context ends."""
        tensors, described = pack(self.state_dict())
        grads = [(p, p.grad) for owner in self.owners for p in owner.parameters]
        try:
            yield
        finally:
            self.load_state_dict(unpack(tensors, described, self.device))
            for p, grad in grads:
                p.grad = grad

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {}
        for owner in self.owners:
            if hasattr(owner.state, "state_dict"):
                saved[owner.name] = {"state": owner.state.state_dict()}
                if owner.optimizer is not None:
                    saved[owner.name]["optimizer"] = owner.optimizer.state_dict()
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        expected = {o.name for o in self.owners if hasattr(o.state, "state_dict")}
        if expected != set(saved):
            raise Corrupt(f"The checkpoint holds the states of {sorted(saved)}, the run has {sorted(expected)}.")
        for owner in self.owners:
            if owner.name not in saved:
                continue
            owner.state.load_state_dict(saved[owner.name]["state"])
            if owner.optimizer is not None:
                owner.optimizer.load_state_dict(saved[owner.name]["optimizer"])


def _optimizer_of(owner: Owner, step: Step) -> torch.optim.Optimizer:
    make = getattr(owner.state, "make_optimizer", None)
    if make is not None:
        return make()
    named = [(n, p) for n, p in owner.state.named_parameters() if p.requires_grad]
    group = {"params": named, "lr": getattr(owner.state, "lr", step.lr), "weight_decay": 0.0}
    if step.needs_backward:
        return step.optimizer([group])
    return torch.optim.AdamW([group])
