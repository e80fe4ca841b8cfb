"""Counts against closed forms, and the meta device against a run on the CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from pegbox.errors import BadInput
from pegbox.objectives.base import OBJECTIVE
from pegbox.optim.base import OPTIM
from pegbox.parts.context import Context
from pegbox.parts.cost import estimate, tensor_flops
from pegbox.parts.metering import (
    machine,
    measuring_flops,
    memory_now,
    optimizer_state_bytes,
    parameter_counts,
    saved_bytes,
    tensor_bytes,
)
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama


def test_flops_of_a_linear_layer_are_two_per_multiply_add():
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(7, 6, requires_grad=True)
    with measuring_flops() as flops:
        y = layer(x)
        assert flops.total == 2 * 7 * 6 * 5
        y.sum().backward()
    assert flops.total == 3 * 2 * 7 * 6 * 5  # forward, input gradient, weight gradient
    forward, into_x, into_w = tensor_flops(nn.Sequential(layer), 7)["0.weight"]
    assert forward + into_x + into_w == flops.total


def test_fused_attention_on_the_cpu_is_counted_as_the_eager_one():
    counts = {}
    for attention in ("eager", "sdpa"):
        model = tiny_llama(attn_implementation=attention, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        with measuring_flops() as flops:
            model(input_ids=torch.ones(2, 16, dtype=torch.long))
        counts[attention] = flops.total
    assert counts["eager"] == counts["sdpa"] > 0


def test_saved_bytes_of_a_product_are_its_inputs_and_return_to_zero():
    w, x = nn.Parameter(torch.randn(4, 3)), torch.randn(5, 3)
    holder = nn.Module()
    holder.w = w
    with saved_bytes(holder) as saved:
        y = torch.nn.functional.linear(x, w)
        assert saved.now == saved.peak == 5 * 3 * 4  # x; the weight is the model's own
        loss = (y * y).sum()
        assert saved.peak == 5 * 3 * 4 + 5 * 4 * 4
        loss.backward()
        del y, loss
        gc.collect()
    assert saved.now == 0


def test_storages_are_counted_once_and_sparse_layouts_by_their_parts():
    x = torch.randn(8, 8, requires_grad=True)
    with saved_bytes() as saved:
        y = x * 1.0
        z = (y.view(64) * y.view(64)).sum() + (y.t() ** 2).sum()
    assert saved.peak == 8 * 8 * 4
    z.backward()
    sparse = torch.eye(4).to_sparse_csr()
    assert tensor_bytes(sparse) == sum(
        t.numel() * t.element_size() for t in (sparse.crow_indices(), sparse.col_indices(), sparse.values())
    )
    coo = torch.eye(4).to_sparse().requires_grad_()
    with saved_bytes() as saved:
        out = torch.sparse.mm(coo, torch.randn(4, 2))
    assert saved.peak > 0
    del out


def test_parameters_and_optimizer_state_are_counted_tied_ones_once():
    model = tiny_llama(tie_word_embeddings=True)
    trained, total = parameter_counts(model)
    assert trained == total == sum({id(p): p.numel() for p in model.parameters()}.values())
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    assert parameter_counts(model) == (32, total)
    optimizer = torch.optim.AdamW([model.model.norm.weight])
    model.model.norm.weight.grad = torch.ones(32)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 32 * 4 + 4  # two moments and the step counter
    assert memory_now(torch.device("cpu")) > 10**7
    assert "cores" in machine()


def _adapted(device: str, frozen: bool = True, attention: str = "eager"):
    with torch.device(device):
        model = tiny_llama(attn_implementation=attention)
    if frozen:
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.requires_grad_(True)
    return model.train()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_meta_device_counts_what_a_run_on_the_cpu_uses(frozen, attention):
    step = OPTIM.validate({"kind": "adamw", "fused": False})
    model = _adapted("meta", frozen, attention)
    found = estimate(model, (2, 24), view=CausalView(model), step=step, accumulation=3)
    real = _adapted("cpu", frozen, attention)
    batch = {"input_ids": torch.zeros(2, 24, dtype=torch.long), "labels": torch.zeros(2, 24, dtype=torch.long)}
    objective = OBJECTIVE.validate({"token": {"kind": "sft"}})
    view = CausalView(real)
    with measuring_flops() as flops, saved_bytes(real) as saved:
        losses = objective.losses(objective.setup(Context(model=real)), view, batch, objective.count(batch), None)
        sum(v for n, v in losses if not n.startswith("_")).backward()
    assert found.trainable_parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.gradient_bytes == 4 * found.trainable_parameters
    # the estimate has all 24 positions predict something, the run 23 of them
    assert found.step_flops / 3 == pytest.approx(flops.total, rel=0.03)
    if frozen:  # what lives within one tile of the loss is counted apart
        assert found.saved_bytes <= saved.peak <= found.saved_bytes + found.working_bytes
    else:
        assert found.saved_bytes == pytest.approx(saved.peak, rel=0.1)
    optimizer = step.optimizer([{"params": [p for p in real.parameters() if p.requires_grad]}])
    optimizer.step()
    assert found.optimizer_state_bytes == optimizer_state_bytes(optimizer)
    assert found.peak_bytes > found.weight_bytes + found.saved_bytes
    assert not found.notes
    assert found.as_json()["peak_bytes"] == found.peak_bytes


def test_a_step_without_backward_holds_no_gradients_and_no_state():
    model = _adapted("meta")
    found = estimate(model, (2, 24), view=CausalView(model), step=OPTIM.validate("mezo"))
    assert found.gradient_bytes == found.optimizer_state_bytes == found.saved_bytes == 0
    assert found.step_flops == 2 * found.forward_flops > 0


def test_checkpointing_saves_bytes_and_costs_flops():
    plain, checkpointed = _adapted("meta", False), _adapted("meta", False)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    one, other = (estimate(m, (2, 64), view=CausalView(m)) for m in (plain, checkpointed))
    assert other.saved_bytes < one.saved_bytes
    assert other.step_flops > one.step_flops


def test_a_model_with_content_is_refused():
    with pytest.raises(BadInput, match="meta device"):
        estimate(tiny_llama(), (1, 8))
