"""`mixture`: which task the next row is of, so that after any number of rows each task has had its share.

    |count_k - n w_k| < 1 for every n and k,   w_k ~ n_k^temperature, or given

Deterministic: of the tasks whose count is still below their due, the one whose next row is due soonest (R. Tijdeman,
"The chairman assignment problem", 1980). Always taking the task that lags most, as MFTCoder (arXiv:2311.02303) does,
breaks the bound for some shares of five tasks and more. Each task's own rows come in a permutation of
their own, made anew whenever it is used up. Temperature 1 is proportional to the number of rows, 0 is all alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from pegbox.data.base import DATA, DataPolicy
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.context import Context, seed_of

__all__ = ["Mixture", "blended", "shares"]


def blended(weights: Sequence[float]) -> Iterator[int]:
    """The endless sequence of task numbers for weights that are not negative and sum to 1; weight 0 never comes."""
    active = [k for k, w in enumerate(weights) if w > 0]
    slack = 1 / (2 * len(active) - 2) if len(active) > 1 else 0.0
    counts, drawn = dict.fromkeys(active, 0), 0
    while True:
        drawn += 1
        due = [k for k in active if weights[k] * drawn - counts[k] >= slack - 1e-9]
        chosen = min(due or active, key=lambda k: ((counts[k] + 1 - slack) / weights[k], k))
        counts[chosen] += 1
        yield chosen


def shares(sizes: Sequence[int], temperature: float = 1.0) -> list[float]:
    """w_k ~ n_k^temperature, 0 for an empty task. Raises `BadInput` where all are empty."""
    powers = [n**temperature if n else 0.0 for n in sizes]
    total = math.fsum(powers)
    if not total:
        raise BadInput("There are no rows to mix.")
    return [p / total for p in powers]


class _Order:
    """The endless order of rows; a new iterator begins it anew, so it follows from the seed alone."""

    def __init__(self, members: Sequence[Sequence[int]], weights: Sequence[float], seed: int):
        self.members, self.weights, self.seed = members, weights, seed

    def __iter__(self) -> Iterator[int]:
        orders = [self._rows(k) for k in range(len(self.members))]
        return (next(orders[k]) for k in blended(self.weights))

    def _rows(self, task: int) -> Iterator[int]:
        rows, turn = self.members[task], 0
        while True:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "mixture", task, turn))
            yield from (rows[i] for i in torch.randperm(len(rows), generator=generator).tolist())
            turn += 1


@DATA.register
class Mixture(DataPolicy):
    """The order of rows over tasks.

    Args:
        weights: each task's share by name (0 leaves it out, unnamed tasks are an error); None: by size.
        temperature: the power of a task's size that its share goes by, where no weights are given.
    """

    reproduces: ClassVar[str] = "arXiv:2311.02303"

    kind: Literal["mixture"] = "mixture"
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0

    def model_post_init(self, context: Any, /) -> None:
        if self.weights is not None and not sum(self.weights.values()):
            raise BadInput("data.mixture.weights are all 0: nothing would be drawn.")
        if self.weights is not None and "temperature" in self.model_fields_set:
            raise BadInput("data.mixture: weights say the shares, so temperature has no use. Leave one out.")

    def sampler(self, state: Any, dataset: Sequence[dict[str, Any]], ctx: Context) -> _Order:
        numbers = getattr(dataset, "task_ids", None)
        if numbers is None:
            numbers = [dataset[i].get("task_id", 0) for i in range(len(dataset))]
        members: list[list[int]] = [[] for _ in range(int(max(numbers, default=-1)) + 1)]
        for i, task in enumerate(numbers):
            members[int(task)].append(i)
        return _Order(members, self._shares([len(m) for m in members], ctx), ctx.seed)

    def _shares(self, sizes: Sequence[int], ctx: Context) -> list[float]:
        if self.weights is None:
            return shares(sizes, self.temperature)
        names = [ctx.tasks[k] if k < len(ctx.tasks) else str(k) for k in range(len(sizes))]
        for name in self.weights:
            if name not in names:
                raise BadInput(f"data.mixture.weights: the rows have no task '{name}'.{did_you_mean(name, names)}")
        missing = [name for name, size in zip(names, sizes) if size and name not in self.weights]
        if missing:
            raise BadInput(f"data.mixture.weights gives no share for the task '{missing[0]}'. Give 0 to leave it out.")
        given = [self.weights.get(name, 0.0) if size else 0.0 for name, size in zip(names, sizes)]
        if not sum(given):
            raise BadInput("data.mixture.weights leaves no task that has rows.")
        return [w / sum(given) for w in given]
