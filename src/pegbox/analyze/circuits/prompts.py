"""Prompts whose last tokens stand in one column, with their vital positions and answers.

    ids (B, T), padded on the left; `positions`: name -> (B,) columns; "last" is always column T - 1

Counting from the last token makes positions and mean activations the same thing for prompts of any length.

What this file does not know: any task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pegbox.errors import BadInput, did_you_mean

__all__ = ["LAST", "Prompts"]

LAST = "last"


@dataclass(frozen=True)
class Prompts:
    """A set of prompts.

    Args:
        ids: (B, T) token ids, left-padded. mask: (B, T) bool, False on padding.
        positions: name -> (B,) columns of ids. answers: (B,) the token that is right, or None.
    """

    ids: Tensor
    mask: Tensor
    positions: Mapping[str, Tensor] = field(default_factory=dict)
    answers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape or not self.ids.numel():
            raise BadInput("Prompts are ids and a mask of one shape, rows by tokens; at least one token a row.")
        if not bool(self.mask[:, -1].all()) or bool((self.mask[:, 1:] < self.mask[:, :-1]).any()):
            raise BadInput("Prompts are padded on the left, so that the last column is every row's last token.")
        whole = {**self.positions, LAST: torch.full((len(self.ids),), self.ids.shape[1] - 1, device=self.ids.device)}
        object.__setattr__(self, "positions", whole)
        for name, columns in whole.items():
            inside = (columns >= 0) & (columns < self.ids.shape[1])
            if columns.shape != (len(self.ids),) or not bool(inside.all() and self._real(columns).all()):
                raise BadInput(f"Position '{name}' needs a column with a token for each row.")
        if self.answers is not None and self.answers.shape != (len(self.ids),):
            raise BadInput(f"{len(self.ids)} prompts need as many answers, one token each.")

    def _real(self, columns: Tensor) -> Tensor:
        return self.mask[torch.arange(len(columns), device=columns.device), columns]

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        positions: Mapping[str, Sequence[int]] | None = None,
        answers: Sequence[int] | None = None,
        pad: int | None = None,
    ) -> Prompts:
        """From lists of ids; positions count from each row's first token.

        Raises `BadInput` for empty rows, and for rows of unequal length without a `pad` to fill and mask them with.
        """
        if not rows or not all(rows):
            raise BadInput("Give at least one prompt, of at least one token each.")
        width = max(map(len, rows))
        if pad is None and any(len(row) != width for row in rows):
            raise BadInput("Prompts of unequal length need a padding token, so that a mask can tell what is padding.")
        lacking = [width - len(row) for row in rows]
        ids = torch.tensor([[pad or 0] * n + list(row) for n, row in zip(lacking, rows)])
        mask = torch.tensor([[False] * n + [True] * len(row) for n, row in zip(lacking, rows)])
        shifted = {
            name: torch.tensor([n + int(p) for n, p in zip(lacking, places, strict=True)])
            for name, places in (positions or {}).items()
        }
        return cls(ids, mask, shifted, None if answers is None else torch.tensor(list(answers)))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    @property
    def places(self) -> Tensor:
        """(B, T) each token's place in its row, 0 on padding: what position embeddings count."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def at(self, name: str) -> Tensor:
        """(B,) columns of a position. Raises `BadInput` with the nearest name."""
        if name not in self.positions:
            raise BadInput(f"Unknown position '{name}'.{did_you_mean(name, self.positions)}")
        return self.positions[name]

    def columns(self, names: Sequence[str]) -> Tensor:
        """(B, P) columns of several positions. Raises `BadInput` where two fall on one token."""
        found = torch.stack([self.at(name) for name in names], 1)
        ordered = found.sort(1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise BadInput(f"Positions {', '.join(names)} fall on one token in some row; a token has one set of heads.")
        return found

    def right(self) -> Tensor:
        """(B,) the answers. Raises `BadInput` without."""
        if self.answers is None:
            raise BadInput("These prompts have no answers, so there is nothing to score.")
        return self.answers

    def inputs(self) -> dict[str, Any]:
        """What goes into a forward; mask and positions only where there is padding."""
        given: dict[str, Any] = {"input_ids": self.ids}
        if self.padded:
            given |= {"attention_mask": self.mask.long(), "position_ids": self.places}
        return given

    def take(self, rows: Tensor | slice) -> Prompts:
        """Some rows, in their order, without columns that are padding in all of them."""
        mask = self.mask[rows]
        first = int(mask.any(0).int().argmax())
        positions = {name: columns[rows] - first for name, columns in self.positions.items() if name != LAST}
        answers = None if self.answers is None else self.answers[rows]
        return Prompts(self.ids[rows][:, first:], mask[:, first:], positions, answers)

    def batches(self, size: int) -> Iterator[Prompts]:
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def to(self, device: Any) -> Prompts:
        moved = {name: columns.to(device) for name, columns in self.positions.items()}
        answers = None if self.answers is None else self.answers.to(device)
        return Prompts(self.ids.to(device), self.mask.to(device), moved, answers)

    def asking(self, answers: Tensor) -> Prompts:
        """The same prompts with other answers."""
        return replace(self, answers=answers)
