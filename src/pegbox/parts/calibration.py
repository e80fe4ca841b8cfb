"""How sure a number is: bootstrap intervals, paired comparisons over seeds and rows, and calibration of probabilities.

The two-level bootstrap. With d[s, r] the difference of two recipes on row r under seed s, one replicate draws rows and
seeds with replacement, the same rows for every seed (the design is crossed):

    d* = sum_s v_s sum_r w_r d[s, r],    v_s = 1/S + sqrt(S / (S - 1)) (c_s / S - 1/S)

where c_s counts how often seed s was drawn. The square root restores the variance that drawing S of only S seeds loses.
The noise that is neither the row's nor the seed's enters both levels: intervals are a little wide, never narrow.

Sources: Efron & Tibshirani 1993 (bootstrap), Rao & Wu 1988 (the rescaling), Owen 2007 (crossed factors), Holm 1979,
Schuirmann 1987 (equivalence), Guo et al. 2017, arXiv:1706.04599 (ECE), Brier 1950.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pegbox.errors import BadInput

__all__ = [
    "Calibration",
    "Difference",
    "Interval",
    "Reliability",
    "Verdict",
    "adaptive_calibration_error",
    "bootstrap",
    "brier",
    "calibration",
    "classwise_calibration_error",
    "expected_calibration_error",
    "holm",
    "log_loss",
    "maximum_calibration_error",
    "minimal_difference",
    "paired_difference",
    "reliability",
    "scaled_probabilities",
    "temperature",
    "verdict",
]

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "equal within the margin", "not told apart"]
_CHUNK = 2_000_000  # entries of one block of resampling weights: 16 MB


@dataclass(frozen=True)
class Interval:
    """A statistic with its bootstrap interval over `n` rows."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A paired difference: a 95 % interval (`low`, `high`), a 90 % one for equivalence, and a two-sided p-value."""

    value: float
    low: float
    high: float
    low90: float
    high90: float
    p: float
    rows: int
    seeds: int


def bootstrap(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    exp: bool = False,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The (weighted) mean of `values` (N,) with a percentile interval over rows; `exp` reports its exponential.

    With token counts as weights and mean losses as values, `exp=True` is the per-token perplexity. Where all rows are
    wrong (0) or all right (1), resampling says nothing: the interval is then Clopper and Pearson's exact one. Raises
    `BadInput` on no rows and on values that are not finite.
    """
    x, w = _checked(values, weights)
    total = np.exp if exp else np.asarray
    value = float(total((x * w).sum() / w.sum()))
    if weights is None and not exp and value in (0.0, 1.0) and (x == value).all():
        miss = 1 - ((1 - level) / 2) ** (1 / len(x))
        low, high = (0.0, miss) if value == 0 else (1 - miss, 1.0)
        return Interval(value, low, high, len(x))
    if len(x) == 1:
        return Interval(value, value, value, 1)
    draws = np.concatenate([(c @ (x * w)) / (c @ w) for c in _resampled(len(x), samples, np.random.default_rng(seed))])
    tail = (1 - level) / 2
    low, high = (float(total(q)) for q in np.quantile(draws, [tail, 1 - tail]))
    return Interval(value, low, high, len(x))


def paired_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    samples: int = 4000,
    seed: int = 0,
) -> Difference:
    """Mean of `ours - theirs`, both (S, N) by seed and row (or (N,) for one seed), by the two-level bootstrap.

    Columns must be the same test rows and lines the same seeds. `weights` (N,) weigh rows (token counts).
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (ours, theirs))
    if a.shape != b.shape or a.size == 0:
        raise BadInput(f"A paired difference needs the same seeds and rows on both sides, got {a.shape} and {b.shape}.")
    d = a - b
    _, w = _checked(d.mean(axis=0), weights)
    if not np.isfinite(d).all():
        raise BadInput("A paired difference needs finite values; rows without a value must be left out on both sides.")
    draws = _two_level(d, w, samples, np.random.default_rng(seed))
    low, low90, high90, high = (float(q) for q in np.quantile(draws, [0.025, 0.05, 0.95, 0.975]))
    below, above = ((draws <= 0).sum() + 1) / (samples + 1), ((draws >= 0).sum() + 1) / (samples + 1)
    value = float(((d * w).sum(axis=1) / w.sum()).mean())
    return Difference(value, low, high, low90, high90, float(min(1.0, 2 * min(below, above))), d.shape[1], d.shape[0])


def _two_level(d: Floats, w: Floats, samples: int, rng: np.random.Generator) -> Floats:
    seeds, rows = d.shape
    by_seed = np.concatenate([(c @ (d * w).T) / (c @ w)[:, None] for c in _resampled(rows, samples, rng)])  # (R, S)
    if seeds == 1:
        return by_seed[:, 0]
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples) / seeds
    v = 1 / seeds + math.sqrt(seeds / (seeds - 1)) * (drawn - 1 / seeds)
    return (v * by_seed).sum(axis=1)


def _resampled(rows: int, samples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Blocks (R', rows) of how often each row was drawn; R' sum to `samples`."""
    step = max(1, _CHUNK // rows)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        picks = rng.integers(rows, size=(size, rows)) + np.arange(size)[:, None] * rows
        yield np.bincount(picks.ravel(), minlength=size * rows).reshape(size, rows).astype(float)


def _checked(values: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats]:
    x = np.asarray(values, dtype=float)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=float)
    if x.ndim != 1 or x.size == 0 or w.shape != x.shape:
        raise BadInput(f"Expected one value (and weight) per row and at least one row, got {x.shape} and {w.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise BadInput("Values must be finite, and weights finite, not negative and not all zero.")
    return x, w


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the family-wise error stays below the level over all comparisons in the mapping."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def verdict(
    difference: Difference, adjusted_p: float | None = None, *, margin: float | None = None, level: float = 0.05
) -> Verdict:
    """The difference in words; it must be oriented so that positive is better.

    better/worse: the (adjusted) p-value is below `level`. equal within the margin: it is not, and the 90 % interval
    lies inside +-margin (two one-sided tests). Else: not told apart, which is no claim of equality.
    """
    p = difference.p if adjusted_p is None else adjusted_p
    if p < level and difference.value != 0:
        return "better" if difference.value > 0 else "worse"
    if margin is not None and -margin < difference.low90 and difference.high90 < margin:
        return "equal within the margin"
    return "not told apart"


def minimal_difference(
    rows: int, seeds: int = 3, accuracy: float = 0.7, *, correlation: float = 0.75, seed_sd: float = 0.012
) -> float:
    """The half-width of the 95 % interval that a test set can be expected to give for a difference in accuracy.

        1.96 sqrt( 2 p (1 - p) (1 - correlation) / rows + 2 seed_sd^2 / seeds )

    Args:
        correlation: of two recipes' correctness (mean over the seeds) across rows.
        seed_sd: standard deviation of one recipe's true accuracy over seeds.

    The defaults give 6.6, 4.1 and 2.8 points at 100, 300 and 1000 rows, 3 seeds, accuracy 0.7.
    """
    if rows < 1 or seeds < 1 or not 0 <= accuracy <= 1:
        raise BadInput(f"Needs rows >= 1, seeds >= 1 and accuracy in [0, 1], got {rows}, {seeds}, {accuracy}.")
    return 1.96 * math.sqrt(2 * accuracy * (1 - accuracy) * (1 - correlation) / rows + 2 * seed_sd**2 / seeds)


# --- calibration of probabilities -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram's bins; empty bins have NaN confidence and accuracy."""

    edges: Floats  # (bins + 1,)
    confidence: Floats  # (bins,) mean confidence
    accuracy: Floats  # (bins,) share correct
    count: NDArray[np.int64]  # (bins,)


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> Reliability:
    """Confidences (N,) in [0, 1] and correctness (N,) in `bins` equal bins, each open below and closed above."""
    p, y = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if bins < 1:
        raise BadInput(f"A reliability diagram needs at least 1 bin, got {bins}.")
    if p.shape != y.shape or p.ndim != 1 or p.size == 0 or ((p < 0) | (p > 1)).any():
        raise BadInput("Reliability needs as many confidences in [0, 1] as outcomes, and at least one.")
    which = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, weights=v, minlength=bins) / count for v in (p, y)]
    return Reliability(np.linspace(0, 1, bins + 1), means[0], means[1], count)


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """sum_b (n_b / N) |accuracy_b - confidence_b|."""
    r = reliability(confidence, correct, bins)
    return float(np.nansum(r.count * np.abs(r.accuracy - r.confidence)) / r.count.sum())


def brier(probabilities: ArrayLike, labels: Sequence[int] | ArrayLike) -> float:
    """Mean squared distance of class probabilities (N, C) from the one-hot labels (N,); (N,) means p(label = 1)."""
    p, y = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=int)
    if p.ndim == 1:
        return float(((p - y) ** 2).mean())
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1).mean())


@dataclass(frozen=True)
class Calibration:
    """How far class probabilities can be trusted.

    Args:
        ece, mce: mean and largest gap of accuracy and confidence over equal-width bins. adaptive: the mean gap over
            bins of equal count. classwise: ECE of every class's own probability, averaged. brier: summed over classes.
            nll: in nats.
    """

    accuracy: float
    ece: float
    mce: float
    adaptive: float
    classwise: float
    brier: float
    nll: float
    bins: Reliability


def calibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> Calibration:
    """Every measure of class probabilities (N, C) against labels (N,); confidence is the largest probability.

    Raises `BadInput` for no rows or classes, probabilities that don't sum to 1, labels outside, and bins below 1.
    """
    p, y = _class_probabilities(probabilities, labels)
    sure, right = p.max(axis=1), (p.argmax(axis=1) == y).astype(float)
    return Calibration(
        accuracy=float(right.mean()),
        ece=expected_calibration_error(sure, right, bins),
        mce=maximum_calibration_error(sure, right, bins),
        adaptive=adaptive_calibration_error(sure, right, bins),
        classwise=classwise_calibration_error(p, y, bins),
        brier=brier(p, y),
        nll=log_loss(p, y),
        bins=reliability(sure, right, bins),
    )


def maximum_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """max_b |accuracy_b - confidence_b| over bins that hold a row."""
    r = reliability(confidence, correct, bins)
    return float(np.nanmax(np.abs(r.accuracy - r.confidence)))


def adaptive_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """As the ECE, over bins of equal count (sizes differ by at most one row). Nguyen and O'Connor, arXiv:1508.05154."""
    r = reliability(confidence, correct, bins)  # checks
    p, y = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, bins) if part.size]
    return float(sum(abs(y[part].mean() - p[part].mean()) * part.size for part in parts) / r.count.sum())


def classwise_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """mean_c ECE of p_c against (label = c). Kull et al., arXiv:1910.12656."""
    p, y = _class_probabilities(probabilities, labels)
    return float(np.mean([expected_calibration_error(p[:, c], y == c, bins) for c in range(p.shape[1])]))


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean -log p of the labels, in nats; a label of probability 0 gives infinity."""
    p, y = _class_probabilities(probabilities, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(p[np.arange(len(y)), y]).mean())


def scaled_probabilities(probabilities: ArrayLike, by: float) -> Floats:
    """softmax(log p / by), (N, C): flatter above 1, sharper below."""
    p = np.asarray(probabilities, dtype=float)
    if by <= 0:
        raise BadInput(f"A temperature must be positive, got {by}.")
    scores = np.log(np.clip(p, 1e-300, None)) / by
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def temperature(probabilities: ArrayLike, labels: ArrayLike, low: float = 0.05, high: float = 20.0) -> float:
    """The temperature between `low` and `high` at which held-out class probabilities have the least log loss (it has
    one minimum in 1 / temperature). Guo et al., arXiv:1706.04599, section 4."""
    p, y = _class_probabilities(probabilities, labels)
    left, right, golden = math.log(1 / high), math.log(1 / low), (math.sqrt(5) - 1) / 2

    def loss(log_inverse: float) -> float:
        scores = np.log(np.clip(p, 1e-300, None)) * math.exp(log_inverse)
        top = scores.max(axis=1)
        normal = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        return float((normal - scores[np.arange(len(y)), y]).mean())

    for _ in range(60):
        third = golden * (right - left)
        if loss(right - third) < loss(left + third):
            right = left + third
        else:
            left = right - third
    return math.exp(-(left + right) / 2)


def _class_probabilities(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    p, y = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=np.int64)
    if p.ndim != 2 or p.shape[0] == 0 or p.shape[1] == 0 or y.shape != p.shape[:1]:
        raise BadInput(f"Expected probabilities (N, C) and labels (N,), got {p.shape} and {y.shape}.")
    if not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, atol=1e-6):
        bad = int(np.argmax(np.abs(p.sum(axis=1) - 1)))
        raise BadInput(f"Class probabilities must be 0 or larger and sum to 1; row {bad} sums to {p[bad].sum():.6g}.")
    if ((y < 0) | (y >= p.shape[1])).any():
        raise BadInput(f"Labels must be class numbers from 0 to {p.shape[1] - 1}.")
    return p, y
