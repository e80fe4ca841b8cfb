"""Coupled structures on many architectures: what units own, re-ordering with exact undo, leaving units out."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.coupled import (
    block_order,
    grouped_order,
    inverse,
    moves,
    reorder,
    reordering_of,
    restore,
    structures,
)
from pegbox.testing import tiny_llama

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**SMALL, "intermediate_size": 48}


def models():
    import transformers as t

    gpt = t.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    phi = t.Phi3Config(**PLAIN, num_key_value_heads=2, pad_token_id=0)
    vit = t.ViTConfig(**{k: v for k, v in PLAIN.items() if k != "vocab_size"}, image_size=32, patch_size=8)
    opt = t.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)
    olmo = t.Olmo2Config(**PLAIN, num_key_value_heads=2, pad_token_id=0)
    falcon = t.FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True)
    return {
        "grouped queries": tiny_llama,
        "one key-value head each": lambda: tiny_llama(num_key_value_heads=4),
        "biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
        "Conv1D, fused qkv, no gate": lambda: t.GPT2LMHeadModel(gpt),
        "fused qkv and gate_up": lambda: t.Phi3ForCausalLM(phi),
        "fused per head": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**PLAIN)),
        "fused per group": lambda: t.FalconForCausalLM(falcon),
        "up and down apart": lambda: t.BertForMaskedLM(t.BertConfig(**PLAIN)),
        "norms over all queries": lambda: t.Olmo2ForCausalLM(olmo),
        "no gate": lambda: t.OPTForCausalLM(opt),
        "vision": lambda: t.ViTForImageClassification(vit),
    }


def shaken(name):
    """Every tensor away from zeros and ones, so that nothing is equal by accident."""
    torch.manual_seed(0)
    model = models()[name]().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def answer(model):
    if hasattr(model, "vit"):
        return model(pixel_values=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).logits
    return model(input_ids=torch.arange(24).view(2, 12)).logits


def random_orders(found, seed=1):
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    for s in found:
        groups = torch.randperm(s.groups, generator=generator)
        inner = [g * s.per_group + torch.randperm(s.per_group, generator=generator) for g in groups]
        orders[s.name] = torch.cat(inner)
    return orders


@pytest.mark.parametrize("name", list(models()))
@torch.no_grad()
def test_reordering_keeps_the_function_and_undoes_bit_for_bit(name):
    """Permutation alone changes logits by < 1e-5; the inverse restores every tensor bit for bit."""
    model = shaken(name)
    before, state = answer(model), copy.deepcopy(model.state_dict())
    reorder(model, random_orders(structures(Anatomy.of(model))))
    assert not all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.allclose(answer(model), before, atol=1e-5)
    restore(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert reordering_of(model) is None


def in_float64(name):
    """The same model in float64 throughout: transformers' own RMS norms compute in float32."""
    model = shaken(name).double()
    for layer in getattr(getattr(model, "model", None), "layers", []):
        for key in ("input_layernorm", "post_attention_layernorm"):
            norm = torch.nn.RMSNorm(32, eps=1e-6).double()
            norm.weight = getattr(layer, key).weight
            setattr(layer, key, norm)
    if hasattr(model, "lm_head") and hasattr(model, "model"):
        model.model.norm = torch.nn.RMSNorm(32, eps=1e-6).double()
    return model


@pytest.mark.parametrize("name", ["grouped queries", "one key-value head each", "biases", "Conv1D, fused qkv, no gate"])
@torch.no_grad()
def test_reordering_in_float64_is_exact_to_rounding(name):
    """Logits change by < 1e-12 in fp64, with and without bias, with and without grouped queries."""
    model = in_float64(name)
    before = answer(model)
    reorder(model, random_orders(structures(Anatomy.of(model))))
    assert float((answer(model) - before).abs().max()) < 1e-12


def test_what_units_own():
    found = structures(Anatomy.of(tiny_llama(attention_bias=True)))
    assert [(s.kind, s.units, s.groups) for s in found] == [("heads", 4, 2), ("channels", 64, 64)] * 2
    heads, channels = found[:2]
    assert heads.share("v").of([1]).tolist() == list(range(8, 16))
    assert heads.share("o").of([1]).tolist() == list(range(8, 16))
    assert (heads.share("o").axis, heads.share("v").axis) == (1, 0)
    assert heads.share("o").owners(torch.tensor([9, 31])) == [1, 3]
    assert (heads.count("v"), heads.count("o")) == (2, 4)
    assert sum(s.bias for s in heads.shares) == 3
    assert channels.share("down").of([5, 2]).tolist() == [5, 2]
    with pytest.raises(BadInput, match="no matrix 'q'"):
        channels.share("q")


def test_a_fused_share_of_values_lies_where_the_model_has_it():
    model = models()["Conv1D, fused qkv, no gate"]()
    share = structures(Anatomy.of(model))[0].share("v")
    assert share.axis == 1
    assert share.of([0]).tolist() == [32, 33, 34, 35]
    grouped = structures(Anatomy.of(models()["fused per head"]()))[0].share("v")
    assert grouped.of([1]).tolist() == list(range(40, 48))


@torch.no_grad()
def test_leaving_units_out_is_zeroing_them():
    """A smaller dense model computes what the large one does with the units' columns at zero."""
    model = shaken("Conv1D, fused qkv, no gate")
    anatomy, small = Anatomy.of(model), copy.deepcopy(model)
    channels = structures(anatomy, ("channels",))[0]
    kept = [u for u in range(channels.units) if u % 3]
    zeroed = model.get_parameter(channels.share("down").parameter)
    zeroed[[u for u in range(channels.units) if not u % 3]] = 0  # Conv1D stores W2 as (in, out)
    for name, (axis, index) in moves(channels, kept).items():
        owner, leaf = small.get_submodule(name.rsplit(".", 1)[0]), name.rsplit(".", 1)[1]
        setattr(owner, leaf, torch.nn.Parameter(getattr(owner, leaf).index_select(axis, index)))
    small.transformer.h[0].mlp.c_fc.nf = len(kept)
    assert torch.allclose(answer(small), answer(model), atol=1e-6)


def test_leaving_heads_out_keeps_groups_whole():
    heads = structures(Anatomy.of(tiny_llama()))[0]
    found = moves(heads, [2, 3])
    assert found["model.layers.0.self_attn.k_proj.weight"][1].tolist() == list(range(8, 16))
    assert found["model.layers.0.self_attn.q_proj.weight"][1].tolist() == list(range(16, 32))
    assert len(moves(heads, [1, 2])["model.layers.0.self_attn.k_proj.weight"][1]) == 16
    for order in ([0, 1, 2], [0, 2, 1, 3], [0, 0], [4], []):
        with pytest.raises(BadInput, match="heads"):
            moves(heads, order)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), *[st.lists(st.integers(0, n - 1), unique=True)] * 2)))
def test_block_order_makes_both_sets_ranges(case):
    units, first, second = case
    order = block_order(first, second, units)
    assert sorted(order) == list(range(units))
    assert set(order[: len(first)]) == set(first)
    start = len(set(first) - set(second))
    assert set(order[start : start + len(second)]) == set(second)


@given(st.data())
def test_grouped_order_keeps_groups_together(data):
    groups, per = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    chosen = data.draw(st.lists(st.integers(0, groups - 1), unique=True))
    units = data.draw(st.lists(st.integers(0, groups * per - 1), unique=True))
    order = grouped_order(chosen, units, groups * per, per)
    assert sorted(order) == list(range(groups * per))
    runs = [{u // per for u in order[i : i + per]} for i in range(0, len(order), per)]
    assert all(len(run) == 1 for run in runs)
    assert {next(iter(run)) for run in runs[: len(chosen)]} == set(chosen)
    if len({u // per for u in units}) <= 2:
        places = sorted(order.index(u) for u in units)
        assert not places or places[-1] - places[0] == len(units) - 1


@given(st.permutations(range(4)))
def test_inverse_undoes(order):
    channels = structures(Anatomy.of(tiny_llama(intermediate_size=4)), ("channels",))[0]
    found = moves(channels, order)
    for name, (axis, index) in inverse(found).items():
        assert axis == found[name][0]
        assert index[found[name][1]].tolist() == list(range(4))


def test_twice_is_refused(llama):
    orders = random_orders(structures(Anatomy.of(llama)))
    reorder(llama, orders)
    with pytest.raises(BadInput, match="permuted twice"):
        reorder(llama, orders)
    restore(llama)
    reorder(llama, orders)


def test_packed_weights_are_refused_before_anything_moves(llama):
    block = llama.model.layers[1].mlp
    block.down_proj.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    before = block.up_proj.weight.clone()
    with pytest.raises(BadInput, match="packed"):
        reorder(llama, {"model.layers.1.mlp": list(range(63, -1, -1))})
    assert torch.equal(block.up_proj.weight, before)


def test_heads_whose_number_matters_are_refused():
    import transformers as t

    config = {"vocab_size": 64, "decoder_start_token_id": 0, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    t5 = t.T5ForConditionalGeneration(t.T5Config(**config, num_heads=4))
    bloom = t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    for model, reason in ((t5, "table of position biases"), (bloom, "ALiBi")):
        heads = structures(Anatomy.of(model), ("heads",))[0]
        with pytest.raises(Unsupported, match=reason):
            reorder(model, {heads.name: [1, 0, 2, 3]})


def test_a_change_of_function_is_noticed_and_undone(llama, monkeypatch):
    """An architecture that goes by a unit's number in a way nobody registered."""
    plain = llama.model.layers[0].mlp.forward
    slope = torch.linspace(0.1, 2, 64)
    monkeypatch.setattr(
        llama.model.layers[0].mlp, "forward", lambda x: llama.model.layers[0].mlp.down_proj(
            slope * llama.model.layers[0].mlp.up_proj(x)
        )
    )  # fmt: skip
    assert plain is not llama.model.layers[0].mlp.forward
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(Unsupported, match="was undone"):
        reorder(llama, {"model.layers.0.mlp": list(range(63, -1, -1))})
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


def test_unknown_structures_and_short_orders(llama):
    with pytest.raises(BadInput, match="no coupled structure"):
        reorder(llama, {"model.layers.9.mlp": [0]})
    with pytest.raises(BadInput, match="order of all 64"):
        reorder(llama, {"model.layers.0.mlp": [1, 0]})


def test_heads_that_do_not_divide_are_refused():
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=3, head_dim=8)
    with pytest.raises(BadInput, match="can't be divided among 3"):
        structures(Anatomy.of(model))
    assert structures(Anatomy.of(model), ("channels",))
