"""Choosing tensors under a budget of back-propagation: an exact dynamic programme, and the published heuristic.

    maximise sum_k m_k I_k   subject to   through[e] + sum_k m_k own_k <= limit,    e the deepest selected tensor

Index 0 is the tensor NEAREST THE LOSS; costs are integers; through[e] is the cost of everything between the loss and e,
e included (it never falls). With the deepest tensor fixed what is left is a 0/1 knapsack over the tensors before it:
one table serves all of them, in O(N limit). "Towards Green AI in Fine-tuning Large Language Models via Adaptive
Backpropagation" (arXiv:2309.13192), whose own O(N^2 limit) recursion drops states that are worth less now and cheaper
to extend: `official_suffix` is that recursion, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pegbox.errors import BadInput

__all__ = ["floored", "knapsack_suffix", "official_suffix", "quantized"]

Floats = Sequence[float] | NDArray[np.floating]
Integers = Sequence[int] | NDArray[np.integer]


def knapsack_suffix(
    importance: Floats, own: Integers, through: Integers, limit: int
) -> tuple[NDArray[np.bool_], float]:
    """The best selection and its value; nothing (and 0) where no tensor of positive importance fits.

    Args:
        importance: (N,) I_k, any sign. own: (N,) >= 0. through: (N,) cumulative, >= 0, never falling.
        limit: the budget, in the same units.

    Ties go to the selection whose deepest tensor is nearer the loss. Raises `BadInput` for NaN or negative costs.
    """
    value, cost, path = np.asarray(importance, float), np.asarray(own, np.int64), np.asarray(through, np.int64)
    _check(value, cost, path)
    limit = int(limit)
    count = len(value)
    best, deepest = 0.0, -1
    table = np.zeros(max(limit, 0) + 1)  # table[w]: the largest value of tensors so far at a cost of at most w
    taken = np.zeros((count, table.size), dtype=bool)
    for r in range(count):
        if path[r] > limit:
            break
        if value[r] <= 0:
            continue
        left = limit - path[r] - cost[r]
        if left >= 0 and value[r] + table[left] > best:
            best, deepest = value[r] + table[left], r
        if cost[r] <= limit:
            candidate = table[: table.size - cost[r]] + value[r]
            better = candidate > table[cost[r] :]
            taken[r, cost[r] :] = better
            table[cost[r] :] = np.where(better, candidate, table[cost[r] :])
    return _recover(taken, cost, path, limit, deepest, count), best


def _recover(
    taken: NDArray[np.bool_], cost: NDArray[np.int64], path: NDArray[np.int64], limit: int, deepest: int, count: int
) -> NDArray[np.bool_]:
    """Walk the decisions back from the winner."""
    chosen = np.zeros(count, dtype=bool)
    if deepest < 0:
        return chosen
    chosen[deepest] = True
    left = limit - path[deepest] - cost[deepest]
    for r in range(deepest - 1, -1, -1):
        if taken[r, left]:
            chosen[r] = True
            left -= cost[r]
    return chosen


def _check(value: NDArray[np.floating], cost: NDArray[np.int64], path: NDArray[np.int64]) -> None:
    if not (len(value) == len(cost) == len(path)):
        raise BadInput(f"{len(value)} importances, {len(cost)} own and {len(path)} through costs: all must be as many.")
    if not np.isfinite(value).all():
        raise BadInput(f"The importance of tensor {int(np.flatnonzero(~np.isfinite(value))[0])} is not finite.")
    if (cost < 0).any() or (path < 0).any() or (np.diff(path) < 0).any():
        raise BadInput("Costs can't be negative, and the cost of reaching a tensor never falls with its depth.")


def official_suffix(importance: Floats, own: Integers, steps: Integers, limit: int) -> tuple[NDArray[np.bool_], float]:
    """The published recursion, which may miss the optimum but never exceeds the budget.

    A state (k, t) is alive if taking tensor k at a total cost of t beats the best of earlier tensors at t; only alive
    states are extended. Here `steps` are the costs of passing each single tensor (not cumulative).
    """
    value, cost, path = np.asarray(importance, float), np.asarray(own, np.int64), np.asarray(steps, np.int64)
    _check(value, cost, np.cumsum(path))
    count, limit = len(value), int(limit)
    beyond = np.flatnonzero(np.cumsum(path) > limit)
    depth = int(beyond[0]) if beyond.size else count - 1
    scores = np.zeros((depth + 1, limit + 1), dtype=np.float32)  # kept in float32, compared in float64: so are ties
    chosen = np.zeros((depth + 1, limit + 1, count), dtype=bool)
    alive = np.zeros((depth + 1, limit + 1), dtype=bool)
    alive[0, :] = True
    best, winner = -np.inf, (0, 0)
    for k in range(1, depth + 1):
        top = scores[k - 1].astype(float)
        chosen[k] = chosen[k - 1]
        offset = int(cost[k - 1])
        for before in range(k - 1, -1, -1):
            offset += int(path[before])
            if offset > limit:
                break
            states = slice(0, limit + 1 - offset)
            candidate = np.where(alive[before, states], scores[before, states] + value[k - 1], -np.inf)
            places = np.flatnonzero(candidate > top[offset:])
            top[places + offset] = candidate[places]
            chosen[k, places + offset] = chosen[before, places]
            chosen[k, places + offset, k - 1] = True
            alive[k, places + offset] = True
        scores[k] = top
        for t in np.flatnonzero(top > best):
            if top[t] > best:
                best, winner = float(scores[k, t]), (k, int(t))
    return chosen[winner], max(best, 0.0)


def quantized(costs: Floats, unit: float) -> NDArray[np.int64]:
    """Costs in whole units, rounded up, so that a selection that fits in units fits."""
    return np.ceil(np.asarray(costs, float) / unit - 1e-9).astype(np.int64)


def floored(costs: Floats, unit: float) -> NDArray[np.int64]:
    """Costs in whole units, rounded down as the official code does: small tensors become free."""
    return np.floor(np.asarray(costs, float) * (1.0 / unit)).astype(np.int64)
