"""k entries of every neuron: what is chosen by each criterion, how many, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pegbox
from pegbox.capabilities import Facts, refusals
from pegbox.errors import BadInput
from pegbox.parts.allocation import Entries, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.indexsets import row_top, to_mask
from pegbox.recipe import load_recipe
from pegbox.select import SELECT
from pegbox.select.per_neuron import active_rows
from pegbox.testing import tiny_batch, tiny_llama

UP = "model.layers.0.mlp.up_proj.weight"


def selector(**options):
    return SELECT.validate({"kind": "per_neuron", **options})


def chosen(model=None, stats=None, seed=0, **options):
    model = tiny_llama() if model is None else model
    draw = torch.Generator().manual_seed(seed)
    return selector(**options).select(Anatomy.of(model), dict(model.named_parameters()), stats, draw)


def masks(model=None, **options):
    model = tiny_llama() if model is None else model
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return {n: to_mask(c.index, shapes[n]) for n, c in chosen(model, **options).items() if isinstance(c, Entries)}


@pytest.mark.parametrize("k", [1, 3, 500])
def test_each_row_has_its_k_largest_connections_and_no_others(k):
    """Each row has exactly min(k, in) distinct columns, the largest by magnitude (brute force)."""
    model = tiny_llama()
    for name, mask in masks(model, k=k).items():
        weight = model.get_parameter(name).detach()
        for row, kept in zip(weight.abs().tolist(), mask.tolist()):
            best = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
            assert [j for j, on in enumerate(kept) if on] == sorted(best)


def test_equal_magnitudes_go_to_the_lowest_column():
    net = nn.Sequential(nn.Linear(5, 2, bias=False))
    net[0].weight.data = torch.tensor([[1.0, -1.0, 1.0, 0.0, 1.0], [0.0, 2.0, -2.0, 2.0, 2.0]])
    assert chosen(net, k=2)["0.weight"].index.tolist() == [0, 1, 6, 7]


def test_reverse_takes_the_smallest():
    model = tiny_llama()
    mask = masks(model, k=2, criterion="reverse")[UP]
    assert torch.equal(mask.sum(1), torch.full((64,), 2))
    weight = model.get_parameter(UP).detach().abs()
    assert (weight[mask].view(64, 2).amax(1) <= weight[~mask].view(64, -1).amin(1)).all()


def test_gradient_ranks_by_the_summed_gradient_over_all_batches():
    model = tiny_llama()
    spec = selector(criterion="gradient", k=2).statistics()
    batches = [tiny_batch(seed=s) for s in range(3)]
    stats = pegbox.collect(model, spec, batches, loss=own_loss)
    for batch in batches:
        own_loss(model, batch).backward()
    mask = masks(model, k=2, criterion="gradient", stats=stats)[UP]
    assert torch.equal(mask.nonzero()[:, 1].view(-1, 2), row_top(model.get_parameter(UP).grad.abs(), 2))
    assert spec.batches is None  # a full pass, however long


def own_loss(model, batch):
    return model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss


def test_random_draws_differ_by_seed_and_not_by_order():
    first, again = masks(k=3, criterion="random", seed=4), masks(k=3, criterion="random", seed=4)
    other = masks(k=3, criterion="random", seed=5)
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    assert all(bool((mask.sum(1) == 3).all()) for mask in first.values())


@pytest.mark.parametrize(
    ("criterion", "group"), [("random_layer", "tensor"), ("random_block", "block"), ("random_global", "all")]
)
def test_without_balance_the_total_stays(criterion, group):
    even, free = masks(k=4), masks(k=4, criterion=criterion)
    assert even.keys() == free.keys()

    def totals(found):
        counts = {}
        for name, mask in found.items():
            key = {"tensor": name, "block": name.split(".mlp")[0].split(".self_attn")[0], "all": ""}[group]
            counts[key] = counts.get(key, 0) + int(mask.sum())
        return counts

    assert totals(free) == totals(even)
    assert not bool((free[UP].sum(1) == 4).all())


@given(st.integers(1, 300), st.floats(0.01, 1.0))
def test_rows_without_a_bypass_are_counted_as_in_the_code(rows, fraction):
    """active_fraction p leaves floor((1 - p) out) rows without bypass."""
    assert rows - active_rows(rows, fraction) == int((1 - fraction) * rows)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_only_a_share_of_the_rows_stays_active(fraction):
    """active_fraction p leaves floor((1 - p) out) rows without bypass; the others keep their k."""
    full = masks(k=2)
    for name, mask in masks(k=2, active_fraction=fraction).items():
        rows = mask.sum(1)
        assert int((rows == 0).sum()) == math.floor((1 - fraction) * len(rows))
        assert torch.equal(mask[rows > 0], full[name][rows > 0])


def test_shared_columns_are_those_that_most_rows_would_choose():
    """shared_columns: the chosen columns are the k most frequent."""
    model = tiny_llama()
    own = masks(model, k=3)
    for name, mask in masks(model, k=3, shared_columns=True).items():
        often = own[name].sum(0).tolist()
        best = sorted(range(len(often)), key=lambda j: (-often[j], j))[:3]
        assert mask.nonzero()[:, 1].view(-1, 3).tolist() == [sorted(best)] * len(mask)


def test_of_a_transposed_weight_the_rows_are_outputs():
    """GPT-2's Conv1D stores (in, out)."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16))
    mask = masks(model, k=2)["transformer.h.0.mlp.c_fc.weight"]
    assert mask.shape == (16, 64)
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight").detach()
    assert torch.equal(mask.T.nonzero()[:, 1].view(64, 2), row_top(weight.T.abs(), 2))


def test_of_a_convolution_a_row_is_an_output_channel():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    mask = masks(net, k=5, target_modules="0")["0.weight"]
    assert torch.equal(mask.flatten(1).sum(1), torch.full((4,), 5))


@pytest.mark.parametrize("k", [1, 20])
def test_the_published_share_of_llama_7b(k):
    """The trainable share of a Llama-7B is 1 359 872 k, counted without a weight."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sum(selector(k=k).count(Anatomy.of(model), shapes).values()) == 1_359_872 * k


@pytest.mark.parametrize(
    "options",
    [
        {"k": 3},
        {"k": 100},
        {"k": 2, "active_fraction": 0.3},
        {"criterion": "random_block", "k": 2},
        {"whole": ["norm"]},
    ],
)
def test_counted_from_shapes_as_selected(options):
    model = tiny_llama()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    counts = selector(**options).count(Anatomy.of(model), shapes)
    assert {n: c for n, c in counts.items() if c} == {n: c for n, c in chosen(**options).trained(shapes).items() if c}


def test_a_block_can_be_left_out_and_modules_can_train_whole_beside():
    left = chosen(target_modules=("all-linear", "not block 1"))
    assert {n.split(".")[2] for n in left} == {"0"}
    beside = chosen(whole=("norm",))
    assert isinstance(beside["model.layers.0.input_layernorm.weight"], Whole)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    assert isinstance(chosen(net, biases=True)["0.bias"], Whole)
    assert "1.bias" not in chosen(net, biases=True)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": 0}, "greater than or equal to 1"),
        ({"active_fraction": 0.0}, "greater than 0"),
        ({"active_fraction": 1.5}, "less than or equal to 1"),
        ({"criterion": "largest"}, "magnitude"),
        ({"criterion": "random_layer", "active_fraction": 0.5}, "without regard to rows"),
        ({"criterion": "random_global", "shared_columns": True}, "without regard to rows"),
        ({"ties": "first"}, "shared_columns"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, word):
    """k < 1; active_fraction outside (0, 1]; unknown criterion."""
    with pytest.raises(BadInput, match=word):
        selector(**options)


def test_no_target_is_refused():
    """A target that matches nothing."""
    with pytest.raises(BadInput, match="no_such"):
        chosen(target_modules="no_such")


def test_gradient_without_data_is_refused():
    """`gradient` without data: nothing was gathered, or not for this matrix."""
    with pytest.raises(BadInput, match="none were given"):
        chosen(criterion="gradient")
    with pytest.raises(BadInput, match="took no part"):
        chosen(criterion="gradient", stats={"gradient_sum": {}})
    spec = selector(criterion="gradient").statistics()
    with pytest.raises(BadInput, match="No calibration batch"):
        pegbox.collect(tiny_llama(), spec, [])


def test_gradient_over_a_quantized_base_is_refused():
    """`gradient` with a quantized base; magnitude reads a dequantized copy."""
    base = load_recipe("neuroada", ["select.criterion=gradient"])
    assert any("quantized" in reason for reason in refusals(base, Facts(quantized=True)))
    assert refusals(load_recipe("neuroada"), Facts(quantized=True)) == []
    assert refusals(base) == []


def test_a_target_without_rows_is_refused():
    """A target that is not a matrix and has no rule: a norm has no rows."""
    with pytest.raises(BadInput, match="a matrix or a convolution"):
        selector().select(None, {"norm.weight": torch.ones(4)}, None, torch.Generator())


def test_broken_weights_are_refused():
    model = tiny_llama()
    model.get_parameter(UP).data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        chosen(model)


def test_words_without_a_model_are_refused():
    with pytest.raises(BadInput, match="whole model"):
        selector(whole=("head",)).select(None, {"a.weight": torch.ones(2, 2)}, None, torch.Generator())


def test_vectors_beside_a_pure_bypass_are_refused():
    recipe = load_recipe("neuroada", ["select.biases=true", "tuner.execution=bypass"])
    assert any("norms and biases" in reason for reason in refusals(recipe))
