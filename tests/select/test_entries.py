"""Selectors of single entries: counts, scopes, brute force, low rank, blocks, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.indexsets import overlap, to_mask
from pegbox.select import SELECT
from pegbox.select.low_rank_magnitude import block_scores, expand_blocks
from pegbox.testing import tiny_llama

KINDS = ("random", "magnitude", "low_rank_magnitude")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pick(weight, seed=0, **block):
    return SELECT.validate(block).select(None, {"w": weight}, None, generator(seed))["w"].index


def decaying(m, n, power=1.0, seed=0):
    g = generator(seed)
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64))
    return (u * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power) @ v.T


def brute_force(weight, rank, count):
    u, s, vh = np.linalg.svd(weight.numpy())
    reduced = np.abs((u[:, :rank] * s[:rank]) @ vh[:rank]).ravel()
    order = sorted(range(reduced.size), key=lambda i: (-reduced[i], i))
    return sorted(order[:count])


@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("budget", [1, 2, 4, 20])
def test_principal_weights_are_the_brute_force_ones(rank, budget):
    weight = torch.randn(9, 13, generator=generator(1), dtype=torch.float64)
    index = pick(weight, kind="low_rank_magnitude", filter_rank=rank, budget={"rank": budget})
    count = min((9 + 13) * budget, 9 * 13)
    assert index.numel() == count
    assert index.dtype == torch.int32
    assert index.tolist() == brute_force(weight, rank, count)


def test_at_full_rank_it_is_selection_by_magnitude():
    weight = torch.randn(9, 13, generator=generator(2), dtype=torch.float64)
    budget = {"density": 0.2}
    full = pick(weight, kind="low_rank_magnitude", filter_rank=9, budget=budget)
    assert torch.equal(full, pick(weight, kind="magnitude", budget=budget))
    with pytest.warns(UserWarning, match="selection by magnitude"):
        clipped = pick(weight, kind="low_rank_magnitude", filter_rank=99, budget=budget)
    assert torch.equal(clipped, full)


def test_smallest_magnitudes():
    weight = torch.tensor([[3.0, -0.1], [0.2, -5.0]])
    assert pick(weight, kind="magnitude", which="smallest", budget={"count": 2}).tolist() == [1, 2]
    assert pick(weight, kind="magnitude", budget={"count": 2}).tolist() == [0, 3]


@pytest.mark.parametrize("which", ["largest", "smallest", "random", "hybrid"])
def test_modes_of_the_reduction_keep_the_singular_values_they_name(which):
    weight = decaying(8, 6)
    block = {"kind": "low_rank_magnitude", "which": which, "filter_rank": 3, "budget": {"count": 10}}
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    kept = {"largest": [0, 1, 2], "smallest": [3, 4, 5], "hybrid": [0, 1, 5]}.get(which)
    index = pick(weight, **block)
    if kept is None:
        chosen = {tuple(pick(weight, seed=i, **block).tolist()) for i in range(8)}
        assert len(chosen) > 1
        assert torch.equal(index, pick(weight, **block))
        return
    reduced = ((u[:, kept] * s[kept]) @ vh[kept]).abs().flatten()
    assert index.tolist() == sorted(reduced.topk(10).indices.tolist())


def test_randomized_and_exact_agree_where_the_spectrum_decays():
    weight = decaying(160, 120)
    block = {"kind": "low_rank_magnitude", "filter_rank": 16, "budget": {"density": 0.05}}
    exact, sketched = (pick(weight, svd=method, **block) for method in ("exact", "randomized"))
    assert overlap(exact, sketched) >= 0.95


def test_blocks_are_chosen_by_their_sum():
    score = torch.arange(30.0).view(5, 6)
    sums = block_scores(score, 4)
    assert sums.shape == (2, 2)
    assert sums[0, 0] == score[:4, :4].sum()
    assert sums[1, 1] == score[4:, 4:].sum()
    mask = to_mask(expand_blocks(torch.tensor([0, 3]), 4, (5, 6)), (5, 6))
    want = torch.zeros(5, 6, dtype=torch.bool)
    want[:4, :4] = want[4:, 4:] = True
    assert torch.equal(mask, want)
    weight = torch.randn(16, 12, generator=generator(3))
    select = SELECT.validate({"kind": "low_rank_magnitude", "block": 4, "filter_rank": 4, "budget": {"count": 50}})
    index = select.select(None, {"w": weight}, None, generator())["w"].index
    assert index.numel() == select.count(None, {"w": (16, 12)})["w"] == 48
    assert (to_mask(index, (16, 12)).view(4, 4, 3, 4).float().mean((1, 3)) % 1 == 0).all()


def test_stable_rank_sets_both_ranks():
    weight = torch.eye(6)[:, :6] * 2.0
    assert pick(weight, kind="low_rank_magnitude", stable_rank=True).numel() == 36  # stable rank 6: all
    weight = torch.outer(torch.ones(8), torch.arange(1.0, 7.0))
    assert pick(weight, kind="low_rank_magnitude", stable_rank=True).numel() == 14  # stable rank 1: m + n


def test_convolutions_and_vectors_are_seen_as_matrices():
    conv, bias = torch.randn(4, 3, 2, 2, generator=generator(4)), torch.randn(7, generator=generator(5))
    select = SELECT.validate({"kind": "low_rank_magnitude", "filter_rank": 2, "budget": {"count": 5}})
    chosen = select.select(None, {"conv": conv, "bias": bias}, None, generator())
    flat = select.select(None, {"conv": conv.view(4, 12)}, None, generator())
    assert torch.equal(chosen["conv"].index, flat["conv"].index)
    assert chosen["bias"].index.tolist() == sorted(bias.abs().topk(5).indices.tolist())


def test_bfloat16_weights_are_reduced_in_float32():
    weight = decaying(12, 10).to(torch.bfloat16)
    block = {"kind": "low_rank_magnitude", "filter_rank": 2, "budget": {"count": 20}}
    assert torch.equal(pick(weight, **block), pick(weight.float(), **block))


@pytest.mark.parametrize("kind", KINDS)
@given(m=st.integers(1, 9), n=st.integers(1, 9), density=st.floats(0.01, 1.0), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_count_from_shapes_is_the_count_of_the_selection(kind, m, n, density, seed):
    select = SELECT.validate({"kind": kind, "budget": {"density": density}})
    weight = torch.randn(m, n, generator=generator(seed))
    index = select.select(None, {"w": weight}, None, generator(seed))["w"].index
    assert index.numel() == select.count(None, {"w": (m, n)})["w"]
    assert (index[1:] > index[:-1]).all()
    assert 0 <= int(index[0]) <= int(index[-1]) < m * n


@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_scope_keeps_the_total_and_lets_tensors_differ(kind):
    model = tiny_llama()
    weights = {n: p.detach() * (10.0 if "layers.1" in n else 1.0) for n, p in model.named_parameters()}
    anatomy = Anatomy.of(model)
    counts = {}
    for scope in ("per_tensor", "per_block", "global"):
        block = {"kind": kind, "scope": scope, "budget": {"density": 0.1}}
        if kind == "low_rank_magnitude":
            block["filter_rank"] = 4
        chosen = SELECT.validate(block).select(anatomy, weights, None, generator())
        counts[scope] = {n: c.index.numel() for n, c in chosen.items()}
        predicted = SELECT.validate(block).count(anatomy, {n: tuple(w.shape) for n, w in weights.items()})
        assert sum(predicted.values()) == sum(counts[scope].values())
        assert set(predicted) == set(chosen)
    assert len(counts["per_tensor"]) == 14  # no embedding, no head, no norm
    second = {scope: sum(k for n, k in c.items() if "layers.1" in n) for scope, c in counts.items()}
    total = sum(counts["global"].values())
    assert abs(second["per_block"] - total / 2) <= 1
    if kind != "random":
        assert second["global"] > 0.9 * total


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_tensors_has_no_influence(kind):
    weights = {name: torch.randn(6, 5, generator=generator(i)) for i, name in enumerate("abc")}
    select = SELECT.validate({"kind": kind, "budget": {"density": 0.3}})
    forward = select.select(None, weights, None, generator(7))
    backward = select.select(None, dict(reversed(weights.items())), None, generator(7))
    assert forward.digest() == backward.digest()
    if kind == "random":
        assert forward.digest() != select.select(None, weights, None, generator(8)).digest()


def test_targets_are_words():
    model = tiny_llama()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    select = SELECT.validate({"kind": "magnitude", "target_modules": "mlp"})
    chosen = select.select(Anatomy.of(model), weights, None, generator())
    assert {n.split(".")[-2] for n in chosen} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"budget": {"rank": 0}}, r"rank"),
        ({"budget": {"density": 0}}, r"density"),
        ({"budget": {"density": 1.01}}, r"density"),
        ({"budget": {"density": 0.1, "count": 3}}, "exactly one way"),
        ({"budget": {}}, "exactly one way"),
        ({"budget": {"bytes": 7}}, r"bytes"),
        ({"filter_rank": 0}, r"filter_rank"),
        ({"filter_rank": -1}, r"filter_rank"),
        ({"which": "biggest"}, r"which"),
        ({"svd": "fast"}, r"svd"),
        ({"schedule": {"every": 0}}, r"every"),
        ({"schedule": {"mode": "sometimes"}}, r"mode"),
        ({"schedule": {"mode": "accumulative", "every": 2}}, "limit"),
        ({"schedule": {"mode": "fixed", "limit": {"count": 3}}}, "no meaning"),
        ({"block": 4, "scope": "global", "filter_rank": 2}, "block"),
        ({"stable_rank": True, "filter_rank": 2}, "stable_rank"),
        ({"scope": "global"}, "filter_rank must be given"),
        ({"filter_rnk": 2}, "Did you mean 'filter_rank'"),
    ],
)
def test_wrong_options_are_refused(block, message):
    with pytest.raises(BadInput, match=message):
        SELECT.validate({"kind": "low_rank_magnitude", **block})


@pytest.mark.parametrize("kind", ["magnitude", "low_rank_magnitude"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind, bad):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(BadInput, match=r"w.*NaN"):
        pick(weight, kind=kind)


def test_nothing_to_train_is_refused():
    model = tiny_llama()
    weights = {"model.norm.weight": model.model.norm.weight.detach()}
    with pytest.raises(BadInput, match="covers none"):
        SELECT.validate("magnitude").select(Anatomy.of(model), weights, None, generator())


def test_a_limit_below_the_start_is_refused():
    schedule = {"mode": "accumulative", "every": 5, "limit": {"count": 3}}
    with pytest.raises(BadInput, match=r"limit allows 3 .* first 10"):
        pick(torch.ones(5, 5), kind="magnitude", budget={"count": 10}, schedule=schedule)


def test_stable_rank_has_no_count_from_shapes():
    with pytest.raises(BadInput, match="not from their shapes"):
        SELECT.validate({"kind": "low_rank_magnitude", "stable_rank": True}).count(None, {"w": (3, 4)})
