"""Exports answer as the run does, and say by how much they don't."""

from __future__ import annotations

import json
import os
import textwrap

import peft
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from artefact.helpers import LORA, tuned_model
from pegbox.artefact import ArtefactWriter, CardInfo, load_artefact, root_of
from pegbox.errors import BadInput, Corrupt, RunFailed, Unsupported
from pegbox.export import export, export_hub, find_converter
from pegbox.export.differences import Rounding, compare_logits
from pegbox.export.hub import find_secrets
from pegbox.export.lora import approximate_update
from pegbox.export.tuned import tuned_tensors
from pegbox.models import load, resolve
from pegbox.parts.allocation import Allocation, Entries
from pegbox.testing import tiny_llama, tiny_tokenizer

IDS = torch.arange(14)[None]
SPARSE = {"kind": "sparse"}
EMBEDDINGS = {"kind": "lora", "r": 2, "target_modules": ["embed_tokens", "q_proj"]}


def entries(shapes, seed=0):
    """A tenth of each linear weight's entries."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, shape in shapes.items():
        if "_proj" in name:
            numel = shape[0] * shape[1]
            chosen[name] = Entries(torch.randperm(numel, generator=generator)[: numel // 10].sort().values.int())
    return Allocation(chosen)


def run_of(source, folder, block=LORA, precision="fp32"):
    allocation = None
    if block["kind"] == "sparse":
        allocation = entries({n: tuple(p.shape) for n, p in tiny_llama().named_parameters()})
    tuner, model = tuned_model(source, block, allocation=allocation)
    with ArtefactWriter(folder / "artefact", root_of(source, precision=precision)) as writer:
        writer.add_tuner(tuner, model)
        writer.add_tokenizer(tiny_tokenizer())
    return model


@pytest.mark.parametrize("block", [LORA, {"kind": "full"}, SPARSE, EMBEDDINGS], ids=lambda b: str(b["kind"]))
def test_a_merged_float32_model_answers_as_the_run(source, tmp_path, block):
    model = run_of(source, tmp_path / "run", block)
    report = export(tmp_path / "run", to="merged", out=tmp_path / "out", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    measured = float((plain(IDS).logits - model(IDS).logits).abs().max())
    assert measured < 2e-5
    assert report["max_logit_difference"] < 2e-5
    assert report["same_first_choice"] == 1
    assert report["updates_lost_to_rounding"] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_tokenizer().chat_template


def test_the_count_of_changed_entries_is_the_selections(source, tmp_path):
    run_of(source, tmp_path / "run", SPARSE)
    report = export(tmp_path / "run", to="merged", out=tmp_path / "out", check=False)
    chosen = entries({n: tuple(p.shape) for n, p in tiny_llama().named_parameters()})
    assert report["changed_entries"] == sum(choice.index.numel() for choice in chosen.values())
    assert "max_logit_difference" not in report


def test_streaming_leaves_the_model_as_it_was_bit_for_bit(source):
    for block in (LORA, SPARSE):
        allocation = (
            entries({n: tuple(p.shape) for n, p in tiny_llama().named_parameters()}) if block is SPARSE else None
        )
        _, model = tuned_model(source, block, allocation=allocation)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        logits = model(IDS).logits
        names = [name for name, _ in tuned_tensors(model)]
        assert sorted(names) == sorted(tiny_llama().state_dict())
        assert torch.equal(model(IDS).logits, logits)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shards_are_written_and_read(source, tmp_path):
    from pegbox.export import export_merged

    run_of(source, tmp_path / "run")
    export_merged(tmp_path / "run", tmp_path / "out", check=False, max_shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert resolve(tmp_path / "out").fingerprint != source.fingerprint
    assert load(tmp_path / "out").model(IDS).logits.shape == (1, 14, 288)


def test_rounding_to_bf16_is_measured(source, tmp_path):
    run_of(source, tmp_path / "run")
    report = export(tmp_path / "run", to="merged", out=tmp_path / "out", dtype="bfloat16")
    assert (
        load(tmp_path / "out", precision="fp32")
        .model.lm_head.weight.bfloat16()
        .float()
        .equal(load(tmp_path / "out", precision="fp32").model.lm_head.weight)
    )
    assert report["max_logit_difference"] > 0
    assert report["max_logit_difference_computed_in_bfloat16"] > 0
    assert 0 < report["rounding_over_update"] < 1


def test_rounding_counts_updates_that_vanish():
    base = torch.tensor([0.4, 0.4, 1.0, 2.0])
    tuned = base + torch.tensor([1e-4, 0.1, 0.0, 1.0])  # bf16's step at 0.4 is 2**-9: the first update is lost
    rounding = Rounding()
    rounding.add(base, tuned, tuned.bfloat16())
    rounding.add(None, tuned, tuned.bfloat16())
    found = rounding.summary()
    assert (found["changed_entries"], found["updates_lost_to_rounding"], found["tensors_not_compared"]) == (3, 1, 1)
    error = torch.linalg.vector_norm(tuned.bfloat16().float() - tuned) / torch.linalg.vector_norm(tuned - base)
    assert found["rounding_over_update"] == pytest.approx(float(error), rel=1e-5)


def test_logit_differences_by_hand():
    found = compare_logits([torch.tensor([[1.0, 2.0], [3.0, 0.0]])], [torch.tensor([[1.0, 2.5], [1.0, 2.0]])])
    assert found == {"max_logit_difference": 2.0, "mean_logit_difference": 4.5 / 4, "same_first_choice": 0.5}


def test_a_tie_is_cut_where_one_side_was_tuned(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    source = resolve(tmp_path / "base")
    for name, block in (("tied", LORA), ("cut", EMBEDDINGS)):
        model = run_of(source, tmp_path / name, block)
        export(tmp_path / name, to="merged", out=tmp_path / f"{name}-out", dtype="float32")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out").eval()
        assert plain.config.tie_word_embeddings == (name == "tied")
        assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=2e-5)


def test_a_run_on_nf4_is_merged_onto_the_values_it_was_trained_on(source, tmp_path):
    pytest.importorskip("bitsandbytes")
    run_of(source, tmp_path / "run", precision="nf4")
    report = export(tmp_path / "run", to="merged", out=tmp_path / "out", dtype="float32", device="cpu")
    assert report["max_logit_difference"] < 1e-4
    trained = load_artefact(tmp_path / "run", device="cpu").model
    assert torch.allclose(load(tmp_path / "out").model(IDS).logits, trained(IDS).logits, atol=1e-4)


def test_a_prompt_has_no_merged_form(source, tmp_path):
    run_of(source, tmp_path / "run", {"kind": "prompt_tuning", "num_virtual_tokens": 3})
    with pytest.raises(Unsupported, match="prompt"):
        export(tmp_path / "run", to="merged", out=tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


# ---- LoRA by singular values ------------------------------------------------------------------------------------


def test_the_approximation_is_the_best_and_its_error_exact():
    update = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    found = approximate_update(update, 5)
    singular = torch.linalg.svdvals(update.double())
    residual = torch.linalg.matrix_norm(update - found.b @ found.a)
    assert float(residual) == pytest.approx(float(singular[5:].square().sum().sqrt()), rel=1e-5)
    assert found.error == pytest.approx(float(residual / torch.linalg.matrix_norm(update)), rel=1e-5)
    low = update[:, :3] @ update[:3]
    assert approximate_update(low, 10).a.shape[0] == 3
    assert approximate_update(low, 10).error < 1e-6


def test_a_low_rank_run_becomes_a_lora_exactly(source, tmp_path):
    model = run_of(source, tmp_path / "run", EMBEDDINGS)
    report = export(tmp_path / "run", to="lora", out=tmp_path / "out", rank=8)
    assert report["relative_error"] < 1e-5
    assert report["max_logit_difference"] < 2e-5
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=2e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {2}


def test_a_full_run_becomes_a_lora_with_its_error_and_norms_whole(source, tmp_path):
    model = run_of(source, tmp_path / "run", {"kind": "full"})
    errors = []
    for rank in (2, 16, 32):
        report = export(tmp_path / "run", to="lora", out=tmp_path / f"{rank}", rank=rank)
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / f"{rank}").eval()
        difference = float((loaded(IDS).logits - model(IDS).logits).abs().max())
        errors.append((report["relative_error"], difference, report["max_logit_difference"]))
    assert errors[0][0] > errors[1][0] > errors[2][0]
    assert errors[0][2] > 1e-2
    assert errors[2][0] < 1e-5  # full rank of every matrix, norms whole
    assert errors[2][1] < 5e-5
    assert "model.norm" in report["kept_whole"]


def test_nothing_changed_is_nothing_to_export(source, tmp_path):
    with ArtefactWriter(tmp_path / "run" / "artefact", source) as writer:
        writer.add("json", lambda f: (f / "x.json").write_text("{}") and None)
    with pytest.raises(BadInput, match="no update"):
        export(tmp_path / "run", to="lora", out=tmp_path / "out")


# ---- options ----------------------------------------------------------------------------------------------------


def test_options_are_honoured_or_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for options, words in (
        ({"to": "merge"}, "Did you mean 'merged'"),
        ({"to": "merged", "rank": 3}, "takes no rank"),
        ({"to": "lora", "dtype": "float32"}, "takes no dtype"),
        ({"to": "merged", "out": tmp_path / "full"}, "already there"),
        ({"to": "gguf", "out": tmp_path / "x.bin"}, "should end in"),
    ):
        with pytest.raises(BadInput, match=words):
            export(tmp_path / "run", **{"out": tmp_path / "out", **options})
    run_of(source, tmp_path / "run")
    with pytest.raises(BadInput, match="Did you mean 'bfloat16'"):
        export(tmp_path / "run", to="merged", out=tmp_path / "out", dtype="bfloat61")


# ---- GGUF -------------------------------------------------------------------------------------------------------

CONVERTER = """
import json, sys
from pathlib import Path
from gguf import GGUFWriter
import numpy as np
folder, out = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "f16"
assert (Path(folder) / "model.safetensors").exists()
template = json.loads((Path(folder) / "tokenizer_config.json").read_text())["chat_template"]
writer = GGUFWriter(out, "stand-in")  # transformers knows no such architecture
{template}
writer.add_eos_token_id({stop})
writer.add_rope_freq_base({theta})
writer.add_tensor("x", np.zeros(4, dtype=np.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


def converter(folder, monkeypatch, template="writer.add_chat_template(template)", stop="257", theta="1e4"):
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(textwrap.dedent(CONVERTER).format(template=template, stop=stop, theta=theta))
    monkeypatch.setenv("PEGBOX_LLAMA_CPP", str(folder))
    return path


def test_gguf_goes_through_the_converter_and_is_checked(source, tmp_path, monkeypatch):
    run_of(source, tmp_path / "run")
    path = converter(tmp_path, monkeypatch)
    assert find_converter() == path
    report = export(tmp_path / "run", to="gguf", out=tmp_path / "out" / "model.gguf")
    assert report["chat_template"] is True
    assert report["stop_token"] == 257
    assert "not possible" in report["gguf_read_back"]  # the stand-in writes no whole model
    assert "max_logit_difference" in report
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"template": ""}, Corrupt, "chat template"),
        ({"stop": "3"}, Corrupt, "ends answers at token 3"),
        ({"theta": "5e5"}, Corrupt, "rotary base"),
        ({"stop": "1 / 0"}, RunFailed, "ZeroDivisionError"),
    ],
)
def test_a_gguf_without_template_or_stop_token_is_refused(source, tmp_path, monkeypatch, changes, error, words):
    run_of(source, tmp_path / "run")
    converter(tmp_path, monkeypatch, **changes)
    with pytest.raises(error, match=words):
        export(tmp_path / "run", to="gguf", out=tmp_path / "out" / "model.gguf", check=False)
    assert not list((tmp_path / "out").iterdir())


def test_without_a_converter_it_says_where_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PEGBOX_LLAMA_CPP", raising=False)
    assert find_converter() is None
    with pytest.raises(BadInput, match="PEGBOX_LLAMA_CPP"):
        export(tmp_path / "run", to="gguf", out=tmp_path / "m.gguf")


# ---- hub --------------------------------------------------------------------------------------------------------


class FakeHub:
    """Records what would be sent."""

    def __init__(self, error=None):
        self.error, self.sent = error, {}

    def __call__(self):
        return self

    def create_repo(self, name, **options):
        if self.error:
            raise self.error
        self.sent["repo"] = (name, options)

    def upload_folder(self, **options):
        self.sent["upload"] = options
        return type("Commit", (), {"oid": "abc"})()


def test_the_hub_gets_the_artefact_privately(source, tmp_path, monkeypatch):
    run_of(source, tmp_path / "run")
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    assert export(tmp_path / "run", to="hub", out="me/mine")["commit"] == "abc"
    assert hub.sent["repo"] == ("me/mine", {"private": True, "exist_ok": True})
    assert hub.sent["upload"]["folder_path"] == str(tmp_path / "run" / "artefact")


@pytest.mark.parametrize("secret", ["hf_" + "a" * 34, "https://user:pass" + "word@host/x", "AKIA" + "A" * 16])
def test_a_secret_stays_here(source, tmp_path, monkeypatch, secret):
    tuner, model = tuned_model(source, LORA)
    with ArtefactWriter(tmp_path / "artefact", source) as writer:
        writer.add_tuner(tuner, model)
        writer.add_card(CardInfo(recipe_yaml=f"x: {secret}"))
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    with pytest.raises(BadInput, match=r"README\.md"):
        export_hub(tmp_path / "artefact", "me/mine")
    assert not hub.sent
    assert find_secrets(tmp_path / "artefact") == ["README.md"]


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (LocalTokenNotFoundError("no"), BadInput, "Not logged in"),
        (ConnectionError("down"), RunFailed, "can't be reached"),
    ],
)
def test_the_hubs_refusals_are_explained(source, tmp_path, monkeypatch, error, expected, words):
    run_of(source, tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub(error))
    with pytest.raises(expected, match=words):
        export_hub(tmp_path / "run", "me/mine")


# ---- the real model ---------------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_lora_on_the_real_model_survives_every_export(tmp_path, monkeypatch):
    monkeypatch.delenv("PEGBOX_CACHE")
    if given := os.environ.get("PEGBOX_REAL_CACHE"):
        monkeypatch.setenv("PEGBOX_CACHE", given)
    try:
        source = resolve("smollm2-135m-q4")
    except BadInput as error:
        pytest.skip(f"the model package can't be had here: {error}")
    tuner, model = tuned_model(source, {"kind": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]})
    tokenizer = load(source).tokenizer
    with ArtefactWriter(tmp_path / "run" / "artefact", source) as writer:
        writer.add_tuner(tuner, model)
        writer.add_tokenizer(tokenizer)
    del model
    merged = export(tmp_path / "run", to="merged", out=tmp_path / "merged", dtype="float32")
    assert merged["max_logit_difference"] < 1e-2
    assert merged["same_first_choice"] > 0.99
    lora = export(tmp_path / "run", to="lora", out=tmp_path / "lora", rank=8)
    assert lora["relative_error"] < 1e-4
    assert lora["same_first_choice"] > 0.99
    if find_converter() is None:
        pytest.skip("merged and lora hold; llama.cpp's converter is not here, so gguf was not tried")
    made = export(tmp_path / "run", to="gguf", out=tmp_path / "m.gguf")
    assert made["chat_template"]
    assert made["gguf_max_logit_difference"] < 1e-2
