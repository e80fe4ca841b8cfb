"""The slices tuner: gradients against dense ones, what is saved, layouts and executions, PEFT's uses, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pegbox.errors import BadInput, Corrupt, RunFailed, Unsupported
from pegbox.parts.allocation import Allocation, Entries, Units
from pegbox.parts.coupled import reordering_of
from pegbox.parts.metering import optimizer_state_bytes
from pegbox.parts.slices import read_slices, to_sparse_delta
from pegbox.testing import tiny_batch, tiny_llama
from pegbox.tuners.slices import SliceLayer, SlicesConfig, export_slices, slice_layers, to_full_weights
from pegbox.tuners.slices.products import Block

IDS = torch.arange(24).view(2, 12)
RATIOS = {"v": 0.5, "o": 0.5, "u": 0.1, "d": 0.1}
FORMS = [(layout, execution) for layout in ("gather", "contiguous") for execution in ("in_place", "bypass")]


def attached(base=None, ratios=None, **options):
    base = tiny_llama().double() if base is None else base
    return get_peft_model(base, SlicesConfig(select={"kind": "units", "ratios": ratios or RATIOS}, **options))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model, ids=IDS):
    return nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **options)).double()


class One(nn.Module):
    """A single linear layer as a model."""

    def __init__(self, out=6, into=10, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(into, out, bias=bias).double()

    def forward(self, x):
        return self.proj(x)


def one(axis, index, **options):
    config = SlicesConfig(**options).with_allocation(Allocation({"proj.weight": Units(axis, torch.tensor(index))}))
    return get_peft_model(One(), config)


# ---- the mathematics


@pytest.mark.parametrize(
    "base", [lambda: tiny_llama(attention_bias=True, mlp_bias=True).double(), gpt2], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize(("layout", "execution"), FORMS)
def test_a_zero_block_answers_as_the_base(base, layout, execution):
    """D = 0: same logits as the base, re-ordered or not; biases, grouped queries, fused and transposed matrices."""
    wanted = base()(input_ids=IDS).logits
    model = attached(base(), layout=layout, execution=execution)
    assert torch.allclose(model(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)
    assert (reordering_of(model.get_base_model()) is not None) == (layout == "contiguous")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("index", [[2, 3, 4], [4, 0, 3]])
@pytest.mark.parametrize("execution", ["in_place", "bypass"])
@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 5, 10)])
def test_the_gradient_is_the_slice_of_the_dense_one(axis, index, execution, shape):
    """dD equals the matching slice of autograd's dense gradient (1e-12), dx too; batches of 1 and 2-d inputs work."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = One()
    out = y(x)
    (out.sin().sum()).backward()
    dense, gx = y.proj.weight.grad.index_select(axis, torch.tensor(index)), x.grad.clone()
    x.grad = None
    model = one(axis, index, execution=execution)
    tuned = model(x)
    torch.testing.assert_close(tuned, out, rtol=0, atol=1e-12)
    tuned.sin().sum().backward()
    (values,) = trained(model)
    torch.testing.assert_close(values.grad, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, gx, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layout", "execution"), FORMS)
@pytest.mark.parametrize("base", [lambda: tiny_llama().double(), gpt2], ids=["llama", "gpt2"])
def test_gradients_in_a_model_and_none_elsewhere(base, layout, execution):
    """The blocks' gradients are the dense ones' slices; frozen tensors receive no gradient."""
    dense = base()
    loss_of(dense).backward()
    model = attached(base(), layout=layout, execution=execution)
    loss_of(model).backward()
    for name, layer in slice_layers(model).items():
        piece, grad = layer.slice_of("default"), layer.slice_values["default"].grad
        wanted = dense.get_submodule(name).weight.grad.index_select(piece.axis, piece.index)
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-7)  # norms run in float32
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_layouts_executions_and_coordinates_train_alike():
    """Contiguous and gather, in place and beside, differences and weights: the same forward and gradients (1e-6)."""
    answers = []
    for layout, execution in FORMS:
        for coordinates in ("delta", "absolute"):
            model = attached(layout=layout, execution=execution, coordinates=coordinates)
            optimizer = torch.optim.SGD(trained(model), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
            answers.append(model(input_ids=IDS).logits)
    assert not torch.allclose(answers[0], tiny_llama().double()(input_ids=IDS).logits, atol=1e-3)
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("coordinates", ["delta", "absolute"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_is_a_masked_dense_step_bit_for_bit(axis, coordinates):
    """One SGD step on the block = a dense step with the gradient masked to it, in fp64 (numbers that sum exactly)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (3, 10), generator=generator).double()
    slope = torch.randint(-4, 5, (3, 6), generator=generator).double()
    index = torch.tensor([1, 4])
    dense = One()
    (dense(x) * slope).sum().backward()
    with torch.no_grad():
        masked = torch.zeros_like(dense.proj.weight)
        masked.index_copy_(axis, index, dense.proj.weight.grad.index_select(axis, index))
        dense.proj.weight.add_(masked, alpha=-0.25)
    model = one(axis, [1, 4], coordinates=coordinates)
    (model(x) * slope).sum().backward()
    torch.optim.SGD(trained(model), lr=0.25).step()
    assert torch.equal(to_full_weights(model)["proj.weight"], dense.proj.weight)


def test_all_channels_are_full_tuning_of_the_down_matrices():
    """Ratio d = 1 alone follows full fine-tuning of down_proj, step by step."""
    full, ours = tiny_llama().double(), attached(ratios={"d": 1.0}, coordinates="absolute")
    full.requires_grad_(False)
    for block in full.model.layers:
        block.mlp.down_proj.weight.requires_grad_(True)
    losses = []
    for model in (full, ours):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses[:4]), torch.stack(losses[4:]), rtol=0, atol=1e-7)
    for name, tensor in to_full_weights(ours).items():
        torch.testing.assert_close(tensor, full.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("execution", ["in_place", "bypass"])
@pytest.mark.parametrize("index", [[3, 4, 5], [9, 0, 4]])
def test_a_column_block_saves_its_own_inputs_and_no_more(execution, index):
    """Saved for backward: batch * length * s activations; counted by storages, parameters left out."""
    model = one(1, index, execution=execution)
    x = torch.randn(2, 7, 10, dtype=torch.float64).requires_grad_()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert sum(saved.values()) == 2 * 7 * 3 * 8
    y.sum().backward()


def test_a_row_block_saves_only_its_input():
    model = one(0, [1, 3])
    x = torch.randn(2, 7, 10, dtype=torch.float64).requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        model(x)
    assert [t.untyped_storage().data_ptr() for t in seen] == [x.untyped_storage().data_ptr()]


def test_optimizer_state_has_the_blocks_size():
    """8 bytes of AdamW state per trained weight (float32), and a step count per block."""
    model = attached(tiny_llama())
    optimizer = torch.optim.AdamW(trained(model))
    loss_of(model).backward()
    optimizer.step()
    blocks = sum(layer.slice_values["default"].numel() for layer in slice_layers(model).values())
    assert optimizer_state_bytes(optimizer) - 4 * len(trained(model)) == 8 * blocks
    assert blocks == sum(p.numel() for p in trained(model))


def test_two_micro_batches_are_one_batch():
    """Accumulation: the mean loss of two halves has the gradient of the whole (1e-6)."""
    whole, halves = attached(), attached()
    loss_of(whole).backward()
    for ids in IDS.split(1):
        (loss_of(halves, ids) / 2).backward()
    for a, b in zip(trained(whole), trained(halves), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)


def test_a_block_is_a_range_where_it_can_be():
    at = torch.tensor([3, 4, 5])
    assert Block.of(0, False, at).start == 3
    assert Block.of(0, False, at, ranges=False).start is None
    assert Block.of(0, False, at.flip(0)).start is None
    contiguous = slice_layers(attached(layout="contiguous", ratios={"u": 0.3, "d": 0.3}))
    assert all(layer.block("default").start is not None for layer in contiguous.values())


def test_a_block_without_a_unit_leaves_its_layer_alone():
    model = attached(ratios={"d": 0.0157}, seed=1)  # two channels of 128
    assert sum(len(layer.slice_index["default"]) for layer in slice_layers(model).values()) == 2
    assert len(slice_layers(model)) <= 2


# ---- in place: writes and reference passes


def test_a_reference_pass_between_forward_and_backward_is_survived():
    """The adapter is switched off and on between: the gradient is still that of the tuned model."""
    plain, crossed = (attached(execution="in_place") for _ in range(2))
    for model in (plain, crossed):
        with torch.no_grad():
            for p in trained(model):
                p.add_(0.05)
    loss_of(plain).backward()
    loss = loss_of(crossed)
    with torch.no_grad(), crossed.disable_adapter():
        base = crossed(input_ids=IDS).logits
    loss.backward()
    assert torch.allclose(base, tiny_llama().double()(input_ids=IDS).logits)
    for a, b in zip(trained(plain), trained(crossed), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_stepping_before_backward_is_refused():
    model = attached(execution="in_place")
    loss = loss_of(model)
    with torch.no_grad():
        trained(model)[-1].add_(1.0)
    with pytest.raises(RunFailed, match="Run backward before stepping"):
        loss.backward()


@pytest.mark.parametrize("fused", [True, False])
def test_every_optimizers_step_is_noticed(fused):
    model = attached(tiny_llama(), execution="in_place")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=fused)
    before = model(input_ids=IDS).logits.detach()
    loss_of(model).backward()
    optimizer.step()
    assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-4)


def test_the_base_is_never_saved_tuned():
    model = attached(execution="in_place")
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.1)
    model(input_ids=IDS)
    fresh = tiny_llama().double().state_dict()
    held = {k.replace("base_model.model.", "").replace("base_layer.", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(held[name], tensor) for name, tensor in fresh.items())


def test_copies_and_casts():
    model = attached(tiny_llama(), execution="in_place")
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.05)
    wanted = model(input_ids=IDS).logits
    again = copy.deepcopy(model)
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    half = again.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in trained(half))
    assert torch.isfinite(half(input_ids=IDS).logits).all()


def test_hooks_on_the_base_layer_still_see_its_calls():
    model = attached(execution="in_place")
    layer = next(iter(slice_layers(model).values()))
    calls = []
    layer.base_layer.register_forward_hook(lambda *a: calls.append(1))
    loss_of(model).backward()
    assert calls
    assert all(p.grad is not None for p in trained(model))


# ---- PEFT


@pytest.mark.parametrize("layout", ["gather", "contiguous"])
def test_saved_with_original_numbers_and_loaded_as_peft_does(tmp_path, layout):
    model = attached(tiny_llama(), layout=layout)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    wanted = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(loaded(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)
    assert reordering_of(loaded.get_base_model()) is None
    units = SlicesConfig(select={"kind": "units", "ratios": RATIOS})
    fresh = get_peft_model(tiny_llama(), units)
    for name, piece in read_slices(tmp_path).items():
        same = slice_layers(fresh)[name.removesuffix(".weight")].slice_of("default")
        assert set(piece.index.tolist()) == set(same.index.tolist())
        assert piece.index.dtype == torch.int64
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True)
    loss_of(again).backward()
    assert all(p.grad is not None for p in trained(again))


def test_a_second_adapter_on_a_re_ordered_model(tmp_path):
    """Original numbers find their units wherever these stand now."""
    other = attached(tiny_llama(), seed=5)
    with torch.no_grad():
        for p in trained(other):
            p.normal_(0, 0.1)
    other.save_pretrained(tmp_path)
    wanted = other(input_ids=IDS).logits
    model = attached(tiny_llama(), layout="contiguous", seed=1)
    model.load_adapter(str(tmp_path), "other")
    model.set_adapter("other")
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    with pytest.raises(BadInput, match="re-ordered already"):
        model.add_adapter("third", SlicesConfig(layout="contiguous", select={"kind": "units", "ratios": RATIOS}))


@pytest.mark.parametrize("layout", ["gather", "contiguous"])
@pytest.mark.parametrize("coordinates", ["delta", "absolute"])
def test_merge_unmerge_and_unload_are_exact(layout, coordinates):
    """The finished model has its units in the original order; the base comes back bit for bit."""
    model = attached(layout=layout, coordinates=coordinates)
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.05)
    wanted = model(input_ids=IDS).logits
    full = to_full_weights(model)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=1e-7)
    model.unmerge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    assert reordering_of(merged) is None
    assert all(torch.equal(merged.state_dict()[n], t) for n, t in full.items())
    bare = model.unload()
    assert all(
        torch.equal(a, b) for a, b in zip(bare.state_dict().values(), tiny_llama().double().state_dict().values())
    )


def test_other_adapters_on_other_layers():
    from pegbox.tuners.sparse import SparseConfig

    base = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
    model = attached(base)
    assert all("slice_values" in n for n, p in model.named_parameters() if p.requires_grad)
    assert SparseConfig().peft_type != SlicesConfig().peft_type


def test_gradient_checkpointing_and_autocast():
    model = attached(tiny_llama()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trained(model))


def test_a_packed_base_trains_beside_itself():
    """Over a quantized base: gather mode, float32 blocks."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    for block in model.model.layers:
        old = block.mlp.down_proj
        packed = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        packed.load_state_dict(old.state_dict())
        block.mlp.down_proj = packed.to("cpu")
    wanted = model(input_ids=IDS).logits
    tuned = attached(model, ratios={"d": 0.2})
    assert torch.allclose(tuned(input_ids=IDS).logits, wanted, atol=1e-5)
    assert {layer.option("default").execution for layer in slice_layers(tuned).values()} == {"bypass"}
    optimizer = torch.optim.AdamW(trained(tuned), lr=1e-2)
    loss_of(tuned).backward()
    optimizer.step()
    assert not torch.allclose(tuned(input_ids=IDS).logits, wanted, atol=1e-4)
    with pytest.raises(Unsupported, match="packed"):
        tuned.merge_adapter()
    for options, says in (({"layout": "contiguous"}, "layout: gather"), ({"execution": "in_place"}, "quantized"),
                          ({"coordinates": "absolute"}, "own numbers")):  # fmt: skip
        with pytest.raises(BadInput, match=says):
            attached(copy.deepcopy(model), ratios={"d": 0.2}, **options)


def test_as_single_entries():
    """A block is a difference like any other: applied to the base it gives the tuned weights."""
    from pegbox.parts import deltas

    model = attached()
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.05)
    fresh = tiny_llama().double()
    deltas.apply(to_sparse_delta(export_slices(model)), dict(fresh.named_parameters()))
    assert all(torch.equal(fresh.state_dict()[n], t) for n, t in to_full_weights(model).items())


# ---- refusals


@pytest.mark.parametrize(
    ("allocation", "says"),
    [
        ({"model.layers.0.mlp.up_proj.weight": Entries(torch.tensor([1]))}, "not entries"),
        ({"model.embed_tokens.weight": Units(0, torch.tensor([1]))}, "linear layers only"),
        ({"model.layers.0.mlp.up_proj.weight": Units(0, torch.tensor([64]))}, "position 64 of an axis of 64"),
        ({"model.layers.0.mlp.up_proj.weight": Units(0, torch.tensor([3, 3]))}, "stands twice"),
        ({}, "nothing would train"),
    ],
)
def test_selections_it_cannot_hold(llama, allocation, says):
    with pytest.raises(BadInput, match=says):
        get_peft_model(llama, SlicesConfig().with_allocation(Allocation(allocation)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layout": "contigous"}, "Did you mean 'contiguous'"),
        ({"execution": "scatter"}, "execution"),
        ({"select": {"kind": "magnitude"}}, "does not choose rows or columns"),
        ({"select": {"kind": "units", "strategy": "gradient"}}, "calibration data"),
    ],
)
def test_bad_options_are_refused(llama, options, says):
    with pytest.raises(BadInput, match=says):
        get_peft_model(llama, SlicesConfig(**options))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    """Indices that exceed the layer, layers that are not there, a damaged file."""
    model = attached(tiny_llama(), ratios={"d": 1.0})
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="here it has 48"):
        PeftModel.from_pretrained(tiny_llama(intermediate_size=48), str(tmp_path))
    with pytest.raises(BadInput, match="no such linear layer"):
        PeftModel.from_pretrained(tiny_llama(num_hidden_layers=1), str(tmp_path))
    with pytest.raises(Corrupt):
        PeftModel.from_pretrained(tiny_llama(hidden_size=16), str(tmp_path))
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("slice_index"))
    save_file({**tensors, key: tensors[key] + 1}, path)
    with pytest.raises(BadInput, match="position 64 of an axis of 64"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    with pytest.raises(BadInput, match="position 64 on an axis of 64"):
        read_slices(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(Corrupt):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_a_model_that_is_re_ordered_already_is_refused(llama):
    """Permuting a model twice."""
    from pegbox.parts.coupled import reorder

    reorder(llama, {"model.layers.0.mlp": list(range(63, -1, -1))})
    with pytest.raises(BadInput, match="permuted twice"):
        attached(llama, layout="contiguous")


def test_a_config_without_its_file_does_not_run(tmp_path):
    model = attached(tiny_llama())
    model.peft_config["default"].save_pretrained(str(tmp_path))
    bare = get_peft_model(tiny_llama(), SlicesConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(BadInput, match="its file is not loaded"):
        bare(input_ids=IDS)


def test_layers_say_what_they_train():
    layer = next(iter(slice_layers(attached(ratios={"d": 0.2})).values()))
    assert isinstance(layer, SliceLayer)
    assert "columns" in repr(layer)


def test_a_batch_with_padding_trains(llama):
    model = attached(llama)
    batch = {k: v for k, v in tiny_batch().items() if k in ("input_ids", "attention_mask", "labels")}
    model(**batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trained(model))


def test_what_a_recipe_is_told_before_anything_is_loaded():
    from pegbox.capabilities import Facts, refusals
    from pegbox.recipe import load_recipe

    plain = load_recipe("s2ft")
    assert refusals(plain) == []
    assert refusals(plain, Facts(quantized=True)) == []
    assert any("bypass" in reason for reason in refusals(plain, Facts(sharded=True)))
    assert refusals(load_recipe("s2ft", ["tuner.execution=bypass"]), Facts(sharded=True)) == []
    for override in ("tuner.layout=contiguous", "tuner.execution=in_place", "tuner.coordinates=absolute"):
        assert any("quantized" in reason for reason in refusals(load_recipe("s2ft", [override]), Facts(quantized=True)))
