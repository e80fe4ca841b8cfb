"""Calibration of class probabilities: hand values, simulated draws, temperature, bad input."""

import numpy as np
import pytest

from pegbox.errors import BadInput
from pegbox.parts.calibration import (
    adaptive_calibration_error,
    calibration,
    classwise_calibration_error,
    expected_calibration_error,
    log_loss,
    maximum_calibration_error,
    reliability,
    scaled_probabilities,
    temperature,
)


def test_hand_values():
    """Four rows in two bins: 0.9, 0.9 (one right), 0.6, 0.6 (both right)."""
    sure, right = [0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1]
    assert expected_calibration_error(sure, right, 4) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    assert maximum_calibration_error([0.9, 0.9, 0.9, 0.6], [1, 0, 0, 1], 4) == pytest.approx(0.9 - 1 / 3)
    assert adaptive_calibration_error(sure, right, 2) == pytest.approx(0.4)
    assert adaptive_calibration_error(sure, right, 1) == pytest.approx(0.0)
    p = [[0.9, 0.1], [0.4, 0.6]]
    assert classwise_calibration_error(p, [0, 1], 10) == pytest.approx((0.1 + 0.4) / 2)
    assert log_loss(p, [0, 1]) == pytest.approx(-(np.log(0.9) + np.log(0.6)) / 2)
    assert log_loss([[1.0, 0.0]], [1]) == np.inf


def test_perfect_probabilities_have_no_error():
    """Labels drawn from the probabilities themselves: below 0.01 on 100 000 rows, and temperature 1."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.5, 1.0, 2.0], size=100_000)
    labels = (p.cumsum(1) < rng.random((len(p), 1))).sum(1)
    found = calibration(p, labels)
    assert max(found.ece, found.adaptive, found.classwise) < 0.01
    assert temperature(p[:20_000], labels[:20_000]) == pytest.approx(1.0, abs=0.05)
    sharp = scaled_probabilities(p, 0.5)
    assert temperature(sharp[:20_000], labels[:20_000]) == pytest.approx(2.0, abs=0.1)
    assert calibration(scaled_probabilities(sharp, 2.0), labels).ece < 0.01


@pytest.mark.parametrize(
    ("p", "labels", "bins", "words"),
    [
        ([[0.5, 0.4]], [0], 15, "sum to 1"),
        ([[1.5, -0.5]], [0], 15, "sum to 1"),
        ([[0.5, 0.5]], [2], 15, "from 0 to 1"),
        ([[0.5, 0.5]], [0], 0, "at least 1 bin"),
        (np.zeros((0, 2)), [], 15, "got"),
        ([[0.5, 0.5]], [0, 1], 15, "got"),
    ],
)
def test_bad_input(p, labels, bins, words):
    with pytest.raises(BadInput, match=words):
        calibration(p, labels, bins)


def test_other_bad_input():
    with pytest.raises(BadInput, match="at least 1 bin"):
        reliability([0.5], [1], 0)
    with pytest.raises(BadInput, match="positive"):
        scaled_probabilities([[0.5, 0.5]], 0.0)
