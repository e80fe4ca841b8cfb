"""A decoder on live models, seen as evaluation sees a model: its log-probabilities stand where hidden rows do.

Metrics by likelihood (perplexity, multiple choice) then measure the decoder itself. `hidden` is the whole of what it
says, and `head` hands it on, so nothing is saved by taking the head apart: (B, T, V) exists once per batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pegbox.decode.base import Decoding
from pegbox.parts.tokens import shift
from pegbox.parts.view import SIDE_KEYS, Batch

__all__ = ["DecodedView"]


class DecodedView:
    """A `ModelView` of a `Decoding`. Shapes: B batch, T tokens, V vocabulary."""

    def __init__(self, model: Decoding):
        self.model: nn.Module = model

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The part of `batch` that goes into the forward."""
        return {k: v for k, v in batch.items() if k not in SIDE_KEYS and v is not None}

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) log-probabilities of the next token."""
        return self.model(**self.inputs(batch)).logits

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, V), the same."""
        return self.logits(batch)

    def head(self, hidden: Tensor) -> Tensor:
        """Any rows of `hidden` as they are: (N, V)."""
        return hidden

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) target ids, and the mask of those that count."""
        return shift(
            batch["labels"],
            batch.get("sequence_ids"),
            batch.get("position_ids"),
            batch.get("attention_mask"),
            batch.get("corrupted_ids"),
        )
