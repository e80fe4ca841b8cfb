"""Selectors answer which weights may move, or which tuner or code a tensor gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation
from pegbox.parts.component import Axis, Component
from pegbox.parts.indexsets import Budget

__all__ = ["SELECT", "Schedule", "Selector"]


class Schedule(BaseModel):
    """When a selection is done again: before every `every`-th optimizer step (never, if None).

    mode: "dynamic" (chosen anew, the set keeps its size), "fixed" (never again), "accumulative" (as many again are
    added each time and none leaves, up to `limit`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    every: Annotated[int, Field(ge=1)] | None = None
    mode: Literal["dynamic", "fixed", "accumulative"] = "dynamic"
    limit: Budget | None = None  # how many entries an accumulative selection may reach

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.mode == "accumulative" and (self.limit is None or self.every is None):
            raise BadInput("An accumulative schedule needs 'every' and a 'limit' (a budget that it grows to).")
        if self.mode != "accumulative" and self.limit is not None:
            raise BadInput(f"A '{self.mode}' schedule does not grow, so 'limit' has no meaning. Leave it out.")
        return self

    @property
    def moves(self) -> bool:
        """Whether anything is chosen again."""
        return self.every is not None and self.mode != "fixed"


class Selector(Component):
    """A pure function of (anatomy, weights, statistics, budget, generator); the same on all ranks for a seed."""

    produces: ClassVar[frozenset[str]] = frozenset({"entries"})  # of: entries, whole, units, tuner, codec
    moves: ClassVar[Literal["never", "slots", "set"]] = "never"  # slots inside a fixed-size set, or the set of tensors
    picks_vectors: ClassVar[bool] = False  # norms and biases too, not just matrices
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
