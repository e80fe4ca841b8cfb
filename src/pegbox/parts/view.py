"""How objectives, selectors and evaluation see a model, whatever its modality: `ModelView`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["SIDE_KEYS", "Batch", "ModelView"]

Batch = Mapping[str, Any]

# Keys of a batch that are for pegbox, not for the model; a view leaves them out of the forward.
SIDE_KEYS = frozenset(
    {"sample_ids", "sample_weight", "task_ids", "labels", "corrupted_ids", "sequence_ids", "episode", "views"}
)


@runtime_checkable
class ModelView(Protocol):
    """A model with the few questions that method code may ask of it.

    Shapes: B batch, T tokens, D width, V vocabulary.
    """

    model: nn.Module

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The part of `batch` that goes into the forward (side keys and labels left out)."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) next-token logits, or (B, C) class logits."""

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, D) the head's input; no logits are made."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of any slice of `hidden`, (N, D) -> (N, V). `head(hidden(b))` equals `logits(b)`."""

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is to be predicted: (B, T) target ids aligned with `hidden` (already shifted), and a bool mask of the
        same shape that is True where the target counts."""
