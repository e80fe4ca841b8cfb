"""4-bit bases: what is packed, that QLoRA trains on it, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.context import Context
from pegbox.prepare import PREPARE
from pegbox.testing import tiny_llama

bnb = pytest.importorskip("bitsandbytes")
IDS = torch.arange(40).view(2, 20)


def pack(model, **options):
    component = PREPARE.validate({"kind": "nf4", "while_loading": False, **options})
    component.apply(model, list, Context(model))
    return component


def test_only_the_blocks_matrices_are_packed():
    model = tiny_llama()
    pack(model)
    packed = {name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(packed) == 14
    assert model.lm_head.weight.is_floating_point()
    assert (model(input_ids=IDS).logits - tiny_llama()(input_ids=IDS).logits).abs().max() > 0
    spared = tiny_llama()
    pack(spared, skip=["down"])
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in spared.modules()) == 12


def test_it_is_what_loading_gives(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path)
    arguments = PREPARE.validate("nf4").load_kwargs()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
    model = tiny_llama()
    pack(model)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    PREPARE.validate("nf4").apply(loaded, list, Context(loaded))  # packed already: nothing happens
    assert PREPARE.validate({"kind": "nf4", "while_loading": False}).load_kwargs() == {}


def test_lora_trains_on_it_and_comes_back(tmp_path):
    import peft

    model = tiny_llama()
    component = pack(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    stepper = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    wrapped.save_pretrained(tmp_path / "adapter")
    component.save({}, tmp_path)
    assert json.loads((tmp_path / "nf4.json").read_text())["quant_type"] == "nf4"
    base = tiny_llama()
    component.replay(base, tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, wrapped.eval()(input_ids=IDS).logits)


def test_it_says_what_it_is():
    component = PREPARE.validate("nf4")
    assert component.packs_base
    assert not component.keeps_function


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"while_loading": True, "skip": ["mlp"]}, "while_loading: false"),
        ({"quant_type": "int4"}, "quant_type"),
        ({"skip": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"skip": ["all-linear"]}, "no linear layer"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        pack(tiny_llama(), **options)


def test_layers_that_cannot_be_packed_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=288, n_embd=16, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    with pytest.raises(BadInput, match="is a Conv1D"):
        pack(GPT2LMHeadModel(config))
