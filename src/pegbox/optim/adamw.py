"""AdamW, the optimizer that nearly every recipe starts from, over torch's own.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr (m^ / (sqrt(v^) + eps) + decay w)

with m^, v^ corrected for their start at zero. Loshchilov and Hutter, arXiv:1711.05101. Which tensors decay is decided
in `groups.py`. It composes with every tuner that holds plain parameters. It does not know sparse index sets that move:
that is `sparse_adam.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from pegbox.optim.base import OPTIM, Step
from pegbox.optim.groups import split_decay

__all__ = ["AdamW", "Betas", "can_fuse"]

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]
Epsilon = Annotated[float, Field(gt=0)]


def can_fuse(groups: list[dict[str, Any]]) -> bool:
    """True if torch's fused kernels take all these parameters: floating, on a device that has them."""
    items = [p[1] if isinstance(p, tuple) else p for g in groups for p in g["params"]]
    return all(p.is_floating_point() and p.device.type in {"cpu", "cuda", "xpu", "mps"} for p in items)


@OPTIM.register
class AdamW(Step):
    """Adam with decoupled weight decay; fused where torch can.

    Args:
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        amsgrad: divide by the largest second moment so far.
        fused: one kernel for all tensors; None: wherever possible.
    """

    reproduces: ClassVar[str] = "arXiv:1711.05101"
    keeps: ClassVar[frozenset[str]] = frozenset({"moments"})

    kind: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    amsgrad: bool = False
    fused: bool | None = None

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split = split_decay(groups, self.weight_decay)
        fused = can_fuse(split) if self.fused is None else self.fused
        options: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "amsgrad": self.amsgrad}
        return torch.optim.AdamW(split, **options, fused=fused or None)
