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

from pegbox.errors import BadInput
from pegbox.optim.adamw import Betas
from pegbox.optim.base import OPTIM, Step
from pegbox.optim.groups import split_decay
from pegbox.parts.parameterinfo import info_of

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


class UnscaledEpsAdamW(torch.optim.Optimizer):
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

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        order = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(order):
            digest = index_digest(p)
            if digest is not None and number in packed["state"]:
                packed["state"][number] = {**packed["state"][number], "index_digest": digest}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        order = [p for group in self.param_groups for p in group["params"]]
        state = {key: dict(value) for key, value in state_dict["state"].items()}
        for number, p in enumerate(order):
            saved = state.get(number, {}).pop("index_digest", None)
            here = index_digest(p)
            moments = state.get(number, {}).get("exp_avg")
            if (moments is not None and moments.shape != p.shape) or (
                saved is not None and here is not None and int(saved) != int(here)
            ):
                info = info_of(p)
                raise BadInput(
                    f"The optimizer's state for '{info.name if info else number}' belongs to other entries than those"
                    " that train now. Load the adapter of the same checkpoint first."
                )
        super().load_state_dict({**state_dict, "state": state})


def index_digest(p: Tensor) -> Tensor | None:
    """A checksum of the positions that a sparse parameter stands for; None for an ordinary one."""
    info = info_of(p)
    if info is None:
        return None
    index = info.index().to("cpu", torch.int64)
    place = torch.arange(1, index.numel() + 1)
    return ((index + 1) * (place * 2654435761 % 2147483647)).sum() % (2**53)


@OPTIM.register
class UnscaledEpsAdam(Step):
    """AdamW with eps before the bias correction.

    Args:
        betas, eps: the paper's code uses (0.9, 0.95) and 1e-6.
        per_entry_age: correct each entry's moments by its own age in a selection that moves.
    """

    kind: Literal["adamw_unscaled_eps"] = "adamw_unscaled_eps"
    reproduces: ClassVar[str] = "arXiv:2506.00772"

    betas: Betas = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    per_entry_age: bool = False

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split = split_decay(groups, self.weight_decay)
        return UnscaledEpsAdamW(split, lr=self.lr, betas=self.betas, eps=self.eps, per_entry_age=self.per_entry_age)
