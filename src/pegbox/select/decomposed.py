"""Entries that a low-rank part can't hold: the largest of S in W = U V + S.

    index = positions of the k largest |W - U V|,   U V grown greedily (`parts/decompose.py`)

The placement of DSEE's sparse update (arXiv:2111.00160): N = 64 per matrix there. Only positions are taken, not values.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.decompose import decompose_low_rank_sparse
from pegbox.parts.indexsets import Budget
from pegbox.select.base import SELECT
from pegbox.select.entries import EntrySelector, as_matrix

__all__ = ["Decomposed"]


@SELECT.register
class Decomposed(EntrySelector):
    """The k entries of each tensor that stand out of its low-rank part.

    Args:
        rank_cap: the low-rank part's highest rank; None: as many as `outer` passes make (the published 100 reach rank
            496, and the low-rank part then swallows what should stand out).
        outer, inner, step, threshold: of the decomposition.
    """

    kind: Literal["decomposed"] = "decomposed"
    reproduces: ClassVar[str] = "arXiv:2111.00160"

    budget: Budget = Budget(count=64)
    rank_cap: Annotated[int, Field(ge=1)] | None = 16
    outer: Annotated[int, Field(ge=1)] = 100
    inner: Annotated[int, Field(ge=1)] = 2
    step: Annotated[int, Field(ge=1)] = 5
    threshold: Annotated[float, Field(ge=0)] = 0.01

    def score(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        matrix = as_matrix(weight)
        options = {"outer": self.outer, "inner": self.inner, "step": self.step, "threshold": self.threshold}
        try:
            found = decompose_low_rank_sparse(matrix, **options, rank_cap=self.rank_cap, generator=generator)  # type: ignore[arg-type]
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None
        return (matrix.to(found.u.dtype) - found.low_rank()).abs().view(weight.shape)
