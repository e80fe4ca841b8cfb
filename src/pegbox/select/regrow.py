"""Drop and grow: k entries train, and now and then those that moved least make room for more promising ones.

    every S updates, a updates later:   n = floor(k * rate(t))
    out  = the n trained entries of smallest |value|, back to the pretrained weight
    in   = the n best others, by |sum of gradients|  or  R_i C_j of SM3's accumulators  or  at random
    rate = r0 (1 - t / T)  (and 1 the first time), or r0 (1 + cos(pi t / T)) / 2

"Scaling Sparse Fine-Tuning to Large Language Models" (arXiv:2401.16405): SpIEL-AG and SpIEL-MA. It starts from random
entries, and needs linear layers and an optimizer that keeps what the growth rule reads. Where values are the weights
themselves, |value| is the distance from the pretrained weight. What it does not do: hold values, moments or gradients;
the tuner does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.context import seed_of
from pegbox.parts.indexsets import Budget, index_dtype, locate, numel, random_entries, top_entries
from pegbox.parts.moves import Held, Relocation, Seeds, inactive, replaced
from pegbox.parts.packed import whole_count
from pegbox.select.base import SELECT, Selector
from pegbox.select.entries import covered

__all__ = ["Exchange", "Regrow", "RegrowSchedule", "by_gradient", "by_momentum", "events", "grow_at_random", "rate_at"]

Policy = Literal["linear", "cosine"]


class RegrowSchedule(BaseModel):
    """When entries are dropped and grown, and how many.

    Args:
        every: S, updates between two events; None: never.
        accumulate: a, the updates into a period after which it happens; gradients are gathered until then.
        rate: r0, the share of a tensor's entries that moves at the beginning.
        policy: "linear" down to 0 at the end, with everything moving the first time; or "cosine".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    every: Annotated[int, Field(ge=2)] | None = 20
    accumulate: Annotated[int, Field(ge=1)] = 5
    rate: Annotated[float, Field(ge=0, le=1)] = 0.2
    policy: Policy = "linear"

    @model_validator(mode="after")
    def _consistent(self) -> RegrowSchedule:
        if self.every is not None and self.every <= self.accumulate:
            raise BadInput(
                f"select.schedule.every is {self.every}, and gathering takes {self.accumulate} updates of it"
                " (select.schedule.accumulate). Make the period longer than that."
            )
        return self

    def in_steps(self, steps_per_epoch: float) -> RegrowSchedule:
        """It counts updates already."""
        return self

    @property
    def moves(self) -> bool:
        """Whether anything ever moves."""
        return self.every is not None


@SELECT.register
class Regrow(Selector):
    """Random entries of linear layers that move towards where the gradient is.

    Args:
        budget: K over all targets together. A density is a share of ALL parameters of the model (see `density_of`);
            each tensor gets its share by size, rounded down, and none if that is 0.
        density_of: "model": a density counts embeddings and everything; "targets": only what is selected from.
        growth: "accumulated_gradient" (AG), "momentum" (MA, with optim sm3), "gradient" (of the update right before),
            "random".
        schedule: when, and how many.
    """

    kind: Literal["regrow"] = "regrow"
    reproduces: ClassVar[str] = "arXiv:2401.16405"
    produces: ClassVar[frozenset[str]] = frozenset({"entries"})
    moves: ClassVar[Literal["never", "slots", "set"]] = "slots"
    needs_weights: ClassVar[bool] = False

    budget: Budget = Budget(density=0.01)
    density_of: Literal["model", "targets"] = "model"
    growth: Literal["accumulated_gradient", "momentum", "gradient", "random"] = "accumulated_gradient"
    target_modules: Annotated[str | tuple[str, ...], Field(min_length=1)] = "all-linear"
    schedule: RegrowSchedule = RegrowSchedule()

    @property
    def needs_state(self) -> frozenset[str]:
        """AG seeds moments, MA reads SM3's accumulators."""
        needed = {"momentum": "rows_columns", "accumulated_gradient": "moments", "gradient": "moments"}
        return frozenset({needed[self.growth]} if self.growth in needed else ())

    # ---- the start

    def select(
        self,
        anatomy: Any,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        shapes = {name: tuple(weights[name].shape) for name in covered(anatomy, list(weights), self.target_modules)}
        counts = self._shares(anatomy, shapes, whole_count(weights))
        seed = generator.initial_seed()
        return Allocation(
            {n: Entries(random_entries(numel(shapes[n]), k, _stream(seed, n))) for n, k in counts.items() if k}
        )

    def count(self, anatomy: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        inside = {name: tuple(shapes[name]) for name in covered(anatomy, list(shapes), self.target_modules)}
        return self._shares(anatomy, inside, whole_count(shapes))

    def _shares(self, anatomy: Any, shapes: Mapping[str, tuple[int, ...]], whole: int) -> dict[str, int]:
        """k per tensor: floor(K * entries / entries of all targets)."""
        for name, shape in shapes.items():
            if len(shape) != 2 or (anatomy is not None and anatomy.category(name) == "embedding"):
                raise BadInput(
                    f"select.target_modules: '{name}' {shape} does not belong to a linear layer, and only these can"
                    " drop and grow. Name linear modules."
                )
        available = sum(numel(shape) for shape in shapes.values())
        wanted = self._total(shapes, whole if self.density_of == "model" else available)
        if not 1 <= wanted <= available:
            raise BadInput(
                f"select.budget asks for {wanted} entries, and the {len(shapes)} targeted tensors have {available}."
                " Change the budget, or target more modules."
            )
        counts = {name: wanted * numel(shape) // available for name, shape in shapes.items()}
        if not any(counts.values()):
            raise BadInput(f"select.budget: {wanted} entries over {len(shapes)} tensors leave none for any of them.")
        return counts

    def _total(self, shapes: Mapping[str, tuple[int, ...]], whole: int) -> int:
        if self.budget.density is not None:
            return int(self.budget.density * whole)
        return self.budget.count or self.budget.entries(shapes.values())

    # ---- the moves

    def begin(self, total: int) -> None:
        if self.schedule.moves and not any(self.due(step, total) for step in range(total)):
            warnings.warn(
                f"{total} updates are too few for select.schedule (the first event comes after"
                f" {self.schedule.accumulate}): the entries stay where they were drawn.",
                stacklevel=2,
            )

    def due(self, step: int, total: int) -> bool:
        every = self.schedule.every
        return every is not None and 0 < step < total and step % every == self.schedule.accumulate

    def watches(self, step: int, total: int) -> bool:
        every, a = self.schedule.every, self.schedule.accumulate
        if every is None:
            return False
        if self.growth == "gradient":
            return (step + 1) % every == a and step + 1 < total
        starts, event = (True, a) if step == 0 else ((step + 1) % every == 0, step + 1 + a)
        return self.growth == "accumulated_gradient" and starts and event < total

    def relocate(
        self, step: int, total: int, held: Mapping[str, Held], generator: torch.Generator
    ) -> dict[str, Relocation]:
        rate = rate_at(step, total, self.schedule)
        return {name: self._relocate(part, int(part.index.numel() * rate), generator) for name, part in held.items()}

    def _relocate(self, part: Held, n: int, generator: torch.Generator) -> Relocation:
        if len(part.shape) != 2:
            raise BadInput(f"'{part.name}' {part.shape} is not a matrix; only linear layers can drop and grow.")
        if n == 0:
            return Relocation(part.index, "revert")
        if self.growth == "random":
            draw = _stream(generator.initial_seed(), part.name)
            moved = grow_at_random(part.index, part.change(), n, part.shape, draw)
        elif self.growth == "momentum":
            moved = by_momentum(part.index, part.change(), n, *_accumulators(part))
        else:
            return self._by_gradient(part, n)
        return Relocation(replaced(part.index, moved.dropped, moved.grown), "revert")

    def _by_gradient(self, part: Held, n: int) -> Relocation:
        watch = part.watched
        if watch is None:
            raise RunFailed(
                f"'{part.name}' is to grow by gradients, and none were watched. Let the engine, or the callbacks of"
                " pegbox.callbacks_for, begin before the first step."
            )
        if watch.index is None or not watch.samples:  # no batch reached it
            return Relocation(part.index, "revert")
        moved = by_gradient(part.index, part.change(), n, watch.index, watch.total)
        grown = moved.grown.sort().values
        at = locate(grown, watch.index)
        seeds = Seeds(grown, watch.total[at] / watch.samples, watch.square[at] / watch.samples, watch.samples)
        return Relocation(replaced(part.index, moved.dropped, grown), "revert", seeds)


def _stream(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, name))


def _accumulators(part: Held) -> tuple[Tensor, Tensor]:
    row, column = part.state.get("row"), part.state.get("column")
    if row is None or column is None or (row.numel(), column.numel()) != part.shape:
        raise Unsupported(
            f"'{part.name}': growth by momentum reads SM3's accumulators of rows and columns, and the optimizer keeps"
            f" {sorted(part.state) or 'no state'}. Use optim: {{kind: sm3}} with rows_only: false."
        )
    return row, column


# ---- the schedule


def rate_at(step: int, total: int, schedule: RegrowSchedule) -> float:
    """The share of entries that moves after `step` of `total` updates."""
    if total <= 0:
        raise BadInput("Drop and grow goes by the length of the training: give the total number of steps.")
    if schedule.policy == "cosine":
        return schedule.rate * (1 + math.cos(math.pi * step / total)) / 2
    return 1.0 if step == schedule.accumulate else schedule.rate * (1 - step / total)


def events(total: int, schedule: RegrowSchedule) -> list[tuple[Any, ...]]:
    """("start", updates done) and ("select", updates done, rate), as the method is written down.

    A start without a later event, and an event right after the last update, are left out by a training.
    """
    every, found = schedule.every, [("start", 0)]
    if every is None:
        return []
    for step in range(1, total + 1):
        if (step + 1) % every == 0:
            found.append(("start", step))
        if step % every == schedule.accumulate:
            found.append(("select", step, rate_at(step, total, schedule)))  # type: ignore[arg-type]
    return found


# ---- the mathematics


@dataclass(frozen=True)
class Exchange:
    """Positions that leave, by growing |value|, and those that take their places, by falling score; equally many."""

    dropped: Tensor
    grown: Tensor


def by_gradient(index: Tensor, values: Tensor, n: int, candidates: Tensor, scores: Tensor) -> Exchange:
    """Drop the n smallest |values|, grow the best of `candidates` (C,) by |scores| (C,).

    Candidates are positions that are not trained, or among the n; one that is both is left untouched. index (k,) and
    candidates are sorted.
    """
    order = values.abs().argsort(stable=True)[:n]
    out = index[order]
    keep = torch.ones(index.numel(), dtype=torch.bool, device=index.device)
    keep[order] = False
    free = locate(candidates, index[keep]) < 0
    best = scores[free].abs().argsort(descending=True, stable=True)[:n]
    inc = candidates[free][best].to(index.dtype)
    leaves = locate(out, inc.sort().values) < 0
    enters = locate(inc, out.sort().values) < 0
    grown = inc[enters]
    return Exchange(out[leaves][: grown.numel()], grown)


def by_momentum(index: Tensor, values: Tensor, n: int, rows: Tensor, columns: Tensor) -> Exchange:
    """Drop the n smallest |values|, grow the n untrained positions (i, j) of largest R_i C_j.

    rows (m,) and columns (c,): SM3's accumulators.
    """
    n = min(n, rows.numel() * columns.numel() - index.numel())
    score = torch.outer(rows, columns).view(-1)
    score[index.long()] = -1.0  # R and C are not negative, so these come last
    best = top_entries(score, n)
    grown = best[score[best.long()].argsort(descending=True, stable=True)].to(index.dtype)
    return Exchange(index[values.abs().argsort(stable=True)[:n]], grown)


def grow_at_random(
    index: Tensor, values: Tensor, n: int, shape: tuple[int, ...], generator: torch.Generator
) -> Exchange:
    """Drop the n smallest |values|, grow n untrained positions drawn without replacement."""
    free = numel(shape) - index.numel()
    n = min(n, free)
    ranks = random_entries(free, n, generator).to(index.device, torch.int64)
    grown = inactive(index, ranks, shape).to(index_dtype(numel(shape)))
    return Exchange(index[values.abs().argsort(stable=True)[:n]], grown)
