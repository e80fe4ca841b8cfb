"""Choosing by scores on validation data: coefficients on a grid, members of a soup, points on a front.

    score = w acc_target / acc_tuned(target) + mean over controls of acc_c / acc_base(c)

The order of a grid matters: only a strictly better score replaces the best, so of equals the first tested wins (the
grid for one task starts at alpha = 1). From the official LiNeS code (arXiv:2410.17146); greedy soups from
arXiv:2203.05482. Nothing here evaluates a model: callers bring a function that does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pegbox.errors import BadInput

__all__ = [
    "MULTI_TASK_GRID",
    "SINGLE_TASK_GRID",
    "TIES_GRID",
    "Choice",
    "greedy_soup",
    "normalised_mean",
    "pareto_front",
    "pick",
    "trade_off",
]

SINGLE_TASK_GRID = tuple(round(1.0 - 0.1 * i, 1) for i in range(11))  # alpha, beta = 1 - alpha
MULTI_TASK_GRID = tuple(round(0.1 * i, 1) for i in range(1, 11))  # beta, or the constant
TIES_GRID = tuple(round(0.1 * i, 1) for i in range(1, 16))

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The best of a grid, and every score on the way."""

    best: T
    score: float
    scores: tuple[tuple[T, float], ...]


def trade_off(
    target: float,
    tuned_target: float,
    controls: Mapping[str, float],
    base_controls: Mapping[str, float],
    weight: float = 2.0,
) -> float:
    """Kept target accuracy, `weight` times, plus kept control accuracy.

    Args:
        target, tuned_target: accuracy on the target of the edited and of the fine-tuned model.
        controls, base_controls: accuracies by control task of the edited and of the pre-trained model.
    """
    return weight * _ratio(target, tuned_target, "the fine-tuned model on the target") + normalised_mean(
        controls, base_controls
    )


def normalised_mean(scores: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean over tasks of score / reference. Raises `BadInput` for other tasks, none, or a reference of 0."""
    if not scores or set(scores) != set(reference):
        raise BadInput(f"Scores for {sorted(scores)} and references for {sorted(reference)}: give both for each task.")
    return sum(_ratio(scores[task], reference[task], f"the reference on '{task}'") for task in scores) / len(scores)


def pick(grid: Sequence[T], score: Callable[[T], float]) -> Choice[T]:
    """The first best point of a grid by a validation score. Raises `BadInput` for an empty grid or a score of NaN."""
    if not grid:
        raise BadInput("The grid is empty. Give at least one value to try.")
    scores: list[tuple[T, float]] = []
    for point in grid:
        value = score(point)
        if math.isnan(value):
            raise BadInput(f"The validation score at {point} is not a number. Check the validation data.")
        scores.append((point, value))
    best = max(scores, key=lambda pair: pair[1])  # the first of equals
    return Choice(best[0], best[1], tuple(scores))


def greedy_soup(members: int, score: Callable[[tuple[int, ...]], float]) -> Choice[tuple[int, ...]]:
    """Members of a soup, added from the best alone downwards, each kept if the soup's score does not fall.

    Args:
        members: M, the number of fine-tuned models.
        score: validation score of the average of the given members, in the order they were added.
    """
    if members < 1:
        raise BadInput("A soup needs at least one member.")
    alone: list[tuple[tuple[int, ...], float]] = [((i,), score((i,))) for i in range(members)]
    order = sorted(range(members), key=lambda i: -alone[i][1])  # stable: the first of equals comes first
    chosen: tuple[int, ...] = (order[0],)
    best, tried = alone[order[0]][1], list(alone)
    for i in order[1:]:
        value = score((*chosen, i))
        tried.append(((*chosen, i), value))
        if value >= best:
            chosen, best = (*chosen, i), value
    return Choice(chosen, best, tuple(tried))


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that no other point beats in one coordinate without losing in another (larger is better).

    Of equal points the first is kept.
    """

    def beaten(i: int) -> bool:
        a = points[i]
        return any(
            all(y >= x for x, y in zip(a, b, strict=True)) and (tuple(b) != tuple(a) or j < i)
            for j, b in enumerate(points)
            if j != i
        )

    return [i for i in range(len(points)) if not beaten(i)]


def _ratio(value: float, reference: float, what: str) -> float:
    if not reference > 0:
        raise BadInput(f"The accuracy of {what} is {reference}: a share of it can't be taken. Choose another task.")
    return value / reference
