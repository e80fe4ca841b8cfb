"""A dial turned: behaviours judged at each setting of the weights, as a table and a picture.

    for lambda in grid:  answers = generate(decoder at (lambda, 1 - lambda));  score_j = mean_j judge_j(prompt, answer)

The interpolation experiment of emulated fine-tuning (arXiv:2310.12962, section 4.3) for any behaviours and judges.
What this file does not do: judge. A judge is any function of a prompt and an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pegbox.errors import BadInput

__all__ = ["Point", "behaviour_sweep", "draw_frontier", "pareto"]

Judge = Callable[[str, str], float]


@dataclass(frozen=True)
class Point:
    """The behaviours at one setting: mean score and its standard error, by judge."""

    value: float
    scores: dict[str, float]
    errors: dict[str, float]


def behaviour_sweep(
    answers: Callable[[float], Sequence[str]],
    prompts: Sequence[str],
    judges: Mapping[str, Judge],
    values: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[Point]:
    """One point per value: `answers(value)` gives an answer per prompt, every judge scores each.

    Raises `BadInput` on no prompts, judges or values, and where a judge gives no number.
    """
    if not prompts or not judges or not values:
        raise BadInput("A sweep needs at least one prompt, one judge and one value.")
    points = []
    for value in values:
        given = answers(value)
        if len(given) != len(prompts):
            raise BadInput(f"{len(given)} answers to {len(prompts)} prompts at {value}.")
        scores, errors = {}, {}
        for name, judge in judges.items():
            scores[name], errors[name] = _mean(name, [float(judge(p, a)) for p, a in zip(prompts, given)])
        points.append(Point(float(value), scores, errors))
    return points


def _mean(name: str, values: list[float]) -> tuple[float, float]:
    if not all(math.isfinite(v) for v in values):
        row = next(i for i, v in enumerate(values) if not math.isfinite(v))
        raise BadInput(f"The judge '{name}' gave {values[row]} for row {row}; a score must be a finite number.")
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values))


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as on every judge and better on one."""

    def beaten(p: Point) -> bool:
        return any(
            all(q.scores[n] >= p.scores[n] for n in p.scores) and any(q.scores[n] > p.scores[n] for n in p.scores)
            for q in points
        )

    return [p for p in points if not beaten(p)]


def draw_frontier(points: Sequence[Point], path: Path, names: tuple[str, str] | None = None) -> Path:
    """The first two judges against each other, each point labelled with its value; written to `path` (.png, .svg)."""
    from matplotlib.figure import Figure

    known = list(points[0].scores)
    if names is None and len(known) < 2:
        raise BadInput("A frontier needs two judges; this sweep has one.")
    across, up = names if names is not None else (known[0], known[1])
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    axes.errorbar(
        [p.scores[across] for p in points],
        [p.scores[up] for p in points],
        xerr=[p.errors[across] for p in points],
        yerr=[p.errors[up] for p in points],
        marker="o",
    )
    for p in points:
        axes.annotate(f"{p.value:g}", (p.scores[across], p.scores[up]), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.tight_layout()
    figure.savefig(path)
    return path
