"""Random entries: the baseline every selection has to beat."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from pegbox.parts.indexsets import everything, index_dtype
from pegbox.select.base import SELECT
from pegbox.select.entries import EntrySelector

__all__ = ["RandomEntries"]


@SELECT.register
class RandomEntries(EntrySelector):
    """k entries drawn without replacement; the same on every machine for a seed."""

    kind: Literal["random"] = "random"
    needs_weights: ClassVar[bool] = False

    def score(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(weight.numel(), generator=generator, dtype=torch.float64).view(weight.shape).to(weight.device)

    def choose(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        total = weight.numel()
        if count >= total:
            return everything(total, weight.device)
        drawn = torch.randperm(total, generator=generator)[:count].sort().values
        return drawn.to(weight.device, index_dtype(total))
