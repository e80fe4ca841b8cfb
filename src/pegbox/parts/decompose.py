"""Low rank plus sparse: a matrix as U V + S by alternating projections with a rank that grows.

    repeat:  U = Q of QR((W - S) V^T),   V = U^T (W - S),   S = W - U V where |.| >= threshold, else 0
    then V <- [V ; the first rows of R of QR(W - U V - S)]

The greedy semi-soft decomposition ("GreBsmo") by which DSEE (arXiv:2111.00160) places its sparse update; robust-PCA
like, and of use for any low-rank initialisation. With the published 100 passes the rank reaches 496 and swallows the
spikes it should leave to S; `rank_cap` stops before. Pure functions of tensors; QR's signs do not matter to U V and S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.indexsets import top_entries

__all__ = ["Decomposition", "decompose_low_rank_sparse", "largest_rest"]


@dataclass(frozen=True)
class Decomposition:
    """W is near u v + s: u (m, q) with orthonormal columns, v (q, n), s (m, n) with few entries."""

    u: Tensor
    v: Tensor
    s: Tensor

    def low_rank(self) -> Tensor:
        return self.u @ self.v


def decompose_low_rank_sparse(
    matrix: Tensor,
    *,
    outer: int = 100,
    inner: int = 2,
    step: int = 5,
    threshold: float = 0.01,
    rank_cap: int | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Decomposition:
    """Decompose a matrix (m, n), in float32 or its own wider dtype.

    Args:
        outer: passes; the rank is 1 in the first and grows by `step` in each (never above min(m, n)).
        inner: alternations in a pass. threshold: entries of S below it are 0.
        rank_cap: stop before a pass of higher rank; None: all passes.
        start: (1, n) first V; None draws it from a normal distribution.

    Raises `BadInput` for what is no finite matrix and for counts below 1.
    """
    if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
        raise BadInput(f"a decomposition needs a matrix of finite entries, got shape {tuple(matrix.shape)}.")
    if min(outer, inner, step) < 1 or threshold < 0 or (rank_cap is not None and rank_cap < 1):
        raise BadInput("a decomposition needs outer, inner, step and rank_cap of at least 1 and a threshold >= 0.")
    w = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    limit = min(*w.shape, rank_cap or min(w.shape))
    v = torch.randn(1, w.shape[1], generator=generator, dtype=w.dtype) if start is None else start.to(w.dtype)
    v = v.to(w.device)
    for done in range(outer):
        s = torch.zeros_like(w)
        for _ in range(inner):
            rest = w - s
            u = torch.linalg.qr(rest @ v.mT).Q
            v = u.mT @ rest
            residual = w - u @ v
            s = torch.where(residual.abs() < threshold, 0.0, residual)
        more = min(step, limit - v.shape[0])
        if done == outer - 1 or more < 1 or (rank_cap is not None and more < step):
            break
        grown = torch.linalg.qr(residual - s).R[:more]
        v = torch.cat([v, grown])
    return Decomposition(u, v, s)


def largest_rest(matrix: Tensor, found: Decomposition, count: int) -> Tensor:
    """Flat positions of exactly `count` entries: the largest of S, then (where S has fewer) of W - U V; ties go to the
    lowest position. S is W - U V above a threshold, so both are one ranking."""
    return top_entries((matrix.to(found.u.dtype) - found.low_rank()).abs(), count)
