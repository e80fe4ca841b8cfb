"""LT-SFT's selector: an exact global threshold, ties, iterations, memory, refusals."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.errors import BadInput, RunFailed
from pegbox.parts.allocation import Entries, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.select import SELECT
from pegbox.select.change import largest_changes
from pegbox.testing import tiny_llama


def select(model, start, end, taken=None, **options):
    selector = SELECT.validate({"kind": "change", **options})
    stats = {"start": start, "end": end} | ({"taken": taken} if taken else {})
    return selector.select(Anatomy.of(model), dict(model.named_parameters()), stats, torch.Generator())


def pair(seed=0, scale=0.01):
    model = tiny_llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    end = {n: p + scale * torch.randn(p.shape, generator=generator) for n, p in start.items()}
    return model, start, end


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**6), st.data())
def test_the_largest_are_chosen_exactly(sizes, seed, data):
    generator = torch.Generator().manual_seed(seed)
    count = data.draw(st.integers(1, sum(sizes)))
    values = torch.randperm(sum(sizes), generator=generator).double() + 1  # distinct
    start = {str(i): torch.zeros(n, dtype=torch.float64) for i, n in enumerate(sizes)}
    end = dict(zip(start, values.split(sizes)))
    chosen = largest_changes(start, end, count)
    got = torch.cat([end[n][i.long()] for n, i in chosen.items()])
    assert sorted(got.tolist()) == sorted(values.tolist())[-count:]
    assert all(torch.equal(i, i.sort().values) for i in chosen.values())


def test_ties_at_the_threshold_are_all_taken():
    start = {"a": torch.zeros(6), "b": torch.zeros(4)}
    end = {"a": torch.tensor([1.0, 2, 2, -2, 3, 0]), "b": torch.tensor([2.0, -3, 0, 1])}
    chosen = largest_changes(start, end, 3)
    assert chosen["a"].tolist() == [1, 2, 3, 4]
    assert chosen["b"].tolist() == [0, 1]


def test_unmoved_entries_fill_up_by_position_only():
    start = {"a": torch.zeros(6), "b": torch.zeros(4)}
    end = {"a": torch.tensor([0.0, 0, 1, 0, 0, 0]), "b": torch.tensor([0.0, 0, 0, 5])}
    chosen = largest_changes(start, end, 5)
    assert chosen["a"].tolist() == [0, 1, 2, 3]
    assert chosen["b"].tolist() == [3]
    everything = largest_changes(start, end, 10)
    assert sum(i.numel() for i in everything.values()) == 10


def test_a_bad_guess_from_the_sample_costs_only_time(monkeypatch):
    from pegbox.select import change

    start, end = {"a": torch.zeros(100)}, {"a": torch.arange(100.0)}
    monkeypatch.setattr(change, "_bracket", lambda *_: (50.0, 60.0))
    assert largest_changes(start, end, 3)["a"].tolist() == [97, 98, 99]


def test_large_tensors_match_a_plain_sort():
    generator = torch.Generator().manual_seed(1)
    start = {str(i): torch.randn(400_000, generator=generator) for i in range(3)}
    end = {n: t + torch.randn(t.shape, generator=generator).pow(3) for n, t in start.items()}
    every = torch.cat([(end[n] - start[n]).abs() for n in start])
    for count in (1, 5000, 600_000, 1_000_000):
        threshold = every.topk(count).values[-1]
        chosen = largest_changes(start, end, count)
        assert sum(i.numel() for i in chosen.values()) == int((every >= threshold).sum())


def test_no_list_of_numbers_and_little_memory():
    start = {"a": torch.zeros(2_000_000)}
    end = {"a": torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))}
    tracemalloc.start()
    largest_changes(start, end, 20_000)
    _, peak = tracemalloc.get_traced_memory()  # numpy's and Python's own
    tracemalloc.stop()
    assert peak < 4 * 2_000_000 * 1.1


def test_iterations_add_up_to_n_times_k_over_n():
    model, start, end = pair()
    first = select(model, start, end, budget={"count": 1001}, iterations=2)
    assert sum(c.index.numel() for c in first.values()) == 500
    _, _, later = pair(seed=1)
    second = select(model, start, later, taken=first, budget={"count": 1001}, iterations=2)
    assert sum(c.index.numel() for c in second.values()) == 1000
    for name, choice in first.items():
        assert torch.isin(choice.index, second[name].index).all()


def test_defaults_leave_norms_and_head_out():
    model, start, end = pair()
    allocation = select(model, start, end)
    assert set(allocation) <= {n for n in start if "norm" not in n and "lm_head" not in n}
    assert sum(c.index.numel() for c in allocation.values()) == int(
        0.01 * sum(p.numel() for n, p in start.items() if "norm" not in n and "lm_head" not in n)
    )
    dense = select(model, start, end, dense=["head"], maskable=["mlp"])
    assert dense["lm_head.weight"] == Whole()
    assert all("mlp" in n for n in dense if n != "lm_head.weight")


def test_the_scope_is_global():
    model, start, end = pair()
    name = "model.layers.1.mlp.up_proj.weight"
    end[name] = start[name] + 1
    allocation = select(model, start, end, budget={"count": 2048})
    assert set(allocation) == {name}
    assert isinstance(allocation[name], Entries)


def test_count_gives_the_whole_budget():
    with torch.device("meta"):
        model = tiny_llama()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    counts = SELECT.validate({"kind": "change", "budget": {"count": 777}}).count(Anatomy.of(model), shapes)
    assert sum(counts.values()) == 777


def test_it_says_which_stage_it_wants():
    wanted = SELECT.validate({"kind": "change", "of": "warm"}).statistics()
    assert wanted.weights_of == {"start": ("warm", "start"), "end": ("warm", "end")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": {"count": 0}}, "count"),
        ({"budget": {"count": 10**9}}, "only .* entries are maskable"),
        ({"budget": {"density": 0}}, "density"),
        ({"budget": {"density": 1.2}}, "density"),
        ({"iterations": 0}, "iterations"),
        ({"budget": {"count": 3}, "iterations": 4}, "more than the 3 entries"),
        ({"maskable": ["nothing_like_it"]}, "matches no module"),
        ({"maskable": []}, "No module was named"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        select(*pair(), **options)


def test_more_than_is_left_and_divergence_are_refused():
    model, start, end = pair()
    with pytest.raises(BadInput, match="only 2 are left"):
        largest_changes({"a": torch.zeros(4)}, {"a": torch.ones(4)}, 3, {"a": torch.tensor([0, 1])})
    end["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(RunFailed, match=r"up_proj.*diverged"):
        select(model, start, end)
    with pytest.raises(BadInput, match="protocol 'staged'"):
        SELECT.validate("change").select(Anatomy.of(model), start, None, torch.Generator())
