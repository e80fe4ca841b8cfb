"""SM3 on the trained entries of a matrix: two accumulators, one per row and one per column, instead of one per entry.

    nu_ij = min(R_i, C_j) + g_ij^2;   R_i <- max(R_i, max_j nu_ij);   C_j <- max(C_j, max_i nu_ij)
    u = g / sqrt(nu + eps);   with momentum b:  u <- b buf + (1 - b) u, buf <- u
    phi <- phi - lr u;   phi <- phi - lr decay phi

R and C bound every nu of their row and column from above. Anil et al., arXiv:1901.11150; on sparse differences, where
R_i C_j also estimates the momentum of entries that don't train: Ansell et al., arXiv:2401.16405. For a dense parameter
the accumulators are set to the maxima, as there. Tensors of more than two axes count as matrices (out, rest), vectors
have rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.optim.base import OPTIM, Step
from pegbox.optim.entry_state import EntryOptimizer
from pegbox.optim.groups import split_decay
from pegbox.parts.indexsets import matrix_shape
from pegbox.parts.parameterinfo import info_of

__all__ = ["Sm3", "SparseSM3", "accumulate"]


def accumulate(
    grad: Tensor, i: Tensor, j: Tensor, rows: Tensor, columns: Tensor | None, *, dense: bool = False
) -> Tensor:
    """nu (k,) of entries (i, j) with gradients (k,); raises the accumulators rows (m,) and columns (n,) to it in place.

    columns None: rows only. dense: every entry of the matrix is here, and the accumulators are set to their maxima.
    """
    bound = rows[i] if columns is None else torch.minimum(rows[i], columns[j])
    nu = bound + grad * grad
    for held, place in ((rows, i), (columns, j)):
        if held is not None:
            held.scatter_reduce_(0, place, nu, "amax", include_self=not dense)
    return nu


class SparseSM3(EntryOptimizer):
    """The rule of this file as a torch optimizer; state: `row` (m,), `column` (n,), `momentum` (k,) if there is any."""

    shared_state: ClassVar[frozenset[str]] = frozenset({"row", "column"})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rows_only: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay, "rows_only": rows_only}
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
        info = info_of(p)
        shape = matrix_shape(tuple(p.shape) if info is None else info.shape)
        flat = torch.arange(p.numel(), device=p.device) if info is None else info.index().to(p.device).long()
        state, grad = self.state[p], p.grad.to(p.dtype).reshape(-1)  # type: ignore[union-attr]
        if not state:
            state["row"] = torch.zeros(shape[0], dtype=p.dtype, device=p.device)
            if not group["rows_only"] and shape[1] > 1:
                state["column"] = torch.zeros(shape[1], dtype=p.dtype, device=p.device)
            if group["momentum"]:
                state["momentum"] = torch.zeros_like(p)
        i, j = flat // shape[1], flat % shape[1]
        nu = accumulate(grad, i, j, state["row"], state.get("column"), dense=info is None)
        u = (grad / (nu + group["eps"]).sqrt()).view_as(p)
        if group["momentum"]:
            u = state["momentum"].mul_(group["momentum"]).add_(u, alpha=1 - group["momentum"])
        p.add_(u, alpha=-group["lr"])
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


@OPTIM.register
class Sm3(Step):
    """SM3, with memory in proportion to rows and columns, and none per entry unless there is momentum.

    Args:
        momentum: of the update; the paper's runs had none.
        eps: added under the root.
        rows_only: no accumulator per column.
    """

    kind: Literal["sm3"] = "sm3"
    reproduces: ClassVar[str] = "arXiv:1901.11150"

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    eps: Annotated[float, Field(gt=0)] = 1e-8
    rows_only: bool = False

    @property
    def keeps(self) -> frozenset[str]:  # type: ignore[override]
        """Both accumulators, which entries that grow by momentum are scored by."""
        return frozenset() if self.rows_only else frozenset({"rows_columns"})

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split = split_decay(groups, self.weight_decay)
        return SparseSM3(split, lr=self.lr, momentum=self.momentum, eps=self.eps, rows_only=self.rows_only)
