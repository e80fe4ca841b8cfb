"""What selectors of single weights share: a budget, a scope, targets, a schedule; a method is only a score.

index = positions of the k largest scores      per tensor, per block of the model, or over all tensors together
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.context import seed_of
from pegbox.parts.indexsets import (
    Budget,
    Scope,
    block_of,
    budget_counts,
    matrix_shape,
    numel,
    top_entries,
    top_entries_across,
    union,
)
from pegbox.parts.moves import Held, Relocation
from pegbox.select.base import Schedule, Selector, relocations

__all__ = ["EntrySelector", "covered"]


class EntrySelector(Selector):
    """Chooses the entries of largest `score` within a budget."""

    produces: ClassVar[frozenset[str]] = frozenset({"entries"})
    moves: ClassVar[Any] = "slots"

    budget: Budget = Budget(density=0.05)
    scope: Scope = "per_tensor"
    target_modules: Annotated[str | tuple[str, ...], Field(min_length=1)] = "all-linear"
    schedule: Schedule = Schedule()

    def score(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """A score per entry, in the weight's shape; `count` is the tensor's own budget (0 where the scope is wider)."""
        raise NotImplementedError

    def choose(self, name: str, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The `count` chosen positions of one tensor."""
        return top_entries(self.score(name, weight, count, generator), count)

    def select(
        self,
        anatomy: Any,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        """Entries of every covered tensor. Each tensor draws from its own stream, so that order has no influence."""
        names = covered(anatomy, list(weights), self.target_modules)
        shapes = {name: tuple(weights[name].shape) for name in names}
        check_growth(self.budget, self.schedule, shapes, self.scope)
        counts = budget_counts(self.budget, shapes, self.scope)
        seed = generator.initial_seed()
        if self.scope == "per_tensor":
            return Allocation({n: Entries(self.choose(n, weights[n], counts[n], _stream(seed, n))) for n in names})
        chosen: dict[str, Tensor] = {}
        for group, count in counts.items():
            members = [n for n in names if self.scope == "global" or block_of(n) == group]
            scores = [self.score(n, weights[n], 0, _stream(seed, n)) for n in members]
            chosen.update(zip(members, top_entries_across(scores, count), strict=True))
        return Allocation({n: Entries(chosen[n]) for n in names})

    def more(self, name: str, weight: Tensor, present: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """`present` and the `count` next entries of one tensor: the largest that are not in it."""
        score = self.score(name, weight, count, generator).flatten().to(torch.float64)
        score[present.long()] = -torch.inf
        return union(present, top_entries(score, min(count, score.numel() - present.numel())))

    def relocate(
        self, step: int, total: int, held: Mapping[str, Held], generator: torch.Generator
    ) -> dict[str, Relocation]:
        """Selected again, tensor by tensor where they don't compete; accumulative: more are added and none leaves."""
        if self.schedule.mode == "accumulative":
            return self._accumulate(held, generator)
        if self.scope != "per_tensor":
            return super().relocate(step, total, held, generator)
        seed, chosen = generator.initial_seed(), Allocation()
        for name, part in held.items():  # one tensor at a time: nothing is held
            again = torch.Generator().manual_seed(seed)
            chosen.update(self.select(None, {name: part.tuned()}, None, again))
        return relocations(chosen, held)

    def _accumulate(self, held: Mapping[str, Held], generator: torch.Generator) -> dict[str, Relocation]:
        """To each tensor's set the next entries, as many as it started with, until the limit is full."""
        limit = self.schedule.limit
        if self.scope != "per_tensor" or limit is None:
            raise Unsupported("An accumulative schedule needs scope 'per_tensor'.")
        shapes = {name: part.shape for name, part in held.items()}
        first, last = (budget_counts(budget, shapes, "per_tensor") for budget in (self.budget, limit))
        result = {}
        for name, part in held.items():
            present = part.index
            extra = min(first[name], last[name] - present.numel())
            draw = _stream(generator.initial_seed(), name)
            more = self.more(name, part.tuned(), present, extra, draw) if extra > 0 else present
            result[name] = Relocation(more)
        return result

    def count(self, anatomy: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Entries per tensor. With a wider scope the split follows the weights; then in proportion to sizes."""
        names = covered(anatomy, list(shapes), self.target_modules)
        inside = {name: tuple(shapes[name]) for name in names}
        counts = budget_counts(self.budget, inside, self.scope)
        if self.scope == "per_tensor":
            return counts
        return {
            name: number
            for group, total in counts.items()
            for name, number in _proportional(
                {n: numel(s) for n, s in inside.items() if self.scope == "global" or block_of(n) == group}, total
            ).items()
        }


def covered(anatomy: Any, names: list[str], targets: str | tuple[str, ...]) -> list[str]:
    """The tensors among `names` that `targets` mean; all of them where no anatomy is given (already restricted)."""
    if anatomy is None:
        wanted = list(names)
    else:
        inside = set(anatomy.weights(targets))
        wanted = [name for name in names if name in inside]
    if not wanted:
        raise BadInput(
            f"select: target_modules {targets!r} covers none of the model's weights, so nothing would train."
        )
    return wanted


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as a matrix (out, rest)."""
    return weight.reshape(matrix_shape(tuple(weight.shape)))


def check_growth(budget: Budget, schedule: Schedule, shapes: Mapping[str, tuple[int, ...]], scope: Scope) -> None:
    """An accumulative schedule ends at least where it starts."""
    if schedule.limit is None:
        return
    start, limit = budget_counts(budget, shapes, scope), budget_counts(schedule.limit, shapes, scope)
    for key, count in start.items():
        if limit[key] < count:
            raise BadInput(
                f"select.schedule.limit allows {limit[key]} entries of '{key}', fewer than the first {count}."
            )


def _stream(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, name))


def _proportional(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers that add up to `total`, by largest remainder."""
    everything = sum(sizes.values())
    exact = {name: total * size / everything for name, size in sizes.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(sizes, key=lambda name: counts[name] - exact[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
