"""Half-Reset: every matrix equals the one or the other bit for bit; the ends of the scale; refusals."""

from __future__ import annotations

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.testing import tiny_llama
from pegbox.weights import WEIGHTS

BASE, TUNED = tiny_llama(0), tiny_llama(1)


def reset(**options):
    operation = WEIGHTS.validate({"kind": "half_reset", **options})
    return dict(operation.apply(BASE.state_dict(), [TUNED.state_dict()], Anatomy.of(BASE)))


def test_each_tensor_is_one_or_the_other():
    result = reset()
    base, tuned = BASE.state_dict(), TUNED.state_dict()
    assert list(result) == list(base)
    back = {n for n in result if torch.equal(result[n], base[n])}
    assert all(torch.equal(result[n], tuned[n]) for n in set(result) - back)
    matrices = [n for n in back if "proj" in n]
    assert len([n for n in matrices if "self_attn" in n]) == 4
    assert len([n for n in matrices if "mlp" in n]) == 3
    assert torch.equal(result["lm_head.weight"], tuned["lm_head.weight"])


def test_the_ends():
    tuned, base = TUNED.state_dict(), BASE.state_dict()
    assert all(torch.equal(t, tuned[n]) for n, t in reset(ratio=0).items())
    assert all(torch.equal(t, base[n]) for n, t in reset(ratio=1, also=["all"]).items())
    outside = {n for n, t in reset(ratio=1).items() if not torch.equal(t, base[n])}
    assert outside == {"model.embed_tokens.weight", "lm_head.weight"}


def test_seeds_and_dtype():
    assert any(not torch.equal(a, b) for a, b in zip(reset(seed=0).values(), reset(seed=1).values()))
    half = {n: t.bfloat16() for n, t in BASE.state_dict().items()}
    mixed = dict(WEIGHTS.validate("half_reset").apply(half, [TUNED.state_dict()], Anatomy.of(BASE)))
    assert {t.dtype for t in mixed.values()} == {torch.bfloat16}


def test_slices_put_back_rows():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    base, tuned = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    operation = WEIGHTS.validate({"kind": "half_reset", "slices": True, "categories": ["attention"]})
    result = dict(operation.apply(base.state_dict(), [tuned.state_dict()], Anatomy.of(base)))
    name = "transformer.h.0.attn.c_attn.weight"
    one, other, mixed = base.state_dict()[name], tuned.state_dict()[name], result[name]
    columns = [torch.equal(mixed[:, c], one[:, c]) for c in range(48)]
    assert 0 < sum(columns) < 48
    assert all(same or torch.equal(mixed[:, c], other[:, c]) for c, same in enumerate(columns))


def test_models_that_do_not_match_are_refused():
    operation = WEIGHTS.validate("half_reset")
    wide = tiny_llama(intermediate_size=32).state_dict()
    with pytest.raises(BadInput, match=r"gate_proj.* \(64, 32\) in the base and \(32, 32\)"):
        list(operation.apply(BASE.state_dict(), [wide], Anatomy.of(BASE)))
    short = {n: t for n, t in TUNED.state_dict().items() if "norm" not in n}
    with pytest.raises(BadInput, match="no tensor 'model"):
        list(operation.apply(BASE.state_dict(), [short], Anatomy.of(BASE)))
    for ratio in (-0.1, 1.1):
        with pytest.raises(BadInput, match="ratio"):
            WEIGHTS.validate({"kind": "half_reset", "ratio": ratio})
