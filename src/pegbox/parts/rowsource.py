"""Further rows that a component may draw batches from while training: the validation set, a policy's own data.

A `RowSource` gives any choice of its rows as one batch, collated and on the device. Whoever draws keeps count of what
it drew (a cursor in its own saved state), so that a resumed run draws on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pegbox.errors import BadInput
from pegbox.parts.context import seed_of
from pegbox.parts.view import Batch

__all__ = ["RowSource", "turns"]


@dataclass
class RowSource:
    """Encoded examples with the way to batch them.

    Args:
        examples: by position. collate: a list of examples -> a batch. place: moves a batch to the device.
    """

    examples: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], Batch]
    place: Callable[[Batch], Batch] = lambda batch: batch

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows as one batch. Raises `BadInput` for none."""
        if not rows:
            raise BadInput("A batch needs at least one row.")
        return self.place(self.collate([self.examples[i] for i in rows]))

    @cached_property
    def by_task(self) -> dict[int, list[int]]:
        """Row positions by task id."""
        known = getattr(self.examples, "task_ids", None)
        if known is None:
            known = [self.examples[i].get("task_id", 0) for i in range(len(self.examples))]
        found: dict[int, list[int]] = {}
        for i, task in enumerate(known):
            found.setdefault(int(task), []).append(i)
        return found

    def drawn(self, cursor: int, count: int, seed: int, name: str) -> list[int]:
        """`count` rows from place `cursor` of an endless shuffled order, a new permutation each pass."""
        out: list[int] = []
        while len(out) < count:
            epoch, place = divmod(cursor + len(out), len(self.examples))
            generator = torch.Generator().manual_seed(seed_of(seed, "rows", name, epoch))
            order = torch.randperm(len(self.examples), generator=generator).tolist()
            out += order[place : place + count - len(out)]
        return out


def turns(source: RowSource, tasks: int, cursor: int, count: int) -> list[int]:
    """`count` rows from place `cursor` of the order in which tasks 0..tasks-1 take turns, each in its own order."""
    rows = []
    for place in range(cursor, cursor + count):
        turn, task = divmod(place, tasks)
        members = source.by_task[task]
        rows.append(members[turn % len(members)])
    return rows
