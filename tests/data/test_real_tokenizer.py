"""Masks on the real tokenizer of SmolLM2, whose pad, eos and end of turn are one token."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pegbox.data import encode_rows, load_rows, resolve_template
from pegbox.data.masks import mask_chat
from pegbox.data.rows import Row
from pegbox.errors import BadInput

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real():
    from pegbox.models import load_tokenizer

    try:
        return load_tokenizer("smollm2-135m-q4")
    except BadInput as error:
        pytest.skip(f"the model package can't be had here: {error}")


def said(tokenizer, ids, trained) -> str:
    kept = [i for i, t in zip(ids, trained) if t]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_facts(real):
    assert real.pad_token_id == real.eos_token_id
    traits = resolve_template(real).traits
    assert (traits.closing, traits.system, traits.opener) == ("<|im_end|>", "native", "")


def test_network_answers_are_trained_whole_and_prompts_not(real):
    rows = load_rows("network:train:300").rows
    encoded = encode_rows(rows, real, max_length=512)
    template = resolve_template(real)
    for row, example in zip(rows, encoded):
        trained = [label != -100 for label in example["labels"]]
        assert said(real, example["input_ids"], trained) == row.messages[-1]["content"] + "<|im_end|>"
        assert example["input_ids"][: trained.index(True)] == template.prompt_ids(row.messages[:-1])
    assert encoded.report.recut == 0
    intents = [sum(label != -100 for label in e["labels"]) for e in encoded if e["task"] == "intent"]
    assert max(intents) <= 64


texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="<>|"), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=4))
def test_any_conversation(real, turns):
    messages = []
    for question, answer in turns:
        assume(
            real.decode(real(answer)["input_ids"], clean_up_tokenization_spaces=False) == answer
        )  # it drops some bytes
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = Row("r", "chat", messages)
    template = resolve_template(real)
    (sequence,) = mask_chat(row, template)
    assert said(real, sequence.ids, sequence.trained) == "".join(answer + "<|im_end|>" for _, answer in turns)
    assert sequence.ids[: sequence.trained.index(True)] == template.prompt_ids(messages[:1])
