"""What the plots show, as plain numbers: points with intervals, and lines. Every form of a plot draws from these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pegbox.report import words
from pegbox.report.model import Comparison, Entry, Told

__all__ = ["Line", "Lines", "Point", "Points", "curve_plots", "scatter_plots"]


@dataclass(frozen=True)
class Point:
    """(x, y) with intervals (low, high) where known; `index` is the entry's place, for its colour."""

    name: str
    index: int
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Points:
    """A scatter plot. `zero_x`, `zero_y`: lines at "as the base"; `good`: where better lies, in words."""

    key: str
    title: str
    x_label: str
    y_label: str
    points: list[Point]
    zero_x: bool = False
    zero_y: bool = False
    log_x: bool = False
    good: str = ""


@dataclass(frozen=True)
class Line:
    name: str
    index: int
    xs: list[float]
    ys: list[float]
    dashed: bool = False


@dataclass(frozen=True)
class Lines:
    key: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False


def scatter_plots(c: Comparison) -> list[Points]:
    """Gain against each retention score, and gain against memory; only those with at least one point."""
    plots = [_forgetting(c, suite, name) for suite, name in c.retention()]
    return [p for p in [*plots, _memory(c)] if p.points]


def _gain(c: Comparison, e: Entry) -> tuple[float, tuple[float, float]] | None:
    """The gain in points (or the metric's unit) over the base, with its interval."""
    told = e.changes.get("target", {}).get(c.primary)
    return _in_unit(told, *_kind(c, "target", c.primary)) if told is not None else None


def _kind(c: Comparison, suite: str, name: str) -> tuple[bool, bool]:
    """(shown in points, lower is better) of a score. Points hold for all rows or for none."""
    scores = [e.scores[suite][name] for e in c.entries if name in e.scores.get(suite, {})]
    return all(words.in_points(s) for s in scores), not scores[0].higher_is_better


def _in_unit(told: Told, points: bool, lower: bool) -> tuple[float, tuple[float, float]]:
    """Better upwards; per cent for logarithms (how much it fell), points for shares."""
    if told.log:
        sign = -1 if lower else 1
        return _percent(told.value, sign), (_percent(told.low, sign), _percent(told.high, sign))
    scale = 100.0 if points else 1.0
    return scale * told.value, (scale * told.low, scale * told.high)


def _percent(value: float, sign: int) -> float:
    return sign * 100 * math.expm1(sign * value)


def _gain_label(c: Comparison) -> str:
    return f"{words.score_label(c.primary)}: gain" + (" in points" if _points_scale(c) else "")


def _points_scale(c: Comparison) -> bool:
    return (
        _kind(c, "target", c.primary)[0] if any(c.primary in e.scores.get("target", {}) for e in c.entries) else False
    )


def _forgetting(c: Comparison, suite: str, name: str) -> Points:
    found = []
    for index, e in enumerate(c.entries):
        gain, told = _gain(c, e), e.changes.get(suite, {}).get(name)
        if gain is None or told is None or e.kind == "free":
            continue
        kept, kept_range = _in_unit(told, *_kind(c, suite, name))
        found.append(Point(e.name, index, kept, gain[0], kept_range, gain[1]))
    logs = any(e.changes.get(suite, {}).get(name, _NONE).log for e in c.entries)
    label = f"{words.score_label(name)}: " + ("fall in % (negative: it rose)" if logs else "change in points")
    title = f"Gained against kept: {words.score_label(name).lower()}"
    return Points(f"gain-{name}", title, label, _gain_label(c), found, True, True, False, "up and right is better")


_NONE = Told(value=0, low=0, high=0, p=1)


def _memory(c: Comparison) -> Points:
    found, kinds = [], set()
    for index, e in enumerate(c.entries):
        gain, (used, kind) = _gain(c, e), words.memory_of(e.cost)
        if gain is not None and used:
            found.append(Point(e.name, index, used / 2**20, gain[0], None, gain[1]))
            kinds.add(kind)
    if len(kinds) > 1:  # a CPU's saved tensors and a GPU's allocator are not one quantity
        found = []
    label = f"{next(iter(kinds), 'Memory').capitalize()}, MiB"
    return Points(
        "gain-memory",
        "Gained against memory",
        label,
        _gain_label(c),
        found,
        False,
        True,
        False,
        "up and left is better",
    )


def curve_plots(c: Comparison) -> list[Lines]:
    """Loss while training (first seed full, others dashed), evaluations, the rate's schedule, and the rates tried."""
    loss, evaluated, rate, trials = [], [], [], []
    eval_name = ""
    for index, e in enumerate(c.entries):
        for n, curve in enumerate(e.curves):
            name = e.name if n == 0 else ""
            if curve.steps:
                loss.append(_line(name, index, curve.steps, _smoothed(curve.loss), n > 0))
                if n == 0 and any(curve.rate):
                    rate.append(_line(name, index, curve.steps, curve.rate, False))
            if curve.eval_steps:
                eval_name = curve.eval_name
                evaluated.append(_line(name, index, curve.eval_steps, curve.eval_values, n > 0))
        tried = sorted((t.rate, t.value) for t in e.rate.trials if t.value is not None) if e.rate else []
        if len(tried) > 1:
            trials.append(Line(e.name, index, [t[0] for t in tried], [t[1] for t in tried]))
    judged = next((e.rate.score for e in c.entries if e.rate and e.rate.score), "validation")
    plots = [
        Lines("loss", "Training loss", "step", "loss", loss),
        Lines("eval", f"During training: {words.score_label(eval_name)}", "step", eval_name, evaluated),
        Lines("rate", "Learning rate", "step", "rate", rate),
        Lines("trials", "Rates tried", "rate", judged, trials, log_x=True),
    ]
    return [p for p in plots if any(len(line.xs) > 1 for line in p.lines)]


def _line(name: str, index: int, xs: list[int], ys: list[float | None], dashed: bool) -> Line:
    pairs = [(float(x), y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]
    return Line(name, index, [p[0] for p in pairs], [p[1] for p in pairs], dashed)


def _smoothed(values: list[float | None], over: float = 0.05) -> list[float | None]:
    """A running mean whose window is a twentieth of the curve, centred and cut at the ends."""
    half = int(len(values) * over / 2)
    out: list[float | None] = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        out.append(sum(near) / len(near) if near else None)
    return out
