"""One PEFT model as several: what a switch shows, and that it leaves nothing behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pegbox.errors import BadInput
from pegbox.parts.adapters import adapter_off, adapter_on, is_adapted
from pegbox.testing import tiny_batch, tiny_llama

IDS = tiny_batch(rows=2, pad=0)["input_ids"]


def lora(**options):
    return LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)


def adapted(**options):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), lora(**options))
    torch.manual_seed(1)
    model.add_adapter("other", lora(**options))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def state(model):
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    return flags, model.active_adapter, model._adapters_disabled, {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(before, after):
    return before[:3] == after[:3] and all(torch.equal(v, after[3][k]) for k, v in before[3].items())


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_switches_show_what_pefts_own_do(options):
    model = adapted(**options)
    before, plain = state(model), logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    before = state(model)
    bare = logits(tiny_llama().eval())
    with adapter_off(model):
        assert torch.equal(logits(model), bare)
        with adapter_on(model, "other"):
            assert torch.equal(logits(model), other)
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), plain)
    with adapter_on(model, "other"), adapter_off(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), plain)
    assert unchanged(before, state(model))


def test_nothing_is_left_after_an_exception():
    model = adapted(modules_to_save=["lm_head"])
    before = state(model)
    for scope in (adapter_off(model), adapter_on(model, "other")):
        with pytest.raises(KeyError), scope:
            raise KeyError("stop")
    assert unchanged(before, state(model))


def test_merged_adapters_are_merged_again():
    model = adapted()
    plain = logits(model)
    model.merge_adapter()
    with adapter_off(model):
        assert torch.allclose(logits(model), logits(tiny_llama().eval()), atol=1e-5)
    assert all(layer.merged for layer in model.modules() if hasattr(layer, "merged_adapters"))
    assert torch.allclose(logits(model), plain, atol=1e-5)


def test_sparse_updates_in_place():
    """Layers that write into the base are switched by their own methods."""
    from pegbox.parts.allocation import Allocation, Entries
    from pegbox.parts.context import Context
    from pegbox.tuners import TUNER

    base = tiny_llama().eval()
    allocation = Allocation({"model.layers.0.mlp.up_proj.weight": Entries(torch.arange(0, 60, 3, dtype=torch.int32))})
    model = TUNER.validate("sparse").attach(base, allocation, Context(base, seed=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    plain, bare = logits(model), logits(tiny_llama().eval())
    assert not torch.equal(plain, bare)
    with adapter_off(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), plain)


def test_what_is_refused():
    assert is_adapted(adapted())
    assert not is_adapted(tiny_llama())
    with pytest.raises(BadInput, match=r"no adapter 'othr'.*other"), adapter_on(adapted(), "othr"):
        pass
