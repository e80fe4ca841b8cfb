"""Balanced draws: exact counts at every level, fused matrices, parameter balance, refusals."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.allocation import Units, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.draws import as_allocation, balanced_counts, draw, items_of
from pegbox.testing import tiny_llama

ALL = ("attention", "mlp", "norm")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt2(layers=2):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        config = GPT2Config(vocab_size=64, n_embd=16, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0)
        return Anatomy.of(GPT2LMHeadModel(config))


@given(st.integers(1, 12), st.integers(1, 60), st.floats(0.01, 1))
def test_counts_add_up(per_block, blocks, ratio):
    total, low, more = balanced_counts(per_block, blocks, ratio)
    assert total == low * blocks + more
    assert 0 <= more < blocks
    assert ratio * per_block * blocks - 1 < total <= ratio * per_block * blocks + 1e-9


@pytest.mark.parametrize("blocks", [1, 4, 5])
def test_category_level_is_balanced_in_every_block(blocks):
    anatomy = Anatomy.of(tiny_llama(num_hidden_layers=blocks))
    items = draw(items_of(anatomy, ALL), "category", 0.5, "count", stream())
    per = Counter((item.category, item.block[1]) for item in items)
    assert all(per["attention", b] == 2 and per["norm", b] == 1 for b in range(blocks))
    mlp = [per["mlp", b] for b in range(blocks)]
    assert set(mlp) <= {1, 2}
    assert sum(mlp) == 3 * blocks // 2


def test_layer_and_model_levels():
    anatomy = Anatomy.of(tiny_llama(num_hidden_layers=3))
    items = items_of(anatomy, ("attention", "mlp"))
    per_block = Counter(item.block[1] for item in draw(items, "layer", 0.5, "count", stream()))
    assert sorted(per_block.values()) == [3, 3, 4]
    assert len(draw(items, "model", 0.5, "count", stream())) == 10


def test_the_seed_decides():
    items = items_of(Anatomy.of(tiny_llama(num_hidden_layers=4)), ALL)
    assert draw(items, "category", 0.5, "count", stream(1)) == draw(items, "category", 0.5, "count", stream(1))
    drawn = {tuple(i.parameters for i in draw(items, "category", 0.5, "count", stream(s))) for s in range(50)}
    assert len(drawn) == 50  # 6^4 attention splits alone: two equal ones in 50 have a chance below 1e-6


def test_each_matrix_gets_its_turn():
    items = items_of(Anatomy.of(tiny_llama(num_hidden_layers=2)), ALL)
    counts = Counter(i.parameters for s in range(200) for i in draw(items, "category", 0.5, "count", stream(s)))
    attention = [counts[i.parameters] for i in items if i.category == "attention"]
    assert all(80 <= count <= 120 for count in attention)


def test_parameter_balance_takes_the_nearest_subset():
    anatomy = Anatomy.of(tiny_llama(num_key_value_heads=1))  # q, o: 1024 weights, k, v: 256
    items = items_of(anatomy, ("attention",))
    for seed in range(10):
        chosen = draw(items, "category", 0.5, "params", stream(seed))
        for block in range(2):
            assert sum(i.size for i in chosen if i.block[1] == block) == 1024 + 256


def test_biases_go_with_their_matrix_and_slices_become_rows():
    anatomy = gpt2()
    whole = as_allocation(draw(items_of(anatomy, ("attention",)), "category", 0.5, "count", stream()))
    assert set(whole.values()) == {Whole()}
    assert all(name.replace("weight", "bias") in whole for name in whole if name.endswith("weight"))
    items = items_of(anatomy, ("attention",), slices=True)
    assert [i.part for i in items if i.block[1] == 0] == ["q", "k", "v", ""]
    allocation = as_allocation(draw(items, "category", 0.5, "count", stream(3)))
    rows = allocation["transformer.h.0.attn.c_attn.weight"]
    assert isinstance(rows, Units)
    assert rows.axis == 1  # stored (in, out)
    assert rows.index.numel() % 16 == 0
    bias = allocation["transformer.h.0.attn.c_attn.bias"]
    assert bias.axis == 0
    assert torch.equal(bias.index, rows.index)


def test_experts_are_groups_of_their_own_and_routers_count_as_norms():
    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = (torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.Linear(8, 16))

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)
            self.attn = torch.nn.ModuleDict(
                {n: torch.nn.Linear(8, 8) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
            )
            self.moe = torch.nn.ModuleDict(
                {"gate": torch.nn.Linear(8, 4), "experts": torch.nn.ModuleList(Expert() for _ in range(4))}
            )

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(Block() for _ in range(2))})
    items = items_of(Anatomy.of(model), ALL)
    assert Counter(item.category for item in items) == {"attention": 8, "mlp": 24, "norm": 4}
    assert len({item.cell for item in items if item.category == "mlp"}) == 8
    chosen = draw(items, "category", 0.5, "count", stream())
    per_expert = Counter(item.cell for item in chosen if item.category == "mlp")
    assert sum(per_expert.values()) == 12
    assert set(per_expert.values()) == {1, 2}


def test_refusals():
    with pytest.raises(BadInput, match=r"No matrix of category 'mixer' .* Name other categories: attention, mlp, norm"):
        items_of(Anatomy.of(tiny_llama()), ("mixer",))
    one = items_of(gpt2(layers=1), ("attention",))
    with pytest.raises(BadInput, match="less than one"):
        draw(one, "category", 0.3, "count", stream())
    with pytest.raises(BadInput, match="slices: true"):
        draw(one, "category", 0.3, "count", stream())
    with pytest.raises(BadInput, match=r"fused matrix.*Set slices: true"):
        draw(one, "category", 0.5, "params", stream())
    assert draw(items_of(gpt2(), ("attention",), slices=True), "category", 0.5, "params", stream())
