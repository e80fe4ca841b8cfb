"""Adam with ages and SM3 on sparse values: bounds, dtypes, seeds, exact states, edits by entry."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pegbox.errors import BadInput, Unsupported
from pegbox.optim.aged_adamw import AgedAdamW, update
from pegbox.optim.base import OPTIM
from pegbox.optim.sparse_sm3 import SparseSM3, accumulate
from pegbox.parts.optimstate import per_entry, remap, seed_moments
from pegbox.parts.parameterinfo import ParameterInfo, attach_info


def values(index, shape, dtype=torch.float32):
    phi = nn.Parameter(torch.zeros(index.numel(), dtype=dtype))
    attach_info(phi, ParameterInfo("w", shape, lambda: index, lambda: torch.zeros_like(phi), "delta"))
    return phi


def stepped(optimizer, p, steps=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@given(st.integers(0, 10_000), st.integers(1, 24), st.booleans())
def test_sm3_bounds_adagrad_from_above(seed, k, rows_only):
    """7. R and C never fall, are at least every nu of their row and column, and nu is at least the sum of squares."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(24, generator=generator)[:k].sort().values
    i, j = index // 6, index % 6
    rows, columns = torch.zeros(4, dtype=torch.float64), None if rows_only else torch.zeros(6, dtype=torch.float64)
    squares = torch.zeros(k, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(k, generator=generator, dtype=torch.float64)
        before = rows.clone(), None if columns is None else columns.clone()
        nu = accumulate(grad, i, j, rows, columns)
        squares += grad**2
        assert (rows >= before[0]).all()
        assert (rows[i] >= nu).all()
        assert (nu >= squares * (1 - 1e-12)).all()
        if columns is not None:
            assert (columns >= before[1]).all()
            assert (columns[j] >= nu).all()


def test_sm3_sets_the_accumulators_of_dense_parameters():
    w = nn.Parameter(torch.zeros(2, 2))
    optimizer = SparseSM3([w], lr=0.1)
    for grad in ([[2.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]):
        w.grad = torch.tensor(grad)
        optimizer.step()
    state = optimizer.state[w]
    assert state["row"].tolist() == [5.0, 0.0]
    assert state["column"].tolist() == [5.0, 0.0]
    bias = nn.Parameter(torch.zeros(3))
    optimizer = SparseSM3([bias])
    stepped(optimizer, bias)
    assert set(optimizer.state[bias]) == {"row"}  # a vector has rows only: Adagrad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ages_advance_whatever_the_dtype_and_come_back_exactly(dtype):
    phi = nn.Parameter(torch.zeros(5, dtype=dtype))
    optimizer = AgedAdamW([phi])
    stepped(optimizer, phi, 300)
    age = optimizer.state[phi]["age"]
    assert age.dtype == torch.float32
    assert (age == 301).all()
    again = AgedAdamW([phi])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(again.state[phi]["age"], age)
    assert again.state[phi]["age"].dtype == torch.float32


def test_with_age_one_for_all_it_is_adam_with_unscaled_eps():
    """The first step moves by lr * sign(g), whatever the betas; the decay comes after it."""
    phi = torch.ones(4, dtype=torch.float64)
    m, v, age = torch.zeros_like(phi), torch.zeros_like(phi), torch.ones(4)
    grad = torch.tensor([1.0, -1.0, 5.0, -5.0], dtype=torch.float64)
    update(phi, grad, m, v, age, lr=0.1, betas=(0.9, 0.999), eps=0.0, weight_decay=0.5)
    torch.testing.assert_close(phi, (1 - 0.1 * grad.sign()) * 0.95, rtol=1e-6, atol=0)  # ages are float32
    assert (age == 2).all()


@pytest.mark.parametrize("kind", ["aged_adamw", "adamw", "adamw_unscaled_eps"])
def test_seeded_moments_give_back_the_means(kind):
    """6. After bias correction with exponent age (or the step count), exactly mean g and mean g^2."""
    phi = values(torch.arange(6, dtype=torch.int32), (2, 3), torch.float64)
    options = {"per_entry_age": True} if kind == "adamw_unscaled_eps" else {}
    optimizer = OPTIM.validate({"kind": kind, **options}).optimizer([{"params": [phi]}])
    stepped(optimizer, phi, 7)
    at, mean = torch.tensor([1, 4]), torch.tensor([0.3, -0.2], dtype=torch.float64)
    square = torch.tensor([0.2, 0.1], dtype=torch.float64)
    others = {k: v.clone() for k, v in optimizer.state[phi].items()}
    seed_moments(optimizer, phi, at, mean, square, 5)
    state, (b1, b2) = optimizer.state[phi], optimizer.param_groups[0]["betas"]
    age = 5 if "age" in state else 7
    torch.testing.assert_close(state["exp_avg"][at] / (1 - b1**age), mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"][at] / (1 - b2**age), square, rtol=1e-12, atol=0)
    rest = torch.tensor([0, 2, 3, 5])
    for key, before in others.items():
        if before.ndim:
            assert torch.equal(state[key][rest], before[rest])
    if "age" in state:
        assert state["age"][at].tolist() == [5, 5]


def test_moments_are_needed_for_seeds():
    phi = values(torch.arange(4, dtype=torch.int32), (2, 2))
    for optimizer in (torch.optim.SGD([phi], 0.1, momentum=0.9), SparseSM3([phi])):
        stepped(optimizer, phi)
        with pytest.raises(Unsupported, match="aged_adamw"):
            seed_moments(optimizer, phi, torch.tensor([0]), torch.ones(1), torch.ones(1), 3)


def test_accumulators_are_never_mistaken_for_state_of_entries():
    """As many entries as rows: the row accumulator has the values' shape, and stays when entries move."""
    phi = values(torch.tensor([0, 1, 5, 7], dtype=torch.int32), (4, 2))
    optimizer = SparseSM3([phi], momentum=0.9)
    stepped(optimizer, phi)
    before = {k: v.clone() for k, v in optimizer.state[phi].items()}
    assert before["row"].shape == phi.shape
    assert per_entry(optimizer, phi) == ["momentum"]
    remap(optimizer, phi, torch.tensor([3, -1, 0, 1]))
    state = optimizer.state[phi]
    assert torch.equal(state["row"], before["row"])
    assert torch.equal(state["column"], before["column"])
    assert state["momentum"].tolist() == [before["momentum"][3], 0, before["momentum"][0], before["momentum"][1]]


def test_entries_that_enter_without_seeds_are_of_age_one():
    phi = values(torch.arange(3, dtype=torch.int32), (1, 3))
    optimizer = AgedAdamW([phi])
    stepped(optimizer, phi, 4)
    remap(optimizer, phi, torch.tensor([2, -1, 0]))
    assert optimizer.state[phi]["age"].tolist() == [5, 1, 5]


@pytest.mark.parametrize("make", [AgedAdamW, lambda p: SparseSM3(p, momentum=0.9)])
def test_state_of_other_entries_is_refused(make):
    index = torch.arange(4, dtype=torch.int32)
    phi = values(index, (3, 4))
    optimizer = make([phi])
    stepped(optimizer, phi)
    saved = copy.deepcopy(optimizer.state_dict())
    make([values(index, (3, 4))]).load_state_dict(copy.deepcopy(saved))
    with pytest.raises(BadInput, match="other entries"):
        make([values(index + 1, (3, 4))]).load_state_dict(copy.deepcopy(saved))


def test_sm3_state_is_rows_and_columns():
    """10. 4 (out + in) bytes beside position and value."""
    phi = values(torch.arange(0, 200, 4, dtype=torch.int32), (20, 10))
    optimizer = SparseSM3([phi])
    stepped(optimizer, phi)
    assert sum(t.numel() * t.element_size() for t in optimizer.state[phi].values()) == 4 * (20 + 10)
