"""Which rows make which step: one endless stream of rows, cut into optimizer steps of exactly the same size.

    step s of rank q, R ranks, B rows per step:   rows [s B + q B / R, s B + (q + 1) B / R) of the stream

The stream is the set's permutation of epoch 0, then that of epoch 1, and so on; a step may span two epochs, so no step
is ever short and the effective batch is the same for any number of processes or micro-batch size. A row's place follows
from the seed and the step alone: resuming starts at a step and skips nothing. A policy's own sampler takes the
permutation's place; it is iterated once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from pegbox.errors import BadInput
from pegbox.parts.context import seed_of

__all__ = [
    "RowStream",
    "StepBatches",
    "length_of",
    "lengths_of",
    "positions_of",
    "steps_for_tokens",
    "tokens_of",
    "train_loader",
]


def length_of(example: Any) -> int:
    """Input positions of one encoded example (1 for one that has no token ids)."""
    ids = example.get("input_ids") if hasattr(example, "get") else None
    return len(ids) if ids is not None else 1


def tokens_of(batch: Any) -> int:
    """Input tokens of a batch, padding left out."""
    if not hasattr(batch, "get"):
        return 0
    others = sum(tokens_of(view) for view in (batch.get("views") or {}).values())
    owner = batch.get("sequence_ids")  # packed rows have no mask; padding belongs to nobody
    if isinstance(owner, Tensor):
        return int((owner >= 0).sum()) + others
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return int((mask != 0).sum()) + others
    ids = batch.get("input_ids")
    return (ids.numel() if isinstance(ids, Tensor) else 0) + others


def positions_of(batch: Any) -> int:
    """Input positions of a batch, padding included (rows where there are none)."""
    if not hasattr(batch, "get"):
        return 0
    ids = batch.get("input_ids")
    others = sum(positions_of(view) for view in (batch.get("views") or {}).values())
    return (ids.numel() if isinstance(ids, Tensor) else 0) + others


class RowStream:
    """The endless order of rows.

    Args:
        rows: how many rows the set has.
        seed: of the shuffle; each epoch has its own permutation.
        sampler: an iterable of row numbers, iterated anew for each epoch (`set_epoch` is called where it exists). One
            with `state_dict`/`load_state_dict` is saved and goes on from its state; any other is walked again to the
            place on resuming, so its order must follow from the epoch alone.
        shuffle: False keeps the set's own order.
    """

    def __init__(self, rows: int, seed: int, sampler: Iterable[int] | None = None, shuffle: bool = True):
        if rows == 0:
            raise BadInput(
                "The training set is empty; nothing is left after filtering. Check the data and its filters."
            )
        self.rows, self.seed, self.sampler, self.shuffle = rows, seed, sampler, shuffle

    def _epoch(self, epoch: int) -> Iterator[int]:
        if self.sampler is not None:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            yield from (int(i) for i in self.sampler)
        elif self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            yield from torch.randperm(self.rows, generator=generator).tolist()
        else:
            yield from range(self.rows)

    def rows_from(self, start: int) -> Iterator[int]:
        """Row numbers from place `start` of the stream on, for ever."""
        if self.sampler is None:
            epoch, skip = divmod(start, self.rows)
        elif hasattr(self.sampler, "load_state_dict"):
            epoch, skip = 0, 0  # restored, it goes on where it was
        else:
            epoch, skip = 0, start  # its epochs may have any length: walk them from the first
        while True:
            seen = 0
            for row in self._epoch(epoch):
                seen += 1
                if skip > 0:
                    skip -= 1
                    continue
                yield row
            if seen == 0:
                raise BadInput("The data policy's sampler gave no rows.")
            epoch += 1


class StepBatches(Sampler[list[int]]):
    """A batch sampler: lists of row numbers, one per micro-batch of this process, from a given step to the last."""

    def __init__(self, stream: RowStream, batch: int, micro: int, steps: int, rank: int = 0, world: int = 1):
        if batch % world:
            raise BadInput(f"batch {batch} can't be split evenly over {world} processes; choose a multiple of {world}.")
        self.stream, self.batch, self.micro, self.steps = stream, batch, min(micro, batch // world), steps
        self.rank, self.world = rank, world
        self.first: Callable[[], int] = lambda: 0  # the step to begin with, asked when iteration begins

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and process."""
        return math.ceil(self.batch / self.world / self.micro)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        first, share = self.first(), self.batch // self.world
        rows = self.stream.rows_from(first * self.batch)
        for _ in range(first, self.steps):
            step = [next(rows) for _ in range(self.batch)][self.rank * share : (self.rank + 1) * share]
            yield from (step[i : i + self.micro] for i in range(0, share, self.micro))


def lengths_of(examples: Any) -> list[int]:
    """Input positions of every example; a set that knows them is asked."""
    known = getattr(examples, "lengths", None)
    return [int(n) for n in known] if known is not None else [length_of(examples[i]) for i in range(len(examples))]


def steps_for_tokens(stream: RowStream, lengths: Sequence[int], batch: int, tokens: int, exact: bool = True) -> int:
    """The number of steps after which at least `tokens` input tokens have been seen.

    Exact for the engine's own order; by mean length for a policy's, which may depend on how training goes.
    """
    if not exact:
        mean = sum(lengths) / len(lengths)
        return max(1, math.ceil(tokens / (mean * batch)))
    whole = math.lcm(stream.rows, batch)  # after so many rows an epoch and a step end together
    per_round = sum(lengths) * (whole // stream.rows)
    rounds = max(0, tokens // per_round - 1)  # whole rounds need no walk
    steps, seen = rounds * (whole // batch), rounds * per_round
    rows = stream.rows_from(steps * batch)
    while seen < tokens:
        seen += sum(lengths[next(rows)] for _ in range(batch))
        steps += 1
    return steps


def train_loader(dataset: Any, batches: StepBatches, collate: Any, options: Mapping[str, Any] | None = None) -> Any:
    """A torch DataLoader over the batches. It takes no number from the global generators.

    `options` are DataLoader's own. Workers fetch ahead, so a policy's sampler, whose order may depend on how training
    went, is always read in this process, when its rows are used.
    """
    options = {} if batches.stream.sampler is not None else dict(options or {})
    generator = torch.Generator().manual_seed(0)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, generator=generator, **options)
