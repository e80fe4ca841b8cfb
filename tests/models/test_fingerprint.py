"""The fingerprint names the stored checkpoint, whatever it is loaded as and however it is spread over files."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pegbox.errors import Corrupt
from pegbox.models import fingerprint, fingerprint_model, fingerprint_tensors, load, resolve
from pegbox.testing import tiny_llama


def test_it_is_the_hash_of_sorted_lines():
    tensors = {"b": torch.tensor([1.0, 2.0]), "model.a": torch.tensor([[3]], dtype=torch.int64)}
    lines = [
        "a I64 [1, 1] " + hashlib.sha256((3).to_bytes(8, "little")).hexdigest(),
        "b F32 [2] " + hashlib.sha256(torch.tensor([1.0, 2.0]).numpy().tobytes()).hexdigest(),
    ]
    assert fingerprint_tensors(tensors) == "pb1-" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_a_large_tensor_is_hashed_in_pieces(monkeypatch):
    monkeypatch.setattr(fingerprint, "_PIECE", 8)
    tensor = torch.arange(5, dtype=torch.float32)  # 20 bytes: 8 + 8 + 4
    raw = tensor.numpy().tobytes()
    pieces = b"".join(hashlib.sha256(raw[i : i + 8]).digest() for i in (0, 8, 16))
    line = "a F32 [5] " + hashlib.sha256(pieces).hexdigest()
    assert fingerprint_tensors({"a": tensor}) == "pb1-" + hashlib.sha256(line.encode()).hexdigest()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_one_changed_entry_changes_it(data):
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}
    before = fingerprint_tensors(tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensors[name].view(-1)[data.draw(st.integers(0, tensors[name].numel() - 1))] = 1
    assert fingerprint_tensors(tensors) != before


def test_names_shapes_and_dtypes_count():
    given_ = {"a": torch.zeros(4), "b": torch.zeros(4)}
    different = [
        {"a": torch.zeros(4), "c": torch.zeros(4)},
        {"a": torch.zeros(2, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.zeros(4)},
        {"a": torch.zeros(4)},
    ]
    assert fingerprint_tensors(given_) not in {fingerprint_tensors(d) for d in different}


def test_resharded_recast_and_in_memory_are_the_same_base(checkpoint, tmp_path):
    source = resolve(checkpoint)
    tiny_llama().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert resolve(tmp_path / "shards").fingerprint == source.fingerprint
    assert fingerprint_model(tiny_llama()) == source.fingerprint
    assert fingerprint_model(load(checkpoint, precision="bf16", device="cpu").model) == source.fingerprint
    assert fingerprint_model(tiny_llama(seed=1)) != source.fingerprint


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    tied = tiny_llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    stored = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert fingerprint_tensors(stored) == fingerprint_tensors(tensors)


def test_recomputed_buffers_and_the_prefix_do_not_count():
    bare = {"h.0.mlp.weight": torch.ones(2, 2)}
    full = {
        "transformer.h.0.mlp.weight": torch.ones(2, 2),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.0.rotary_emb.inv_freq": torch.ones(4),
    }
    assert fingerprint_tensors(bare) == fingerprint_tensors(full)


def test_it_is_remembered_until_a_file_changes(checkpoint, monkeypatch):
    before = resolve(checkpoint).fingerprint
    monkeypatch.setattr(fingerprint, "_combine", lambda tensors: "hashed again")
    assert resolve(checkpoint).fingerprint == before
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes())
    assert resolve(checkpoint).fingerprint == "hashed again"


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty"])
def test_a_damaged_file_is_named(checkpoint, damage):
    path = checkpoint / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes({"short": raw[:-10], "long": raw + b"x", "header": raw[:8] + b"x" + raw[9:], "empty": b""}[damage])
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        _ = resolve(checkpoint).fingerprint


def test_a_missing_shard_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(Corrupt, match=gone.name):
        resolve(tmp_path)


def test_an_unwritable_cache_costs_nothing_but_time(checkpoint, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEGBOX_CACHE", str(tmp_path / "file" / "below"))
    assert resolve(checkpoint).fingerprint.startswith("pb1-")


def test_files_and_memory_agree_for_every_dtype(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    tensors = {str(d): torch.arange(6).to(d) for d in [*dtypes, torch.int8, torch.uint8, torch.bool]}
    save_file(tensors, tmp_path / "a.safetensors")
    assert fingerprint.fingerprint_safetensors([tmp_path / "a.safetensors"]) == fingerprint_tensors(tensors)
