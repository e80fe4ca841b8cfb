"""Budgets and equal sizes, by hand-made costs and counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pegbox.compare.budget import Budget, Probe, parse_budget, probe_from, steps_within
from pegbox.compare.match import TOLERANCE, match_count
from pegbox.errors import BadInput


def test_budgets_are_read():
    assert parse_budget("tokens") == Budget()
    assert parse_budget("flops=1e15") == Budget("flops", 1e15)


@pytest.mark.parametrize("text", ["hours=3", "flops", "seconds=x", "seconds=-1", "flops=inf"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(BadInput, match="budget"):
        parse_budget(text)


def test_probe_separates_fixed_from_per_step_cost():
    probe = probe_from((2, 10 + 2 * 3), (6, 10 + 6 * 3))
    assert probe == Probe(fixed=10, per_step=3)
    assert steps_within(100, probe, "x") == 30
    with pytest.raises(BadInput, match="one step of 'x'"):
        steps_within(12, probe, "x")


@given(st.integers(1, 200_000))
def test_rank_is_matched_as_nearly_as_integers_allow(wanted):
    def count(rank):
        return int(rank) * 700

    rank, near = match_count(count, 16, wanted, whole=True, most=256)
    others = [r for r in (rank - 1, rank + 1) if 1 <= r <= 256]
    assert all(abs(count(rank) - wanted) <= abs(count(o) - wanted) for o in others)
    assert near == (abs(count(rank) - wanted) <= TOLERANCE * wanted)


@given(st.integers(100, 900_000))
def test_density_is_matched_within_the_tolerance(wanted):
    density, near = match_count(lambda d: int(d * 1_000_000), 0.05, wanted, whole=False, most=1.0)
    assert near
    assert 0 < density <= 1
