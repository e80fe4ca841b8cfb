"""The smallest weights of a whole model train, whatever tensors they are in; half-way those that have grown stop.

    M = {|w0| < theta},   theta one number for all tensors (or the q-quantile of |w0|)
    after the first stage:   M <- M and {|w| < theta};   what leaves M keeps the value it has learnt

"SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation" (arXiv:2409.06633). Small
weights matter least to what a model can do already. It composes with any objective; the low-rank loss is the term
`nuclear_norm`. What it does not do: hold values (the tuner) or apply the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.indexsets import numel
from pegbox.parts.moves import Held, Relocation
from pegbox.parts.thresholds import below, quantile_threshold
from pegbox.select.base import SELECT, Selector

__all__ = ["Smallest", "StageSchedule"]


class StageSchedule(BaseModel):
    """When the second stage begins: after `at` updates, or after a share of them; never, if both are None.

    reset_state: the optimizer starts anew then, instead of keeping the moments of what still trains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    at: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    reset_state: bool = False

    def in_steps(self, steps_per_epoch: float) -> StageSchedule:
        """It counts updates already."""
        return self

    @property
    def moves(self) -> bool:
        """Whether there is a second stage."""
        return self.at is not None or self.share is not None

    def stage(self, total: int) -> int | None:
        """The number of updates after which it begins; `at` counts before `share`."""
        if self.at is not None:
            return self.at
        return None if self.share is None else max(1, round(self.share * total))


@SELECT.register
class Smallest(Selector):
    """Every entry of absolute value below one threshold.

    Args:
        theta: the threshold, or
        density: the share of all selected tensors' entries that lie below it.
        target_modules: words for modules; their weights and biases, of whatever kind. A weight that two modules share
            is left out, since a tuner's layer knows one of them.
        exclude_zeros: leave out exact zeros (pruned entries, padding rows).
        schedule: when those that have grown above the threshold stop training.
    """

    kind: Literal["smallest"] = "smallest"
    reproduces: ClassVar[str] = "arXiv:2409.06633, section 3"
    produces: ClassVar[frozenset[str]] = frozenset({"entries"})
    moves: ClassVar[Literal["never", "slots", "set"]] = "slots"
    picks_vectors: ClassVar[bool] = True

    theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    target_modules: Annotated[str | tuple[str, ...], Field(min_length=1)] = "all"
    exclude_zeros: bool = False
    schedule: StageSchedule = StageSchedule()

    @model_validator(mode="after")
    def _one(self) -> Smallest:
        if (self.theta is None) == (self.density is None):
            raise BadInput("select 'smallest' needs a threshold in exactly one way: theta, or density.")
        return self

    def select(
        self,
        anatomy: Any,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        names = self._names(anatomy, list(weights))
        held = {name: weights[name] for name in names}
        theta = self.theta
        if theta is None:
            assert self.density is not None
            theta = quantile_threshold(held, self.density, exclude_zeros=self.exclude_zeros)
        found = {n: below(w, theta, exclude_zeros=self.exclude_zeros, where=n) for n, w in held.items()}
        chosen = Allocation({name: Entries(index) for name, index in found.items() if index.numel()})
        if not chosen:
            raise BadInput(f"select.theta is {theta:g}, and no entry is smaller, so nothing would train. Raise it.")
        return chosen

    def count(self, anatomy: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Entries per tensor, in proportion to sizes: which tensors hold the smallest is known from weights only."""
        if self.density is None:
            raise BadInput(
                "select.theta: how many entries are smaller follows from the weights, not from their shapes."
            )
        sizes = {name: numel(shapes[name]) for name in self._names(anatomy, list(shapes))}
        total, whole, seen, given, counts = int(self.density * sum(sizes.values())), sum(sizes.values()), 0, 0, {}
        for name, size in sizes.items():
            seen += size
            counts[name] = total * seen // whole - given
            given += counts[name]
        return counts

    def _names(self, anatomy: Any, names: list[str]) -> list[str]:
        if anatomy is None:
            return names
        shared = {*anatomy.ties, *anatomy.ties.values()}
        inside = set(anatomy.parameters(self.target_modules)) - shared
        wanted = [name for name in names if name in inside]
        if not wanted:
            raise BadInput(
                f"select.target_modules {self.target_modules!r} covers none of the model's tensors that are not shared."
            )
        return wanted

    # ---- the second stage

    def begin(self, total: int) -> None:
        stage = self.schedule.stage(total)
        if stage is not None and stage >= total > 0:
            warnings.warn(
                f"select.schedule.at is {stage}, and there are {total} updates: the second stage never begins.",
                stacklevel=2,
            )

    def due(self, step: int, total: int) -> bool:
        return step == self.schedule.stage(total) and step < total

    def relocate(
        self, step: int, total: int, held: Mapping[str, Held], generator: torch.Generator
    ) -> dict[str, Relocation]:
        theta, reset = self._theta(held), self.schedule.reset_state
        return {n: Relocation(part.index[part.weights().abs() < theta], reset=reset) for n, part in held.items()}

    def _theta(self, held: Mapping[str, Held]) -> float:
        """The threshold of the selection: given, or just above the largest pretrained weight that was selected."""
        if self.theta is not None:
            return self.theta
        largest = [part.reference().abs().max() for part in held.values() if part.index.numel()]
        above = [float(torch.nextafter(w, torch.full_like(w, torch.inf))) for w in largest]
        return max(above, default=0.0)
