"""The allotment of a budget: exact counts, nested masks, thresholds, and the search over every level."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.select.allotment import Site, allot, grid, module_cost, nearest, ranked, split_at, totals

CASES = st.tuples(st.integers(0, 10_000), st.integers(1, 6), st.booleans())


def world(seed, count, ties):
    """Scores and sites of `count` matrices and vectors."""
    draw = torch.Generator().manual_seed(seed)
    scores, sites = {}, []
    for i in range(count):
        if i % 2:
            n = int(torch.randint(1, 12, (), generator=draw))
            score, site = torch.rand(n, generator=draw), Site(f"v{i}", n, "vector", n)
        else:
            rows, columns = torch.randint(2, 9, (2,), generator=draw).tolist()
            score = torch.rand(rows, columns, generator=draw)
            site = Site(f"m{i}", rows * columns, "matrix", module_cost("lora", 1, columns, rows))
        scores[site.tensor] = (score * 4).round() if ties else score
        sites.append(site)
    return scores, sites


def by_hand(scores, tau):
    """The tau largest, ties to the first tensor and position."""
    flat = [(-float(v), t, p) for t, s in enumerate(scores.values()) for p, v in enumerate(s.flatten())]
    return sorted(flat)[:tau]


@given(CASES)
def test_exactly_tau_entries_ties_by_index(case):
    """|top-tau mask| == tau exactly, ties broken by index."""
    scores, _ = world(*case)
    total = sum(s.numel() for s in scores.values())
    for tau in {1, total // 2 + 1, total}:
        tensors, positions = ranked(scores, tau)
        assert list(zip(tensors.tolist(), positions.tolist())) == [(t, p) for _, t, p in by_hand(scores, tau)]


@given(CASES)
def test_masks_are_nested(case):
    """For tau1 < tau2 the first set lies within the second."""
    scores, _ = world(*case)
    total = sum(s.numel() for s in scores.values())
    small, large = (set(zip(*(t.tolist() for t in ranked(scores, tau)))) for tau in (total // 3 + 1, total))
    assert small <= large


@given(CASES)
def test_the_totals_of_all_levels_at_once(case):
    """What every further entry adds, summed, is the total of the allocation at that level."""
    scores, sites = world(*case)
    whole = sum(s.numel() for s in scores.values())
    tensors, _ = ranked(scores, whole)
    found = totals(tensors, sites, 3.0, 2.0, extra=5)
    for tau in range(whole + 1):
        counts = torch.bincount(tensors[:tau], minlength=len(sites)).tolist()
        assert int(found[tau]) == split_at(tau, counts, sites, 3.0, 2.0, 5).total


@given(CASES, st.integers(1, 60))
def test_no_level_comes_nearer_to_the_budget(case, budget):
    scores, sites = world(*case)
    whole = sum(s.numel() for s in scores.values())
    budget = min(budget, whole)
    split, entries = allot(scores, sites, budget=budget, alpha=3.0, beta=2.0)
    every = totals(ranked(scores, whole)[0], sites, 3.0, 2.0)[1:]
    assert abs(split.total - budget) == int((every - budget).abs().min())
    assert sum(e.numel() for e in entries.values()) == split.tau


def test_thresholds():
    """m exactly equal to cost / alpha counts; alpha -> infinity: any selected entry; alpha tiny: none; beta alike."""
    matrix, vector = Site("m", 100, "matrix", 40), Site("v", 10, "vector", 10)
    assert split_at(4, [4], [matrix], alpha=10, beta=5).structured == (True,)
    assert split_at(3, [3], [matrix], alpha=10, beta=5).structured == (False,)
    assert split_at(2, [2], [vector], alpha=10, beta=5) == split_at(2, [2], [vector], alpha=1, beta=5)
    assert split_at(2, [2], [vector], alpha=10, beta=5).total == 10
    assert split_at(1, [1], [vector], alpha=10, beta=5).total == 1
    huge, tiny = 1e15, 1e-15
    assert split_at(2, [1, 1], [matrix, vector], huge, huge).structured == (True, True)
    assert split_at(2, [0, 0], [matrix, vector], huge, huge).structured == (False, False)
    assert split_at(20, [10, 10], [matrix, vector], tiny, tiny).structured == (False, False)


def test_costs_of_modules():
    """LoRA r (in + out); adapter 2 r out + r + out."""
    assert module_cost("lora", 8, 768, 3072) == 8 * (768 + 3072)
    assert module_cost("adapter", 8, 768, 3072) == 2 * 8 * 3072 + 8 + 3072


def test_the_official_grid():
    assert grid(608)[:2] == [math.ceil(12.16), math.ceil(24.32)]
    assert len(grid(1e6)) == 79
    assert grid(1e6)[-1] == 1_580_000


def test_the_nearest_total_the_later_of_two_and_none_beyond_zero():
    assert nearest([8, 12, 12, 20], 10) == 2
    assert nearest([21, 30], 10) is None
    assert nearest([20], 10) == 0
    assert nearest([], 10) is None


def test_a_sample_that_misjudges_costs_a_second_pass_only(monkeypatch):
    import pegbox.select.allotment as module

    scores, _ = world(3, 5, False)
    wanted = ranked(scores, 20)
    monkeypatch.setattr(module, "_bound", lambda *a: 2.0)
    again = ranked(scores, 20)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"budget": 0}, "between 1 and"),
        ({"budget": 10**6}, "between 1 and"),
        ({"tau": 5, "alpha": 0}, "must be positive"),
        ({"tau": 5, "beta": -1.0}, "must be positive"),
        ({}, "either a level"),
        ({"budget": 20, "search": "grid", "levels": [10**6]}, "grid's first level"),
        ({"budget": 1, "search": "grid", "levels": [30]}, "nearer"),
    ],
)
def test_budgets_without_meaning_are_refused(options, word):
    """budget <= 0, larger than the candidates; alpha or beta <= 0."""
    scores, sites = world(1, 4, False)
    with pytest.raises(BadInput, match=word):
        allot(scores, sites, **options)
