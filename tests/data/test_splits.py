"""Splits by hash: deterministic, stable under growth, groups and duplicates whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pegbox.data.rows import Row
from pegbox.data.splits import keys_of, split_rows, without_duplicates_of
from pegbox.errors import BadInput


def row(content: int, group: str = "", copy: int = 1) -> Row:
    return Row(f"{content:016x}" + (f"#{copy}" if copy > 1 else ""), "text", text=str(content), group=group)


rows_of = st.lists(
    st.builds(row, st.integers(0, 30), st.sampled_from(["", "", "a", "b", "c"]), st.integers(1, 3)), max_size=60
)


@given(rows_of, st.integers(0, 5))
def test_groups_and_duplicates_never_straddle(rows, seed):
    if len(set(keys_of(rows))) < 3:
        return
    parts = split_rows(rows, {"validation": 0.2, "test": 0.3}, seed)
    assert sorted(r.id for part in parts.values() for r in part) == sorted(r.id for r in rows)
    where_content, where_group = {}, {}
    for name, part in parts.items():
        assert part
        for r in part:
            assert where_content.setdefault(r.id.partition("#")[0], name) == name
            if r.group:
                assert where_group.setdefault(r.group, name) == name


@given(rows_of)
def test_keys_do_not_depend_on_the_order(rows):
    forward = dict(zip([(r.id, r.group) for r in rows], keys_of(rows)))
    backward = dict(zip([(r.id, r.group) for r in reversed(rows)], keys_of(rows[::-1])))
    assert forward == backward


def test_shares_are_met_and_growth_moves_nothing():
    rows = [row(i) for i in range(20_000)]
    shares = {"validation": 0.05, "test": 0.1}
    parts = split_rows(rows, shares, seed=1)
    assert abs(len(parts["test"]) / 20_000 - 0.1) < 0.01
    assert abs(len(parts["validation"]) / 20_000 - 0.05) < 0.01
    small = split_rows(rows[:5000], shares, seed=1)
    assert [r for r in parts["test"] if int(r.id, 16) < 5000] == small["test"]
    assert split_rows(rows, shares, seed=2)["test"] != parts["test"]


def test_an_asked_for_split_is_never_empty():
    parts = split_rows([row(i) for i in range(3)], {"validation": 0.001, "test": 0.001})
    assert {name: len(part) for name, part in parts.items()} == {"train": 1, "validation": 1, "test": 1}
    assert split_rows([row(0)], {"validation": 0.0})["validation"] == []


def test_too_few_groups_and_wrong_shares():
    with pytest.raises(BadInput, match="1 separate rows or groups can't fill the splits test, train"):
        split_rows([row(i, "g") for i in range(9)], {"test": 0.5})
    for shares in ({"test": 1.0}, {"test": -0.1}, {"test": 0.6, "validation": 0.5}):
        with pytest.raises(BadInput, match="sum to less than 1"):
            split_rows([row(0), row(1)], shares)


def test_duplicates_of_a_given_set_are_left_out():
    assert without_duplicates_of([row(1), row(1, copy=2), row(2)], [row(1, copy=3)]) == [row(2)]
