"""Set algebra and budgets against Python sets and plain counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts import indexsets as ix
from pegbox.parts.indexsets import Budget

positions = st.sets(st.integers(0, 40), max_size=20).map(lambda s: torch.tensor(sorted(s), dtype=torch.int32))


@given(a=positions, b=positions)
@settings(max_examples=60, deadline=None)
def test_algebra_is_that_of_sets(a, b):
    sa, sb = set(a.tolist()), set(b.tolist())
    assert ix.union(a, b).tolist() == sorted(sa | sb)
    assert ix.intersect(a, b).tolist() == sorted(sa & sb)
    assert ix.difference(a, b).tolist() == sorted(sa - sb)
    assert ix.overlap(a, b) == (len(sa & sb) / min(len(sa), len(sb)) if sa and sb else 0.0)
    place = ix.locate(a, b)
    assert [b[p].item() if p >= 0 else None for p in place] == [x if x in sb else None for x in a.tolist()]
    assert torch.equal(ix.from_mask(ix.to_mask(a, (41,))), a)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), count=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_top_entries_take_the_largest_and_ties_by_lowest_position(values, count):
    score = torch.tensor(values, dtype=torch.float32)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert ix.top_entries(score, count).tolist() == sorted(order[:count])


def test_top_entries_across_tensors_and_per_row():
    scores = [torch.tensor([[1.0, 5.0], [5.0, 0.0]]), torch.tensor([5.0, 9.0])]
    assert [i.tolist() for i in ix.top_entries_across(scores, 3)] == [[1, 2], [1]]
    assert ix.per_row_top(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), 2).tolist() == [0, 2, 3, 4]


def test_units_are_slices():
    assert ix.from_units(0, torch.tensor([1]), (2, 3)).tolist() == [3, 4, 5]
    assert ix.from_units(1, torch.tensor([0, 2]), (2, 3)).tolist() == [0, 2, 3, 5]


def test_positions_are_int32_unless_they_do_not_fit():
    assert ix.index_dtype(2**31 - 1) == torch.int32
    assert ix.index_dtype(2**31) == torch.int64
    assert ix.everything(4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "index", [torch.tensor([2, 1]), torch.tensor([1, 1]), torch.tensor([-1, 0]), torch.tensor([0, 9]), torch.ones(2)]
)
def test_bad_indices_are_refused(index):
    with pytest.raises(BadInput, match="w"):
        ix.check_index(index, 9, "w")


def test_budgets_count_from_shapes():
    shapes = {"a.0.w": (4, 6), "a.1.w": (2, 3), "a.1.v": (10,)}
    assert ix.budget_counts(Budget(density=0.5), shapes, "per_tensor") == {"a.0.w": 12, "a.1.w": 3, "a.1.v": 5}
    assert ix.budget_counts(Budget(rank=1), shapes, "per_tensor") == {"a.0.w": 10, "a.1.w": 5, "a.1.v": 10}
    assert ix.budget_counts(Budget(rank=2), shapes, "per_tensor")["a.0.w"] == 20
    assert ix.budget_counts(Budget(rank=9), shapes, "per_tensor")["a.0.w"] == 24
    assert ix.budget_counts(Budget(count=7), shapes, "per_block") == {"a.0": 7, "a.1": 7}
    assert ix.budget_counts(Budget(count=100), shapes, "global") == {"": 40}
    assert ix.budget_counts(Budget(bytes=80), shapes, "global") == {"": 10}
    assert ix.budget_counts(Budget(density=1e-6), shapes, "per_tensor") == dict.fromkeys(shapes, 1)


@pytest.mark.parametrize(
    ("name", "block"),
    [("model.layers.3.mlp.up_proj.weight", "model.layers.3"), ("model.norm.weight", ""), ("h.0", "h.0")],
)
def test_blocks_by_name(name, block):
    assert ix.block_of(name) == block


def test_shapes_as_matrices():
    assert ix.matrix_shape((4, 3, 2, 2)) == (4, 12)
    assert ix.matrix_shape((7,)) == (7, 1)
    assert ix.matrix_shape(()) == (1, 1)
