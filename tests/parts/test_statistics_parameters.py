"""Sensitivities of all parameters: equal to brute force, streamed, and the model is given back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pegbox
from pegbox.errors import BadInput
from pegbox.parts.statistics_parameters import ParameterSpec, sensitivity
from pegbox.testing import tiny_llama


def net(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.LayerNorm(36), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(36, 3)).to(dtype)


def batches(count=3, rows=5, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 2, 5, 5, generator=draw, dtype=dtype), torch.randint(0, 3, (rows,), generator=draw))
        for _ in range(count)
    ]


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def brute_force(reduce):
    model = net().eval()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in batches():
        units = [(x, y)] if reduce != "per_sample_sq" else [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        for unit in units:
            grads = torch.autograd.grad(loss_of(model, unit), list(model.parameters()))
            for name, g in zip(total, grads):
                total[name] += g.abs() if reduce == "abs" else g**2
    return total


@pytest.mark.parametrize("reduce", ["batch_sq", "per_sample_sq", "abs"])
def test_equal_to_brute_force(reduce):
    """s equals the brute-force sum over autograd's gradients, for convolutions, norms and biases too."""
    found = sensitivity(net(), batches(), loss_of, reduce)
    for name, value in brute_force(reduce).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_model_comes_back_bit_for_bit(deterministic):
    """Parameters, buffers, train/eval mode, requires_grad flags and gradients are restored, bit for bit."""
    model = net()
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[6].bias.grad = torch.full((3,), 7.0, dtype=torch.float64)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    sensitivity(model, batches(), loss_of, deterministic=deterministic)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [m.training for m in model] == [True, True, True, True, False, True, True]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert torch.equal(model[6].bias.grad, torch.full((3,), 7.0, dtype=torch.float64))
    assert model[6].weight.grad is None


def test_it_comes_back_after_an_error_too():
    model = net()

    def broken(model, batch):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        sensitivity(model, batches(), broken)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert model.training


def test_dropout_is_off_unless_asked_for():
    calm = [sensitivity(net(), batches(1), loss_of, seed=s)["6.weight"] for s in (0, 1)]
    noisy = [sensitivity(net(), batches(1), loss_of, seed=s, deterministic=False)["6.weight"] for s in (0, 1)]
    assert torch.equal(*calm)
    assert not torch.equal(*noisy)


def test_gradients_are_freed_as_they_arrive():
    """One accumulator per tensor: never a second copy of all gradients."""
    model = net()
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(sum(p.grad is not None for p in model.parameters())))
    sensitivity(model, batches(1), loss_of)
    assert seen == [0]


def test_a_batch_of_one_and_a_limit():
    one = [(x[:1], y[:1]) for x, y in batches()]
    model = net()
    first = sensitivity(model, one, loss_of, limit=1)
    again = sensitivity(model, one[:1], loss_of, "per_sample_sq")
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_a_head_of_zeros_is_drawn_for_the_pass_and_put_back():
    """The head must not be zero-initialised, else every gradient below it is 0."""
    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    ids = torch.arange(3, 19).view(2, 8)
    spec = ParameterSpec(names=("model.layers.0.mlp.up_proj.weight",))
    found = pegbox.collect(model, spec, [{"input_ids": ids, "labels": ids}])
    assert bool(found["sensitivity"]["model.layers.0.mlp.up_proj.weight"].any())
    assert not bool(model.lm_head.weight.any())


def test_no_batch_is_refused():
    """No batch."""
    with pytest.raises(BadInput, match="No calibration batch"):
        sensitivity(net(), [], loss_of)


def test_a_loss_that_is_not_finite_is_refused():
    """A loss that is not finite."""
    with pytest.raises(BadInput, match="batch 0 is nan"):
        sensitivity(net(), batches(), lambda m, b: loss_of(m, b) * torch.nan)


def test_sums_of_zero_are_refused():
    """All-zero scores."""
    with pytest.raises(BadInput, match="Every sensitivity is 0"):
        sensitivity(net(), batches(), lambda m, b: loss_of(m, b) * 0)


def test_packed_weights_are_refused_with_the_remedy():
    """Quantized weights without a gradient: measure on a dequantized copy, or pass scores."""
    model = net()
    model[6].weight = nn.Parameter(torch.zeros(3, 36, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match="dequantized copy"):
        sensitivity(model, batches(), loss_of)
    with pytest.raises(BadInput, match="no parameter 'x'"):
        sensitivity(net(), batches(), loss_of, names=["x"])
