"""The decoder that scales tuning: a causal model under `generate` and `forward`, as a recipe's block."""

import pytest
import torch

from parts.pair_models import adapted, batch_of, eager, moved
from pegbox.decode.base import DECODE, DecodeContext
from pegbox.errors import BadInput
from pegbox.parts.mixing import mixed
from pegbox.parts.pairs import ModelPair


def bound(alpha, **options):
    base = eager()
    ctx = DecodeContext(moved(base), base=base)
    return DECODE.validate({"kind": "scaled", "alpha": alpha, **options}).bind(ctx), ctx


@torch.no_grad()
def test_alpha_one_writes_the_tuned_models_text():
    decoding, ctx = bound(1.0)
    batch = batch_of(6, 6)
    own = ctx.model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(decoding.generate(**batch, max_new_tokens=6, do_sample=False), own)
    expected = ctx.model(**batch).logits.log_softmax(-1)
    assert torch.allclose(decoding(batch["input_ids"], batch["attention_mask"]).logits, expected, atol=1e-6)


@torch.no_grad()
def test_other_alphas_are_the_mixture():
    decoding, ctx = bound([0.2, 1.0, 1.4])
    batch = batch_of(6, 6)
    with mixed(ModelPair(ctx.model, ctx.base), [0.2, 1.0, 1.4]) as model:
        own = model.generate(**batch, max_new_tokens=6, do_sample=False)
        logits = model(**batch).logits.log_softmax(-1)
    assert torch.equal(decoding.generate(**batch, max_new_tokens=6, do_sample=False), own)
    assert torch.allclose(decoding(batch["input_ids"], batch["attention_mask"]).logits, logits, atol=1e-6)
    assert all("forward" not in vars(block) for block in ctx.model.model.layers)


@torch.no_grad()
def test_an_adapter_needs_no_second_model():
    from pegbox.decode.pairs import View

    base, model = eager(), adapted(eager(), 3.0)
    one = DECODE.validate({"kind": "scaled", "alpha": 0.5})
    batch = batch_of(6)
    shared = one.bind(DecodeContext(model, base=View(model, adapter=False)))
    two = one.bind(DecodeContext(adapted(eager(), 3.0), base=base))
    found = [d.generate(**batch, max_new_tokens=6, do_sample=False) for d in (shared, two)]
    assert torch.equal(*found)
    shared.generate(**batch, max_new_tokens=2)
    assert torch.equal(model(**batch).logits, adapted(eager(), 3.0)(**batch).logits)


@pytest.mark.parametrize(
    ("alpha", "options", "words"),
    [
        (-0.5, {}, "allow_negative"),
        (float("inf"), {}, "finite"),
        ([1.0], {}, "1 numbers for 3 blocks"),
    ],
)
def test_bad_alphas(alpha, options, words):
    """Alpha negative or not finite."""
    with pytest.raises(BadInput, match=words):
        bound(alpha, **options)


def test_negative_alphas_can_be_allowed():
    decoding, _ = bound(-0.25, allow_negative=True)
    assert decoding.generate(**batch_of(5), max_new_tokens=2).shape == (1, 7)


def test_a_base_has_no_tuning_to_scale():
    with pytest.raises(BadInput, match="base itself"):
        DECODE.validate({"kind": "scaled"}).bind(DecodeContext(eager()))


def test_modes_are_as_before():
    decoding, ctx = bound(0.5)
    ctx.model.train()
    decoding.generate(**batch_of(5), max_new_tokens=2)
    assert ctx.model.training
    assert not ctx.base.training
