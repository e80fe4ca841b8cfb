"""Penalties on weights with closed-form gradients: towards where they started, and towards low rank.

    l1 = sum |w - w0|      gradient sign(w - w0), 0 where w = w0
    l2 = sum (w - w0)^2    gradient 2 (w - w0)
    nuclear norm of a matrix = sum of its singular values    gradient U V^T over the singular values that are not 0

The start is a constant: without that the gradient of |w - start(w)| is sign - sign = 0. Weights and starts are given as
lists, so one penalty covers a whole model and its sum is taken in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["l1_distance", "l2_distance", "nuclear_norm"]


class _Distance(torch.autograd.Function):
    """(power, starts, *weights) -> sum over all weights of |w - w0|^power, power 1 or 2."""

    @staticmethod
    def forward(ctx: Any, power: int, starts: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.power, ctx.starts = power, [s.detach() for s in starts]
        ctx.save_for_backward(*weights)
        total: Tensor | None = None
        for w, start in zip(weights, ctx.starts, strict=True):
            difference = w.detach() - start
            wide = difference if difference.dtype == torch.float64 else difference.float()
            part = wide.abs().sum() if power == 1 else wide.square().sum()
            total = part if total is None else total + part.to(total.device)
        return torch.zeros(()) if total is None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = []
        for w, start in zip(ctx.saved_tensors, ctx.starts):
            difference = w - start
            slope = difference.sign() if ctx.power == 1 else 2 * difference
            grads.append(slope.mul_(grad.to(slope)))
        return None, None, *grads


def l1_distance(weights: Sequence[Tensor], starts: Sequence[Tensor]) -> Tensor:
    """Sum of |w - w0| over all tensors; scalar."""
    return _Distance.apply(1, starts, *weights)


def l2_distance(weights: Sequence[Tensor], starts: Sequence[Tensor]) -> Tensor:
    """Sum of (w - w0)^2 over all tensors; scalar."""
    return _Distance.apply(2, starts, *weights)


@torch.no_grad()
def nuclear_norm(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the singular values, a subgradient U_r V_r^T of the matrix's shape) of a matrix (m, n).

    r counts the singular values above max(m, n) eps times the largest; autograd's own derivative is not finite where
    some are 0 or equal. float32 or wider.
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    kept = s > (s[0] if s.numel() else 0.0) * max(matrix.shape) * torch.finfo(s.dtype).eps
    return s.sum(), u[:, kept] @ vh[kept]
