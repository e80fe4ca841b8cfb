"""CorDA as a preparation: the model is unchanged at step 0, the record suffices, the export is an ordinary LoRA."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase
from pegbox.parts.context import Context
from pegbox.parts.initial import apply_initial, pending
from pegbox.prepare import PREPARE
from pegbox.prepare.corda_export import to_plain_lora
from pegbox.testing import tiny_llama, tiny_tokenizer

ALL = "all-linear"
IDS = torch.arange(40).view(2, 20)


def rows(count=8, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (count, length), generator=generator)
    return lambda: [{"input_ids": half, "attention_mask": torch.ones_like(half)} for half in ids.split(4)]


def prepare(model, **options):
    component = PREPARE.validate({"kind": "corda", "rank": 4, "calibration": "rows", **options})
    record = component.apply(model, rows(), Context(model))
    return component, record


def adapter(model, rank=4, alpha=4, **options):
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=options.pop("targets", ALL), **options)
    wrapped = peft.get_peft_model(model, config)
    apply_initial(model, wrapped)
    return wrapped.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, steps=5):
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        stepper.step()
        stepper.zero_grad()
    return model.eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=288, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("alpha", [4, 1, 13])
@pytest.mark.parametrize("balance", ["official", "balanced"])
def test_step_zero_is_the_original(mode, alpha, balance):
    expected = logits(tiny_llama())
    model = tiny_llama()
    prepare(model, mode=mode, balance=balance)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    torch.testing.assert_close(logits(adapter(model, alpha=alpha)), expected, rtol=0, atol=1e-4)
    assert not pending(model)


def test_step_zero_with_biases_and_transposed_weights():
    expected = logits(gpt2())
    model = gpt2()
    prepare(model)
    wrapped = adapter(model, targets=["c_attn", "c_proj", "c_fc"])
    torch.testing.assert_close(logits(wrapped), expected, rtol=0, atol=1e-4)
    biased = tiny_llama(attention_bias=True, mlp_bias=True)
    expected = logits(biased)
    prepare(biased, power=0.5)
    torch.testing.assert_close(logits(adapter(biased)), expected, rtol=0, atol=1e-4)


def test_bf16_stays_within_its_own_noise():
    model = tiny_llama().bfloat16()
    expected = logits(model).float()
    prepare(model)
    assert model.dtype == torch.bfloat16
    change = (logits(adapter(model)).float() - expected).norm() / expected.norm()
    assert change < 2e-2


def test_the_covariances_are_those_of_the_untouched_model():
    """Later blocks are decomposed by what they see before anything is rewritten."""
    from pegbox.parts.statistics import StatSpec, collect
    from pegbox.prepare.oriented import decompose, factors_of

    _, record = prepare(tiny_llama(), mode="kpm")
    spec = StatSpec(("input_covariance",), weigh="sequence", normalize="abs_max", dtype="float64")
    stats = collect(tiny_llama(), spec, rows()())
    name = "model.layers.1.mlp.down_proj"
    weight = tiny_llama().get_submodule(name).weight.detach().double()
    a, b = factors_of(decompose(weight, stats["input_covariance"][name]), 4, "kpm")
    ours = record["factors"][name]
    torch.testing.assert_close(ours[1] @ ours[0], (b @ a).float(), rtol=1e-4, atol=1e-6)


def test_the_record_and_the_adapter_suffice(tmp_path):
    model = tiny_llama()
    component, record = prepare(model)
    trained = train(adapter(model))
    (tmp_path / "prep").mkdir()
    component.save(record, tmp_path / "prep")
    trained.save_pretrained(tmp_path / "adapter")
    import peft

    base = tiny_llama()
    component.replay(base, tmp_path / "prep")
    assert torch.equal(
        base.model.layers[0].mlp.up_proj.weight, model.get_submodule("model.layers.0.mlp.up_proj").weight
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(trained), rtol=0, atol=1e-5)


def test_replaying_hands_the_same_start_to_the_tuner(tmp_path):
    model, base = tiny_llama(), tiny_llama()
    component, record = prepare(model)
    component.save(record, tmp_path)
    component.replay(base, tmp_path)
    assert torch.equal(logits(adapter(base)), logits(adapter(model)))


@pytest.mark.parametrize("alpha", [4, 9])
def test_the_export_is_a_plain_lora_over_the_original(tmp_path, alpha):
    import peft

    model = tiny_llama()
    component, record = prepare(model)
    trained = train(adapter(model, alpha=alpha))
    (tmp_path / "prep").mkdir()
    component.save(record, tmp_path / "prep")
    trained.save_pretrained(tmp_path / "adapter")
    errors = to_plain_lora(tmp_path / "adapter", tmp_path / "prep", tmp_path / "plain")
    assert set(errors.values()) == {0.0}
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["r"] == 8
    torch.testing.assert_close(logits(plain), logits(trained), rtol=0, atol=1e-5)
    errors = to_plain_lora(tmp_path / "adapter", tmp_path / "prep", tmp_path / "cut", rank=4)
    cut = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut").eval()
    assert all(0 <= error < 1 for error in errors.values())
    assert (logits(cut) - logits(trained)).norm() <= (logits(tiny_llama()) - logits(trained)).norm()


def test_exports_that_would_be_wrong_are_refused(tmp_path):
    model = tiny_llama()
    component, record = prepare(model)
    wrapped = adapter(model)
    (tmp_path / "prep").mkdir()
    component.save(record, tmp_path / "prep")
    wrapped.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    plain = json.loads(config.read_text())
    for change, error in (
        ({"use_dora": True}, Unsupported),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, Unsupported),
        ({"peft_type": "IA3"}, Unsupported),
    ):
        config.write_text(json.dumps({**plain, **change}))
        with pytest.raises(error):
            to_plain_lora(tmp_path / "adapter", tmp_path / "prep", tmp_path / "out")
    config.write_text("{")
    with pytest.raises(Corrupt, match="adapter folder"):
        to_plain_lora(tmp_path / "adapter", tmp_path / "prep", tmp_path / "out")
    config.write_text(json.dumps(plain))
    with pytest.raises(BadInput, match="not empty"):
        to_plain_lora(tmp_path / "adapter", tmp_path / "prep", tmp_path / "prep")


def test_wrong_bases_and_broken_records_are_refused(tmp_path):
    component, record = prepare(tiny_llama())
    component.save(record, tmp_path)
    with pytest.raises(WrongBase, match="fingerprint"):
        component.replay(tiny_llama(seed=1), tmp_path)
    with pytest.raises(WrongBase, match="isn't in this model"):
        component.replay(tiny_llama(intermediate_size=32), tmp_path)
    twice = tiny_llama()
    component.replay(twice, tmp_path)
    with pytest.raises((WrongBase, BadInput)):
        component.replay(twice, tmp_path)
    (tmp_path / "factors.safetensors").write_bytes(b"no")
    with pytest.raises(Corrupt, match="decomposition"):
        component.replay(tiny_llama(), tmp_path)


def test_a_tuner_that_does_not_fit_is_refused():
    model = tiny_llama()
    prepare(model)
    with pytest.raises(BadInput, match="prepared with rank 4, the tuner has rank 8"):
        adapter(model, rank=8)
    model = tiny_llama()
    prepare(model)
    with pytest.raises(BadInput, match="no LoRA layer there"):
        adapter(model, targets=["q_proj"])


def test_training_without_what_was_taken_out_is_refused(tmp_path):
    import peft

    model = tiny_llama().train()
    component, record = prepare(model)
    forgotten = peft.get_peft_model(model, peft.LoraConfig(target_modules=ALL, r=4)).train()
    with pytest.raises(BadInput, match="no adapter has taken it up"):
        forgotten(input_ids=IDS)
    component.save(record, tmp_path)
    trained = train(adapter(_prepared(component, tmp_path)))
    trained.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(_prepared(component, tmp_path), tmp_path / "adapter", is_trainable=True)
    train(again.train())  # an adapter with values of its own stands there
    assert not pending(again.get_base_model())


def _prepared(component, folder):
    base = tiny_llama()
    component.replay(base, folder)
    return base


def test_a_text_orients_it_too(tmp_path):
    text = tmp_path / "keep.txt"
    text.write_text("The river Po rises at the foot of Monviso and flows east. " * 40)
    model = tiny_llama()
    component = PREPARE.validate(
        {"kind": "corda", "mode": "kpm", "rank": 4, "calibration": str(text), "samples": 6, "length": 32}
    )
    expected = logits(tiny_llama())
    component.apply(model, rows(), Context(model, tokenizer=tiny_tokenizer()))
    torch.testing.assert_close(logits(adapter(model)), expected, rtol=0, atol=1e-4)
    text.write_text("  ")
    with pytest.raises(BadInput, match="is empty"):
        component.apply(tiny_llama(), rows(), Context(model, tokenizer=tiny_tokenizer()))
    missing = PREPARE.validate({"kind": "corda", "rank": 4, "calibration": str(tmp_path / "none.txt")})
    with pytest.raises(BadInput, match="can't be read"):
        missing.apply(tiny_llama(), rows(), Context(model, tokenizer=tiny_tokenizer()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "kpa"}, "mode"),
        ({"rank": 0}, "rank"),
        ({"rank": 33}, "above the"),
        ({"targets": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"targets": ["lm_head"]}, "no matrix inside the model"),
        ({"mode": "kpm", "calibration": None}, "name it with calibration"),
        ({"power": 0}, "power"),
        ({"damping": 0}, "damping"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        prepare(tiny_llama(), **options)


def test_bad_calibration_is_refused():
    component = PREPARE.validate({"kind": "corda", "rank": 4})
    with pytest.raises(BadInput, match="no calibration row"):
        component.apply(tiny_llama(), list, Context(tiny_llama()))
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[5, 0] = float("nan")
    with pytest.raises(BadInput, match=r"inputs of 'model.layers.0.*' are not finite"):
        component.apply(broken, lambda: [{"input_ids": IDS}], Context(broken))
    model = tiny_llama()
    prepare(model)
    with pytest.raises(BadInput, match="decomposed already"):
        prepare(model)


def test_too_few_tokens_are_warned_of():
    component = PREPARE.validate({"kind": "corda", "rank": 4})
    with pytest.warns(UserWarning, match="below a quarter"):
        component.apply(tiny_llama(), lambda: [{"input_ids": IDS[:1, :5]}], Context(tiny_llama()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(tiny_llama())


def test_a_packed_base_needs_permission():
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden_size=64)
    PREPARE.validate({"kind": "nf4", "while_loading": False}).apply(model, rows(), Context(model))
    packed = logits(model)
    with pytest.raises(BadInput, match="dequantize_for_init"):
        prepare(model)
    component, _ = prepare(model, dequantize_for_init=True)
    assert not component.needs_floating_base
    change = (logits(adapter(model)) - packed).norm() / packed.norm()
    assert change < 0.3  # the rest was rounded to 4 bits once more


def test_decomposed_then_quantized_loses_only_the_rounding_of_the_rest():
    pytest.importorskip("bitsandbytes")
    expected = logits(tiny_llama(hidden_size=64))
    both, alone = tiny_llama(hidden_size=64), tiny_llama(hidden_size=64)
    nf4 = PREPARE.validate({"kind": "nf4", "while_loading": False})
    prepare(both, rank=16)
    nf4.apply(both, rows(), Context(both))
    nf4.apply(alone, rows(), Context(alone))
    assert (logits(adapter(both, rank=16)) - expected).norm() < (logits(alone) - expected).norm()
