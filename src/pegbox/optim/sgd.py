"""Stochastic gradient descent, with momentum if asked, over torch's own.

    u <- mu u + (1 - dampening) g;  w <- w - lr (u + decay w)

The decay is decoupled from the momentum, as in AdamW, so that `weight_decay` means the same in every recipe; torch's
own couples it (g + decay w enters u). Without momentum both are the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from pegbox.errors import BadInput
from pegbox.optim.adamw import can_fuse
from pegbox.optim.base import OPTIM, Step
from pegbox.optim.groups import split_decay

__all__ = ["Sgd", "SgdW"]


class SgdW(torch.optim.SGD):
    """torch's SGD with the weight decay applied to the weight, before the step, and not to the gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"] and moved:
                torch._foreach_mul_(moved, 1.0 - float(group["lr"]) * group["weight_decay"])
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


@OPTIM.register
class Sgd(Step):
    """Plain descent along the gradient.

    Args:
        momentum: 0 keeps no state at all.
        dampening: part of the gradient left out of the momentum buffer.
        nesterov: look ahead; needs momentum and no dampening.
    """

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dampening: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise BadInput(
                "optim.nesterov needs momentum > 0 and dampening 0. Set optim.momentum=0.9, or leave it off."
            )
        return self

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split = split_decay(groups, self.weight_decay)
        options: dict[str, Any] = {"momentum": self.momentum, "dampening": self.dampening, "nesterov": self.nesterov}
        return SgdW(split, lr=self.lr, **options, fused=can_fuse(split) or None)
