"""The learning rate, tuned alike for every row.

Trials multiply the recipe's own rate by a ladder around 1; the best on validation wins. A best at the edge adds
one point beyond it (flagged), at most two: a row that still improves at the edge is told apart from one that does not.
"""

from __future__ import annotations

import itertools
from typing import Any

__all__ = ["LADDER", "choose", "extend", "settings_of"]

LADDER = (0.1, 0.32, 1.0, 3.2, 10.0)
MOST_EXTENSIONS = 2


def ladder(trials: int) -> tuple[float, ...]:
    """`trials` multipliers around 1, in the order they are tried: the middle first, then outwards."""
    if trials <= 0:
        return ()
    steps = sorted(range(-(trials // 2), trials - trials // 2), key=abs)
    named = {-2: 0.1, -1: 0.32, 0: 1.0, 1: 3.2, 2: 10.0}
    return tuple(named.get(step, round(10 ** (step / 2), 6)) for step in steps)


def settings_of(rate_key: str, rate: float, trials: int, more: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The overrides of each trial. Further declared knobs share the same number of trials, cycling through values."""
    rates = [{rate_key: rate * m} for m in ladder(trials)]
    if not more:
        return rates
    combos = [dict(zip(more, values)) for values in itertools.product(*more.values())]
    return [{**setting, **combos[i % len(combos)]} for i, setting in enumerate(rates)]


def choose(scores: list[float | None], higher_is_better: bool) -> int | None:
    """The position of the best score; failed trials are None; the first wins a tie. None if all failed."""
    valid = [(s if higher_is_better else -s, -i) for i, s in enumerate(scores) if s is not None]
    if not valid:
        return None
    return -max(valid)[1]


def extend(tried: list[float], best: float, extensions: int) -> float | None:
    """The rate to try next when the best one is the smallest or largest tried; None when it is inside, or enough."""
    if extensions >= MOST_EXTENSIONS or len(tried) < 2:
        return None
    step = 10**0.5
    if best == max(tried):
        return best * step
    if best == min(tried):
        return best / step
    return None
