"""`multi_source`: rows of several sources in batches of one source each, on whose difference the batch is learnt.

    batch of source s:   g = grad L(theta + phi_s; batch),   then theta <- step(theta, g)

A task is learnt on top of several languages at once, so that what is left (the task's difference) fits whichever
language is put below it later. Before a batch's forward its source's difference is added to the weights, after its
backward the very weights from before are there again. Ansell et al., arXiv:2110.07560 and its official code.

A row's source is its task (the row's own `task`, or its data source's). Training: a source's share of the blocks is its
number of rows times its upsampling; blocks come in random order, a source's rows in permutations of their own.
Evaluation: source after source. With one source this is how a task is learnt over one language.

What this does not do: put anything on the finished model (`pegbox.load([language, task])` does), or train differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from pegbox.data.base import DATA, DataPolicy
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.context import Context, seed_of
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.differences import acting, base_parameters, checked_difference
from pegbox.parts.view import Batch

__all__ = ["Blocks", "MultiSource", "SourceState"]


class Blocks:
    """The endless order of rows: blocks of `size` rows of one source each. It follows from the seed alone.

    Args:
        members: row numbers by source. weights: blocks are dealt out in proportion to rows times weight, exactly over
            time; a source's block at the border of its permutation goes on with the next one.
    """

    def __init__(self, members: Sequence[Sequence[int]], weights: Sequence[int], size: int, seed: int):
        self.members, self.weights, self.size, self.seed = members, weights, size, seed

    def __iter__(self) -> Iterator[int]:
        rows = [self._rows(k) for k in range(len(self.members))]
        shares = [len(m) * w for m, w in zip(self.members, self.weights)]
        turn = 0
        while True:
            order = [
                k for k, n in enumerate(shares) for _ in range((turn + 1) * n // self.size - turn * n // self.size)
            ]
            generator = torch.Generator().manual_seed(seed_of(self.seed, "multi_source", turn))
            for place in torch.randperm(len(order), generator=generator).tolist():
                yield from (next(rows[order[place]]) for _ in range(self.size))
            turn += 1

    def _rows(self, source: int) -> Iterator[int]:
        members, turn = self.members[source], 0
        while True:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "multi_source rows", source, turn))
            yield from (members[i] for i in torch.randperm(len(members), generator=generator).tolist())
            turn += 1


@dataclass
class SourceState:
    """What acts for each task number (None: the bare weights), and where it is put."""

    by_task: dict[int, Delta | None]
    model: nn.Module
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept: what acts follows from the batch."""


@DATA.register
class MultiSource(DataPolicy):
    """Batches of one source each, learnt on top of the source's difference.

    Args:
        parts: for each source (a task of the rows) what acts: a run or artefact whose update is additive, a difference
            file, composable-sft's `pytorch_diff.bin`; null: the bare weights.
        upsampling: how many times a source's rows count (default 1).
        block: rows in a row from one source; default: those of an optimizer step. A smaller block mixes sources in a
            step, and must be a multiple of the micro-batch.
        other_base: take parts that were made on another base than this run's.
    """

    kind: Literal["multi_source"] = "multi_source"
    parts: dict[str, str | None] = Field(min_length=1)
    upsampling: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    block: Annotated[int, Field(ge=1)] | None = None
    other_base: bool = False

    reproduces: ClassVar[str] = "arXiv:2110.07560"
    training_only: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = True

    def model_post_init(self, context: Any, /) -> None:
        for name in self.upsampling:
            if name not in self.parts:
                raise BadInput(f"data.multi_source.upsampling: no source '{name}'.{did_you_mean(name, self.parts)}")
        if all(place is None for place in self.parts.values()):
            raise BadInput(
                "data.multi_source.parts gives no source a difference, so nothing would ever act. Name a run for at "
                "least one source, or leave this policy out."
            )

    def setup(self, ctx: Context) -> SourceState:
        """Read and check every part against the model. Raises `BadInput`, `WrongBase`, `Corrupt`."""
        self._check_tags(ctx.tasks)
        parameters = base_parameters(ctx.model)
        read = {name: None if place is None else self._read(name, place, ctx) for name, place in self.parts.items()}
        placed = {name: None if delta is None else _beside(delta, parameters) for name, delta in read.items()}
        return SourceState({k: placed[name] for k, name in enumerate(ctx.tasks)}, ctx.model, parameters)

    def sampler(self, state: SourceState, dataset: Sequence[dict[str, Any]], ctx: Context) -> Blocks:
        members = _by_task(dataset)
        weights = [self.upsampling.get(ctx.tasks[k], 1) for k in range(len(members))]
        return Blocks(members, weights, self.block or ctx.batch, ctx.seed)

    def apart(self, state: SourceState, dataset: Sequence[dict[str, Any]], ctx: Context) -> list[list[int]]:
        return _by_task(dataset)

    def acting(self, state: SourceState, batch: Batch, ctx: Context) -> AbstractContextManager[Any]:
        delta = state.by_task[self._source_of(state, batch)]
        return nullcontext() if delta is None else acting(state.model, delta, state.parameters)

    def _source_of(self, state: SourceState, batch: Batch) -> int:
        tags = batch.get("task_ids")
        if tags is None:
            raise BadInput("The batch doesn't say which source its rows are from (no task_ids).")
        found = sorted(set(torch.as_tensor(tags).tolist()))
        if len(found) != 1:
            raise BadInput(
                f"A batch holds rows of {len(found)} sources, and one difference acts at a time. Make "
                f"data.multi_source.block (now {self.block}) a multiple of the micro-batch, or leave it out."
            )
        if found[0] not in state.by_task:
            raise BadInput(f"A batch is of source number {found[0]}, which none of the training rows has.")
        return int(found[0])

    def _check_tags(self, tasks: Sequence[str]) -> None:
        for name in tasks or ("",):
            if not name:
                raise BadInput(
                    "data.multi_source: there are rows without a source. Give each data source a `task`, or each row a "
                    "field `task`."
                )
            if name not in self.parts:
                raise BadInput(
                    f"data.multi_source.parts says nothing of source '{name}'.{did_you_mean(name, self.parts)} Give "
                    "null to train it on the bare weights."
                )
        absent = [name for name in self.parts if name not in tasks]
        if absent:
            raise BadInput(f"data.multi_source.parts names '{absent[0]}', of which there are no rows.")

    def _read(self, name: str, place: str, ctx: Context) -> Delta:
        where = f"data.multi_source.parts.{name}"
        return checked_difference(place, ctx.model, where, other_base=self.other_base)


def _by_task(dataset: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Row numbers by task number."""
    numbers = getattr(dataset, "task_ids", None)
    if numbers is None:
        numbers = [dataset[i].get("task_id", 0) for i in range(len(dataset))]
    members: list[list[int]] = [[] for _ in range(int(max(numbers, default=-1)) + 1)]
    for i, task in enumerate(numbers):
        members[int(task)].append(i)
    return members


def _beside(delta: Delta, parameters: dict[str, nn.Parameter]) -> Delta:
    """A difference whose tensors lie on the devices of the weights they change."""
    moved = Delta()
    for name, piece in delta.items():
        device = parameters[name].device
        index = None if piece.index is None else piece.index.to(device)
        moved[name] = Piece(piece.shape, piece.values.to(device), index, piece.mode)
    return moved
