"""Equal size: turn each row's size knob until it trains as many weights as the reference, within 2 %.

A knob is a number whose count grows with it (a LoRA rank, a density). Rows without a knob stay as they are, marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["TOLERANCE", "match_count"]

TOLERANCE = 0.02


def match_count(
    count: Callable[[float], int], start: float, wanted: int, *, whole: bool, most: float = math.inf
) -> tuple[float, bool]:
    """The knob's value whose count is nearest to `wanted`, and whether it lies within `TOLERANCE`.

    Args:
        count: value -> trained weights; must not fall as the value grows.
        start: the recipe's own value. whole: only integers are allowed. most: the largest value allowed.
    """
    low, high = _bracket(count, start, wanted, whole, most)
    for _ in range(60):
        middle = (low + high) / 2 if not whole else float(round((low + high) / 2))
        if (whole and middle in {low, high}) or high - low < 1e-9 * max(high, 1e-9):
            break
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    best = min((low, high), key=lambda v: abs(count(v) - wanted))
    return best, abs(count(best) - wanted) <= TOLERANCE * wanted


def _bracket(count: Callable[[float], int], start: float, wanted: int, whole: bool, most: float) -> tuple[float, float]:
    least = 1.0 if whole else 0.0
    low = high = start
    while count(high) < wanted and high < most:
        low, high = high, min(high * 2, most)
    while count(low) > wanted and low > max(least, 1e-9):
        high, low = low, max(low / 2 if not whole else math.floor(low / 2), least, 1e-9)
    return low, high
