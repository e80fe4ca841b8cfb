"""The sparse tuner as PEFT sees it: identity, exact revert, files, several adapters, merging, copies, dtypes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pegbox.errors import BadInput, Corrupt, Unsupported
from pegbox.parts.allocation import Allocation, Entries, Units, Whole
from pegbox.parts.context import Context
from pegbox.parts.parameterinfo import info_of
from pegbox.testing import tiny_llama
from pegbox.tuners import TUNER
from pegbox.tuners.sparse import SparseConfig, export_delta, sparse_layers

IDS = torch.arange(3, 40).view(1, -1)
RANDOM = {"kind": "random", "budget": {"density": 0.1}}
EXECUTIONS = ("in_place", "scatter", "bypass")


def config(**options):
    return SparseConfig(**{"select": RANDOM, "task_type": "CAUSAL_LM", **options})


def wrapped(model=None, **options):
    return get_peft_model(model or tiny_llama(), config(**options))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, steps=3, lr=1e-2, **options):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, **options)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def weights(model):
    return {n.replace("base_layer.", ""): p.detach().clone() for n, p in model.named_parameters() if "sparse_" not in n}


@pytest.mark.parametrize("coordinates", ["absolute", "delta"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_untrained_it_is_the_base_and_switched_off_it_is_the_base_again(execution, coordinates):
    base = logits(tiny_llama())
    model = wrapped(execution=execution, coordinates=coordinates)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=0 if execution == "in_place" else 1e-6)
    train(model)
    tuned = logits(model)
    assert not torch.allclose(tuned, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        assert all(torch.equal(w, v) for w, v in zip(weights(model.model).values(), weights(tiny_llama()).values()))
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_saved_by_peft_and_loaded_by_peft(execution, tmp_path):
    model = train(wrapped(execution=execution, coordinates="absolute"))
    tuned = logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(logits(loaded), tuned)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), tuned)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == 1836
    assert json.loads((tmp_path / "adapter_config.json").read_text())["allocation"] == "stored"


def test_loading_does_not_select_again(tmp_path, monkeypatch):
    wrapped().save_pretrained(str(tmp_path))
    monkeypatch.setattr("pegbox.tuners.sparse.model.select_entries", lambda *a: pytest.fail("selected again"))
    PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True)


def test_eight_bytes_per_entry_on_disk(tmp_path):
    model = wrapped(tiny_llama(hidden_size=256, intermediate_size=512), select={"kind": "random"})
    model.save_pretrained(str(tmp_path))
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= 8 * entries * 1.01 + 4096  # the header's fixed part


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_several_adapters_switch_add_up_and_go(execution, tmp_path):
    base = logits(tiny_llama())
    model = train(wrapped(execution=execution))
    first = logits(model)
    model.add_adapter("b", config(execution=execution, seed=1, coordinates="absolute"))
    assert torch.equal(logits(model), first)
    model.set_adapter("b")
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)
    train(model)
    second = logits(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["b"])
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    deltas = [export_delta(model, name) for name in ("default", "b")]
    by_hand = tiny_llama()
    pretrained = dict(tiny_llama().named_parameters())
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            for delta in deltas:
                if name in delta:
                    at, old = delta[name].index.long(), pretrained[name].flatten()
                    change = delta[name].values - (old[at] if delta[name].mode == "set" else 0)
                    parameter.view(-1)[at] += change
    torch.testing.assert_close(logits(by_hand), both, rtol=0, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("b")
    assert torch.equal(logits(model), second)
    other = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "b"))
    assert torch.equal(logits(other), second)
    model.delete_adapter("b")
    assert torch.equal(logits(model.base_model.model), base)


def test_a_second_adapter_is_selected_from_pretrained_weights_and_may_go_elsewhere():
    magnitude = {"kind": "magnitude", "budget": {"density": 0.1}}
    fresh = wrapped(select=magnitude)
    model = train(wrapped(select=magnitude), lr=0.5)
    model.add_adapter("b", config(select=magnitude, target_modules=["q_proj", "embed_tokens"]))
    q = "model.layers.0.self_attn.q_proj"
    want = sparse_layers(fresh)[q].slot("default", "weight").index
    assert torch.equal(sparse_layers(model)[q].slot("b", "weight").index, want)
    model.set_adapter("b")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}.sparse_weight_values.b"
        for name in (q, q.replace("layers.0", "layers.1"), "model.embed_tokens")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_tuned_and_unmerged_equals_the_base_bit_for_bit(dtype):
    model = train(wrapped(tiny_llama().to(dtype), tensors=["weight"]))
    tuned = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), tuned)
    model.unmerge_adapter()
    assert torch.equal(logits(model), tuned)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama().to(dtype)))
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged), tuned)
    assert torch.equal(logits(model.unload()), logits(tiny_llama().to(dtype)))


def test_two_merged_adapters_come_off_again_exactly():
    base = weights(tiny_llama())
    model = train(wrapped(coordinates="absolute"))
    model.add_adapter("b", config(seed=0, coordinates="absolute"))  # the same entries: they overlap fully
    model.set_adapter("b")
    train(model)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    model.merge_adapter(adapter_names=["default", "b"])
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    model.set_adapter("b")
    with model.disable_adapter():
        got = weights(model.model)
    assert all(torch.equal(got[n], w) for n, w in base.items())


def test_a_copy_is_independent():
    model = train(wrapped())
    tuned = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), tuned)
    train(twin)
    assert torch.equal(logits(model), tuned)
    assert not torch.equal(logits(twin), tuned)
    values = next(p for p in twin.parameters() if p.requires_grad)
    assert info_of(values).reference().shape == values.shape


def test_values_stay_float32_on_a_bfloat16_base_and_small_steps_are_not_lost():
    model = wrapped(tiny_llama().to(torch.bfloat16), coordinates="absolute")
    values = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in values} == {torch.float32}
    before = [p.detach().clone() for p in values]
    train(model, steps=1, lr=1e-4, weight_decay=0)
    moved = torch.cat([(p - b).abs() for p, b in zip(values, before)])
    assert (moved > 5e-5).float().mean() > 0.9
    layer = sparse_layers(model)["model.layers.0.mlp.up_proj"]
    slot = layer.slot("default", "weight")
    assert torch.equal(layer.tuned("weight").flatten()[slot.index.long()], slot.values.to(torch.bfloat16))


def test_casting_the_model_later_leaves_the_values_in_float32():
    model = train(wrapped())
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model.to(torch.bfloat16)
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(after, before))
    assert logits(model).dtype == torch.bfloat16
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama().to(torch.bfloat16)))


def test_a_state_dict_holds_pretrained_base_weights_and_base_weights_can_be_loaded():
    model = train(wrapped())
    tuned = logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    q = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert torch.equal(state[q], tiny_llama().model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(logits(model), tuned)
    other = wrapped(tiny_llama(seed=1), seed=5)
    logits(other)
    other.load_state_dict(state)
    assert torch.equal(logits(other), tuned)


def test_metadata_says_what_the_values_stand_for():
    model = wrapped(coordinates="absolute", select={"kind": "magnitude"})
    name, values = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    info = info_of(values)
    assert info.name == "model.layers.0.self_attn.q_proj.weight"
    assert info.shape == (32, 32)
    assert info.coordinates == "absolute"
    weight = tiny_llama().model.layers[0].self_attn.q_proj.weight.flatten()
    assert torch.equal(info.reference(), weight[info.index().long()])
    train(model)
    assert torch.equal(info.reference(), weight[info.index().long()])
    assert "default" in name


def test_decay_pulls_absolute_values_to_zero_and_delta_values_to_the_pretrained_weights():
    for coordinates in ("absolute", "delta"):
        model = wrapped(coordinates=coordinates)
        values = next(p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            values += 0.5
        layer = sparse_layers(model)[info_of(values).name.removesuffix(".weight")]
        at = layer.slot("default", "weight").index.long()
        start = info_of(values).reference()
        values.grad = torch.zeros_like(values)
        torch.optim.SGD([values], lr=0.1, weight_decay=1.0).step()
        target = torch.zeros_like(start) if coordinates == "absolute" else start
        want = target + 0.9 * (start + 0.5 - target)
        torch.testing.assert_close(layer.tuned("weight").flatten()[at], want, rtol=0, atol=1e-6)


def test_an_allocation_made_beforehand_is_attached_as_it_is():
    model = tiny_llama(attention_bias=True)
    q, k = (f"model.layers.0.self_attn.{x}_proj" for x in "qk")
    given = Allocation(
        {
            f"{q}.weight": Entries(torch.tensor([1, 5, 9], dtype=torch.int32)),
            f"{k}.weight": Units(1, torch.tensor([0, 2])),
            f"{q}.bias": Whole(),
            "model.norm.weight": Whole(),
            "model.embed_tokens.weight": Units(0, torch.tensor([7])),
        }
    )
    tuner = TUNER.validate("sparse")
    attached = tuner.attach(model, given, Context(model))
    counts = {info_of(p).name: p.numel() for p in attached.parameters() if p.requires_grad}
    shapes = {n: tuple(p.shape) for n, p in tiny_llama(attention_bias=True).named_parameters()}
    assert counts == given.trained(shapes)
    train(attached)
    assert not torch.equal(logits(attached), logits(tiny_llama(attention_bias=True)))


def test_tuner_component_saves_counts_loads_and_refuses_another_kind(tmp_path):
    tuner = TUNER.validate({"kind": "sparse", "select": RANDOM})
    model = train(tuner.attach(tiny_llama(), None, Context(tiny_llama(), seed=3)))
    entry = tuner.save(model, tmp_path)
    assert (entry["trained"], entry["touched"]) == (1836, 1836)
    assert torch.equal(logits(tuner.load(tiny_llama(), tmp_path)), logits(model))
    lora = TUNER.validate({"kind": "lora", "r": 2, "target_modules": ["q_proj"]})
    (tmp_path / "lora").mkdir()
    lora.save(lora.attach(tiny_llama(), None, Context(tiny_llama())), tmp_path / "lora")
    with pytest.raises(Corrupt, match="not a sparse one"):
        tuner.load(tiny_llama(), tmp_path / "lora")


def tampered(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.sparse_weight_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[KEY + "index"].__setitem__(-1, 99999), "sorted, unique"),
        (lambda t: t[KEY + "index"].__setitem__(0, -1), "sorted, unique"),
        (lambda t: t.update({KEY + "values": t[KEY + "values"][:-1].clone()}), "positions but"),
        (lambda t: t.pop(KEY + "values"), "no complete entry"),
        (lambda t: [t.pop(KEY + "values"), t.pop(KEY + "index")], "no complete entry"),
        (lambda t: t.update({"base_model.model.nowhere.sparse_weight_index": torch.zeros(1)}), "no place"),
        (lambda t: t.update({KEY + "other": torch.zeros(1)}), "no place"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    wrapped().save_pretrained(str(tmp_path))
    tampered(tmp_path, change)
    with pytest.raises(Corrupt, match=message):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_what_can_not_be_right_is_refused_with_the_reason():
    with pytest.raises(BadInput, match="coordinates"):
        config(coordinates="absolut")
    with pytest.raises(BadInput, match="tensors"):
        config(tensors=["wieght"])
    with pytest.raises(BadInput, match="density"):
        config(select={"kind": "random", "budget": {"density": 1.5}})
    with pytest.raises(BadInput, match="Did you mean 'magnitude'"):
        config(select={"kind": "magnitud"})
    with pytest.raises(BadInput, match="matches no module"):
        wrapped(target_modules=["nothing_here"])
    with pytest.raises(BadInput, match="none of the tensors"):
        wrapped(tensors=["bias"])
    model = tiny_llama()
    missing = Allocation({"model.layers.9.self_attn.q_proj.weight": Whole()})
    with pytest.raises(BadInput, match=r"layers\.9"):
        TUNER.validate("sparse").attach(model, missing, Context(model))
    bad = Allocation({"model.norm.weight": Entries(torch.tensor([5, 5]))})
    with pytest.raises(BadInput, match="sorted, unique"):
        TUNER.validate("sparse").attach(model, bad, Context(model))


def test_a_config_from_a_file_without_its_weights_says_so(tmp_path):
    config().save_pretrained(str(tmp_path))
    model = get_peft_model(tiny_llama(), SparseConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(BadInput, match="its file is not loaded"):
        logits(model)


def test_a_tied_weight_is_not_written_in_place_nor_merged():
    def tied():
        return tiny_llama(tie_word_embeddings=True)

    with pytest.raises(Unsupported, match="shared with another module"):
        wrapped(tied(), target_modules=["embed_tokens"], execution="in_place")
    model = train(wrapped(tied(), target_modules=["embed_tokens"]))
    assert not torch.equal(logits(model), logits(tied()))
    with pytest.raises(Unsupported, match="tie_word_embeddings=False"):
        model.merge_adapter()


def test_on_the_meta_device_counts_come_from_shapes():
    with torch.device("meta"):
        model = tiny_llama()
    block = {"kind": "low_rank_magnitude", "budget": {"density": 0.1}}
    model = wrapped(model, select=block)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1836
    out = model(input_ids=IDS.to("meta"), labels=IDS.to("meta"))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
