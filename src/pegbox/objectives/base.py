"""Objectives say what is minimised. They count first, yield named losses lazily, and never average by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from pegbox.parts.component import Axis, Component
from pegbox.parts.context import Context
from pegbox.parts.view import Batch, ModelView

__all__ = ["OBJECTIVE", "Objective", "StepView"]


@dataclass(frozen=True)
class StepView:
    """One optimizer step as an objective sees it around its update.

    Args:
        view: the model. batches: this process's micro-batches, on the device. totals: the step's denominators.
        step: finished steps. sum_over_ranks: a tensor's sum over the processes.
    """

    view: ModelView
    batches: Sequence[Batch]
    totals: Mapping[str, Tensor]
    step: int = 0
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor


class Objective(Component):
    """Token loss x weights -> reduction, plus terms.

    The engine calls, per optimizer step: `count` on every micro-batch (summed over micro-batches and ranks into
    `totals`), then per micro-batch `reference` (no gradient, before the policy's forward) and `losses`. Every yielded
    loss is already divided by its entry of `totals`, so summing over micro-batches and ranks gives the step's loss.
    """

    host: ClassVar[Literal["supervised", "preference", "policy", "own_loop"]] = "supervised"
    has_value: ClassVar[bool] = True  # a scalar exists that `losses` is the gradient of (zeroth order needs it)
    fixed_value: ClassVar[bool] = True  # that scalar is one function of the weights during a step (zeroth order too)
    needs_reference: ClassVar[bool] = False
    needs_causal_model: ClassVar[bool] = True
    separable: ClassVar[bool] = False  # its losses share no graph: each may run backward before the next is asked for

    @property
    def view_names(self) -> tuple[str, ...]:
        """Other forms of each row that it reads, under a batch's `views`; data policies make them."""
        return ()

    def setup(self, ctx: Context) -> Any:
        """Mutable state (an nn.Module or a dataclass with state_dict/load_state_dict), or None."""
        return None

    def before_step(self, state: Any, step: StepView) -> None:
        """Told of a step before its first forward; no gradient, and random state is put back afterwards."""

    def after_step(self, state: Any, step: StepView) -> None:
        """Told when the weights have moved, likewise: for what is measured between steps."""

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Denominators of this batch, before any forward, as float64 scalars, e.g. {"tokens": 37}."""
        raise NotImplementedError

    def reference(self, state: Any, view: ModelView, batch: Batch) -> Any:
        """What is needed of the reference model for this batch; called under no_grad."""
        return None

    def losses(
        self, state: Any, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """Named scalar losses; their sum is what is minimised. Names of plain readings start with '_' (not summed)."""
        raise NotImplementedError

    def value(
        self, state: Any, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any = None
    ) -> Tensor | None:
        """The scalar that `losses` is the gradient of; None if there is none."""
        if not type(self).has_value:
            return None
        parts = [loss for name, loss in self.losses(state, view, batch, totals, ref) if not name.startswith("_")]
        return sum(parts[1:], parts[0])


OBJECTIVE: Axis[Objective] = Axis("objective", Objective, "pegbox.objectives", default="tokens")
