"""Every PEFT method as a tuner: options checked, targets by word, saved and loaded without silent gaps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pegbox.errors import BadInput, Corrupt, Unsupported
from pegbox.parts.allocation import Allocation, Whole
from pegbox.parts.context import Context
from pegbox.testing import tiny_llama
from pegbox.tuners import TUNER
from pegbox.tuners.peft_methods import option_hints, peft_kinds

IDS = torch.arange(3, 20).view(1, -1)


def attach(block, model=None, **context):
    model = model or tiny_llama()
    return TUNER.validate(block).attach(model, None, Context(model, **context))


def test_peft_is_imported_only_when_one_of_its_kinds_is_asked_for():
    code = (
        "import sys; from pegbox.tuners import TUNER; TUNER.validate({'kind': 'sparse'}); TUNER.kinds();"
        "assert 'peft' not in sys.modules, 'too early'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", peft_kinds())
def test_every_method_is_a_kind_whose_options_can_be_checked(kind):
    if kind == "adamss":
        pytest.importorskip("sklearn")
    options = {"total_step": 10} if kind == "adalora" else {}
    tuner = TUNER.validate({"kind": kind, **options})
    assert tuner.kind == kind
    assert TUNER.validate(tuner.model_dump(mode="json")) == tuner
    json.dumps(tuner.model_dump(mode="json"))
    assert option_hints(kind)


@pytest.mark.parametrize("kind", ["lora", "ia3", "vera", "shira", "oft", "loha", "hra", "ln_tuning", "adalora"])
def test_methods_attach_train_save_and_load(kind, tmp_path):
    blocks = {
        "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "ln_tuning": {"target_modules": ["input_layernorm"]},
        "oft": {"target_modules": ["q_proj"], "oft_block_size": 4, "r": 0},
        "shira": {"target_modules": ["q_proj"], "r": 2},
    }
    block = {"kind": kind, **blocks.get(kind, {"target_modules": ["q_proj", "v_proj"]})}
    tuner = TUNER.validate(block)
    model = attach(block, total_steps=10)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        with tuner.reference(model):
            assert torch.equal(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)
        tuner.save(model, tmp_path)
        loaded = tuner.load(tiny_llama(), tmp_path)
        torch.testing.assert_close(loaded(input_ids=IDS).logits, want)


def test_words_for_parts_of_the_model_become_module_names():
    model = attach({"kind": "lora", "r": 2, "target_modules": "attention"})
    tuned = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert tuned == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model = attach({"kind": "lora", "r": 2, "target_modules": "all-linear"})
    assert len([m for m in model.modules() if hasattr(m, "lora_A")]) == 14


def test_what_is_wrong_with_a_block_is_said_with_the_nearest_right_thing():
    with pytest.raises(BadInput, match="Did you mean 'lora_alpha'"):
        TUNER.validate({"kind": "lora", "lora_alfa": 3})
    with pytest.raises(BadInput, match=r"tuner\.r: .*integer"):
        TUNER.validate({"kind": "lora", "r": "abc"})
    with pytest.raises(BadInput, match="Did you mean 'sparse'"):
        TUNER.validate({"kind": "spars"})
    with pytest.raises(BadInput, match="init_lora_weights"):
        TUNER.validate({"kind": "lora", "init_lora_weights": "nope"})
    with pytest.raises(BadInput, match=r"Unknown key 'tuner\.inference_mode'"):
        TUNER.validate({"kind": "lora", "inference_mode": True})


def test_a_literal_with_a_number_in_it_is_an_option():
    assert TUNER.validate({"kind": "lora", "init_lora_weights": "pissa_niter_4"}).init_lora_weights == "pissa_niter_4"


def test_a_target_that_matches_nothing_is_refused_before_anything_changes():
    model = tiny_llama()
    with pytest.raises(BadInput, match="q_proj"):
        attach({"kind": "lora", "target_modules": ["qproj"]}, model)
    assert not any("lora" in n for n, _ in model.named_modules())


def test_a_selection_of_weights_is_refused_by_methods_that_cannot_hold_one():
    model = tiny_llama()
    with pytest.raises(Unsupported, match="sparse"):
        TUNER.validate("lora").attach(model, Allocation({"lm_head.weight": Whole()}), Context(model))


def test_plain_names_stay_as_written_in_the_saved_config():
    model = attach({"kind": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]})
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_files_that_do_not_fit_are_refused(tmp_path):
    tuner = TUNER.validate({"kind": "lora", "r": 2, "target_modules": ["q_proj"]})
    tuner.save(attach(tuner), tmp_path)
    with pytest.raises(Corrupt, match="no place"):
        tuner.load(tiny_llama(num_hidden_layers=1), tmp_path)
    with pytest.raises(Corrupt, match="does not load"):
        tuner.load(tiny_llama(hidden_size=64), tmp_path)
    with pytest.raises(Corrupt, match="not 'ia3'"):
        TUNER.validate("ia3").load(tiny_llama(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Corrupt, match=r"truncated|does not load"):
        tuner.load(tiny_llama(), tmp_path)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(Corrupt, match="pickle"):
        tuner.load(tiny_llama(), tmp_path)


def test_lora_over_a_4_bit_base_trains_and_reloads(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def quantized():
        model = tiny_llama(hidden_size=64, intermediate_size=128)
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        packed = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                        packed.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                        setattr(parent, name, packed.to("cpu"))
        return model

    tuner = TUNER.validate({"kind": "lora", "r": 4, "target_modules": "all-linear"})
    model = attach(tuner, quantized())
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28
    torch.optim.AdamW(trained, 1e-2).step()
    want = model(input_ids=IDS).logits
    tuner.save(model, tmp_path)
    assert torch.equal(tuner.load(quantized(), tmp_path)(input_ids=IDS).logits, want)
