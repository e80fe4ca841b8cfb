"""k entries per row: between flat positions, column numbers and their file form; the largest of each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts import indexsets as ix
from pegbox.parts import rowsets as rs

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 12), st.booleans(), st.integers(0, 999))


def by_hand(score, k):
    """Brute force: of each row the k largest, ties to the lowest column."""
    rows = []
    for row in score.tolist():
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        rows.append(sorted(order[:k]))
    return rows


@given(SIZES)
def test_the_largest_of_each_row_ties_to_the_lowest_column(case):
    rows, columns, k, ties, seed = case
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    if ties:
        score = (score * 3).round()
    assert ix.row_top(score, k).tolist() == by_hand(score, k)


def test_a_large_matrix_is_ranked_in_pieces(monkeypatch):
    score = torch.randint(0, 4, (9, 8), generator=torch.Generator().manual_seed(1)).float()
    whole = ix.row_top(score, 3)
    monkeypatch.setattr(ix, "_AT_ONCE", 16)
    assert torch.equal(ix.row_top(score, 3), whole)


@given(SIZES)
def test_columns_and_flat_positions_are_two_forms_of_one_set(case):
    rows, columns, k, transposed, seed = case
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    chosen = ix.row_top(score, k)
    shape = (columns, rows) if transposed else (rows, columns)
    index = rs.flat_of_columns(chosen, shape, transposed)
    ix.check_index(index, rows * columns, "here")
    mask = ix.to_mask(index, shape)
    assert torch.equal(mask.T if transposed else mask, torch.zeros(rows, columns).scatter(1, chosen, 1).bool())
    assert torch.equal(rs.columns_of(index, shape, transposed), chosen)


def test_rows_that_differ_in_number_have_no_columns():
    assert rs.columns_of(torch.tensor([0, 1, 3]), (2, 3)) is None
    assert rs.columns_of(torch.tensor([0, 1]), (2, 3)) is None
    assert rs.columns_of(torch.tensor([0, 1]), (2,)) is None
    assert rs.columns_of(torch.empty(0, dtype=torch.int32), (2, 3)) is None


def test_some_rows_only():
    index = rs.flat_of_columns(torch.tensor([[1, 2], [0, 2]]), (4, 3), rows=torch.tensor([0, 3]))
    assert index.tolist() == [1, 2, 9, 11]
    assert index.dtype == torch.int32


@pytest.mark.parametrize(("inputs", "dtype"), [(40, torch.int16), (65536, torch.int16), (65537, torch.int32)])
def test_two_bytes_per_column_where_they_fit(inputs, dtype):
    columns = torch.tensor([[0, inputs - 1], [1, inputs // 2]])
    packed = rs.pack_columns(columns, inputs)
    assert packed.dtype == dtype
    assert rs.unpack_columns(packed).tolist() == columns.tolist()


def test_shared_columns_are_written_once_and_meant_for_all():
    columns = torch.tensor([[1, 3]]).expand(5, -1)
    packed = rs.pack_columns(columns, 4)
    assert packed.shape == (1, 2)
    index = rs.flat_of_columns(rs.unpack_columns(packed), (5, 4))
    assert rs.shared_columns_of(index, (5, 4)).tolist() == [1, 3]
    assert rs.shared_columns_of(torch.tensor([0, 5]), (2, 4)) is None


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match=r"\[0, 3\)"):
        rs.flat_of_columns(torch.tensor([[3], [0]]), (2, 3))
    with pytest.raises(BadInput, match="3 rows"):
        rs.flat_of_columns(torch.tensor([[1], [0], [2]]), (2, 3))
    with pytest.raises(BadInput, match="integer matrix"):
        rs.flat_of_columns(torch.tensor([1, 2]), (2, 3))


def test_the_most_frequent_columns():
    columns = torch.tensor([[2, 3], [2, 3], [0, 1], [0, 3]])
    assert rs.frequent_columns(columns, 3, 5).tolist() == [3, 0, 2]
    assert rs.frequent_columns(columns, 3, 5, first_met=True).tolist() == [3, 2, 0]


@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 99))
def test_random_entries_are_a_set_of_the_wanted_size(total, count, seed):
    chosen = ix.random_entries(total, count, torch.Generator().manual_seed(seed))
    ix.check_index(chosen, total, "here")
    assert chosen.numel() == min(count, total)
    assert torch.equal(chosen, ix.random_entries(total, count, torch.Generator().manual_seed(seed)))


def test_random_entries_are_evenly_spread():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([ix.random_entries(10, 3, generator).long() for _ in range(2000)])
    often = torch.bincount(drawn, minlength=10).double()
    assert float((often / 600 - 1).abs().max()) < 0.2
