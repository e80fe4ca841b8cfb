"""Merges in closed form: TIES' three steps, masks, soups, interpolation; and choosing by scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.weights import WEIGHTS
from pegbox.weights.merges import combine_elected, elect
from pegbox.weights.selection import (
    MULTI_TASK_GRID,
    SINGLE_TASK_GRID,
    TIES_GRID,
    greedy_soup,
    pareto_front,
    pick,
    trade_off,
)


def vectors(*rows):
    base = {"layers.0.w": torch.zeros(len(rows[0]), dtype=torch.float64)}
    return base, [{"layers.0.w": torch.tensor(row, dtype=torch.float64)} for row in rows]


def run(kind, base, tuned, **options):
    return dict(WEIGHTS.validate({"kind": kind, **options}).apply(base, tuned, None))["layers.0.w"].tolist()


def test_ties_by_hand():
    base, tuned = vectors([3.0, -1.0, 2.0, 0.1], [1.0, 2.0, -2.0, 0.2], [-5.0, 2.0, 1.0, 0.3])
    # sums -1, 3, 1, .6 -> signs - + + +; means of what agrees
    assert run("ties", base, tuned, keep=100) == pytest.approx([-5.0, 2.0, 1.5, 0.2])
    assert run("ties", base, tuned, keep=100, combine="sum") == pytest.approx([-5.0, 4.0, 3.0, 0.6])
    assert run("ties", base, tuned, keep=100, combine="max") == pytest.approx([-5.0, 2.0, 2.0, 0.3])


def test_ties_on_cancelling_entries_takes_the_majority_of_signs():
    base, tuned = vectors([1.0, 1.0, 1.0], [1.0, 1.0, -1.0])
    assert run("ties", base, tuned, keep=100) == [1.0, 1.0, 1.0]
    base, tuned = vectors([-1.0, -1.0, 1.0], [-1.0, -1.0, -1.0])
    assert run("ties", base, tuned, keep=100) == [-1.0, -1.0, -1.0]


def test_trim_keeps_one_more_than_its_share():
    base, tuned = vectors([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0])
    kept = [v for v in run("ties", base, tuned, keep=20) if v]
    assert kept == [-8.0, 9.0, -10.0]  # int(10 * .2) + 1


def test_dare_drops_a_share_and_rescales_the_rest():
    """drop 0 is task arithmetic; the rest is divided by what is left; the mean over draws is the whole vector."""
    base, tuned = vectors([1.0] * 4000, [2.0] * 4000)
    assert run("dare", base, tuned, drop=0.0) == run("task_arithmetic", base, tuned)
    one = run("dare", base, tuned[:1], drop=0.75)
    assert set(one) == {0.0, 4.0}
    assert sum(v == 0 for v in one) / 4000 == pytest.approx(0.75, abs=0.03)
    assert set(run("dare", base, tuned[:1], drop=0.75, rescale=False)) == {0.0, 1.0}
    mean = sum(run("dare", base, tuned, drop=0.5)) / 4000
    assert mean == pytest.approx(3.0, abs=0.15)
    assert run("dare", base, tuned, then="average", drop=0.0) == [1.5] * 4000


def test_dare_draws_by_seed_task_and_tensor():
    base, tuned = vectors([1.0] * 50, [1.0] * 50)
    assert run("dare", base, tuned, drop=0.5) == run("dare", base, tuned, drop=0.5)
    assert run("dare", base, tuned, drop=0.5) != run("dare", base, tuned, drop=0.5, seed=1)
    assert set(run("dare", base, tuned, drop=0.5)) == {0.0, 2.0, 4.0}  # the two tasks drop other entries
    together = run("dare", base, tuned[:1], drop=0.5)
    again = run("dare", base, [tuned[0], {"layers.0.w": torch.zeros(50, dtype=torch.float64)}], drop=0.5)
    assert together == again


def test_dare_then_ties_elects_among_what_is_left():
    base, tuned = vectors([3.0, -1.0], [1.0, 2.0])
    assert run("dare", base, tuned, drop=0.0, then="ties") == [2.0, 2.0]
    with pytest.raises(BadInput, match="less than 1"):
        run("dare", base, tuned, drop=1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=12), st.integers(1, 4))
def test_ties_of_agreeing_signs_is_the_sum(values, tasks):
    base, tuned = vectors(*[[v * (t + 1) for v in values] for t in range(tasks)])
    expected = [v * sum(range(1, tasks + 1)) for v in values]
    assert run("ties", base, tuned, keep=100, combine="sum") == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3), min_size=4, max_size=20), st.integers(1, 99))
def test_ties_of_one_task_is_its_trimmed_vector(values, keep):
    base, tuned = vectors(values)
    d = len(values)
    limit = sorted(map(abs, values))[d - int(d * keep / 100) - 1]
    expected = [v if abs(v) >= limit else 0.0 for v in values]
    for combine in ("mean", "sum", "max"):
        assert run("ties", base, tuned, keep=keep, combine=combine) == pytest.approx(expected)


def test_elected_zero_counts_the_negative_values():
    values = [torch.tensor([1.0]), torch.tensor([-1.0])]
    assert elect(values).item() == 0
    assert combine_elected(values, torch.zeros(1), "sum").item() == -1.0


def test_consensus_ends():
    base, tuned = vectors([1.0, 0.5, -1.0], [0.0, 2.0, 1.0])
    plain = run("task_arithmetic", base, tuned)
    assert run("consensus", base, tuned, tasks=0) == plain == [1.0, 2.5, 0.0]
    assert run("consensus", base, tuned, tasks=3) == [0.0, 0.0, 0.0]
    # entry 0: only task 1 moved it; |1| > .4 |0| and not |0| > .4 |1|
    assert run("consensus", base, tuned, tasks=2)[0] == 0.0
    assert run("consensus", base, tuned, tasks=1)[0] == 1.0


def test_tall_and_magnitude_masks_select_by_task():
    base, tuned = vectors([1.0, 0.0, 0.0], [0.0, 2.0, 0.1])
    assert run("tall", base, tuned, task=0) == [1.0, 0.0, 0.0]
    assert run("tall", base, tuned, task=1) == [0.0, 2.0, 0.1]
    assert run("magnitude_mask", base, tuned, task=1, keep=1) == [0.0, 2.0, 0.0]
    with pytest.raises(BadInput, match="task: 2 of 2"):
        run("tall", base, tuned, task=2)


def test_averages_soups_and_interpolation():
    base, tuned = vectors([1.0, 2.0], [3.0, -2.0])
    assert run("average", base, tuned) == [2.0, 0.0]
    assert run("rewarded_soup", base, tuned, preference=[0.25, 0.75]) == [2.5, -1.0]
    assert run("rewarded_soup", base, tuned, preference=[1.0, 0.0]) == [1.0, 2.0]
    assert run("interpolate", base, tuned[:1], amount=0.25) == [0.25, 0.5]
    assert run("task_arithmetic", base, tuned, scaler={"kind": "constant", "value": 0.5}) == [2.0, 0.0]
    with pytest.raises(BadInput, match="sum to 1"):
        run("rewarded_soup", base, tuned, preference=[0.5, 0.2])
    with pytest.raises(BadInput, match="one tuned model"):
        run("interpolate", base, tuned)


def test_inputs_are_left_alone():
    base, tuned = vectors([1.0, -2.0, 0.5], [3.0, 2.0, -0.5])
    before = [t["layers.0.w"].clone() for t in tuned]
    for kind, options in [("ties", {}), ("consensus", {}), ("tall", {"task": 0}), ("magnitude_mask", {"task": 0})]:
        run(kind, base, tuned, **options)
        assert base["layers.0.w"].tolist() == [0.0, 0.0, 0.0]
        assert all(torch.equal(t["layers.0.w"], b) for t, b in zip(tuned, before, strict=True))


# ---- choosing


def test_grids_and_order_of_equals():
    assert SINGLE_TASK_GRID[0] == 1.0
    assert SINGLE_TASK_GRID[-1] == 0.0
    assert len(MULTI_TASK_GRID) == 10
    assert TIES_GRID[-1] == 1.5
    assert pick(SINGLE_TASK_GRID, lambda a: 1.0).best == 1.0
    assert pick([1, 2, 3], lambda a: -abs(a - 2)).best == 2
    with pytest.raises(BadInput, match="not a number"):
        pick([1], lambda a: float("nan"))
    with pytest.raises(BadInput, match="empty"):
        pick([], lambda a: 1.0)


def test_trade_off_by_hand_and_its_refusals():
    assert trade_off(0.8, 0.8, {"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.5}) == pytest.approx(2.75)
    with pytest.raises(BadInput, match="share"):
        trade_off(0.8, 0.8, {"a": 0.5}, {"a": 0.0})
    with pytest.raises(BadInput, match="for each task"):
        trade_off(0.8, 0.8, {}, {})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_greedy_soup_never_scores_below_its_best_member(alone, rng):
    memory: dict = {}

    def score(members):
        if len(members) == 1:
            return alone[members[0]]
        return memory.setdefault(tuple(sorted(members)), rng.uniform(-1, 1))

    chosen = greedy_soup(len(alone), score)
    assert chosen.score >= max(alone)
    assert chosen.score == score(chosen.best)


def test_pareto_front():
    assert pareto_front([(1, 5), (2, 4), (2, 3), (0, 6), (2, 4)]) == [0, 1, 3]
    assert pareto_front([]) == []
