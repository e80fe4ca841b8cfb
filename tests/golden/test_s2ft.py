"""S2FT against the official conversion and layers: order of units, permuted weights, logits, gradients, fusing; and the
official formulas of parallel serving."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import golden_cases
from pegbox.parts.allocation import Allocation, Units
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.coupled import block_order, reordering_of, structures

MODELS = golden_cases("s2ft", "llama*.npz")
SERVING = golden_cases("s2ft", "parallel_serving*.npz")

pytestmark = pytest.mark.skipif(not MODELS and not SERVING, reason="no golden vectors of s2ft")
ROLES = {"v": ("self_attn.v_proj", 0), "o": ("self_attn.o_proj", 1), "u": ("mlp.up_proj", 0), "d": ("mlp.down_proj", 1)}


def case_of(path):
    """(the case's sizes and units, its tensors). The sizes stand beside it: in a file of its own, or in cases.json."""
    data = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}
    own = [path.with_suffix(".json"), path.with_name(path.name.replace("llama_mha", "cases")).with_suffix(".json")]
    file = next((p for p in own if p.is_file()), path.with_name("cases.json"))
    every = json.loads(file.read_text())
    return every.get(path.stem, every), data


def close(data):
    """Tolerances: transformers' norms compute in float32 whatever the model's dtype."""
    wide = data["logits_base"].dtype == torch.float64
    return {"rtol": 0, "atol": 1e-6 if wide else 2e-5, "check_dtype": False}


def base_of(case, data):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case["vocab"],
        hidden_size=case["hidden"],
        intermediate_size=case["intermediate"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case.get("kv_heads", case["heads"]),
        attn_implementation="eager",
        rms_norm_eps=case.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(data["logits_base"].dtype).eval()
    state = {k.removeprefix("base/"): v for k, v in data.items() if k.startswith("base/")}
    model.load_state_dict(state, strict=True)
    return model


def numbers(case, data):
    """role -> layer -> unit numbers, in the order in which the official blocks hold them."""
    found = {}
    for role in ROLES:
        found[role] = []
        for layer, units in enumerate(case[role]):
            order = data[f"unit_order/{layer}.{'attn' if role in 'vo' else 'ffn'}"].tolist()
            found[role].append([u for u in order if u in set(units)])
    return found


def allocation_of(case, data):
    size = {"v": case["hidden"] // case["heads"], "o": case["hidden"] // case["heads"], "u": 1, "d": 1}
    allocation = Allocation()
    for role, layers in numbers(case, data).items():
        module, axis = ROLES[role]
        for layer, units in enumerate(layers):
            if units:
                rows = torch.tensor(units)[:, None] * size[role] + torch.arange(size[role])
                allocation[f"model.layers.{layer}.{module}.weight"] = Units(axis, rows.reshape(-1))
    return allocation


def attached(case, data, **options):
    from peft import get_peft_model

    from pegbox.tuners.slices import SlicesConfig

    config = SlicesConfig(**options).with_allocation(allocation_of(case, data))
    return get_peft_model(base_of(case, data), config)


def by_block(model, data, group):
    """(our parameter, the official tensor of its block)."""
    from pegbox.tuners.slices import slice_layers

    for name, layer in slice_layers(model).items():
        yield layer.slice_values["default"], data[f"{group}/{name}.s2"]


def run(model, data):
    out = model(input_ids=data["input_ids"], labels=data["input_ids"])
    logits = out.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data["input_ids"][:, 1:].flatten())
    return logits, loss


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_the_order_of_units_and_the_permuted_weights(path):
    case, data = case_of(path)
    for layer in range(case["layers"]):
        u, d = case["u"][layer], case["d"][layer]
        order = block_order(u, d, case["intermediate"])
        assert order[: len({*u, *d})] == data[f"unit_order/{layer}.ffn"].tolist()
    model = attached(case, data, layout="contiguous")
    model.eval()
    named = {f"{n}": p for n, p in model.get_base_model().named_parameters()}
    for key in [k for k in data if k.startswith("permuted/")]:
        name = "model.layers." + key.removeprefix("permuted/")
        ours = named.get(f"{name}.weight", named.get(f"{name}.base_layer.weight"))
        assert torch.equal(ours, data[key]), key
    assert reordering_of(model.get_base_model()) is not None


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_the_blocks_are_the_official_ranges(path):
    from pegbox.tuners.slices import slice_layers

    case, data = case_of(path)
    layers = slice_layers(attached(case, data, layout="contiguous"))
    assert set(layers) == set(case["blocks"])
    for name, block in case["blocks"].items():
        held = layers[name].block("default")
        assert (held.start, held.start + len(held.at)) == (block["start"], block["end"])
        assert held.rows == (block["type"] == "S2ColumnLinear")
        assert list(layers[name].slice_values["default"].shape) == block["shape"]


@pytest.mark.parametrize("layout", ["contiguous", "gather"])
@pytest.mark.parametrize("execution", ["in_place", "bypass"])
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_logits_losses_and_gradients(path, layout, execution):
    case, data = case_of(path)
    model = attached(case, data, layout=layout, execution=execution).eval()
    logits, loss = run(model, data)
    torch.testing.assert_close(logits, data["logits_base"], **close(data))
    torch.testing.assert_close(logits, data["logits_converted"], **close(data))
    torch.testing.assert_close(loss, data["loss_base"], **close(data))
    loss.backward()
    for values, grad in by_block(model, data, "grad_at_zero"):
        torch.testing.assert_close(values.grad, grad, **close(data))
    with torch.no_grad():
        for values, delta in by_block(model, data, "delta"):
            values.copy_(delta)
            values.grad = None
    logits, loss = run(model, data)
    torch.testing.assert_close(logits, data["logits_delta"], **close(data))
    torch.testing.assert_close(loss, data["loss_delta"], **close(data))
    loss.backward()
    for values, grad in by_block(model, data, "grad_at_delta"):
        torch.testing.assert_close(values.grad, grad, **close(data))
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, data)[0], data["logits_fused"], **close(data))


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_the_model_has_the_structures(path):
    case, data = case_of(path)
    found = structures(Anatomy.of(base_of(case, data)))
    assert [s.units for s in found] == [case["heads"], case["intermediate"]] * case["layers"]


@pytest.mark.parametrize("path", SERVING, ids=lambda p: p.stem)
def test_parallel_serving(path):
    from pegbox.tuners.slices import gathered_product, scattered_product

    data = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}
    x, shared = data["x"], data["x"] @ data["W"]
    columns = shared + gathered_product(x, data["idx_in"], data["C"].transpose(1, 2))
    rows = scattered_product(shared, x, data["idx_out"], data["D"].transpose(1, 2))
    atol = 1e-12 if x.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(columns, data["y_column_type"], rtol=0, atol=atol)
    torch.testing.assert_close(rows, data["y_row_type"], rtol=0, atol=atol)
