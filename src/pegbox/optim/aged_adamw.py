"""Adam with an age per entry: bias correction by how long each entry has trained, decay after the step.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   s = sqrt(v) + eps
    phi <- phi - lr (m / (1 - b1^age)) / (s / sqrt(1 - b2^age));   age <- age + 1;   phi <- phi - lr decay phi

age starts at 1. eps is added before the bias correction. Source: Ansell et al., arXiv:2401.16405 (its code); the decay
pulls a difference to 0, that is, the weight to its pretrained value. An entry that grows is seeded with moments and an
age (`parts.optimstate.seed_moments`); its first step then uses exponent `age` although age + 1 gradients are in m, as
there. It does not know why entries move. Unlike `sparse_adam.py` it decays after the step and counts from 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.optim.adamw import Betas
from pegbox.optim.base import OPTIM, Step
from pegbox.optim.entry_state import EntryOptimizer
from pegbox.optim.groups import split_decay

__all__ = ["AgedAdam", "AgedAdamW", "update"]


def update(
    phi: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    age: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place on values of any one shape; `age` (float32) has the same and advances by one.

    The arithmetic is done in the moments' dtype, whatever phi's.
    """
    grad = grad.to(m.dtype)
    m.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    first, second = 1 - betas[0] ** age, 1 - betas[1] ** age
    root = v.sqrt().add_(eps).div_(second.sqrt_())
    moved = phi.to(m.dtype) - lr * (m / first) / root
    age.add_(1)
    phi.copy_(moved.mul_(1 - lr * weight_decay) if weight_decay else moved)


class AgedAdamW(EntryOptimizer):
    """The rule of this file as a torch optimizer; state: `exp_avg`, `exp_avg_sq` (float32 for 16-bit values), `age`."""

    entry_start: ClassVar[dict[str, float]] = {"age": 1.0}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    wide = p.dtype if p.dtype == torch.float64 else torch.float32
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=wide) for _ in range(2))
                    state["age"] = torch.ones_like(p, dtype=torch.float32)
                update(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["age"], **options)
        return loss


@OPTIM.register
class AgedAdam(Step):
    """AdamW with an age per entry, for selections whose entries move. Works on dense tensors too.

    Args:
        betas, eps: the paper's code uses (0.9, 0.999) and 1e-6.
    """

    kind: Literal["aged_adamw"] = "aged_adamw"
    reproduces: ClassVar[str] = "arXiv:2401.16405"
    keeps: ClassVar[frozenset[str]] = frozenset({"moments"})

    betas: Betas = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-6

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split = split_decay(groups, self.weight_decay)
        return AgedAdamW(split, lr=self.lr, betas=self.betas, eps=self.eps)
