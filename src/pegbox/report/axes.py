"""Axes: round tick marks over a range, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Scale", "scale"]


@dataclass(frozen=True)
class Scale:
    """Data to [0, 1], with its ticks."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def __call__(self, x: float) -> float:
        if self.log:
            return (math.log(x) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (x - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        text = (
            f"{tick:.6g}"
            if 1e-3 <= abs(tick) < 1e6 or tick == 0
            else f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
        )
        return text.replace("-", "−", 1) if text.startswith("-") else text


def scale(
    values: Iterable[float], *, log: bool = False, zero: bool = False, marks: int = 5, pad: float = 0.06
) -> Scale:
    """A scale over all `values` (and zero, if asked), widened by `pad` on each side."""
    known = [v for v in values if math.isfinite(v) and (not log or v > 0)] + ([0.0] if zero and not log else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if log:
        low, high = low / 1.5, high * 1.5
        return Scale(low, high, _log_ticks(low, high), True)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    margin = pad * (high - low)
    low, high = low - margin, high + margin
    step = _round_step((high - low) / marks)
    first = math.ceil(low / step)
    return Scale(low, high, [k * step for k in range(first, math.floor(high / step) + 1)])


def _round_step(raw: float) -> float:
    power = 10 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    whole = [10.0**k for k in range(first, last + 1)]
    if len(whole) >= 3:
        return whole
    for marks in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**k for k in range(first - 1, last + 1) for m in marks if low <= m * 10.0**k <= high]
        if len(ticks) >= 3:
            break
    return ticks
