"""How well a score tells two kinds of prompts apart: area under the curve, and hits at a fixed rate of false alarms.

    AUC = P(score of a positive > score of a negative) + P(equal) / 2

Pure functions of scores and labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pegbox.errors import BadInput

__all__ = ["Separation", "auc", "separation", "true_positives"]


@dataclass(frozen=True)
class Separation:
    """AUC, the share of positives found at the given share of false alarms, and the counts behind them."""

    auc: float
    found: float
    at: float
    positives: int
    negatives: int


def separation(scores: Sequence[float], labels: Sequence[int], at: float = 0.05) -> Separation:
    """Scores of rows labelled 1 ("should be high") and 0. Raises `BadInput` where one class is missing."""
    high, low = _split(scores, labels)
    return Separation(auc(high, low), true_positives(high, low, at), at, len(high), len(low))


def auc(high: Sequence[float], low: Sequence[float]) -> float:
    """Probability that a positive lies above a negative, ties counting half; from ranks, in n log n."""
    a, b = _numbers(high), _numbers(low)
    below = np.searchsorted(np.sort(b), a, "left")
    equal = np.searchsorted(np.sort(b), a, "right") - below
    return float((below + equal / 2).sum() / (a.size * b.size))


def true_positives(high: Sequence[float], low: Sequence[float], at: float = 0.05) -> float:
    """Largest share of positives at or above a threshold that no more than `at` of the negatives reach."""
    if not 0 <= at <= 1:
        raise BadInput(f"The rate of false alarms is a share, between 0 and 1; got {at}.")
    a, b = _numbers(high), _numbers(low)
    thresholds = np.unique(np.concatenate([a, b]))
    alarms = np.array([(b >= t).mean() for t in thresholds])
    allowed = thresholds[alarms <= at]
    return float((a >= allowed.min()).mean()) if allowed.size else 0.0


def _split(scores: Sequence[float], labels: Sequence[int]) -> tuple[list[float], list[float]]:
    if len(scores) != len(labels):
        raise BadInput(f"{len(scores)} scores and {len(labels)} labels: give one label for each score.")
    wrong = set(labels) - {0, 1}
    if wrong:
        raise BadInput(f"Labels are 1 (should be high) or 0, got {sorted(map(str, wrong))[0]}.")
    high = [s for s, label in zip(scores, labels) if label == 1]
    low = [s for s, label in zip(scores, labels) if label == 0]
    if not high or not low:
        raise BadInput(f"Two classes are needed, and there are {len(high)} rows labelled 1 and {len(low)} labelled 0.")
    return high, low


def _numbers(values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        raise BadInput("Two classes are needed, and one has no row.")
    if np.isnan(found).any():
        raise BadInput("A score is not a number; leave its row out.")
    return found
