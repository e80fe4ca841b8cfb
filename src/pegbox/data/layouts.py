"""How encoded examples become rows of at most S + 1 tokens, so that S remain after the shift to the next token.

    padding    one example per row, filled up to S + 1; longer ones are dropped
    dynamic    one example per row, cut behind its last trained token; rows are padded to the longest of their batch
    pack       examples in their order, a new row when the next does not fit; longer ones are dropped
    best_fit   the longest first, each into the fullest row that holds it; longer ones are dropped
    concat     everything in one stream, cut into windows of S + 1 that share one token: no example is dropped

A row holds examples of one task. Nothing is lost but what is dropped, and that is counted: the last row of a task is
kept however short. A row made of several parts says where they begin (`parts`), and the collator restarts position ids
there, so that attention stays inside each part; with `cross_attend` the row is one text, as in MFTCoder's code
(arXiv:2311.02303).
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from pegbox.errors import BadInput

__all__ = ["Layout", "Piece", "Rows", "arranged", "best_fit", "greedy", "windows"]

Example = dict[str, Any]
Layout = Literal["padding", "dynamic", "pack", "best_fit", "concat"]
IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """Tokens start to end of one example."""

    example: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


# ---- which example goes where: numbers only


def greedy(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of item numbers in their order; a new row when the next does not fit. All fit `capacity`."""
    rows: list[list[int]] = []
    used = capacity + 1
    for item, length in enumerate(lengths):
        if used + length > capacity:
            rows.append([])
            used = 0
        rows[-1].append(item)
        used += length
    return rows


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of item numbers: longest first, each into the row with the least room that still holds it."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[item], -1))
        if place == len(rooms):
            rows.append([item])
            insort(rooms, (capacity - lengths[item], len(rows) - 1))
            continue
        room, row = rooms.pop(place)
        rows[row].append(item)
        insort(rooms, (room - lengths[item], row))
    return [sorted(row) for row in sorted(rows, key=min)]


def windows(lengths: Sequence[int], stride: int) -> list[list[Piece]]:
    """Pieces of windows of stride + 1 tokens over all items joined; each begins with the last token before it."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    rows: list[list[Piece]] = []
    first, item = 0, 0
    while first + 1 < starts[-1] or (first == 0 and starts[-1] == 1):
        last = min(first + stride + 1, starts[-1])
        while starts[item + 1] <= first:
            item += 1
        row, i = [], item
        while i < len(lengths) and starts[i] < last:
            row.append(Piece(i, max(first, starts[i]) - starts[i], min(last, starts[i + 1]) - starts[i]))
            i += 1
        rows.append(row)
        first += stride
    return rows


# ---- the rows as a data set


@dataclass
class Rows(Sequence[Example]):
    """Rows made of pieces of encoded examples, joined when they are asked for.

    Args:
        examples: what the pieces are of. pieces: by row. width: every row is padded to it (0: not).
        cross_attend: position ids run on over a whole row. dropped: examples that were too long.
    """

    examples: Sequence[Example]
    pieces: list[list[Piece]]
    task_ids: list[int]
    tasks: list[str]
    width: int = 0
    cross_attend: bool = False
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [max(self.width, sum(p.length for p in row)) for row in self.pieces]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        pieces = self.pieces[index]
        found = [self.examples[p.example] for p in pieces]
        labels: list[int] = []
        for piece, example in zip(pieces, found):
            labels += [IGNORED, *list(example["labels"])[piece.start + 1 : piece.end]]
        return {
            "input_ids": [t for p, e in zip(pieces, found) for t in list(e["input_ids"])[p.start : p.end]],
            "labels": labels,
            "parts": [p.length for p in pieces],
            "sample_id": found[0]["sample_id"],
            "sample_ids": [e["sample_id"] for e in found],
            "row_id": str(found[0].get("row_id", index)),
            "row_ids": [str(e.get("row_id", e["sample_id"])) for e in found],
            "weights": [float(e.get("weight", 1.0)) for e in found],
            "task_id": self.task_ids[index],
            "task": self.tasks[self.task_ids[index]],
            "width": self.width,
            "cross_attend": self.cross_attend,
        }

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def arranged(
    examples: Sequence[Example],
    mode: Layout,
    seq_length: int,
    *,
    cross_attend: bool = False,
    report: bool = True,
) -> Rows:
    """The examples as rows; `report`: warn of what was dropped.

    Raises:
        BadInput: a budget below 2 tokens; an example without token labels; nothing left.
    """
    if seq_length < 2:
        raise BadInput(f"seq_length must be at least 2 tokens, got {seq_length}.")
    ends = [_end(examples[i], i, mode == "dynamic") for i in range(len(examples))]
    capacity = seq_length + 1
    kept = [i for i, end in enumerate(ends) if mode == "concat" or end <= capacity]
    dropped = len(ends) - len(kept)
    if not kept:
        raise BadInput(
            f"No row is left: all {len(ends)} examples have more than {capacity} tokens (the shortest "
            f"{min(ends, default=0)}). Raise seq_length, or use mode concat."
        )
    if dropped and report:
        warnings.warn(
            f"{dropped} of {len(ends)} examples have more than {capacity} tokens and are left out.", stacklevel=2
        )
    by_task: dict[int, list[int]] = {}
    for i in kept:
        by_task.setdefault(int(examples[i].get("task_id", 0)), []).append(i)
    pieces: list[list[Piece]] = []
    tasks: list[int] = []
    for task, members in sorted(by_task.items()):
        made = _ROWS[mode]([ends[i] for i in members], seq_length)
        pieces += [[Piece(members[p.example], p.start, p.end) for p in row] for row in made]
        tasks += [task] * len(made)
    width = capacity if mode == "padding" else 0
    return Rows(examples, pieces, tasks, _names(examples, tasks), width, cross_attend, dropped)


def _end(example: Example, number: int, trimmed: bool) -> int:
    """Tokens of an example, up to its last trained one if `trimmed`."""
    labels = example.get("labels")
    if labels is None or not hasattr(labels, "__len__"):
        raise BadInput(f"Example {number} has no token labels: layouts arrange texts, not classes.")
    trained = [j for j, label in enumerate(labels) if label != IGNORED]
    if not any(j for j in trained):
        raise BadInput(
            f"Example {example.get('row_id', number)} has no assistant token to learn from. Drop it, or raise "
            "max_length."
        )
    return trained[-1] + 1 if trimmed else len(example["input_ids"])


def _names(examples: Sequence[Example], tasks: Sequence[int]) -> list[str]:
    known = getattr(examples, "tasks", None)
    if known is not None:
        return list(known)
    names = {int(e.get("task_id", 0)): str(e.get("task", e.get("task_id", 0))) for e in examples}
    return [names.get(k, str(k)) for k in range(max(tasks) + 1)]


def _whole(bins: list[list[int]], lengths: Sequence[int]) -> list[list[Piece]]:
    return [[Piece(i, 0, lengths[i]) for i in members] for members in bins]


_ROWS: dict[str, Callable[[list[int], int], list[list[Piece]]]] = {
    "padding": lambda lengths, size: _whole([[i] for i in range(len(lengths))], lengths),
    "dynamic": lambda lengths, size: _whole([[i] for i in range(len(lengths))], lengths),
    "pack": lambda lengths, size: _whole(greedy(lengths, size + 1), lengths),
    "best_fit": lambda lengths, size: _whole(best_fit(lengths, size + 1), lengths),
    "concat": windows,
}
