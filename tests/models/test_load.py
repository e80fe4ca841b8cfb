"""Loading: precision, task classes, the meta device, refusals; and the real GGUF model."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from pegbox.errors import BadInput, Corrupt, MissingExtra
from pegbox.models import load, load_meta, load_tokenizer, resolve

IDS = torch.arange(12)[None]  # (B=1, T=12)


def test_a_model_loads_in_float32_and_evaluation_mode_with_its_tokenizer(checkpoint, llama):
    model, tokenizer = load(checkpoint, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(model(IDS).logits, llama.eval()(IDS).logits)
    assert tokenizer.chat_template is not None
    assert model.pegbox_source.path == checkpoint


def test_precision_is_honoured(checkpoint):
    assert load(checkpoint, precision="bf16").model.dtype == torch.bfloat16
    assert load(checkpoint, precision="fp32").model.dtype == torch.float32
    with pytest.raises(BadInput, match="Did you mean 'bf16'"):
        load(checkpoint, precision="bf8")


def test_half_precision_weights_load_as_float32_on_a_cpu(tmp_path, llama):
    llama.half().save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").model.dtype == torch.float32


def test_nf4_packs_the_linear_layers(checkpoint):
    bnb = pytest.importorskip("bitsandbytes")
    model = load(checkpoint, precision="nf4", device="cpu").model
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 14  # 7 per block
    assert torch.isfinite(model(IDS).logits).all()


def test_nf4_without_bitsandbytes_names_the_extra(checkpoint, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(MissingExtra, match=r"pegbox\[quant\]"):
        load(checkpoint, precision="nf4")


def test_the_attention_can_be_chosen(checkpoint):
    assert load(checkpoint, attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(BadInput, match="nonsense"):
        load(checkpoint, attn_implementation="nonsense")


def test_devices_and_tasks_that_do_not_exist_are_named(checkpoint):
    with pytest.raises(BadInput, match="cuda:99"):
        load(checkpoint, device="cuda:99")
    with pytest.raises(BadInput, match="Did you mean 'causal-lm'"):
        load(checkpoint, task="causal")


def test_a_new_classification_head_is_the_same_every_time_and_draws_nothing_from_the_outside(checkpoint):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    heads = [load(checkpoint, task="sequence-classification", model_kwargs={"num_labels": 3}).model for _ in range(2)]
    assert torch.equal(heads[0].score.weight, heads[1].score.weight)
    assert heads[0](IDS).logits.shape == (1, 3)
    assert torch.equal(torch.rand(1), expected)


def test_a_base_with_a_tensor_missing_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Corrupt, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(checkpoint)


def test_a_truncated_file_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Corrupt, match="damaged"):
        load(checkpoint)


@pytest.mark.parametrize(("auto_map", "words"), [(True, "trust_remote_code=True"), (False, "does not know")])
def test_remote_code_is_off(checkpoint, auto_map, words, monkeypatch):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "never-heard-of"
    if auto_map:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
        (checkpoint / "modeling.py").write_text("import builtins\nbuiltins.was_run = True\n")
    (checkpoint / "config.json").write_text(json.dumps(config))
    for how in (load, load_meta):
        with pytest.raises(BadInput, match=words):
            how(checkpoint)
    assert not hasattr(builtins, "was_run")


def test_meta_has_shapes_and_no_memory(checkpoint, llama):
    meta = load_meta(checkpoint)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in llama.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())
    (checkpoint / "model.safetensors").unlink()  # not needed for planning
    assert load_meta(checkpoint, task="sequence-classification", model_kwargs={"num_labels": 5}).score.out_features == 5


def test_meta_keeps_ties(tmp_path):
    from pegbox.testing import tiny_llama

    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    meta = load_meta(tmp_path)
    assert meta.lm_head.weight is meta.model.embed_tokens.weight


def test_a_model_without_tokenizer_has_none(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None
    assert load(tmp_path).tokenizer is None


def test_a_broken_gguf_is_named_and_not_cached(tmp_path, cache):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(Corrupt, match=r"x\.gguf"):
        load(tmp_path / "x.gguf")
    assert not list(cache.glob("gguf/pb1*"))


@pytest.fixture
def real_gguf(monkeypatch):
    """The alias's file, with the machine's own cache."""
    monkeypatch.delenv("PEGBOX_CACHE")
    if given := os.environ.get("PEGBOX_REAL_CACHE"):
        monkeypatch.setenv("PEGBOX_CACHE", given)
    try:
        return resolve("smollm2-135m-q4")
    except BadInput as error:
        pytest.skip(f"the model package can't be had here: {error}")


@pytest.mark.real
def test_the_real_model_loads_quickly_from_its_unpacked_copy_and_unchanged(real_gguf):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load(real_gguf, device="cpu")
    start = time.perf_counter()
    model, tokenizer = load("smollm2-135m-q4", device="cpu")
    seconds = time.perf_counter() - start
    place = {"gguf_file": real_gguf.path.name}
    direct = AutoModelForCausalLM.from_pretrained(str(real_gguf.path.parent), dtype=torch.float32, **place).eval()
    direct_tokenizer = AutoTokenizer.from_pretrained(str(real_gguf.path.parent), **place)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert ids["input_ids"].tolist() == [
        direct_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    ]
    assert torch.equal(model(**ids).logits, direct(**ids).logits)
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert seconds < 5
    assert load_meta("smollm2-135m-q4").num_parameters() == 134_515_008


@pytest.mark.real
def test_the_real_models_fingerprint_does_not_depend_on_how_it_is_loaded(real_gguf):
    assert real_gguf.fingerprint == "pb1-52f5cca29a80be665bc525969a16ec8f7f88727f2e119208b6fe9304f29f57c2"
    assert resolve(real_gguf.path).fingerprint == real_gguf.fingerprint
    assert resolve(real_gguf.path.parent).fingerprint == real_gguf.fingerprint
