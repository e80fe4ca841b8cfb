"""How often one of k samples passes: Top-k of the first k, and the unbiased pass@k.

    Top-k    share of problems of which at least one of the FIRST k samples passes
    pass@k   mean over problems of 1 - C(n - c, k) / C(n, k),  c of n samples pass     (arXiv:2107.03374)

Both are shares in [0, 1]. With k = n they agree; else pass@k has the smaller variance, and Top-k is what is reported
where samples were drawn in an order and only the first k looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pegbox.errors import BadInput

__all__ = ["pass_at_k", "top_k"]

Passed = Sequence[Sequence[bool | int]]  # by problem, by sample in the order drawn


def top_k(passed: Passed, k: int) -> float:
    """Share of problems that one of the first k samples solves. Raises `BadInput` for n < k."""
    _check(passed, k)
    return sum(any(line[:k]) for line in passed) / len(passed)


def pass_at_k(passed: Passed, k: int) -> float:
    """The unbiased estimate of solving a problem with k samples. Raises `BadInput` for n < k."""
    _check(passed, k)
    return sum(1 - math.comb(len(p) - sum(map(bool, p)), k) / math.comb(len(p), k) for p in passed) / len(passed)


def _check(passed: Passed, k: int) -> None:
    if k < 1:
        raise BadInput(f"k must be at least 1, got {k}.")
    if not passed:
        raise BadInput("There is no problem to count over.")
    fewest = min(len(line) for line in passed)
    if fewest < k:
        raise BadInput(f"Top-{k} needs {k} samples of every problem, and one has {fewest}. Draw more, or lower k.")
