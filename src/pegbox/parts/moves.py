"""How trained entries move while training: what a selector is shown of a tensor, and what it answers.

    relocate: {name: Held} -> {name: Relocation}

A selector that moves its entries (a refresh, drop and grow, a later stage) is a pure function of what it is shown; who
holds values and optimizer state carries the answer out. Nothing here knows a tuner or an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pegbox.parts.indexsets import difference, index_dtype, numel, union
from pegbox.parts.watching import Watch

__all__ = ["Held", "Relocation", "Seeds", "inactive", "replaced"]


@dataclass(frozen=True)
class Held:
    """The trained entries of one tensor, as they are between two optimizer steps.

    Args:
        name, shape: of the tensor in the bare base.
        index, values: (k,) sorted flat positions and what trains there.
        absolute: whether a value is the weight itself, or its difference from the pretrained one.
        reference: () -> (k,) the pretrained weights, in the values' dtype.
        tuned: () -> the tensor as it is now, to read only.
        state: the optimizer's state of the values by name, live ({} before its first step or without one).
        watched: gradients seen since watching began, if they were watched.
    """

    name: str
    shape: tuple[int, ...]
    index: Tensor
    values: Tensor
    absolute: bool
    reference: Callable[[], Tensor]
    tuned: Callable[[], Tensor]
    state: Mapping[str, Any] = field(default_factory=dict)
    watched: Watch | None = None

    def change(self) -> Tensor:
        """(k,) how far each trained weight is from the pretrained one."""
        return self.values - self.reference() if self.absolute else self.values

    def weights(self) -> Tensor:
        """(k,) the trained weights of now, unrounded."""
        return self.values if self.absolute else self.reference() + self.values


@dataclass(frozen=True)
class Seeds:
    """What is known of entries that enter: their gradients' mean and mean square over `samples` updates.

    index: (n,) sorted positions; mean, square: (n,).
    """

    index: Tensor
    mean: Tensor
    square: Tensor
    samples: int


@dataclass(frozen=True)
class Relocation:
    """The entries that train from now on.

    Args:
        index: (k',) sorted positions.
        leave: what becomes of entries that leave: "keep" what they have reached, or "revert" to the pretrained weight.
            Entries that enter under "revert" start from the pretrained weight.
        seeds: where the optimizer's moments of entering entries start; None: at zero.
        reset: forget the optimizer's state of all entries of the tensor, step count included.
    """

    index: Tensor
    leave: Literal["keep", "revert"] = "keep"
    seeds: Seeds | None = None
    reset: bool = False


def replaced(index: Tensor, dropped: Tensor, grown: Tensor) -> Tensor:
    """The sorted index with `dropped` out and `grown` in (both in any order)."""
    return union(difference(index, dropped.sort().values), grown.to(index.dtype))


def inactive(index: Tensor, ranks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The positions outside the sorted `index`, by rank among them (0: the lowest): ranks (n,) -> (n,)."""
    before = index.long() - torch.arange(index.numel(), device=index.device)
    return (ranks + torch.searchsorted(before, ranks, right=True)).to(index_dtype(numel(shape)))
