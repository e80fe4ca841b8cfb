"""Batches: padding by position, packing without leaks (by gradient), classes, preferences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pegbox.data.collate import (
    ClassCollator,
    PackingCollator,
    PaddingCollator,
    pack_lengths,
    packing_leaks,
    preference_records,
)
from pegbox.data.rows import Row
from pegbox.errors import BadInput
from pegbox.testing import tiny_llama

PAD = 257  # also the end of turn


def example(n: int, seed: int = 0, **fields) -> dict:
    ids = [(7 * seed + 3 * i) % 250 for i in range(n - 1)] + [PAD]
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "sample_id": 10 + seed, "weight": 0.5, "task_id": 1, **fields}


def test_padding_is_masked_by_position():
    batch = PaddingCollator(PAD, multiple_of=4)([example(3), example(5, 1)])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["labels"][0].tolist() == [-100, 3, PAD, *[-100] * 5]
    assert batch["sample_ids"].tolist() == [10, 11]
    assert batch["sample_weight"].tolist() == [0.5, 0.5]
    assert batch["task_ids"].tolist() == [1, 1]
    assert batch["sample_ids"].dtype == torch.int64


def test_left_padding_gives_positions_and_equal_logits():
    model = tiny_llama().eval()
    examples = [example(4), example(7, 1)]
    right, left = PaddingCollator(PAD)(examples), PaddingCollator(PAD, "left")(examples)
    with torch.no_grad():
        a = model(input_ids=right["input_ids"], attention_mask=right["attention_mask"]).logits[0, :4]
        b = model(
            input_ids=left["input_ids"], attention_mask=left["attention_mask"], position_ids=left["position_ids"]
        ).logits[0, 3:]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(BadInput, match="middle"):
        PaddingCollator(PAD, "middle")


@given(st.lists(st.integers(1, 16), max_size=40), st.integers(16, 40))
def test_packing_holds_every_item_once_within_capacity(lengths, capacity):
    bins = pack_lengths(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
    if len(bins) > 1:  # first fit: no two bins could be joined
        sizes = sorted(sum(lengths[i] for i in b) for b in bins)
        assert sizes[0] + sizes[1] > capacity


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(BadInput, match=r"9 tokens.*8"):
        pack_lengths([3, 9], 8)


def test_packed_batch_layout():
    batch = PackingCollator(PAD, 10, multiple_of=4)([example(6), example(5, 1), example(4, 2)])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["sequence_ids"].tolist() == [[0] * 6 + [2] * 4 + [-1] * 2, [1] * 5 + [-1] * 7]
    assert batch["position_ids"][0].tolist() == [*range(6), *range(4), 0, 1]
    assert batch["labels"][0, 6] == -100, "a sample's first token is not predicted from the sample before it"
    assert batch["sample_ids"].tolist() == [10, 11, 12]
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False


def gpt2(**overrides):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 288, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **overrides}))


MODELS = {
    "llama-sdpa": lambda: tiny_llama(attn_implementation="sdpa"),
    "llama-eager": lambda: tiny_llama(attn_implementation="eager"),
    "gpt2-sdpa": lambda: gpt2(attn_implementation="sdpa"),
    "gpt2-eager": lambda: gpt2(attn_implementation="eager"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_packed_losses_and_gradients_are_those_of_separate_samples(make):
    examples = [example(6), example(5, 1), example(4, 2)]
    model = make().eval()

    def total_loss(batches):
        loss = torch.zeros(())
        for batch in batches:
            labels = batch["labels"]
            inputs = {k: batch[k] for k in ("input_ids", "position_ids", "use_cache", "attention_mask") if k in batch}
            logits = model(**inputs).logits
            loss = loss + nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
        return loss

    grads = []
    for batches in ([PackingCollator(PAD, 32)(examples)], [PaddingCollator(PAD)([e]) for e in examples]):
        model.zero_grad()
        loss = total_loss(batches)
        loss.backward()
        grads.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-4, rtol=1e-5)
    for packed, apart in zip(grads[0][1], grads[1][1]):
        torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-3)
    assert not packing_leaks(model)


class Leaky(nn.Module):
    """Attention over everything before, whatever the positions say."""

    def __init__(self, reads_positions: bool):
        super().__init__()
        self.embed, self.head, self.reads_positions = nn.Embedding(99, 8), nn.Linear(8, 99), reads_positions

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, position_ids=None, use_cache=None):
        return (self.head(self.embed(input_ids).cumsum(1)),)


class NoPositions(Leaky):
    def forward(self, input_ids):
        return (self.head(self.embed(input_ids)),)


@pytest.mark.parametrize("kind", [Leaky, NoPositions])
def test_leaking_models_are_found(kind):
    assert packing_leaks(kind(True))


def test_bloom_leaks():
    from transformers import BloomConfig, BloomForCausalLM

    assert packing_leaks(BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)))


def test_the_probe_leaves_no_trace():
    model = tiny_llama(attention_dropout=0.3).train()
    model.model.layers[0].eval()
    for p in model.parameters():
        p.requires_grad_(False)
    state = torch.get_rng_state()
    assert not packing_leaks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_class_batches():
    rows = [{"input_ids": [1, 2], "token_type_ids": [0, 1], "labels": 1, "sample_id": 3}, example(3, labels=0)]
    rows[1]["token_type_ids"] = [0, 1, 1]
    batch = ClassCollator(0)(rows)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 1]]
    numbers = ClassCollator(0)([{"input_ids": [1], "labels": 0.5, "sample_id": 0}])
    assert numbers["labels"].dtype == torch.float32


def test_preferences_take_trls_form():
    said = {"role": "assistant", "content": "4"}
    row = Row(
        "r", "preference", [{"role": "user", "content": "2+2?"}], chosen=[said], rejected=[said | {"content": "5"}]
    )
    (record,) = preference_records([row])
    assert set(record) == {"prompt", "chosen", "rejected"}
    assert record["chosen"] == [said]
    with pytest.raises(BadInput, match="text row"):
        preference_records([Row("t", "text", text="x")])
