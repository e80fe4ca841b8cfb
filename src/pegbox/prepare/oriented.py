"""The mathematics of a decomposition oriented by data. Pure functions of tensors.

    C~ = C + c mean(diag C) I,     U S V^T = svd(W C~^p),     V^ = C~^-p V,     W = U S V^^T   (p = 1: CorDA)
    kept: the r components of largest (ipm) or smallest (kpm) S;   B = U_r sqrt(S_r),   A = sqrt(S_r) V^_r^T

The first k components minimise || (W - W_k) C~^p ||_F over rank k; p = 1/2 makes that the expected output error. With
C = I it is the plain decomposition (PiSSA). Source: CorDA (arXiv:2406.05223), official code iboing/CorDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = ["Oriented", "balanced", "damped", "decompose", "factors_of"]

Mode = Literal["kpm", "ipm"]
_DOUBLINGS = 60


@dataclass(frozen=True)
class Oriented:
    """u (m, q), s (q,) falling, v (n, q): W = u diag(s) v^T, v not orthonormal. damping: the c that was used."""

    u: Tensor
    s: Tensor
    v: Tensor
    damping: float

    def part(self, positions: Tensor | slice) -> Tensor:
        """(m, n) the sum of some components."""
        return (self.u[:, positions] * self.s[positions]) @ self.v[:, positions].T


def damped(covariance: Tensor, damping: float = 0.01, threshold: float = 0.05) -> tuple[Tensor, Tensor, float]:
    """(C~, its Cholesky factor, the c used): c is doubled until || C~ C~^-1 - I ||_F < threshold.

    Raises `BadInput` for a covariance that is not finite or has no positive diagonal.
    """
    mean = covariance.diagonal().mean()
    if not bool(torch.isfinite(covariance).all()) or float(mean) <= 0:
        raise BadInput("a covariance that is not finite or all zero can't orient a decomposition.")
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for _ in range(_DOUBLINGS):
        trial = covariance + damping * mean * eye
        factor, failed = torch.linalg.cholesky_ex(trial)
        if not int(failed):
            error = torch.linalg.matrix_norm(trial @ torch.cholesky_inverse(factor) - eye)
            if float(error) < threshold:
                return trial, factor, damping
        damping *= 2
    raise BadInput("no damping makes this covariance invertible.")


def decompose(
    weight: Tensor, covariance: Tensor | None, *, power: float = 1.0, damping: float = 0.01, threshold: float = 0.05
) -> Oriented:
    """All components of W (m, n) oriented by C (n, n), or by the identity if None, in the covariance's dtype."""
    if covariance is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        return Oriented(u, s, vt.T, 0.0)
    weight = weight.to(covariance)
    trial, factor, used = damped(covariance, damping, threshold)
    if power == 1:
        u, s, vt = torch.linalg.svd(weight @ trial, full_matrices=False)
        return Oriented(u, s, torch.cholesky_solve(vt.T, factor), used)
    values, basis = torch.linalg.eigh(trial)
    u, s, vt = torch.linalg.svd(((weight @ basis) * values**power) @ basis.T, full_matrices=False)
    return Oriented(u, s, basis @ ((basis.T @ vt.T) / values[:, None] ** power), used)


def factors_of(parts: Oriented, rank: int, mode: Mode) -> tuple[Tensor, Tensor]:
    """(A (r, n), B (m, r)) of the chosen components. Raises `BadInput` for a rank that W has not."""
    count = len(parts.s)
    if not 1 <= rank <= count:
        raise BadInput(f"rank {rank} is outside 1..{count}, the number of components of this matrix.")
    at = slice(count - rank, count) if mode == "kpm" else slice(0, rank)
    root = parts.s[at].sqrt()
    return root[:, None] * parts.v[:, at].T, parts.u[:, at] * root


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product B A split by its own singular values, so that it doesn't depend on the covariance's scale."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s.sqrt()
    return root[:, None] * (vt @ qa.T), (qb @ u) * root
