"""Adding a token: the mean of all old rows, nothing else moved; saved, replayed, removed again."""

import copy

import pytest
import torch

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.context import Context
from pegbox.prepare.add_token import AddToken, remove_rows
from pegbox.prepare.base import PREPARE
from pegbox.testing import tiny_llama, tiny_tokenizer


def base(**options):
    return tiny_llama(vocab_size=260, **options)


def added(model, **options):
    part, tokenizer = AddToken(**options), tiny_tokenizer()
    return part, part.apply(model, list, Context(model, tokenizer=tokenizer)), tokenizer


@pytest.mark.parametrize("tied", [False, True])
def test_the_new_row_is_the_mean_and_the_old_ones_stay(tied):
    model = base(tie_word_embeddings=tied)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs, outputs = (copy.deepcopy(e.weight.detach()) for e in (model.get_input_embeddings(), model.lm_head))
    _, record, tokenizer = added(model)
    assert record["id"] == 260 == tokenizer.convert_tokens_to_ids("<mask>")
    assert model.config.vocab_size == 261
    assert torch.equal(model.get_input_embeddings().weight[:260], inputs)
    assert torch.equal(model.lm_head.weight[:260], outputs)
    assert torch.allclose(model.get_input_embeddings().weight[260], inputs.double().mean(0).float(), atol=1e-7)
    assert torch.allclose(model.lm_head.weight[260], outputs.double().mean(0).float(), atol=1e-7)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    for name, p in model.named_parameters():
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(p, before[name])
    assert 260 in model.generation_config.suppress_tokens


def test_known_tokens_are_answered_as_before():
    model, ids = base(), torch.arange(20)[None]
    before = model(ids).logits
    added(model)
    assert torch.equal(model(ids).logits[..., :260], before)


def test_an_unused_row_is_taken_where_there_is_one():
    model = tiny_llama()  # 288 rows for 260 tokens
    old = model.get_input_embeddings().weight.detach().clone()
    _, record, _ = added(model)
    assert model.get_input_embeddings().weight.shape == old.shape
    assert record["rows"] == 288
    changed = (model.get_input_embeddings().weight != old).any(-1).nonzero()[:, 0].tolist()
    assert changed == [260]
    assert torch.allclose(model.get_input_embeddings().weight[260], old[:260].mean(0), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_replay_gives_the_same_model(tied, tmp_path):
    model, other = base(tie_word_embeddings=tied), base(tie_word_embeddings=tied)
    part, record, _ = added(model)
    part.save(record, tmp_path)
    PREPARE.validate("add_token").replay(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert other.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    with pytest.raises(WrongBase, match="base of 260 embeddings; this one has 300"):
        part.replay(tiny_llama(vocab_size=300), tmp_path)
    (tmp_path / "rows.safetensors").write_bytes(b"nothing")
    with pytest.raises(Corrupt):
        part.replay(base(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_removed_at_save_leaves_the_bases_shapes(tied, tmp_path):
    model, plain = base(tie_word_embeddings=tied), base(tie_word_embeddings=tied)
    part, record, _ = added(model, remove_at_save=True)
    part.finish(model, record)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert model.config.vocab_size == 260
    assert model.generation_config.suppress_tokens is None
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    part.save(record, tmp_path)
    part.replay(plain, tmp_path)
    assert plain.config.vocab_size == 260
    kept = base()
    part, record, _ = added(kept)
    part.finish(kept, record)
    assert kept.config.vocab_size == 261
    remove_rows(kept, 260)
    assert kept.config.vocab_size == 260


def test_generation_never_says_it():
    model = base().eval()
    added(model)
    with torch.no_grad():
        model.lm_head.weight[260] = model.lm_head.weight.abs().sum(0) * 100
        model.model.norm.weight.fill_(1.0)
    out = model.generate(torch.arange(4)[None], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert 260 not in out


def test_bad_input():
    model = base()
    with pytest.raises(BadInput, match="no tokenizer"):
        AddToken().apply(model, list, Context(model))
    with pytest.raises(BadInput, match="has '<pad>' already"):
        added(model, token="<pad>")
    with pytest.raises(BadInput, match="at least 1 character"):
        PREPARE.validate({"kind": "add_token", "token": ""})
