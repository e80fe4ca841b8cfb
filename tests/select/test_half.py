"""HFT's selector: its options, what always trains, rounds and seeds."""

from __future__ import annotations

import time

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.allocation import Units, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.select import SELECT
from pegbox.select.half import Half
from pegbox.testing import tiny_llama
from pegbox.tuners.full import Full

IDS = torch.arange(24).view(2, 12)


def select(model, generator_seed=0, **options):
    selector = SELECT.validate({"kind": "half", **options})
    weights = dict(model.named_parameters())
    return selector.select(Anatomy.of(model), weights, None, torch.Generator().manual_seed(generator_seed))


def test_what_is_not_drawn_always_trains(llama):
    allocation = select(llama)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(allocation)
    assert set(allocation.values()) == {Whole()}
    frozen = select(llama, always_on=[])
    assert not {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & set(frozen)
    assert "lm_head.weight" in select(llama, always_on=["head"])


def test_ratio_one_or_everything_always_on_is_full_tuning(llama):
    every = {name for name, _ in llama.named_parameters()}
    assert set(select(llama, ratio=1)) == every
    assert set(select(llama, always_on=["all"])) == every


def test_ratio_one_trains_bit_for_bit_as_full_tuning():
    results = []
    for options in (None, {"ratio": 1}, {"always_on": ["all"]}):
        model = tiny_llama()
        allocation = None if options is None else select(model, **options)
        Full().attach(model, allocation, Context(model))
        stepper = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            stepper.step()
            stepper.zero_grad()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in results[0])


def test_rounds_and_seeds():
    model = tiny_llama(num_hidden_layers=4)
    assert select(model, seed=3) == select(model, generator_seed=9, seed=3)
    assert select(model, seed=3) != select(model, seed=3, round=1)
    assert select(model, generator_seed=1) == select(model, generator_seed=1)
    assert select(model, generator_seed=1) != select(model, generator_seed=2)


def test_slices_reach_the_full_tuner():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    allocation = select(model, slices=True, always_on=[])
    rows = {name: c for name, c in allocation.items() if isinstance(c, Units)}
    assert rows
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Full().attach(model, allocation, Context(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1).step()
    for name, choice in rows.items():
        parameter = model.get_parameter(name)
        others = [i for i in range(parameter.shape[choice.axis]) if i not in set(choice.index.tolist())]
        at = torch.tensor(others)
        assert torch.equal(parameter.index_select(choice.axis, at), before[name].index_select(choice.axis, at))


def test_count_needs_shapes_alone():
    with torch.device("meta"):
        model = tiny_llama(num_hidden_layers=4)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    counts = Half().count(Anatomy.of(model), shapes)
    share = sum(counts.values()) / sum(torch.Size(s).numel() for s in shapes.values())
    assert 0.5 < share < 0.85  # embeddings and head train whole


def test_drawing_a_thousand_matrices_is_quick():
    anatomy = Anatomy.of(
        tiny_llama(
            num_hidden_layers=112,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=260,
        )
    )
    best = min(_timed(lambda: Half()._draw(anatomy, torch.Generator().manual_seed(0))) for _ in range(3))
    assert best < 0.5  # 10 times the target: this machine may be busy; `benchmarks/hft.py` measures it


def _timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"level": "head"}, "level"),
        ({"categories": ["mixer"]}, "No matrix of category 'mixer'"),
        ({"seed": 1, "schedule": {"every": 10}}, "Leave out one"),
        ({"always_on": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"ratios": 1}, "Did you mean 'ratio'"),
    ],
)
def test_bad_options_are_refused(llama, options, says):
    with pytest.raises(BadInput, match=says):
        select(llama, **options)


def test_a_packed_matrix_is_refused(llama):
    for block in llama.model.layers:
        for module in (block.mlp.up_proj, block.mlp.down_proj, block.mlp.gate_proj):
            module.weight = torch.nn.Parameter(torch.zeros_like(module.weight, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(BadInput, match="packed matrix"):
        select(llama)
    assert select(llama, categories=["attention"], always_on=[])


def test_a_frozen_half_is_bit_identical_after_adamw_with_decay(llama):
    model = llama
    allocation = select(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Full().attach(model, allocation, Context(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    stepper.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in allocation), name
    assert sum(p.grad is not None for p in model.parameters()) == len(allocation)


def test_gradients_of_the_updated_half_are_full_tunings(llama):
    model = llama.double()
    model(input_ids=IDS, labels=IDS).loss.backward()
    full = {name: p.grad for name, p in model.named_parameters()}
    half = tiny_llama().double()
    allocation = select(half)
    Full().attach(half, allocation, Context(half))
    half(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.equal(half.get_parameter(n).grad, full[n]) for n in allocation)


def test_products_of_frozen_matrices_do_not_happen():
    """Backward's counted operations: the input gradients of everything and the weight gradients of what trains."""
    from torch.utils.flop_counter import FlopCounterMode

    def backward(options):
        model = tiny_llama(attn_implementation="eager")
        allocation = None if options is None else select(model, **options)
        Full().attach(model, allocation, Context(model))
        loss = model(input_ids=IDS, labels=IDS).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops(), model

    full, _ = backward(None)
    half, model = backward({"seed": 0})
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad and p.ndim == 2]
    weight_gradients = sum(2 * p.numel() * IDS.numel() for p in frozen)
    first = model.model.layers[0].self_attn
    assert frozen
    assert full - half == weight_gradients
    assert all(p.grad is None for p in frozen)
    assert first.q_proj.weight.requires_grad != (first.q_proj.weight.grad is None)
