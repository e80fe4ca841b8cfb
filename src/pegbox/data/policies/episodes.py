"""`episodes`: every step is made of whole tasks, each with rows to learn from and rows to be judged on.

    step = task_1 support, task_1 query, task_2 support, ...   (tasks x (support + query) rows)

Tasks come in rounds, each a permutation of all; the rows of an episode are a fresh permutation of the task's own,
support and query disjoint where the task has the rows. All of it follows from the seed and the place alone. Batches
say which episode they are of (`episode`: its number in the step, and whether they are its query). Vinyals et al.,
arXiv:1606.04080.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from pegbox.data.base import DATA, DataPolicy
from pegbox.errors import BadInput
from pegbox.parts.context import Context, seed_of
from pegbox.parts.view import Batch

__all__ = ["Episodes", "split_rows"]

Count = Annotated[int, Field(ge=1)]


def split_rows(rows: Sequence[int], support: int, query: int) -> tuple[list[int], list[int]]:
    """`support` and `query` rows of a task, in the order given. A task of too few rows is parted in proportion and each
    part repeated; one row stands for both."""
    if len(rows) >= support + query:
        return list(rows[:support]), list(rows[support : support + query])
    if query == 0 or len(rows) == 1:
        first, second = list(rows), list(rows)
    else:
        cut = min(len(rows) - 1, max(1, round(len(rows) * support / (support + query))))
        first, second = list(rows[:cut]), list(rows[cut:])
    return [first[i % len(first)] for i in range(support)], [second[i % len(second)] for i in range(query)]


class _Order:
    """The endless order of rows, episode after episode."""

    def __init__(self, members: Sequence[Sequence[int]], support: int, query: int, seed: int):
        self.members, self.support, self.query, self.seed = members, support, query, seed

    def __iter__(self) -> Iterator[int]:
        episode, turn = 0, 0
        while True:
            for task in self._permuted(range(len(self.members)), "tasks", turn):
                rows = self._permuted(self.members[task], "rows", episode)
                first, second = split_rows(rows, self.support, self.query)
                yield from first
                yield from second
                episode += 1
            turn += 1

    def _permuted(self, items: Sequence[int], *names: object) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "episodes", *names))
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


@dataclass
class _Place:
    """How many rows of the present step have been seen."""

    step: int = -1
    rows: int = 0


@DATA.register
class Episodes(DataPolicy):
    """Rows by task.

    Args:
        tasks: per step, over all processes. support, query: rows of each to learn from, and to be judged on (0: on the
            support). The batch must be tasks x (support + query), in micro-batches that divide both.
    """

    kind: Literal["episodes"] = "episodes"
    gives_episodes: ClassVar[bool] = True

    tasks: Count = 4
    support: Count = 8
    query: Annotated[int, Field(ge=0)] = 8

    def setup(self, ctx: Context) -> _Place:
        if len(ctx.tasks) == 1:
            warnings.warn(
                f"All rows are of one task ('{ctx.tasks[0]}'), so nothing is learnt about learning a new one. Name "
                "tasks by the rows' `task`.",
                stacklevel=2,
            )
        return _Place()

    def sampler(self, state: Any, dataset: Sequence[dict[str, Any]], ctx: Context) -> _Order:
        numbers = getattr(dataset, "task_ids", None)
        if numbers is None:
            numbers = [dataset[i].get("task_id", 0) for i in range(len(dataset))]
        members: dict[int, list[int]] = {}
        for i, task in enumerate(numbers):
            members.setdefault(int(task), []).append(i)
        return _Order([members[k] for k in sorted(members)], self.support, self.query, ctx.seed)

    def on_batch(self, state: _Place, batch: Batch, ctx: Context) -> Batch:
        step, size = ctx.step(), self.support + self.query
        if step != state.step:
            state.step, state.rows = step, 0
        rows = len(batch["sample_ids"]) if batch.get("sample_ids") is not None else len(batch["labels"])
        episode, place = divmod(state.rows, size)
        query = place >= self.support
        end = place + rows
        if end > size or (not query and end > self.support):
            raise BadInput(
                f"A micro-batch of {rows} rows straddles two parts of an episode ({self.support} to learn from, "
                f"{self.query} to be judged on). Use a micro_batch that divides both, and a batch "
                f"of {self.tasks * size}."
            )
        state.rows += rows
        return {**batch, "episode": torch.tensor([episode, int(query)])}
