"""Merges of K task vectors over one base, each one function from task vectors to a merged update.

Definitions follow the code of LiNeS (arXiv:2410.17146), which is built on TIES (arXiv:2306.01708) and on TALL masks and
consensus (arXiv:2405.07813), down to which entries a threshold keeps; DARE follows its paper (arXiv:2311.03099). Each
function below is also a recipe's weight operation of that name, with a constant or LiNeS as scaler. They see one tensor
of one model at a time; thresholds over whole vectors are found by streaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.algebra import weighted_sum
from pegbox.parts.context import seed_of
from pegbox.weights.operation import merge
from pegbox.weights.updates import Merged, Updates

__all__ = [
    "average",
    "combine_elected",
    "consensus",
    "dare",
    "dropped",
    "elect",
    "magnitude_mask",
    "rewarded_soup",
    "tall",
    "tall_mask",
    "task_arithmetic",
    "ties",
]

Percent = Annotated[float, Field(gt=0, le=100)]
Index = Annotated[int, Field(ge=0)]


@merge("task_arithmetic", "arXiv:2212.04089")
def task_arithmetic(updates: Updates, *, keep: Percent = 100.0) -> Merged:
    """The sum of the task vectors, each cut to its largest `keep` percent first."""
    trimmed = _trimmed(updates, keep)

    def total(name: str) -> Tensor:
        return weighted_sum(trimmed(name), [1.0] * updates.count)

    return Merged(total, total)


@merge("dare", "arXiv:2311.03099")
def dare(
    updates: Updates,
    *,
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    rescale: bool = True,
    then: Literal["sum", "average", "ties"] = "sum",
    combine: Literal["mean", "sum", "max"] = "mean",
    seed: int = 0,
) -> Merged:
    """DARE: drop a random share of each task vector and divide the rest by what is left, then merge.

    `rescale`: divide by 1 - drop, so that the expected vector is the whole one. `then`: how the sparse vectors are
    merged ("ties": elect signs, combine what agrees). The draw of an entry depends on (seed, task, tensor) alone.
    """

    def sparse(name: str) -> list[Tensor]:
        return [dropped(updates.delta(t, name), drop, rescale, seed, t, name) for t in range(updates.count)]

    def update(name: str) -> Tensor:
        values = sparse(name)
        if then == "ties":
            return combine_elected(values, elect(values), combine)
        return weighted_sum(values, [1.0 / (updates.count if then == "average" else 1)] * updates.count)

    return Merged(update, lambda name: _plain(updates, name))


@merge("average", "arXiv:2203.05482")
def average(updates: Updates) -> Merged:
    """The mean of the task vectors: a uniform soup."""
    share = 1.0 / updates.count
    return Merged(
        lambda name: weighted_sum(updates.deltas(name), [share] * updates.count), lambda name: _plain(updates, name)
    )


@merge("rewarded_soup", "arXiv:2306.04488")
def rewarded_soup(updates: Updates, *, preference: list[Annotated[float, Field(ge=0)]]) -> Merged:
    """Task vectors weighted by a preference on the simplex, one number a model."""
    if len(preference) != updates.count or not math.isclose(sum(preference), 1.0, abs_tol=1e-6):
        raise BadInput(f"preference: give {updates.count} numbers of 0 or more that sum to 1, got {preference}.")
    return Merged(lambda name: weighted_sum(updates.deltas(name), preference), lambda name: _plain(updates, name))


@merge("ties", "arXiv:2306.01708")
def ties(updates: Updates, *, keep: Percent = 20.0, combine: Literal["mean", "sum", "max"] = "mean") -> Merged:
    """TIES: trim each task vector to its largest `keep` percent, elect a sign per entry, combine what agrees with it.

    Entries whose trimmed values cancel take the sign of the sum of all elected signs.
    """
    trimmed = _trimmed(updates, keep)
    majority = sum(float(elect(trimmed(name)).sum()) for name in updates.names)

    def update(name: str) -> Tensor:
        values = trimmed(name)
        sign = elect(values)
        sign = torch.where(sign == 0, math.copysign(1.0, majority) if majority else 0.0, sign)
        return combine_elected(values, sign, combine)

    return Merged(update, lambda name: _plain(updates, name))


@merge("tall", "arXiv:2405.07813")
def tall(updates: Updates, *, task: Index, threshold: Annotated[float, Field(ge=0)] = 0.4) -> Merged:
    """The sum of the task vectors where it matters for one task: weights of task `task` from the shared sum."""
    _refuse_task(updates, task)

    def update(name: str) -> Tensor:
        total = _plain(updates, name)
        return total.mul_(tall_mask(updates.delta(task, name), total, threshold))

    return Merged(update, lambda name: _plain(updates, name))


@merge("consensus", "arXiv:2405.07813")
def consensus(
    updates: Updates, *, tasks: Index = 2, threshold: list[Annotated[float, Field(ge=0)]] | float = 0.4
) -> Merged:
    """The sum of the task vectors on the entries that matter for at least `tasks` tasks (0: all; above K: none).

    `threshold`: one lambda of the TALL masks for all tasks, or one a task.
    """
    levels = threshold if isinstance(threshold, list) else [threshold] * updates.count
    if len(levels) != updates.count:
        raise BadInput(f"threshold: give one number, or one for each of the {updates.count} models, got {threshold}.")

    def update(name: str) -> Tensor:
        total = _plain(updates, name)
        votes = torch.zeros_like(total, dtype=torch.int16)
        for t, level in enumerate(levels):
            votes += tall_mask(updates.delta(t, name), total, level)
        return total.mul_(votes >= tasks)

    return Merged(update, lambda name: _plain(updates, name))


@merge("magnitude_mask", "arXiv:2405.07813")
def magnitude_mask(updates: Updates, *, task: Index, keep: Percent = 20.0) -> Merged:
    """The sum of the task vectors on the largest `keep` percent of one task's own vector."""
    _refuse_task(updates, task)
    threshold = updates.threshold(task, keep)
    return Merged(
        lambda name: _plain(updates, name).mul_(updates.delta(task, name).abs() >= threshold),
        lambda name: _plain(updates, name),
    )


# ---- on tensors


def tall_mask(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Where a task's own change outweighs what the others add: |tau_t| > lambda |tau_sum - tau_t|."""
    return delta.abs() > threshold * (total - delta).abs()


def dropped(delta: Tensor, drop: float, rescale: bool, seed: int, task: int, name: str) -> Tensor:
    """A random share `drop` of the entries at zero, the others divided by 1 - drop where `rescale`."""
    generator = torch.Generator().manual_seed(seed_of(seed, "dare", task, name))
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64).to(delta.device) >= drop
    return delta.mul_(kept).div_(1 - drop if rescale else 1.0)


def elect(values: list[Tensor]) -> Tensor:
    """The sign of the sum over tasks, per entry; 0 where it cancels."""
    return weighted_sum(values, [1.0] * len(values)).sign_()


def combine_elected(values: list[Tensor], sign: Tensor, how: Literal["mean", "sum", "max"]) -> Tensor:
    """Per entry, combine the values that have the elected sign: their mean, sum, or the largest magnitude.

    Where no sign was elected (0) the negative values count, as in the official code.
    """
    total, count, largest = torch.zeros_like(sign), torch.zeros_like(sign), torch.zeros_like(sign)
    for value in values:
        agreeing = value * torch.where(sign > 0, value > 0, value < 0)
        if how == "max":
            largest = torch.maximum(largest, agreeing.abs())
        else:
            total += agreeing
            count += agreeing != 0
    if how == "max":
        return largest * sign
    return total / count.clamp(min=1) if how == "mean" else total


def _plain(updates: Updates, name: str) -> Tensor:
    return weighted_sum(updates.deltas(name), [1.0] * updates.count)


def _trimmed(updates: Updates, keep: float) -> Callable[[str], list[Tensor]]:
    """A function from a name to every task's trimmed vector there."""
    limits = [updates.threshold(t, keep) for t in range(updates.count)]
    return lambda name: [updates.trimmed(t, name, limit) for t, limit in enumerate(limits)]


def _refuse_task(updates: Updates, task: int) -> None:
    if task >= updates.count:
        raise BadInput(f"task: {task} of {updates.count} models; give 0 to {updates.count - 1}.")
