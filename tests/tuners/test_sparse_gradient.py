"""The sparse tuner's gradient is full tuning's at the kept entries, however and on whatever layer it is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from pegbox.errors import RunFailed, Unsupported
from pegbox.parts.parameterinfo import CLOCK, info_of, touch
from pegbox.testing import tiny_llama
from pegbox.tuners.sparse import SparseConfig, sparse_layers

EXECUTIONS = ("in_place", "scatter", "bypass")
RANDOM = {"kind": "random", "budget": {"density": 0.3}}
IDS = torch.arange(3, 40).view(1, -1)


class Net(nn.Module):
    """One layer of every kind that can be tuned, in float64."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 8)
        self.conv1d = Conv1D(5, 8)
        self.conv = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=1, groups=2)
        self.same = nn.Conv2d(1, 2, 3, padding="same")  # no backward of ours: built

    def forward(self, ids):
        x = torch.tanh(self.conv1d(torch.tanh(self.fc(self.norm(self.embed(ids))))))
        y = self.conv(x.reshape(ids.shape[0], 2, -1, 5))
        return y.square().sum() + self.same(x.unsqueeze(1)).square().sum() + x.sum()


LAYERS = {
    "fc": "linear",
    "conv1d": "transposed linear",
    "conv": "convolution",
    "embed": "embedding",
    "norm": "norm",
    "same": "other",
}
BATCH = torch.tensor([[1, 2, 0, 5, 5, 9, 10, 3], [0, 7, 8, 8, 1, 4, 2, 6]])


def net():
    torch.manual_seed(0)
    with torch.random.fork_rng():
        return Net().double()


def kept_gradients(model):
    return {info_of(p).name: (info_of(p).index().long(), p.grad) for p in model.parameters() if p.requires_grad}


def dense_gradients(model, loss):
    loss.backward()
    return {n: p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize("coordinates", ["absolute", "delta"])
@pytest.mark.parametrize("execution", [*EXECUTIONS, "auto"])
@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_the_dense_gradient_at_the_kept_entries(layer, execution, coordinates, gradient):
    base = net()
    options = {"target_modules": [layer], "tensors": ["weight"], "coordinates": coordinates, "gradient": gradient}
    config = SparseConfig(select=RANDOM, execution=execution, **options)
    if LAYERS[layer] == "other" and execution in {"in_place", "bypass"}:
        with pytest.raises(Unsupported):
            get_peft_model(net(), config)
        return
    if LAYERS[layer] == "norm" and execution == "bypass":
        with pytest.raises(Unsupported):
            get_peft_model(net(), config)
        return
    model = get_peft_model(net(), config)
    values = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():  # away from the pretrained point, in both
        change = torch.linspace(-0.3, 0.3, values.numel(), dtype=torch.float64)
        values += change
        dict(base.named_parameters())[f"{layer}.weight"].view(-1)[info_of(values).index().long()] += change
    model(BATCH).backward()
    want = dense_gradients(base, base(BATCH))
    for name, (index, grad) in kept_gradients(model).items():
        torch.testing.assert_close(grad, want[name][index], rtol=0, atol=1e-12)
        if gradient == "dense" and execution == "in_place" and LAYERS[layer] in {"linear", "transposed linear"}:
            assert torch.equal(grad, want[name][index])
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("execution", ["in_place", "scatter"])
def test_biases_train_beside_weights(execution):
    base = net()
    model = get_peft_model(
        net(),
        SparseConfig(
            select=RANDOM, target_modules=["fc", "conv1d", "conv", "norm"], tensors=["weight", "bias"], execution="auto"
        ),
    )
    del execution
    model(BATCH).backward()
    want = dense_gradients(base, base(BATCH))
    got = kept_gradients(model)
    assert len(got) == 8
    for name, (index, grad) in got.items():
        torch.testing.assert_close(grad, want[name][index], rtol=0, atol=1e-12)


def test_the_input_gets_its_gradient_through_every_execution():
    for execution in EXECUTIONS:
        base = nn.Sequential(nn.Linear(6, 8)).double()
        model = get_peft_model(
            copy.deepcopy(base), SparseConfig(select=RANDOM, target_modules=["0"], execution=execution)
        )
        values = next(p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            values += 1.0
        x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(model(x).square().sum(), x)
        weight = sparse_layers(model)["0"].effective("weight")
        y = F.linear(x, weight, base[0].bias)
        (want,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)


def llama(**options):
    return get_peft_model(tiny_llama(), SparseConfig(select=RANDOM, task_type="CAUSAL_LM", **options))


def gradients(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(execution, reentrant):
    model = llama(execution=execution)
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    got = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_accumulated_micro_batches_add_up(execution):
    model = llama(execution=execution)
    want = [2 * g for g in gradients(model)]
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    got = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_under_bfloat16_autocast(execution):
    model = llama(execution=execution)
    want = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    got = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in got} == {torch.float32}
    cosine = F.cosine_similarity(torch.cat(got), torch.cat(want), dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_reference_pass_between_forward_and_backward(execution):
    """DPO's order: policy forward, adapter-off forward, backward."""
    model = llama(execution=execution, coordinates="absolute")
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2).step()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.01
    base = tiny_llama()(input_ids=IDS).logits

    def loss(reference_between):
        policy = model(input_ids=IDS).logits
        if reference_between:
            with torch.no_grad(), model.disable_adapter():
                reference = model(input_ids=IDS).logits
            assert torch.equal(reference, base)
        else:
            reference = base.detach()
        return F.logsigmoid(policy - reference).mean()

    loss(False).backward()
    want = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    loss(True).backward()
    got = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_optimizer_step_between_forward_and_backward_is_an_error(execution, fused):
    model = llama(execution=execution)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients(model)
    optimizer = torch.optim.AdamW(trained, 1e-2, fused=fused)
    loss = model(input_ids=IDS, labels=IDS).loss
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RunFailed, match="changed between a forward and its backward"):
        loss.backward()


def test_a_step_of_another_optimizer_in_between_is_no_error():
    model = llama()
    want = gradients(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.AdamW([other], 1e-2, fused=True).step()
    loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip((p for p in model.parameters() if p.requires_grad), want))


OPTIMIZERS = {
    "fused adamw": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False),
    "fused sgd": lambda p: torch.optim.SGD(p, 1.0, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 1.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


@pytest.mark.parametrize("execution", ["in_place", "scatter"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_reaches_the_weights(name, execution):
    model = llama(execution=execution)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]


def test_writes_that_nobody_can_see_need_a_touch():
    model = llama()
    before = model(input_ids=IDS).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data.add_(0.1)
    touch(trained)
    assert not torch.equal(model(input_ids=IDS).logits, before)
    for p in trained:
        p.data.sub_(0.1)
    clock = CLOCK.now
    touch()
    assert CLOCK.now == clock + 1
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=1e-5)


def test_an_up_to_date_forward_writes_nothing():
    model = llama()
    model(input_ids=IDS)
    weight = sparse_layers(model)["model.layers.0.mlp.up_proj"].base_layer.weight
    version = weight._version
    for _ in range(3):
        model(input_ids=IDS)
    assert weight._version == version


def test_only_the_input_is_kept_for_backward_and_no_dense_gradient_survives():
    layer_in, layer_out, rows = 64, 96, 32
    base = nn.Sequential(nn.Linear(layer_in, layer_out, bias=False))
    model = get_peft_model(base, SparseConfig(select=RANDOM, target_modules=["0"]))
    saved = []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(rows, layer_in))
        (y * torch.ones_like(y)).sum().backward()
    assert torch.Size([rows, layer_in]) in saved
    assert torch.Size([layer_out, layer_in]) not in saved
    assert sparse_layers(model)["0"].base_layer.weight.grad is None


def test_frozen_values_keep_nothing_for_backward():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), SparseConfig(select=RANDOM, target_modules=["0"]))
    model.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(2, 4, requires_grad=True)
        model(x).sum().backward()
    assert not any(t.shape == (2, 4) for t in saved)
    assert x.grad is not None


def test_hooks_on_the_base_layer_still_run():
    model = llama()
    seen = []
    layer = sparse_layers(model)["model.layers.0.mlp.up_proj"]
    handle = layer.base_layer.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    want = gradients(llama())
    got = gradients(model)
    assert len(seen) == 1
    handle.remove()
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_layer_used_twice_in_one_graph():
    base = nn.Sequential(nn.Linear(5, 5)).double()
    model = get_peft_model(copy.deepcopy(base), SparseConfig(select=RANDOM, target_modules=["0"]))
    x = torch.randn(3, 5, dtype=torch.float64)
    model(checkpoint(model, torch.tanh(model(x)), use_reentrant=False)).square().sum().backward()
    want = dense_gradients(base, base(base(torch.tanh(base(x)))).square().sum())
    for name, (index, grad) in kept_gradients(model).items():
        torch.testing.assert_close(grad, want[name][index], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_compiled(execution):
    model = llama(execution=execution)
    want = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    for p, w in zip((p for p in model.parameters() if p.requires_grad), want):
        torch.testing.assert_close(p.grad, w, rtol=0, atol=1e-5)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-5)


def quantized(bnb):
    model = nn.Sequential(nn.Linear(64, 32))
    packed = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(model[0].weight.data, requires_grad=False, quant_type="nf4")
    packed.bias = model[0].bias
    return nn.Sequential(packed.to("cpu"))


def test_beside_a_4_bit_base():
    bnb = pytest.importorskip("bitsandbytes")
    for kind in ("random", "low_rank_magnitude"):
        base = quantized(bnb)
        select = {"kind": kind, "budget": {"density": 0.1}}
        model = get_peft_model(base, SparseConfig(select=select, target_modules=["0"]))
        layer = sparse_layers(model)["0"]
        assert layer.option("default", "execution") == "bypass"
        x = torch.randn(3, 64)
        model(x).square().sum().backward()
        values = layer.sparse_values("weight", "default")
        assert values.numel() == 204
        dense = bnb.functional.dequantize_4bit(base[0].base_layer.weight, base[0].base_layer.weight.quant_state)
        y = F.linear(x, dense.requires_grad_(), base[0].base_layer.bias)
        y.square().sum().backward()
        want = dense.grad.flatten()[layer.slot("default", "weight").index.long()]
        torch.testing.assert_close(values.grad, want, rtol=1e-3, atol=1e-3)
    for wrong in ({"execution": "in_place"}, {"execution": "scatter"}, {"coordinates": "absolute"}):
        with pytest.raises(Unsupported, match=r"quantized|packed"):
            get_peft_model(quantized(bnb), SparseConfig(select=RANDOM, target_modules=["0"], **wrong))


def test_an_offloaded_base_is_bypassed():
    from accelerate import cpu_offload

    base = nn.Sequential(nn.Linear(6, 8))
    x = torch.randn(3, 6)
    want = base(x)
    cpu_offload(base, execution_device="cpu")
    model = get_peft_model(base, SparseConfig(select=RANDOM, target_modules=["0"]))
    assert sparse_layers(model)["0"].option("default", "execution") == "bypass"
    y = model(x)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert next(p for p in model.parameters() if p.requires_grad).grad is not None
    with pytest.raises(Unsupported, match="offloaded"):
        get_peft_model(base, SparseConfig(select=RANDOM, target_modules=["0"], execution="in_place"))
