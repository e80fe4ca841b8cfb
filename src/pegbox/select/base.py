"""Selectors answer which weights may move, or which tuner or code a tensor gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pegbox.parts.allocation import Allocation
from pegbox.parts.component import Axis, Component

__all__ = ["SELECT", "Schedule", "Selector"]


class Schedule(BaseModel):
    """When a selection is done again: before every `every`-th optimizer step (never, if None)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    every: Annotated[int, Field(ge=1)] | None = None
    mode: Literal["dynamic", "fixed", "accumulative"] = "dynamic"


class Selector(Component):
    """A pure function of (anatomy, weights, statistics, budget, generator); the same on all ranks for a seed."""

    produces: ClassVar[frozenset[str]] = frozenset({"entries"})  # of: entries, whole, units, tuner, codec
    moves: ClassVar[Literal["never", "slots", "set"]] = "never"  # slots inside a fixed-size set, or the set of tensors
    needs_weights: ClassVar[bool] = True  # False: the count and choice follow from shapes and the seed alone

    def statistics(self) -> Any | None:
        """A `parts.statistics.StatSpec` to gather beforehand, or None."""
        return None

    def select(
        self,
        anatomy: Any,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        """The allocation over the tensors in `weights` that this selector's scope covers."""
        raise NotImplementedError

    def count(self, anatomy: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """How many weights each tensor would train, from shapes alone (for `plan`, on the meta device)."""
        raise NotImplementedError


SELECT: Axis[Selector] = Axis("select", Selector, "pegbox.select")
