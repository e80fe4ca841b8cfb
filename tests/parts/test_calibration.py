"""Intervals, paired differences and calibration against closed forms, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.calibration import (
    Difference,
    bootstrap,
    brier,
    expected_calibration_error,
    holm,
    minimal_difference,
    paired_difference,
    reliability,
    verdict,
)


def test_bootstrap_agrees_with_the_normal_interval():
    x = np.random.default_rng(0).normal(3, 2, 400)
    b = bootstrap(x, samples=4000)
    half = 1.96 * x.std() / 20
    assert b.value == pytest.approx(x.mean())
    assert (b.low, b.high) == (pytest.approx(x.mean() - half, abs=0.03), pytest.approx(x.mean() + half, abs=0.03))


def test_bootstrap_weights_and_exponential():
    b = bootstrap([1.0, 3.0], [3.0, 1.0], exp=True)
    assert b.value == pytest.approx(math.exp(1.5))
    assert b.low == pytest.approx(math.e)
    assert b.high == pytest.approx(math.exp(3))


def test_bootstrap_is_seeded_and_blocks_do_not_matter(monkeypatch):
    x = np.arange(50.0)
    one = bootstrap(x, seed=4)
    assert one == bootstrap(x, seed=4)
    assert one != bootstrap(x, seed=5)
    monkeypatch.setattr("pegbox.parts.calibration._CHUNK", 500)
    assert bootstrap(x, seed=4).value == one.value
    assert bootstrap([2.0]).low == 2.0


@pytest.mark.parametrize("bad", [[], [float("nan")], [[1.0]]])
def test_bootstrap_refuses(bad):
    with pytest.raises(BadInput):
        bootstrap(bad)


def test_paired_difference_sees_what_unpaired_would_not():
    rng = np.random.default_rng(1)
    hard = rng.random(300)
    theirs = (rng.random((3, 300)) * 0.1 + hard > 0.55).astype(float)
    ours = np.maximum(theirs, (rng.random((3, 300)) < 0.05).astype(float))
    d = paired_difference(ours, theirs)
    assert 0 < d.low < d.value < d.high
    assert d.p < 0.01
    assert (d.rows, d.seeds) == (300, 3)


@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 99))
def test_a_difference_mirrors(seeds, rows, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, seeds, rows))
    one, other = paired_difference(a, b, samples=300), paired_difference(b, a, samples=300)
    assert one.value == pytest.approx(-other.value)
    assert one.low == pytest.approx(-other.high)
    assert one.p == other.p
    assert paired_difference(a, a, samples=300).p == 1.0


def test_weighted_difference():
    d = paired_difference([[1.0, 0.0]], [[0.0, 0.0]], [3.0, 1.0])
    assert d.value == 0.75


def test_shapes_must_agree():
    with pytest.raises(BadInput, match="same seeds and rows"):
        paired_difference(np.ones((2, 5)), np.ones((3, 5)))
    with pytest.raises(BadInput, match="finite"):
        paired_difference([[1.0, math.inf]], [[1.0, 1.0]])


def test_two_level_intervals_cover():
    """True difference 0, with row, seed and residual noise: the 95 % interval misses it rarely, and is not idle."""
    rng = np.random.default_rng(2)
    missed, widths = 0, []
    for i in range(300):
        d = rng.normal(0, 0.3, 100) + rng.normal(0, 0.02, (4, 1)) + rng.normal(0, 0.3, (4, 100))
        found = paired_difference(d, np.zeros_like(d), samples=400, seed=i)
        missed += not found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    truth = 2 * 1.96 * math.sqrt(0.09 / 100 + 0.0004 / 4 + 0.09 / 400)
    assert missed / 300 < 0.09
    assert 0.9 * truth < np.mean(widths) < 1.35 * truth


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06)}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_is_monotone_and_between_raw_and_bonferroni(p):
    adjusted = holm(p)
    for name in p:
        assert p[name] <= adjusted[name] <= min(1.0, len(p) * p[name]) or adjusted[name] <= max(
            min(1.0, len(p) * q) for q in p.values() if q <= p[name]
        )
        assert all(adjusted[name] <= adjusted[other] for other in p if p[name] < p[other])


def found(value, low, high, p):
    return Difference(value, low, high, low, high, p, 100, 3)


@pytest.mark.parametrize(
    ("difference", "adjusted", "margin", "words"),
    [
        (found(0.1, 0.05, 0.15, 0.001), None, None, "better"),
        (found(-0.1, -0.15, -0.05, 0.001), None, None, "worse"),
        (found(0.1, 0.05, 0.15, 0.02), 0.06, None, "not told apart"),
        (found(0.0, -0.01, 0.01, 0.9), None, 0.02, "equal within the margin"),
        (found(0.0, -0.03, 0.01, 0.9), None, 0.02, "not told apart"),
        (found(0.0, -0.01, 0.01, 0.9), None, None, "not told apart"),
    ],
)
def test_verdicts(difference, adjusted, margin, words):
    assert verdict(difference, adjusted, margin=margin) == words


@pytest.mark.parametrize(("rows", "points"), [(100, 6.7), (300, 4.0), (1000, 2.8)])
def test_the_difference_that_a_test_set_can_show(rows, points):
    assert 100 * minimal_difference(rows, 3, 0.7) == pytest.approx(points, abs=0.2)


def test_minimal_difference_falls_with_rows_and_seeds():
    assert minimal_difference(100) > minimal_difference(200) > minimal_difference(200, seeds=9)
    with pytest.raises(BadInput):
        minimal_difference(0)


def test_minimal_difference_is_what_the_bootstrap_gives():
    """Answers simulated under the formula's own assumptions, over many test sets."""
    rng = np.random.default_rng(3)
    halves = []
    for i in range(40):
        d = rng.normal(0, math.sqrt(0.42 * 0.25), 300) + rng.normal(0, 0.012 * math.sqrt(2), (3, 1))
        found = paired_difference(d, np.zeros_like(d), samples=400, seed=i)
        halves.append((found.high - found.low) / 2)
    assert np.mean(halves) == pytest.approx(minimal_difference(300), rel=0.1)


def test_calibration_by_hand():
    r = reliability([0.15, 0.15, 0.95, 1.0], [0, 1, 1, 1])
    assert r.count.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert r.accuracy[1] == 0.5
    assert np.isnan(r.accuracy[0])
    assert expected_calibration_error([0.15, 0.15, 0.95, 1.0], [0, 1, 1, 1]) == pytest.approx(0.5 * 0.35 + 0.5 * 0.025)
    assert expected_calibration_error([1.0, 1.0], [1, 1]) == 0
    with pytest.raises(BadInput):
        reliability([1.2], [1])


def test_brier_by_hand():
    assert brier([[0.8, 0.2], [0.4, 0.6]], [0, 0]) == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2)
    assert brier([0.9, 0.2], [1, 0]) == pytest.approx((0.01 + 0.04) / 2)
