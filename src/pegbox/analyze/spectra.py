"""What fine-tuning did to the weights' spectra and which weights matter: six measurements on pairs of models.

    alignment   mean_i sum_j (v'_i . v_j)^2 over the top p right singular vectors before (v) and after (v'), in [0, 1]
    rank        of W_after - W_before, counting singular values above 10 max(m, n) sigma_max eps
    norm        |W_after|_2 - |W_before|_2
    overlap     of two selections, per tensor        histogram   of updates by size
    perturb     noise on chosen entries, taken off again: does the model break sooner there?

Source: Liu et al., arXiv:2506.00772, sections 3-5 and appendix H. Pure functions of tensors or of tensors by name; they
know neither how entries were chosen nor how a model was tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.indexsets import matrix_shape, overlap
from pegbox.parts.parameterinfo import touch

__all__ = [
    "Spectrum",
    "alignment",
    "compare_spectra",
    "mask_overlap",
    "norm_change",
    "perturbed",
    "update_histogram",
    "update_rank",
]


def alignment(before: Tensor, after: Tensor, top: int = 128) -> float:
    """How much of the top right singular space survived: 1 if all, p / n in expectation for unrelated matrices."""
    _same_shape(before, after)
    old, new = (_right_vectors(matrix, top) for matrix in (before, after))
    return float((new.mT @ old).square().sum() / new.shape[1])


def update_rank(before: Tensor, after: Tensor, tolerance: float = 10.0) -> int:
    """Numerical rank of the update; tolerance in units of max(m, n) sigma_max eps of the weights' dtype."""
    _same_shape(before, after)
    change = _matrix(after) - _matrix(before)
    values = torch.linalg.svdvals(change)
    eps = torch.finfo(before.dtype if before.is_floating_point() else torch.float32).eps
    return int((values > tolerance * max(change.shape) * values[0] * eps).sum()) if values.numel() else 0


def norm_change(before: Tensor, after: Tensor) -> float:
    """Change of the spectral norm."""
    _same_shape(before, after)
    return float(torch.linalg.matrix_norm(_matrix(after), 2) - torch.linalg.matrix_norm(_matrix(before), 2))


def mask_overlap(a: Allocation, b: Allocation) -> dict[str, float]:
    """Per tensor in both selections: |common entries| / |entries of the smaller|."""
    found = {}
    for name, one in a.items():
        two = b.get(name)
        if isinstance(one, Entries) and isinstance(two, Entries):
            found[name] = overlap(one.index, two.index)
    return found


def update_histogram(before: Tensor, after: Tensor, bins: int = 100) -> tuple[Tensor, Tensor]:
    """(counts (bins,), edges (bins + 1,)) of the entries that moved, by signed size, symmetric about 0."""
    _same_shape(before, after)
    change = (after.double() - before.double()).flatten()
    change = change[change != 0].cpu()
    reach = float(change.abs().max()) if change.numel() else 1.0
    counts, edges = torch.histogram(change, bins, range=(-reach, reach))
    return counts.long(), edges


@contextmanager
def perturbed(
    tensors: Mapping[str, Tensor], where: Allocation, scale: float = 0.01, seed: int = 0
) -> Iterator[Mapping[str, Tensor]]:
    """Inside: N(0, scale^2) noise is added to the chosen entries of the given tensors; outside: as before, bit for bit.

    Evaluate a model (perplexity, accuracy) inside to see how much these entries matter.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for name, choice in where.items():
                if not isinstance(choice, Entries):
                    raise BadInput(f"'{name}': noise goes to chosen entries, not to {type(choice).__name__}.")
                if name not in tensors:
                    raise BadInput(f"The selection names '{name}', which is not among the tensors.")
                flat, at = tensors[name].detach().view(-1), choice.index.long().to(tensors[name].device)
                kept.append((flat, at, flat[at]))
                noise = torch.randn(at.numel(), generator=generator) * scale
                flat[at] += noise.to(flat)
        touch()
        yield tensors
    finally:
        with torch.no_grad():
            for flat, at, values in reversed(kept):
                flat[at] = values
        touch()


@dataclass(frozen=True)
class Spectrum:
    """The measurements of one tensor."""

    alignment: float
    update_rank: int
    norm_before: float
    norm_change: float
    moved: int  # entries that differ


def compare_spectra(before: Mapping[str, Tensor], after: Mapping[str, Tensor], top: int = 128) -> dict[str, Spectrum]:
    """Every matrix that both models have, by name."""
    found = {}
    for name, old in before.items():
        new = after.get(name)
        if new is None or old.ndim < 2 or not old.is_floating_point():
            continue
        _same_shape(old, new)
        found[name] = Spectrum(
            alignment=alignment(old, new, top),
            update_rank=update_rank(old, new),
            norm_before=float(torch.linalg.matrix_norm(_matrix(old), 2)),
            norm_change=norm_change(old, new),
            moved=int((old != new).sum()),
        )
    return found


def _right_vectors(weight: Tensor, top: int) -> Tensor:
    """(n, p) the top right singular vectors."""
    matrix = _matrix(weight)
    if not top >= 1:
        raise BadInput(f"top = {top}: at least one singular vector is compared.")
    return torch.linalg.svd(matrix, full_matrices=False).Vh.mT[:, : min(top, *matrix.shape)]


def _matrix(weight: Tensor) -> Tensor:
    matrix = weight.detach().reshape(matrix_shape(tuple(weight.shape)))
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _same_shape(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise BadInput(f"the weights before and after differ in shape: {tuple(before.shape)}, {tuple(after.shape)}.")
