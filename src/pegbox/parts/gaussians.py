"""Diagonal Gaussians over weights: divergence, prior, moments of a linear layer's output, and a stable step towards
one.

    KL(N(mp, vp) || N(mt, vt)) = 1/2 sum [ log(vt / vp) + (vp + (mp - mt)^2) / vt - 1 ]

and the low-rank form, in which mean and spread of a weight (o, i) are products of factors B (o, r) and A (r, i):

    mean = s B A,    spread = s B A + c    (or softplus(s B A + softplus^-1(c))),    variance = spread^2

A spread may cross zero; only its square enters. Ravi and Beatson, "Amortized Bayesian Meta-Learning", ICLR 2019; Zhang,
Snell and Griffiths, arXiv:2508.14285. Kingma et al., arXiv:1506.02557 (noise in the output instead of in the weights).
It holds no parameters and knows no layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "TINY",
    "SpreadForm",
    "by_rows",
    "implicit_rows",
    "kl_diagonal",
    "neg_log_prior",
    "output_variance",
    "proximal",
    "spread_of",
]

SpreadForm = Literal["linear", "softplus"]
TINY = 1e-12  # added to variances in training, where a spread may be exactly 0


def spread_of(product: Tensor, c: float, form: SpreadForm = "linear") -> Tensor:
    """The spread from s B A: `product + c`, or softplus(product + softplus^-1(c)), which stays positive. Both are c at
    product 0."""
    if form == "linear":
        return product + c
    return F.softplus(product + math.log(math.expm1(c)))


def kl_diagonal(mean_p: Tensor, var_p: Tensor, mean_t: Tensor, var_t: Tensor) -> Tensor:
    """KL(p || t) of diagonal Gaussians by means and variances, summed over all entries."""
    return 0.5 * (torch.log(var_t / var_p) + (var_p + (mean_p - mean_t).square()) / var_t - 1).sum()


def neg_log_prior(mean: Tensor, var: Tensor, a0: float, b0: float, *, constants: bool = False) -> Tensor:
    """-log p of means under N(0, 1) and of precisions 1 / var under Gamma(a0, rate b0), summed over entries.

    Args:
        constants: keep the normalising constants, which no gradient sees.
    """
    precision = 1 / var
    total = (0.5 * mean.square() - (a0 - 1) * precision.log() + b0 * precision).sum()
    if constants:
        each = 0.5 * math.log(2 * math.pi) - a0 * math.log(b0) + math.lgamma(a0)
        total = total + each * mean.numel()
    return total


def output_variance(x: Tensor, b: Tensor, a: Tensor, scale: float, c: float, form: SpreadForm = "linear") -> Tensor:
    """Variance of the entries of x W^T for independent W with spread `scale b a + c`: (..., i) -> (..., o).

    sum_i x_i^2 spread_ji^2. Where it is cheaper the square is expanded into products of factors, r (r + 1) / 2 wide,
    and no (o, i) matrix is formed.
    """
    rank, squares = a.shape[0], x.square()
    pairs = rank * (rank + 1) // 2
    if form != "linear" or pairs * (b.shape[0] + a.shape[1]) >= b.shape[0] * a.shape[1]:
        return F.linear(squares, spread_of(scale * (b @ a), c, form).square())
    p, q = torch.triu_indices(rank, rank, device=a.device)
    twice = torch.where(p == q, 1.0, 2.0).to(b)
    quadratic = F.linear(F.linear(squares, a[p] * a[q]), b[:, p] * b[:, q] * (twice * scale**2))
    mixed = F.linear(F.linear(squares, a), b * (2 * scale * c))
    return (quadratic + mixed + c**2 * squares.sum(-1, keepdim=True)).clamp(min=0)


def by_rows(function: Callable[..., Tensor], rows: int, width: int, *tensors: Tensor, limit: int = 1 << 20) -> Tensor:
    """The sum of `function(start, stop, *tensors)` over ranges of rows of at most `limit` entries, made anew in
    backward.

    So a function of (o, i) matrices needs a few of them for one range at a time, and none between forward and backward.
    """
    step = max(1, limit // max(1, width))
    total: Tensor | None = None
    for start in range(0, rows, step):
        part = checkpoint(function, start, min(rows, start + step), *tensors, use_reentrant=False)
        total = part if total is None else total + part
    assert total is not None
    return total


def proximal(mean: Tensor, grad: Tensor, towards: Tensor, lr: float, strength: Tensor) -> Tensor:
    """One step on a loss with gradient `grad` and the pull strength / 2 (mean - towards)^2, the pull taken implicitly:

        mean <- (mean - lr grad + a towards) / (1 + a),   a = lr strength

    It never overshoots, however strong the pull.
    """
    pull = lr * strength
    return (mean - lr * grad + pull * towards) / (1 + pull)


def implicit_rows(grad: Tensor, other: Tensor, curvature: Tensor, lr: float | Tensor) -> Tensor:
    """The step of a factor (n, r) whose product with `other` (r, m) has curvature (n, m) per entry, taken implicitly:

    row j:  -lr (I + lr H_j)^-1 grad_j,   H_j = other diag(curvature_j) other^T
    """
    rank = other.shape[0]
    pairs = (other[:, None] * other[None]).reshape(rank * rank, -1)  # (r r, m)
    hessian = (curvature @ pairs.T).view(-1, rank, rank)
    eye = torch.eye(rank, dtype=grad.dtype, device=grad.device)
    return -lr * torch.linalg.solve(eye + lr * hessian, grad)
