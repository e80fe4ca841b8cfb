"""Numbers as people read them: scores with intervals, differences, counts, bytes, seconds, rates."""

from __future__ import annotations

import math

from pegbox.parts.results import Cost, Score
from pegbox.report.model import Told

__all__ = [
    "change_text",
    "count",
    "in_points",
    "interval",
    "memory_of",
    "rate_text",
    "score_label",
    "score_text",
    "seconds",
    "size",
    "told_text",
]

_LABELS = {
    "exact_match": "Exact match",
    "f1": "F1",
    "knowledge": "Knowledge",
    "loss": "Loss",
    "multiple_choice": "Multiple choice",
    "perplexity": "Perplexity",
    "verified": "Verified answers",
}


def score_label(name: str) -> str:
    """A score's name for people; groups stay behind a slash."""
    base, slash, group = name.partition("/")
    text = _LABELS.get(base, base.replace("_", " ").replace("-", " ").capitalize())
    return f"{text}{slash}{group}"


def in_points(score: Score) -> bool:
    """Whether a score is a share, shown as per cent and compared in points."""
    return not score.exp and score.unit == "" and score.name.partition("/")[0] != "loss" and 0 <= score.value <= 1


def score_text(score: Score | None) -> str:
    """The value alone."""
    if score is None:
        return "–"
    return f"{100 * score.value:.1f} %" if in_points(score) else _plain(score.value)


def interval(score: Score | None) -> str:
    """The interval alone, "" without one."""
    if score is None or score.low is None or score.high is None:
        return ""
    if in_points(score):
        return f"{100 * score.low:.1f} – {100 * score.high:.1f}"
    return f"{_plain(score.low)} – {_plain(score.high)}"


def told_text(told: Told | None, score: Score | None) -> str:
    """A difference with its interval, in points, per cent (perplexity) or the metric's unit; positive is better."""
    if told is None or score is None:
        return ""
    return f"{_difference(told.value, told, score)} [{_bounds(told, score)}]"


def change_text(told: Told | None, score: Score | None) -> str:
    """The difference alone, in its natural sign: a perplexity that rose is "+", though it is worse."""
    if told is None or score is None:
        return ""
    sign = 1 if score.higher_is_better else -1
    return _difference(sign * told.value, told, score)


def _difference(value: float, told: Told, score: Score) -> str:
    if told.log:
        text = f"{100 * math.expm1(value):+.1f} %"
    else:
        text = f"{100 * value:+.1f}" if in_points(score) else f"{value:+.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _bounds(told: Told, score: Score) -> str:
    return f"{_difference(told.low, told, score)}, {_difference(told.high, told, score)}"


def _plain(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def count(value: int | None) -> str:
    """12,345 as 12.3 k, and so on."""
    return _scaled(value, 1000, ["", " k", " M", " G", " T", " P", " E"])


def size(value: int | None) -> str:
    """Bytes in binary units."""
    return _scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"])


def _scaled(value: int | None, step: int, units: list[str]) -> str:
    if value is None:
        return "–"
    number, power = float(value), 0
    while abs(number) >= step and power < len(units) - 1:
        number, power = number / step, power + 1
    text = f"{number:.0f}" if power == 0 or abs(number) >= 100 else f"{number:.1f}"
    return text + units[power]


def seconds(value: float | None) -> str:
    if value is None or value == 0:
        return "–"
    if value < 90:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def rate_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def memory_of(cost: Cost | None) -> tuple[int | None, str]:
    """(bytes, what they are): the allocator's peak on a GPU, autograd's saved tensors on a CPU."""
    if cost is None:
        return None, ""
    if cost.peak_device_bytes is not None:
        return cost.peak_device_bytes, "peak device memory"
    return cost.peak_saved_bytes, "peak saved tensors"
