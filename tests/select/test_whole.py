"""Whole tensors by place."""

from __future__ import annotations

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.select import SELECT
from pegbox.testing import tiny_llama


def select(model, **options):
    selector = SELECT.validate({"kind": "whole", **options})
    return selector.select(Anatomy.of(model), dict(model.named_parameters()), None, torch.Generator())


def test_scopes(llama):
    assert len(select(llama)) == len(list(llama.parameters()))
    assert len(select(llama, scope=["mlp & block 1"])) == 3
    assert set(select(llama, scope=["head"])) == {"lm_head.weight"}
    assert set(select(tiny_llama(tie_word_embeddings=True), scope=["head"])) == {"model.embed_tokens.weight"}


def test_biases_alone():
    model = tiny_llama(attention_bias=True)
    names = set(select(model, scope=["all-linear"], what="biases"))
    assert len(names) == 8
    assert all(n.endswith("bias") for n in names)
    assert not any(n.endswith("bias") for n in select(model, what="weights"))


def test_count_matches_the_selection(llama):
    selector = SELECT.validate({"kind": "whole", "scope": ["attention"]})
    shapes = {n: tuple(p.shape) for n, p in llama.named_parameters()}
    assert selector.count(Anatomy.of(llama), shapes) == select(llama, scope=["attention"]).trained(shapes)


def test_nothing_is_refused(llama):
    with pytest.raises(BadInput, match="have no biases"):
        select(llama, what="biases")
    with pytest.raises(BadInput, match="matches no module"):
        select(llama, scope=["q_prj"])
