"""Selectors answer which weights may move, or which tuner or code a tensor gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.component import Axis, Component
from pegbox.parts.indexsets import Budget
from pegbox.parts.moves import Held, Relocation

__all__ = ["SELECT", "Schedule", "Selector", "relocations"]


class Schedule(BaseModel):
    """When a selection is done again: before every `every`-th optimizer step, or every `epochs` passes over the rows
    (never, if neither is given).

    mode: "dynamic" (chosen anew, the set keeps its size), "fixed" (never again), "accumulative" (as many again are
    added each time and none leaves, up to `limit`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    every: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    mode: Literal["dynamic", "fixed", "accumulative"] = "dynamic"
    limit: Budget | None = None  # how many entries an accumulative selection may reach

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.every is not None and self.epochs is not None:
            raise BadInput("select.schedule says when by 'every' (steps) or by 'epochs', not by both.")
        if self.mode == "accumulative" and (self.limit is None or not self._repeats):
            raise BadInput("An accumulative schedule needs 'every' and a 'limit' (a budget that it grows to).")
        if self.mode != "accumulative" and self.limit is not None:
            raise BadInput(f"A '{self.mode}' schedule does not grow, so 'limit' has no meaning. Leave it out.")
        return self

    @property
    def moves(self) -> bool:
        """Whether anything is chosen again."""
        return self._repeats and self.mode != "fixed"

    @property
    def _repeats(self) -> bool:
        return self.every is not None or self.epochs is not None

    def in_steps(self, steps_per_epoch: float) -> Schedule:
        """The same, said in optimizer steps."""
        if self.epochs is None:
            return self
        return self.model_copy(update={"every": max(1, round(self.epochs * steps_per_epoch)), "epochs": None})


class Selector(Component):
    """A pure function of (anatomy, weights, statistics, budget, generator); the same on all ranks for a seed."""

    produces: ClassVar[frozenset[str]] = frozenset({"entries"})  # of: entries, whole, units, tuner, codec
    moves: ClassVar[Literal["never", "slots", "set"]] = "never"  # slots inside a fixed-size set, or the set of tensors
    picks_vectors: ClassVar[bool] = False  # norms and biases too, not just matrices
    needs_floating_base: ClassVar[bool] = False  # reads gradients of the weights, which packed ones don't have
    budgets_backward: ClassVar[bool] = False  # spends FLOPs of back-propagation, so there has to be one
    needs_weights: ClassVar[bool] = True  # False: the count and choice follow from shapes and the seed alone

    @property
    def needs_state(self) -> frozenset[str]:
        """What an optimizer must keep (`Step.keeps`) so that this selection can move while training."""
        return frozenset()

    def statistics(self) -> Any | None:
        """What to gather beforehand: a `parts.statistics.StatSpec`, a request with a `gather` of its own, or None."""
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

    # ---- moving while training: when, what has to be seen for it, and where to

    def begin(self, total: int) -> None:
        """Told how many updates there will be, before the first: to refuse, or to warn that nothing will move."""

    def due(self, step: int, total: int) -> bool:
        """Whether entries move after `step` of `total` finished updates, before the next one.

        By default right before updates T, 2T, ... of `schedule.every`.
        """
        schedule = getattr(self, "schedule", None)
        return schedule is not None and schedule.moves and (step + 1) % schedule.every == 0

    def watches(self, step: int, total: int) -> bool:
        """Whether gradients are watched from the update after `step` finished ones on, until the next move."""
        return False

    def relocate(
        self, step: int, total: int, held: Mapping[str, Held], generator: torch.Generator
    ) -> dict[str, Relocation]:
        """Where the entries go; for every tensor in `held`. By default: selected again on the weights of now."""
        chosen = self.select(None, {name: part.tuned() for name, part in held.items()}, None, generator)
        return relocations(chosen, held)


SELECT: Axis[Selector] = Axis("select", Selector, "pegbox.select")


def relocations(chosen: Mapping[str, Any], held: Mapping[str, Held]) -> dict[str, Relocation]:
    """A new selection as moves in which entries that leave keep what they have reached. Raises `BadInput`."""
    for name in held:
        if not isinstance(chosen.get(name), Entries):
            raise BadInput(f"The new selection has no entries for '{name}', which is being trained.")
    return {name: Relocation(chosen[name].index) for name in held}
