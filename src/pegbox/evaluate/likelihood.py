"""Log-likelihoods of rows, from a view: the head sees only the positions that count, a slice of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.evaluate.base import Encode
from pegbox.parts.view import Batch, ModelView

__all__ = ["row_log_likelihoods", "token_log_likelihoods"]

_SLICE = 512  # positions whose logits exist at a time: 512 x V


def token_log_likelihoods(view: ModelView, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p of every counted target, (N,) float32, and the line of the batch each is from, (N,)."""
    targets, mask = view.targets(batch)
    hidden = view.hidden(batch)[mask]  # (N, D)
    wanted = targets[mask]
    parts = []
    for start in range(0, len(wanted), _SLICE):
        logits = view.head(hidden[start : start + _SLICE]).float()  # (n, V)
        picked = logits.gather(1, wanted[start : start + _SLICE, None])[:, 0]
        parts.append(picked - logits.logsumexp(dim=-1))
    total = torch.cat(parts) if parts else hidden.new_zeros(0).float()
    return total, mask.nonzero()[:, 0]


def row_log_likelihoods(
    view: ModelView, rows: Sequence[Any], encode: Encode
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per row: the sum of log p over its counted tokens (R,), and how many these are (R,). Raises `BadInput` at 0."""
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    with torch.no_grad():
        for positions, batch in encode(rows):
            values, lines = token_log_likelihoods(view, batch)
            owner = np.asarray(positions)[lines.cpu().numpy()]
            np.add.at(sums, owner, values.double().cpu().numpy())
            np.add.at(counts, owner, 1)
    if (counts == 0).any():
        row = rows[int(np.argmin(counts))]
        raise BadInput(f"Row {row.id} has no token to score. Check its text, its mask, and max_length.")
    return sums, counts
