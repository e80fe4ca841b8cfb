"""Adafactor: the second moment of a matrix kept as one row and one column, over torch's own.

    V ~ r c^T / sum(r),  w <- w - lr max(eps2, rms(w)) clip(g / sqrt(V), d)

For a matrix m x n the state is m + n numbers instead of 2 m n; there is no first moment. Shazeer and Stern,
arXiv:1804.04235. The rate is relative to the size of the weights, so 1e-3 to 1e-2 is usual.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from pegbox.optim.base import OPTIM, Step
from pegbox.optim.groups import split_decay

__all__ = ["Adafactor"]


@OPTIM.register
class Adafactor(Step):
    """Factored second moments.

    Args:
        beta2_decay: exponent of the second moment's decay, 1 - t^beta2_decay.
        eps: added to the squared gradient (None: the dtype's smallest step), and least size of a weight.
        clip: largest root mean square of an update (d).
    """

    reproduces: ClassVar[str] = "arXiv:1804.04235"

    kind: Literal["adafactor"] = "adafactor"
    beta2_decay: Annotated[float, Field(ge=-1, lt=0)] = -0.8
    eps: tuple[Annotated[float, Field(gt=0)] | None, Annotated[float, Field(gt=0)]] = (None, 1e-3)
    clip: Annotated[float, Field(ge=1)] = 1.0

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split = split_decay(groups, self.weight_decay)
        return torch.optim.Adafactor(split, lr=self.lr, beta2_decay=self.beta2_decay, eps=self.eps, d=self.clip)
