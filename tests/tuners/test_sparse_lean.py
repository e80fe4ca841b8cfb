"""The sparse tuner's lean execution, k entries per neuron: equal to every other form, and nothing kept beyond them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import pegbox
from pegbox.errors import BadInput, Corrupt, RunFailed, WrongBase
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.metering import saved_bytes
from pegbox.select import SELECT
from pegbox.testing import tiny_llama
from pegbox.tuners.full import Full
from pegbox.tuners.sparse import SparseConfig, export_delta, sparse_layers
from pegbox.tuners.sparse.execution import product_is_cheaper

IDS = torch.arange(3, 40).view(1, -1)
FORMS = ("lean", "scatter", "bypass", "in_place")


def rows(k=2, **options):
    return {"kind": "per_neuron", "k": k, **options}


def wrapped(model=None, execution="lean", select=None, **options):
    config = SparseConfig(select=select or rows(), execution=execution, task_type="CAUSAL_LM", **options)
    return get_peft_model(model or tiny_llama(), config)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def train(model, steps=3, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def net(dtype=torch.float64, inputs=7):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 5, bias=False)).to(dtype)


def fit(model, parameters, make, steps=20, dtype=torch.float64):
    """`steps` updates on a fixed regression."""
    draw = torch.Generator().manual_seed(8)
    x = torch.randn(30, 7, generator=draw, dtype=dtype)
    y = torch.randn(30, 5, generator=draw, dtype=dtype)
    optimizer = make(parameters)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
}


# ---- what is computed


@pytest.mark.parametrize("tokens", [37, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_untrained_it_is_the_base_bit_for_bit(tokens, shared):
    """With theta = 0 the output is the base's, bit for bit."""
    ids = IDS[:, :tokens]
    model = wrapped(select=rows(shared_columns=shared))
    assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_agree_with_a_weight_built_by_autograd(form, tokens, dtype, tolerance):
    """The forms agree: outputs, gradients of theta and x to 1e-6 in float32, to autograd's within 1e-12 in float64."""
    base = net(dtype, inputs=64)
    model = get_peft_model(
        net(dtype, inputs=64), SparseConfig(select=rows(3), execution=form, target_modules=["0", "2"])
    )
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 64, generator=draw, dtype=dtype, requires_grad=True)
    weights = []
    for name, layer in sparse_layers(model).items():
        slot = layer.slot("default", "weight")
        with torch.no_grad():
            slot.values.copy_(torch.randn(slot.values.shape, generator=draw, dtype=dtype) * 0.1)
        theta = slot.values.detach().clone().requires_grad_(True)
        module = base.get_submodule(name)
        flat = module.weight.detach().flatten().index_add(0, slot.index.long(), theta)
        weights.append((theta, slot.values, flat.view_as(module.weight), module.bias))
    z = x.detach().clone().requires_grad_(True)
    wanted = nn.functional.linear(torch.tanh(nn.functional.linear(z, weights[0][2], weights[0][3])), weights[1][2])
    pull = torch.randn(wanted.shape, generator=draw, dtype=dtype)
    (wanted * pull).sum().backward()
    y = model(x)
    (y * pull).sum().backward()
    close = {"rtol": tolerance, "atol": tolerance * 10}
    torch.testing.assert_close(y, wanted, **close)
    torch.testing.assert_close(x.grad, z.grad, **close)
    for theta, values, _, _ in weights:
        torch.testing.assert_close(values.grad, theta.grad, **close)


def test_few_tokens_take_the_product_and_many_a_built_weight(monkeypatch):
    """The cost rule: positions times entries against one pass over the weight; shared columns always the product."""
    assert product_is_cheaper(1, 64, (64, 576), False)
    assert not product_is_cheaper(512, 64, (64, 576), False)
    assert product_is_cheaper(1, 64, (576, 64), True)
    taken = []
    from pegbox.tuners.sparse import layer as module

    original = module.SparseLayer._bypassed
    monkeypatch.setattr(module.SparseLayer, "_bypassed", lambda s, *a, **k: taken.append(1) or original(s, *a, **k))
    model = wrapped(select=rows(1))
    logits(model)
    many = len(taken)
    logits(model, IDS[:, :1])
    assert len(taken) - many == 14 > many
    taken.clear()
    logits(wrapped(select=rows(1, shared_columns=True)))
    assert len(taken) == 14


def test_shared_columns_are_the_dense_formula():
    """shared_columns: the forward is base + x[..., columns] theta^T."""
    base = net()
    select = rows(2, shared_columns=True)
    model = get_peft_model(net(), SparseConfig(select=select, execution="lean", target_modules=["0"]))
    layer = sparse_layers(model)["0"]
    theta = torch.randn(6, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.sparse_values("weight", "default").copy_(theta.flatten())
    columns = (layer.slot("default", "weight").index % 7).view(6, 2)[0].long()
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base[0](x) + x[..., columns] @ theta.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["lean", "in_place"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_all_columns_are_full_fine_tuning(form, optimizer):
    """k = in equals full fine-tuning of W: the same trajectory in float64 under any optimizer without decay."""
    full = net()
    fit(full, [full[0].weight, full[2].weight], OPTIMIZERS[optimizer])
    config = SparseConfig(select=rows(99), execution=form, target_modules=["0", "2"])
    model = get_peft_model(net(), config)
    fit(model, [p for p in model.parameters() if p.requires_grad], OPTIMIZERS[optimizer])
    merged = model.merge_and_unload()
    for at in (0, 2):
        torch.testing.assert_close(merged[at].weight.detach(), full[at].weight.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["lean", "bypass"])
def test_it_equals_tuning_under_a_mask(form):
    """Merged weights equal mask-based tuning's with the same mask after 20 AdamW steps without decay, to 1e-10."""
    model = get_peft_model(net(), SparseConfig(select=rows(2), execution=form, target_modules=["0", "2"]))
    chosen = {f"{n}.weight": Entries(s.slot("default", "weight").index) for n, s in sparse_layers(model).items()}
    masked = net()
    Full().attach(masked, Allocation(chosen), Context(masked))
    fit(masked, [p for p in masked.parameters() if p.requires_grad], OPTIMIZERS["adamw"])
    fit(model, [p for p in model.parameters() if p.requires_grad], OPTIMIZERS["adamw"])
    merged = model.merge_and_unload()
    for at in (0, 2):
        torch.testing.assert_close(merged[at].weight.detach(), masked[at].weight.detach(), rtol=0, atol=1e-10)


# ---- what is touched and what is kept


def test_only_the_bypass_trains_and_the_base_stays_bit_identical():
    """Only theta requires a gradient; W is bit-identical after training; merged and unmerged it is W again."""
    model = wrapped()
    assert all(".sparse_weight_values." in n for n, p in model.named_parameters() if p.requires_grad)
    train(model)
    pretrained = dict(tiny_llama().named_parameters())

    def same():
        held = {n.removeprefix("base_model.model.").replace("base_layer.", ""): p for n, p in model.named_parameters()}
        return all(torch.equal(held[n], p) for n, p in pretrained.items())

    assert same()
    tuned = logits(model)
    model.merge_adapter()
    assert not same()
    torch.testing.assert_close(logits(model), tuned, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert same()
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize(("values", "size"), [("float32", 4), ("bfloat16", 2)])
def test_state_and_gradient_have_the_size_of_the_bypass(values, size):
    """Optimizer state is 8 k out bytes per layer and the gradient 4 k out (half of it with bfloat16 values)."""
    k = 3
    model = wrapped(select=rows(k), values=values)
    optimizer = train(model, steps=1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in sparse_layers(model).items():
        parameter = layer.sparse_values("weight", "default")
        entries = k * tiny_llama().get_submodule(name).out_features
        state = [t for t in optimizer.state[parameter].values() if t.ndim]
        assert sum(t.numel() * t.element_size() for t in state) == 2 * size * entries
        assert parameter.grad.numel() * parameter.grad.element_size() == size * entries
        assert not layer._patterns  # nothing is kept beside positions and values
        assert not layer.in_place._positions


@pytest.mark.parametrize("form", ["lean", "bypass"])
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_of_the_weights_size_is_saved_for_backward(form, shared):
    """What autograd saves beyond a frozen base is each layer's input and positions: no out x in tensor."""
    wide = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 1}
    frozen = tiny_llama(**wide)
    frozen.requires_grad_(False)
    model = wrapped(tiny_llama(**wide), form, rows(1, shared_columns=shared))
    seen, held = [], {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in held:
            seen.append(tensor.numel())
        return tensor

    embedded = model.get_input_embeddings()(IDS[:, :8]).detach().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(inputs_embeds=embedded).logits.sum()
    assert seen
    assert max(seen) < 64 * 512
    with saved_bytes(model) as meter:
        model(inputs_embeds=embedded).logits.sum().backward()
    assert meter.peak < 4 * 64 * 512


def test_a_step_between_forward_and_backward_is_noticed():
    for shared in (False, True):
        model = wrapped(select=rows(shared_columns=shared))
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, fused=True)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(RunFailed, match="changed between"):
            loss.backward()


# ---- files


@pytest.mark.parametrize("select", [rows(2), rows(2, shared_columns=True), rows(2, active_fraction=0.5)])
def test_reloaded_on_a_fresh_base_it_gives_the_same_logits_bit_for_bit(select, tmp_path):
    """Save, reload on a fresh base: the same logits, bit for bit."""
    model = wrapped(select=select)
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(loaded, IDS[:, :1]), logits(model, IDS[:, :1]))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["execution"] == "lean"


@pytest.mark.parametrize(("values", "each"), [("float32", 6), ("bfloat16", 4)])
def test_two_bytes_per_column_on_disk(values, each, tmp_path):
    """k out (2 bytes of index + the value) per layer."""
    model = wrapped(tiny_llama(hidden_size=256, intermediate_size=512), select=rows(8), values=values)
    train(model, steps=1)
    model.save_pretrained(str(tmp_path))
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= each * entries + 8192  # the header
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for n, t in held.items() if n.endswith("index")} == {torch.int16}
    again = PeftModel.from_pretrained(tiny_llama(hidden_size=256, intermediate_size=512), str(tmp_path))
    assert torch.equal(logits(again), logits(model))


def test_on_another_base_it_is_refused(tmp_path):
    """Reloading on another base is refused by fingerprint."""
    folders = []
    for seed in (0, 1):
        from pegbox.testing import tiny_tokenizer

        folders.append(tmp_path / f"base{seed}")
        tiny_llama(seed, max_position_embeddings=1024).save_pretrained(folders[-1])
        tiny_tokenizer().save_pretrained(folders[-1])
    data = {"path": "network", "limit": 4, "families": ["subnet"]}
    options = {"steps": 1, "batch": 2, "micro_batch": 2, "max_length": 400, "suites": [], "eval_split": 0.0}
    run = pegbox.train("neuroada", model=str(folders[0]), data=data, out=tmp_path / "run", **options)
    assert run.status == "finished"
    with pytest.raises(WrongBase, match=r"base|fingerprint"):
        pegbox.load(tmp_path / "run", base=str(folders[1]))


def test_for_another_shape_it_is_refused(tmp_path):
    """An adapter for another shape."""
    wrapped().save_pretrained(str(tmp_path))
    with pytest.raises(Corrupt, match="another base"):
        PeftModel.from_pretrained(tiny_llama(intermediate_size=48), str(tmp_path))


def test_damaged_columns_are_refused(tmp_path):
    wrapped().save_pretrained(str(tmp_path))
    held = load_file(tmp_path / "adapter_model.safetensors")
    name = next(n for n in held if n.endswith("q_proj.sparse_weight_index"))
    held[name][0, 0] = 9000
    save_file(held, str(tmp_path / "adapter_model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(Corrupt, match="column numbers"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_adapters_add_up_and_become_a_common_difference():
    """Sum of adapters; conversion to the common sparse difference."""
    model = wrapped()
    train(model)
    model.add_adapter("b", SparseConfig(select=rows(1), execution="lean", coordinates="delta"))
    model.set_adapter("b")
    train(model)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    tuned = tiny_llama()
    from pegbox.parts import deltas

    for name in ("default", "b"):
        deltas.apply(export_delta(model, name), dict(tuned.named_parameters()))
    torch.testing.assert_close(logits(tuned), both, rtol=0, atol=1e-5)


def test_a_target_without_a_rule_is_refused():
    """A module that is no linear layer, convolution or embedding has no rows."""
    with pytest.raises(BadInput, match="a matrix or a convolution"):
        wrapped(target_modules=["input_layernorm"])


def test_a_selector_that_needs_data_wants_it_beforehand():
    with pytest.raises(BadInput, match="statistics"):
        wrapped(select=rows(criterion="gradient"))
    model = tiny_llama()
    component = SELECT.validate(rows(1))
    chosen = component.select(Anatomy.of(model), dict(model.named_parameters()), None, torch.Generator())
    given = SparseConfig(execution="lean", task_type="CAUSAL_LM").with_allocation(chosen)
    assert torch.equal(logits(get_peft_model(model, given)), logits(tiny_llama()))


def test_in_bfloat16_the_values_stay_float32():
    model = wrapped(tiny_llama().to(torch.bfloat16))
    train(model)
    assert {v.dtype for n, v in model.named_parameters() if v.requires_grad} == {torch.float32}
    small = wrapped(values="bfloat16")
    train(small)
    assert not torch.allclose(logits(small), logits(tiny_llama()), atol=1e-4)


# ---- single weights, whatever their number


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("share", ["none", "some", "all"])
@pytest.mark.parametrize("axes", [2, 3, 4])
def test_single_weights_equal_a_masked_dense_weight(axes, share, dtype, tolerance):
    """Forward and backward equal F.linear with a masked dense parameter; k = 0, k = all; 2 to 4 axes; no bias."""
    draw = torch.Generator().manual_seed(axes)
    base = nn.Sequential(nn.Linear(9, 6, bias=axes == 3)).to(dtype)
    index = {"none": torch.empty(0), "some": torch.tensor([1, 7, 20, 53]), "all": torch.arange(54)}[share].int()
    weight = base[0].weight.detach().clone()
    bias = base[0].bias
    config = SparseConfig(execution="lean").with_allocation(Allocation({"0.weight": Entries(index)}))
    model = get_peft_model(base, config)
    theta = torch.randn(index.numel(), generator=draw, dtype=dtype, requires_grad=True)
    values = sparse_layers(model)["0"].sparse_values("weight", "default")
    with torch.no_grad():
        values.copy_(theta)
    x = torch.randn(*(2, 3, 4, 5)[: axes - 1], 9, generator=draw, dtype=dtype, requires_grad=True)
    z = x.detach().clone().requires_grad_(True)
    y = model(x)
    wanted = nn.functional.linear(z, weight.flatten().index_add(0, index.long(), theta).view(6, 9), bias)
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    pull = torch.randn(y.shape, generator=draw, dtype=dtype)
    (y * pull).sum().backward()
    (wanted * pull).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values.grad, theta.grad, rtol=tolerance, atol=tolerance)
