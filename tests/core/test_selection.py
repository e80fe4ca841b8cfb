"""Where a selection's budget goes: counted by operation and block, drawn, also where a matrix got a module."""

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries, PerTensor, Whole
from pegbox.selection import by_place, draw, table
from pegbox.testing import tiny_llama


@pytest.fixture
def found():
    given = Allocation(
        {
            "model.layers.0.mlp.up_proj.weight": PerTensor(
                "tuner", {"sites": [], "trained": 192}, torch.arange(3).int()
            ),
            "model.layers.1.mlp.up_proj.weight": Entries(torch.arange(7).int()),
            "model.norm.weight": Whole(),
        }
    )
    return by_place(given, tiny_llama())


def test_counts_by_operation_and_block(found):
    assert found["by_operation"] == {"up_proj": 202, "norm": 32}
    assert found["by_block"] == {0: 195, 1: 7}
    assert found["outside"] == 32
    assert found["grid"] == {"up_proj": {0: 195, 1: 7}}
    assert found["trained"] == 234
    assert found["inside"] == 2 * 32 * 64 + 32  # of the tensors that something was chosen from
    assert found["total"] == sum(p.numel() for p in tiny_llama().parameters())
    assert table(found)


def test_a_picture(found, tmp_path):
    for form in ("png", "svg"):
        draw(found, tmp_path / f"a.{form}")
        assert (tmp_path / f"a.{form}").stat().st_size > 1000
    with pytest.raises(BadInput, match=r"\.png"):
        draw(found, tmp_path / "a.txt")
