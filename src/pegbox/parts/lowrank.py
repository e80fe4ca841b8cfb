"""Low rank: the best rank-r approximation of a matrix, exact or randomized, in other modes, and low-rank factors.

    W = U diag(S) V^T,    W_r = U[:, P] diag(S[P]) V[:, P]^T      P: the positions kept (the r largest, smallest, ...)

Computed in float32 whatever W's dtype (float64 where `exact_dtype` says so). Pure functions of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = ["SVD", "LowRank", "Which", "approximate", "factors", "kept_positions", "stable_rank", "svd"]

Which = Literal["largest", "smallest", "random", "hybrid"]


@dataclass(frozen=True)
class SVD:
    """u (m, q), s (q,) falling, v (n, q): W = u diag(s) v^T, or its leading part."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class LowRank:
    """b (m, r) and a (r, n): W is near b a."""

    b: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        return self.b @ self.a


def svd(
    matrix: Tensor,
    rank: int | None = None,
    *,
    method: Literal["exact", "randomized"] = "exact",
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> SVD:
    """Singular value decomposition of a matrix (m, n), all of it or the leading `rank` values.

    randomized: a Gaussian sketch of q = min(2 rank, min(m, n)) columns with `iterations` power iterations (Halko,
    Martinsson, Tropp 2011); good where the spectrum decays. Raises `BadInput` for NaN or infinite entries.
    """
    if matrix.ndim != 2:
        raise BadInput(f"a singular value decomposition needs a matrix, got shape {tuple(matrix.shape)}.")
    work = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    if not bool(torch.isfinite(work).all()):
        raise BadInput("the weight has NaN or infinite entries, so it has no singular value decomposition.")
    full = min(work.shape)
    rank = full if rank is None else min(rank, full)
    if method == "randomized" and 2 * rank < full:
        found = _randomized(work, min(2 * rank, full), iterations, generator)
    else:
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
        found = SVD(u, s, vh.mT)
    return SVD(found.u[:, :rank], found.s[:rank], found.v[:, :rank])


def _randomized(work: Tensor, columns: int, iterations: int, generator: torch.Generator | None) -> SVD:
    """On the smaller side: q = orthonormal basis of (W W^T)^iterations W G."""
    tall = work if work.shape[0] >= work.shape[1] else work.mT
    drawn = torch.randn(
        tall.shape[1], columns, generator=generator, dtype=work.dtype
    )  # drawn on the CPU: same everywhere
    q = torch.linalg.qr(tall @ drawn.to(work.device)).Q
    for _ in range(iterations):
        q = torch.linalg.qr(tall.mT @ q).Q
        q = torch.linalg.qr(tall @ q).Q
    u, s, vh = torch.linalg.svd(q.mT @ tall, full_matrices=False)
    left, right = q @ u, vh.mT
    return SVD(left, s, right) if tall is work else SVD(right, s, left)


def kept_positions(count: int, rank: int, which: Which, generator: torch.Generator | None = None) -> Tensor:
    """Which of `count` singular values (falling) are kept: `rank` positions, sorted.

    hybrid: the rank / 2 largest (rounded up) and the rest smallest. random: drawn without replacement.
    """
    if rank < 1:
        raise BadInput(f"rank = {rank}: a rank is at least 1.")
    rank = min(rank, count)
    if which == "largest":
        return torch.arange(rank)
    if which == "smallest":
        return torch.arange(count - rank, count)
    if which == "random":
        return torch.randperm(count, generator=generator)[:rank].sort().values
    if which == "hybrid":
        top = rank - rank // 2
        return torch.cat([torch.arange(top), torch.arange(count - (rank - top), count)])
    raise BadInput(f"which = {which!r}: choose largest, smallest, random or hybrid.")


def approximate(
    matrix: Tensor,
    rank: int,
    *,
    which: Which = "largest",
    method: Literal["exact", "randomized"] = "exact",
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(m, n) the rank-`rank` part of a matrix; the matrix itself where rank >= min(m, n).

    Randomized methods find the largest singular values only, so any other `which` is computed exactly.
    """
    if rank < 1:
        raise BadInput(f"rank = {rank}: a rank is at least 1.")
    if rank >= min(matrix.shape):
        if not bool(torch.isfinite(matrix).all()):
            raise BadInput("the weight has NaN or infinite entries.")
        return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    if which == "largest":
        found = svd(matrix, rank, method=method, iterations=iterations, generator=generator)
        return (found.u * found.s) @ found.v.mT
    found = svd(matrix)
    keep = kept_positions(found.s.numel(), rank, which, generator).to(matrix.device)
    return (found.u[:, keep] * found.s[keep]) @ found.v[:, keep].mT


def stable_rank(matrix: Tensor) -> int:
    """floor(||W||_F^2 / ||W||_2^2), at least 1."""
    work = matrix.to(torch.float64)
    norm = torch.linalg.matrix_norm(work, ord=2)
    if not bool(norm > 0):
        return 1
    ratio = work.square().sum() / norm.square()
    eps = torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0
    return max(1, int(torch.floor(ratio * (1 + 8 * eps))))  # an orthogonal matrix has ratio n up to rounding


def factors(
    matrix: Tensor,
    metric: Tensor | None,
    rank: int,
    which: Which = "largest",
    *,
    generator: torch.Generator | None = None,
) -> LowRank:
    """Low-rank factors b a of W (m, n) in a metric on the input side: singular parts of W C, taken back by C^-1.

        W C = U diag(S) V^T,    b = U_P diag(S_P)^(1/2),    a = diag(S_P)^(1/2) V_P^T C^-1

    metric: C, None (plain), a vector (n,) for a diagonal one, or a symmetric positive definite matrix (n, n); C W^T
    is solved for, no inverse is made. With all positions kept, b a = W. Float32 (float64 if either input is).
    """
    dtype = torch.float64 if torch.float64 in (matrix.dtype, getattr(metric, "dtype", None)) else torch.float32
    work = matrix.to(dtype)
    if metric is None:
        weighted = work
    elif metric.ndim == 1:
        weighted = work * metric.to(work)
    else:
        weighted = work @ metric.to(work)
    found = svd(weighted)
    keep = kept_positions(found.s.numel(), rank, which, generator).to(matrix.device)
    root = found.s[keep].sqrt()
    b = found.u[:, keep] * root
    a = root.unsqueeze(1) * found.v[:, keep].mT
    if metric is not None:
        a = a / metric.to(work) if metric.ndim == 1 else torch.linalg.solve(metric.to(work).mT, a.mT).mT
    return LowRank(b, a)
