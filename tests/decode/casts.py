"""Tiny models that step together: an anchor, a reference, a tuned model that is the reference and a little noise."""

import torch

from pegbox.decode.base import DECODE, DecodeContext
from pegbox.testing import tiny_llama, tiny_tokenizer


def quiet(model):
    """Without end or padding tokens of its own, so that nothing stops early."""
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def cast(scale=0.2, vocabulary=288, **changes):
    """{"anchor", "reference", "tuned"}."""
    sizes = {"vocab_size": vocabulary, **changes}
    anchor, reference, tuned = (quiet(tiny_llama(seed, **sizes)) for seed in (1, 2, 2))
    sharpened(anchor, reference, tuned)
    generator = torch.Generator().manual_seed(0)
    for weight in tuned.parameters():
        weight.add_(scale * weight.std() * torch.randn(weight.shape, generator=generator))
    return {"anchor": anchor, "reference": reference, "tuned": tuned}


def sharpened(*models, by=8.0):
    """Random models are nearly uniform; larger heads make their choices matter."""
    for model in models:
        model.get_output_embeddings().weight.mul_(by)


def emulated(models, weight=1.0, options=None, tokenizer=None, **block):
    block = {"kind": "emulated", "deltas": [{"reference": "reference", "weight": weight}], **block}
    context = DecodeContext(models["anchor"], tokenizer, models, options=options or {})
    return DECODE.validate(block).bind(context)


def prompts(lengths=(7, 4, 9), vocabulary=250, seed=0):
    """((B, P) ids, mask), padded on the left, and the rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, rows


def answers(model, ids, mask=None, count=10, **options):
    options.setdefault("do_sample", False)
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)
    return out[:, ids.shape[1] :]


def tokenizer():
    return tiny_tokenizer()
