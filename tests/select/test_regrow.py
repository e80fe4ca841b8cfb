"""Drop and grow: what SpIEL's selection must hold about exchanges, schedules, budgets and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.capabilities import refusals
from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.indexsets import everything, index_dtype, intersect, to_mask
from pegbox.parts.moves import Held, inactive, replaced
from pegbox.parts.packed import Share
from pegbox.recipe import load_recipe
from pegbox.select import SELECT
from pegbox.select.regrow import RegrowSchedule, by_gradient, by_momentum, events, grow_at_random, rate_at
from pegbox.testing import tiny_llama

SHAPE = (6, 7)


def regrow(**options):
    return SELECT.validate({"kind": "regrow", **options})


def drawn(seed, k, total=42):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(total, generator=generator)[:k].sort().values.to(torch.int32)
    return index, torch.randn(k, generator=generator), generator


@given(st.integers(0, 10_000), st.integers(1, 42), st.floats(0, 1), st.sampled_from(["gradient", "momentum", "random"]))
def test_an_exchange_keeps_the_count_and_distinct_positions(seed, k, rate, rule):
    """4. k stays, positions are distinct and in range, what is dropped has the smallest |value|."""
    index, values, generator = drawn(seed, k)
    n = int(k * rate)
    if rule == "gradient":
        gradient = torch.randn(42, generator=generator)
        candidates = gradient.abs().topk(k).indices.sort().values.to(torch.int32)
        moved = by_gradient(index, values, n, candidates, gradient[candidates.long()])
    elif rule == "momentum":
        moved = by_momentum(index, values, n, torch.rand(6, generator=generator), torch.rand(7, generator=generator))
    else:
        moved = grow_at_random(index, values, n, SHAPE, generator)
    new = replaced(index, moved.dropped[: moved.grown.numel()], moved.grown)
    assert new.numel() == k == new.unique().numel()
    assert int(new.min()) >= 0
    assert int(new.max()) < 42
    assert intersect(moved.grown.sort().values, index).numel() == 0
    smallest = set(index[values.abs().argsort()[:n]].tolist())
    assert set(moved.dropped.tolist()) <= smallest


def test_by_gradient_by_hand():
    """Dropped 1 and 5; 5 is also the second best candidate, so it is left alone; 8 takes the place of 1."""
    index = torch.tensor([1, 3, 5, 7], dtype=torch.int32)
    values = torch.tensor([0.1, 1.0, -0.2, 2.0])
    candidates = torch.tensor([3, 5, 8, 9], dtype=torch.int32)
    moved = by_gradient(index, values, 2, candidates, torch.tensor([9.0, -3.0, 4.0, 1.0]))
    assert (moved.dropped.tolist(), moved.grown.tolist()) == ([1], [8])


def test_fewer_candidates_leave_the_larger_slots_as_they_are():
    index = torch.arange(4, dtype=torch.int32)
    values = torch.tensor([0.3, 0.1, 0.2, 0.4])
    moved = by_gradient(index, values, 4, torch.tensor([1, 2, 3, 9], dtype=torch.int32), torch.tensor([1.0, 2, 3, 4]))
    assert (moved.dropped.tolist(), moved.grown.tolist()) == ([0], [9])  # 1, 2 and 3 are dropped and regrown


@given(st.integers(0, 1000), st.integers(1, 41))
def test_momentum_scores_are_the_outer_product_and_never_pick_an_active_entry(seed, k):
    """8. R_i C_j on untrained positions, best first."""
    index, values, generator = drawn(seed, k)
    rows, columns = torch.rand(6, generator=generator), torch.rand(7, generator=generator)
    n = min(k, 42 - k)
    moved = by_momentum(index, values, k, rows, columns)
    score = torch.outer(rows, columns).flatten()
    score[to_mask(index, (42,))] = -torch.inf
    assert torch.equal(score[moved.grown.long()], score.topk(n).values)
    assert intersect(moved.grown.sort().values, index).numel() == 0


@given(st.integers(0, 1000), st.integers(0, 41))
def test_positions_by_rank_outside_an_index(seed, k):
    index, _, _ = drawn(seed, k)
    want = (~to_mask(index, (42,))).nonzero().flatten()
    assert torch.equal(inactive(index, torch.arange(42 - k), (42,)).long(), want)


@given(st.integers(2, 30), st.data(), st.integers(1, 200))
def test_a_training_does_what_the_schedule_says_while_it_is_of_use(every, data, total):
    """5. It moves at every event but one after the last update, and watches only where an event follows."""
    schedule = {"every": every, "accumulate": data.draw(st.integers(1, every - 1))}
    select = regrow(schedule=schedule)
    found = events(total, select.schedule)
    selects = [e[1] for e in found if e[0] == "select"]
    assert [t for t in range(total + 1) if select.due(t, total)] == [t for t in selects if t < total]
    starts = [t for t in range(total) if select.watches(t, total)]
    assert starts == [e[1] for e in found if e[0] == "start" and any(e[1] < t < total for t in selects)]


def test_gradients_of_now_are_watched_for_one_update_only():
    select = regrow(growth="gradient", schedule={"every": 5, "accumulate": 2})
    assert [t for t in range(20) if select.watches(t, 20)] == [1, 6, 11, 16]
    assert [t for t in range(20) if select.due(t, 20)] == [2, 7, 12, 17]
    for growth in ("random", "momentum"):
        assert not any(regrow(growth=growth).watches(t, 100) for t in range(100))


def test_the_rate_is_one_at_first_and_falls_to_nothing():
    """5. Rate 1 at t = a (linear); the shares of the rest."""
    linear, cosine = RegrowSchedule(), RegrowSchedule(policy="cosine")
    assert rate_at(5, 100, linear) == 1
    assert rate_at(25, 100, linear) == pytest.approx(0.15)
    assert rate_at(5, 100, cosine) == pytest.approx(0.2 * 0.99384, rel=1e-4)
    assert rate_at(100, 100, linear) == rate_at(100, 100, cosine) == 0
    assert not RegrowSchedule(every=None).moves
    assert events(50, RegrowSchedule(every=None)) == []


# ---- the start


def test_each_tensor_gets_its_share_by_size_of_a_density_of_the_whole_model():
    model = tiny_llama()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    select, anatomy = regrow(budget={"density": 0.02}), Anatomy.of(model)
    counts = select.count(anatomy, shapes)
    whole = sum(p.numel() for p in model.parameters())
    targets = {n: torch.Size(shapes[n]).numel() for n in anatomy.weights("all-linear")}
    assert counts == {n: int(0.02 * whole) * size // sum(targets.values()) for n, size in targets.items()}
    weights = dict(model.named_parameters())
    chosen = select.select(anatomy, weights, None, torch.Generator().manual_seed(1))
    assert {n: c.index.numel() for n, c in chosen.items()} == counts
    of_targets = regrow(budget={"density": 0.02}, density_of="targets").count(anatomy, shapes)
    assert sum(of_targets.values()) < sum(counts.values())
    inside = {n: shapes[n] for n in targets}
    assert select.count(None, Share(inside, whole)) == counts  # PEFT shows the targets alone


def test_a_budget_like_lora_and_a_tensor_too_small_for_a_share():
    shapes = {"a.weight": (8, 6), "b.weight": (2, 1)}
    assert regrow(budget={"rank": 1}).count(None, shapes) == {"a.weight": 15, "b.weight": 0}
    weights = {n: torch.zeros(s) for n, s in shapes.items()}
    assert list(regrow(budget={"count": 9}).select(None, weights, None, torch.Generator())) == ["a.weight"]


# ---- bad input


@pytest.mark.parametrize("density", [0, -0.5, 1.5])
def test_density_outside_its_range(density):
    with pytest.raises(BadInput, match="density"):
        regrow(budget={"density": density})


def test_no_entries_or_more_than_there_are():
    with pytest.raises(BadInput, match="count"):
        regrow(budget={"count": 0})
    shapes = {"a.weight": (4, 4)}
    with pytest.raises(BadInput, match="asks for 17 entries"):
        regrow(budget={"count": 17}).count(None, shapes)
    with pytest.raises(BadInput, match="asks for 0 entries"):
        regrow(budget={"density": 0.01}).count(None, shapes)
    with pytest.raises(BadInput, match="none for any"):
        regrow(budget={"count": 1}).count(None, {"a.weight": (4, 4), "b.weight": (4, 4)})


def test_no_target():
    model = tiny_llama()
    with pytest.raises(BadInput, match="nowhere"):
        regrow(target_modules=("nowhere",)).count(Anatomy.of(model), dict(model.named_parameters()))
    with pytest.raises(BadInput, match="covers none"):
        regrow().count(None, {})


def test_targets_that_are_not_linear():
    model = tiny_llama()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    with pytest.raises(BadInput, match="linear layer"):
        regrow(target_modules=("embed_tokens",)).count(Anatomy.of(model), shapes)
    for shape in ((4, 3, 3, 3), (5,)):
        with pytest.raises(BadInput, match="linear layer"):
            regrow().count(None, {"c.weight": shape})


@pytest.mark.parametrize(
    ("schedule", "word"),
    [
        ({"every": 5, "accumulate": 5}, "longer"),
        ({"every": 20, "accumulate": 0}, "accumulate"),
        ({"rate": 1.5}, "rate"),
        ({"policy": "square"}, "policy"),
    ],
)
def test_schedules_that_can_not_be(schedule, word):
    with pytest.raises(BadInput, match=word):
        regrow(schedule=schedule)


def test_an_unknown_growth_rule():
    with pytest.raises(BadInput, match="growth"):
        regrow(growth="wish")


@pytest.mark.parametrize(
    ("growth", "optim", "word"),
    [
        ("accumulated_gradient", {"kind": "sgd"}, "moments"),
        ("accumulated_gradient", {"kind": "sm3"}, "moments"),
        ("gradient", {"kind": "adafactor"}, "moments"),
        ("momentum", {"kind": "adamw"}, "rows_columns"),
        ("momentum", {"kind": "sm3", "rows_only": True}, "rows_columns"),
        ("random", {"kind": "mezo"}, "directions"),
    ],
)
def test_optimizers_that_do_not_keep_what_growth_reads(growth, optim, word):
    """AG without moments per entry, MA without SM3's accumulators, before anything is loaded."""
    block = load_recipe("spiel").plain() | {"optim": optim, "select": {"kind": "regrow", "growth": growth}}
    assert any(word in reason for reason in refusals(load_recipe(block)))
    for fine in ("aged_adamw", "adamw", "adamw_unscaled_eps"):
        assert not refusals(load_recipe(block | {"select": {"kind": "regrow"}, "optim": {"kind": fine}}))


def held(**options):
    index = everything(3)
    fields = {"name": "w", "shape": (3, 2), "index": index, "values": torch.rand(3), "tuned": lambda: torch.zeros(3, 2)}
    return Held(**{**fields, "absolute": False, "reference": lambda: torch.rand(3), **options})


def test_what_a_move_needs_at_run_time():
    generator = torch.Generator()
    with pytest.raises(Unsupported, match="accumulators"):
        regrow(growth="momentum").relocate(5, 100, {"w": held()}, generator)
    with pytest.raises(BadInput, match="not a matrix"):
        regrow(growth="random").relocate(5, 100, {"w": held(shape=(6,))}, generator)
    with pytest.raises(RunFailed, match="none were watched"):
        regrow().relocate(5, 100, {"w": held()}, generator)
    with pytest.raises(BadInput, match="total number of steps"):
        regrow(growth="random").relocate(5, 0, {"w": held()}, generator)
    assert index_dtype(6) == torch.int32
