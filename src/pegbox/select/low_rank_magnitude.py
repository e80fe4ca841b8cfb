"""Principal weights: the entries that are largest once the matrix has been reduced to low rank.

    W' = U[:, :r] diag(S[:r]) V[:, :r]^T,      index = positions of the k largest |W'|

Two different ranks: `filter_rank` r is that of the reduction; a budget of rank R means k = (m + n) R. Source: Liu et
al., "LIFT the Veil for the Truth", ICML 2025 (arXiv:2506.00772), section 3; reductions other than `largest`: its
appendix B.2. What it does not do: train (the sparse tuner does) or decide when to choose again (`schedule`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.indexsets import from_mask, matrix_shape, top_entries
from pegbox.parts.lowrank import Which, approximate, stable_rank
from pegbox.select.base import SELECT
from pegbox.select.entries import EntrySelector, as_matrix, covered

__all__ = ["LowRankMagnitude", "block_scores", "expand_blocks"]

RANDOMIZED_ABOVE = 2048  # min(m, n) from which "auto" sketches


@SELECT.register
class LowRankMagnitude(EntrySelector):
    """The k entries of largest magnitude in the rank-reduced weight.

    Args:
        filter_rank: r; None: the rank whose LoRA has as many parameters as this tensor's budget (works best close to
            it). One above min(m, n) is clipped, with a warning; at min(m, n) this is plain magnitude.
        which: which singular values the reduction keeps.
        svd: "randomized" sketches, "auto" does so above 2048; `iterations` power iterations.
        block: choose b x b blocks by the sum of |W'| in them instead of single entries; 1: single entries.
        stable_rank: r = R = floor(|W|_F^2 / |W|_2^2) for each matrix; the budget is then not used.
    """

    kind: Literal["low_rank_magnitude"] = "low_rank_magnitude"
    reproduces: ClassVar[str] = "arXiv:2506.00772, section 3"

    filter_rank: Annotated[int, Field(ge=1)] | None = None
    which: Which = "largest"
    svd: Literal["auto", "exact", "randomized"] = "auto"
    iterations: Annotated[int, Field(ge=0)] = 4
    block: Annotated[int, Field(ge=1)] = 1
    stable_rank: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> LowRankMagnitude:
        if self.block > 1 and (self.scope != "per_tensor" or self.schedule.mode == "accumulative"):
            raise BadInput("select.block needs scope 'per_tensor' and a schedule that is not accumulative.")
        if self.stable_rank and (self.filter_rank is not None or self.scope != "per_tensor"):
            raise BadInput(
                "select.stable_rank sets the ranks itself: leave out filter_rank, and use scope 'per_tensor'."
            )
        if self.scope != "per_tensor" and self.filter_rank is None:
            raise BadInput(f"select.filter_rank must be given with scope '{self.scope}': no tensor has its own budget.")
        return self

    def score(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        matrix = as_matrix(weight)
        try:
            reduced = approximate(
                matrix,
                self._filter_rank(name, matrix, count),
                which=self.which,
                method=self._method(matrix),
                iterations=self.iterations,
                generator=generator,
            )
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
        return reduced.abs().view(weight.shape)

    def choose(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        if self.stable_rank:
            rows, columns = matrix_shape(tuple(weight.shape))
            count = min((rows + columns) * stable_rank(as_matrix(weight)), weight.numel())
        score = self.score(name, weight, count, generator)
        if self.block == 1:
            return top_entries(score, count)
        sums = block_scores(as_matrix(score), self.block)
        blocks = top_entries(sums, max(1, count // self.block**2))
        return expand_blocks(blocks, self.block, matrix_shape(tuple(weight.shape)))

    def count(self, anatomy: object, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        if self.stable_rank:
            raise BadInput(
                "select.stable_rank: how many entries train follows from the weights, not from their shapes."
            )
        counts = super().count(anatomy, shapes)
        if self.block == 1:
            return counts
        for name in covered(anatomy, list(shapes), self.target_modules):
            rows, columns = matrix_shape(tuple(shapes[name]))
            blocks = math.ceil(rows / self.block) * math.ceil(columns / self.block)
            chosen = min(max(1, counts[name] // self.block**2), blocks)
            counts[name] = min(chosen * self.block**2, rows * columns)  # blocks at an edge may be smaller
        return counts

    def _filter_rank(self, name: str, matrix: Tensor, count: int) -> int:
        rows, columns = matrix.shape
        if self.stable_rank:
            return stable_rank(matrix)
        if self.filter_rank is None:
            return min(max(1, round(count / (rows + columns))), rows, columns)
        if self.filter_rank > min(rows, columns):
            warnings.warn(
                f"{name}: filter_rank {self.filter_rank} is more than a {rows} x {columns} matrix can have; using"
                f" {min(rows, columns)}, which is selection by magnitude.",
                stacklevel=2,
            )
        return min(self.filter_rank, rows, columns)

    def _method(self, matrix: Tensor) -> Literal["exact", "randomized"]:
        if self.svd != "auto":
            return self.svd
        return "randomized" if min(matrix.shape) > RANDOMIZED_ABOVE else "exact"


def block_scores(score: Tensor, size: int) -> Tensor:
    """(ceil(m / b), ceil(n / b)) sums over the b x b blocks of a score (m, n); blocks at the edges are smaller."""
    rows, columns = score.shape
    down, across = -rows % size, -columns % size
    padded = torch.nn.functional.pad(score, (0, across, 0, down))
    return padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size).sum((1, 3))


def expand_blocks(blocks: Tensor, size: int, shape: tuple[int, int]) -> Tensor:
    """The entries in the given blocks (flat block positions), as sorted flat positions in a matrix of `shape`."""
    rows, columns = shape
    grid = torch.zeros(math.ceil(rows / size), math.ceil(columns / size), dtype=torch.bool, device=blocks.device)
    grid.view(-1)[blocks.long()] = True
    mask = grid.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
    return from_mask(mask.contiguous())
