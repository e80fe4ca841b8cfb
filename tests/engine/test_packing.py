"""Any state comes back from tensors and JSON as it was."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.engine.packing import pack, restore_random, take_random, unpack
from pegbox.errors import Corrupt, Unsupported

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.just("__kind__")
)
keys = st.one_of(st.text(max_size=4), st.integers(), st.just("__kind__"), st.just("a.b"))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


def through_json(tree):
    tensors, described = pack(tree)
    return unpack(tensors, json.loads(json.dumps(described)))


@given(trees)
def test_plain_trees_come_back_equal_with_their_types(tree):
    back = through_json(tree)
    assert back == tree
    assert repr(back) == repr(tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_bit_for_bit(dtype):
    tensor = (torch.randn(3, 4) * 3).to(dtype)
    back = through_json({"state": {0: {"m": tensor, "scalar": tensor[0, 0], "empty": tensor[:0]}}})
    for name, expected in (("m", tensor), ("scalar", tensor[0, 0]), ("empty", tensor[:0])):
        assert back["state"][0][name].dtype == dtype
        assert torch.equal(back["state"][0][name], expected)


def test_two_views_of_one_storage_and_names_that_collide_are_kept_apart():
    base = torch.arange(6.0)
    tree = {"a": {"b": base[:3]}, "a.b": base[3:], 1: torch.tensor(1), "1": torch.tensor(2)}
    back = through_json(tree)
    assert torch.equal(back["a"]["b"], base[:3])
    assert torch.equal(back["a.b"], base[3:])
    assert (back[1], back["1"]) == (torch.tensor(1), torch.tensor(2))


def test_other_values_come_back():
    array = np.arange(6, dtype=np.uint32).reshape(2, 3)
    back = through_json(
        {"n": array, "z": np.float64(0.1), "d": torch.bfloat16, "s": {3, 1}, "nan": math.nan, "inf": -math.inf}
    )
    assert back["n"].dtype == np.uint32
    assert np.array_equal(back["n"], array)
    assert back["z"] == 0.1
    assert back["d"] is torch.bfloat16
    assert back["s"] == {1, 3}
    assert math.isnan(back["nan"])
    assert back["inf"] == -math.inf


def test_what_only_a_pickle_could_hold_is_refused_with_its_place():
    with pytest.raises(Unsupported, match=r"optimizer\.state\.0.*function"):
        pack({"state": [lambda: 0]}, "optimizer")
    with pytest.raises(Unsupported, match="layout"):
        pack(torch.eye(2).to_sparse())


def test_a_missing_tensor_and_an_unknown_marker_are_corrupt():
    tensors, described = pack({"m": torch.zeros(2)})
    with pytest.raises(Corrupt, match="missing"):
        unpack({}, described)
    with pytest.raises(Corrupt, match="unknown kind"):
        unpack(tensors, {"__kind__": "code", "of": 1})


def test_random_states_come_back_through_json():
    state = through_json(take_random())
    first = (random.random(), np.random.rand(), torch.rand(3))
    restore_random(state)
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])
