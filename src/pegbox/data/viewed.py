"""Examples with further views: the same row written in other ways, each encoded for itself.

    example = {input_ids, labels, ..., views: {name: {input_ids, labels, sample_id, ...}}}

A view has a sample id of its own (a hash of the row's id and the view's name), so that nothing kept by sample mixes
them up. Collators make one batch of each view and put it under `views` of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pegbox.data.encoded import EncodedSet
from pegbox.data.rows import sample_id
from pegbox.errors import BadInput

__all__ = ["Viewed", "joined"]


@dataclass
class Viewed(Sequence[dict[str, Any]]):
    """Encoded rows and their views, by name; a row may lack a view."""

    rows: EncodedSet
    views: Mapping[str, EncodedSet]
    place: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _places(self.rows, "the rows")
        for name, others in self.views.items():
            self.place[name] = _places(others, f"view '{name}'")
            if not self.place[name].keys() <= known.keys():
                raise BadInput(f"View '{name}' has rows that the training set has not; make views from its rows.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Any:
        """Everything else (tasks, task_ids, report, ...) is the rows' own."""
        if name.startswith("__") or name == "rows":
            raise AttributeError(name)
        return getattr(self.rows, name)

    @property
    def lengths(self) -> list[int]:
        """Input positions of each row, views included."""
        total = [int(n) for n in self.rows.lengths]
        for name, others in self.views.items():
            sizes = others.lengths
            for i, row in enumerate(self.rows.row_ids):
                if row in self.place[name]:
                    total[i] += int(sizes[self.place[name][row]])
        return total

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self.rows[index]
        row, views = example["row_id"], {}
        for name, others in self.views.items():
            at = self.place[name].get(row)
            if at is not None:
                views[name] = {**others[at], "sample_id": sample_id(f"{row}/{name}")}
        return {**example, "views": views}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def joined(rows: EncodedSet, views: Mapping[str, EncodedSet], wanted: Sequence[str]) -> EncodedSet | Viewed:
    """The rows with the views that are wanted; the rows alone where none is. Raises `BadInput` for one that is not
    there."""
    missing = [name for name in wanted if name not in views]
    if missing:
        raise BadInput(f"No data policy made the view '{missing[0]}'. Add data: [{{kind: views, templates: ...}}].")
    return Viewed(rows, views) if wanted else rows


def _places(examples: EncodedSet, what: str) -> dict[str, int]:
    found = {row: i for i, row in enumerate(examples.row_ids)}
    if len(found) < len(examples):
        raise BadInput(
            f"{what[0].upper()}{what[1:]}: a row became several sequences (a long plain text, or a chat whose template "
            "rewrites earlier turns), which can't be matched with its views. Use rows with one answer each."
        )
    return found
