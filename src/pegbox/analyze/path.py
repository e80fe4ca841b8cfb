"""The path between a base and a tuned model: what it loses on the way and what it gains elsewhere.

    barrier = max_a [ L(a) - ((1-a) L(0) + a L(1)) ]       gain = max_a acc(a) - acc(0)
    failure: no a strictly between 0 and 1 is better than the base

a = 0 is the base, 1 the tuned model. Wortsman et al., arXiv:2109.01903; the failure mode after arXiv:2410.16476. The
numbers are pure functions of curves; `Path` measures suites of a run along the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from pegbox.analyze.base import ANALYZE, Analysis, Subject
from pegbox.errors import BadInput
from pegbox.parts.algebra import check_alike, interpolate
from pegbox.parts.findings import Finding, Grid, Picture, Series
from pegbox.parts.results import Score

__all__ = [
    "GRID",
    "Path",
    "PathSummary",
    "barrier",
    "gain",
    "interpolation_curve",
    "kendall",
    "spearman",
    "summarise",
    "walking",
]

GRID = tuple(round(0.1 * i, 1) for i in range(11))


# ---- numbers of curves


def barrier(grid: Sequence[float], losses: Sequence[float]) -> float:
    """How far the loss rises above the chord between its ends; 0 where it nowhere does."""
    ends = _ends(grid, losses)
    return max(loss - ((1 - a) * ends[0] + a * ends[1]) for a, loss in zip(grid, losses, strict=True))


def gain(grid: Sequence[float], scores: Sequence[float]) -> float:
    """The best score on the path over the base's; scores where more is better."""
    return max(scores) - _ends(grid, scores)[0]


def interior_gain(grid: Sequence[float], scores: Sequence[float]) -> float:
    """The best score strictly between the ends over the base's. 0 or less is the failure mode."""
    inside = [s for a, s in zip(grid, scores, strict=True) if 0 < a < 1]
    if not inside:
        raise BadInput("The grid has no point between 0 and 1, so the path has no inside.")
    return max(inside) - _ends(grid, scores)[0]


@dataclass(frozen=True)
class PathSummary:
    """Of one curve of scores where more is better.

    Args:
        barrier: of the negated scores. gain: best of the path over the base. interior: best of the inside over it.
        best: the amount with the best score (the smallest of equals). failure: no point inside beats the base.
    """

    barrier: float
    gain: float
    interior: float
    best: float
    failure: bool


def summarise(grid: Sequence[float], scores: Sequence[float]) -> PathSummary:
    """Everything at once."""
    inner = interior_gain(grid, scores)
    best = max(zip(scores, (-a for a in grid), strict=True))
    return PathSummary(barrier(grid, [-s for s in scores]), gain(grid, scores), inner, -best[1], inner <= 0)


def _ends(grid: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    if 0.0 not in grid or 1.0 not in grid:
        raise BadInput("The grid needs both ends: 0 (the base) and 1 (the tuned model).")
    return values[list(grid).index(0.0)], values[list(grid).index(1.0)]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation over runs (ties get their mean rank); NaN where one side does not vary."""
    a, b = (torch.tensor(_ranks(_pairs(v)), dtype=torch.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b: agreement of orders over all pairs of runs; NaN where one side does not vary."""
    a, b = (torch.tensor(list(_pairs(v)), dtype=torch.float64) for v in (x, y))
    first, second = torch.sign(a[:, None] - a), torch.sign(b[:, None] - b)
    size = float((first.square().sum() * second.square().sum()).sqrt())
    return float((first * second).sum()) / size if size else math.nan


def _pairs(values: Sequence[float]) -> Sequence[float]:
    if len(values) < 2:
        raise BadInput("A correlation needs at least two runs.")
    return values


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


# ---- walking


Put = Callable[..., None]  # (amount, or amounts by name, and the amount of the rest)


@contextmanager
def walking(model: nn.Module, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Iterator[Put]:
    """Gives a function that puts `model` at an amount, or at amounts by tensor name and the rest at another, in place.

    Integer tensors are the base's at 0 and the tuned model's elsewhere. Afterwards the model is at the base.
    """
    check_alike(base, tuned)
    places = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n in base}

    @torch.no_grad()
    def put(amounts: float | Mapping[str, float], rest: float = 0.0) -> None:
        for name, place in places.items():
            amount = amounts if isinstance(amounts, int | float) else amounts.get(name, rest)
            if base[name].is_floating_point():
                place.copy_(interpolate(base[name], tuned[name], float(amount)))
            else:
                place.copy_(base[name] if amount == 0 else tuned[name])

    try:
        yield put
    finally:
        put(0.0)


def interpolation_curve(
    model: nn.Module,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    measure: Callable[[nn.Module], Any],
    grid: Sequence[float] = GRID,
) -> list[Any]:
    """What `measure` gives at each amount; the model is moved in place and left at the base."""
    with walking(model, base, tuned) as put:
        found = []
        for amount in grid:
            put(amount)
            found.append(measure(model))
    return found


# ---- the analysis


def checked_grid(grid: Sequence[float]) -> list[float]:
    """Sorted, without doubles, with both ends and an inside."""
    points = sorted({float(a) for a in grid})
    if not all(math.isfinite(a) and 0 <= a <= 1 for a in points):
        raise BadInput(f"analyze.grid: amounts between 0 (the base) and 1 (the tuned model), got {list(grid)}.")
    if not {0.0, 1.0} <= set(points) or len(points) < 3:
        raise BadInput(f"analyze.grid: 0, 1 and at least one point between them; got {list(grid)}.")
    return points


@ANALYZE.register
class Path(Analysis):
    """Scores along the path from base to tuned model, on the target and on shifted data.

    Args:
        grid: amounts, with both ends. shifted: further sets of rows by name, to see what holds out of distribution.
        suites: further suites of the run, e.g. "retention". generate: also draw answers where the suites' metrics ask
            for them (slow); else the likelihood speaks.
    """

    kind: Literal["path"] = "path"
    grid: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=lambda: list(GRID))
    shifted: dict[str, Any] = Field(default_factory=dict)
    suites: list[str] = Field(default_factory=list)
    generate: bool = False

    needs_rows: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2109.01903"

    @field_validator("grid")
    @classmethod
    def _grid(cls, grid: list[float]) -> list[float]:
        return checked_grid(grid)

    def run(self, subject: Subject) -> Finding:
        names = defined(subject, self.shifted, self.suites)
        model, base, tuned = subject.weights()
        scores = measured(subject, model, base, tuned, names, self.grid, self.generate)
        finding = Finding(kind=self.kind, title="Along the path from base to tuned model")
        report_path(finding, self.grid, scores)
        return finding


def defined(subject: Subject, shifted: Mapping[str, Any], suites: Sequence[str] = ()) -> list[str]:
    """The suites that are measured: "target", the shifted sets (made known to the subject), further ones."""
    subject.rows()
    for name, source in shifted.items():
        if name in ("target", *suites):
            raise BadInput(f"analyze.shifted: '{name}' names a suite already; choose another name.")
        subject.define(name, source)
    return ["target", *shifted, *suites]


def measured(
    subject: Subject,
    model: nn.Module,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    suites: Sequence[str],
    grid: Sequence[float],
    generate: bool = False,
) -> dict[str, list[Score]]:
    """The first score of each suite at each amount."""

    def scores(moved: nn.Module) -> list[Score]:
        found = (subject.measure(moved, suite, generating=generate).scores for suite in suites)
        return [next(iter(of_suite.values())) for of_suite in found]

    rows = interpolation_curve(model, base, tuned, scores, grid)
    return {suite: [row[i] for row in rows] for i, suite in enumerate(suites)}


def report_path(
    finding: Finding, grid: Sequence[float], scores: Mapping[str, Sequence[Score]], label: str = ""
) -> None:
    """Summaries into a finding: numbers and a row a suite, and one picture per score's name."""
    rows: list[list[Any]] = []
    pictures: dict[str, list[Series]] = {}
    for suite, curve in scores.items():
        name, values = curve[0].name, [s.value for s in curve]
        told = summarise(grid, [v if curve[0].higher_is_better else -v for v in values])
        rows.append([suite, name, values[0], values[-1], told.best, told.interior, told.barrier, _yes(told.failure)])
        finding.numbers |= {f"{suite}_gain{label}": told.gain, f"{suite}_barrier{label}": told.barrier}
        finding.details[f"{suite}{label}"] = {"grid": list(grid), name: values, "failure": told.failure}
        pictures.setdefault(name, []).append(Series(name=suite, xs=list(grid), ys=values))
    heads = ["suite", "score", "base", "tuned", "best at", "gain inside", "barrier", "failure mode"]
    finding.tables.append(Grid(title=f"The path{label.replace('_', ' ')}", columns=heads, rows=rows))
    for name, series in pictures.items():
        finding.pictures.append(
            Picture(
                key=f"path-{name}{label}".replace("_", "-"), title=f"{name} along the path{label.replace('_', ' ')}",
                x_label="amount (0 base, 1 tuned)", y_label=name, series=series,
            )
        )  # fmt: skip


def _yes(value: bool) -> str:
    return "yes" if value else "no"
