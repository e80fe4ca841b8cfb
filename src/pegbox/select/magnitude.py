"""Entries by magnitude: score = |w| (largest), or -|w| (smallest)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.select.base import SELECT
from pegbox.select.entries import EntrySelector

__all__ = ["Magnitude"]


@SELECT.register
class Magnitude(EntrySelector):
    """The k entries of largest (or smallest) absolute value."""

    kind: Literal["magnitude"] = "magnitude"
    which: Literal["largest", "smallest"] = "largest"

    def score(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        size = weight.abs().float() if weight.dtype != torch.float64 else weight.abs()
        if not bool(torch.isfinite(size).all()):
            raise BadInput(f"{name} has NaN or infinite entries, so its largest can't be chosen.")
        return size if self.which == "largest" else -size
