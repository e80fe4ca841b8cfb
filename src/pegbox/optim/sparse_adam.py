"""Adam with eps added to the uncorrected root, one step count per tensor: the form that LIFT and early BERT codes use.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    w <- w - lr decay w - lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

torch's AdamW corrects v first, which makes eps sqrt(1 - b2^t) times as strong. Source: Liu et al., arXiv:2506.00772.
`per_entry_age` counts t per entry, from the step at which the entry entered a moving selection. Decay acts on trained
values only, since nothing else is a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.optim.adamw import Betas
from pegbox.optim.base import OPTIM, Step
from pegbox.optim.entry_state import EntryOptimizer, index_digest
from pegbox.optim.groups import split_decay

__all__ = ["UnscaledEpsAdam", "UnscaledEpsAdamW", "index_digest", "update"]


def update(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    t: int | Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step on a tensor, in place. t: the number of this step (from 1), or one per entry."""
    m.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    if isinstance(t, Tensor):
        rate = lr * (1 - betas[1] ** t).sqrt() / (1 - betas[0] ** t)
        weight.sub_(rate * m / (v.sqrt() + eps))
    else:
        rate_now = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        weight.addcdiv_(m, v.sqrt().add_(eps), value=-rate_now)


class UnscaledEpsAdamW(EntryOptimizer):
    """The rule of this file as a torch optimizer; state per tensor: `step`, `exp_avg`, `exp_avg_sq` (and `age`).

    A sparse tuner's values carry their positions: their digest goes into the state dict, and loading a state that
    belongs to other entries raises `BadInput`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        per_entry_age: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "per_entry_age": per_entry_age}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if group["per_entry_age"]:
                state["age"] = torch.zeros_like(p)
        state["step"] += 1
        t: int | Tensor = int(state["step"])
        if group["per_entry_age"]:
            t = state["age"].add_(1)
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        update(p, p.grad.to(p.dtype), state["exp_avg"], state["exp_avg_sq"], t, **options)  # type: ignore[union-attr]


@OPTIM.register
class UnscaledEpsAdam(Step):
    """AdamW with eps before the bias correction.

    Args:
        betas, eps: the paper's code uses (0.9, 0.95) and 1e-6.
        per_entry_age: correct each entry's moments by its own age in a selection that moves.
    """

    kind: Literal["adamw_unscaled_eps"] = "adamw_unscaled_eps"
    reproduces: ClassVar[str] = "arXiv:2506.00772"
    keeps: ClassVar[frozenset[str]] = frozenset({"moments"})

    betas: Betas = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    per_entry_age: bool = False

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split = split_decay(groups, self.weight_decay)
        return UnscaledEpsAdamW(split, lr=self.lr, betas=self.betas, eps=self.eps, per_entry_age=self.per_entry_age)
