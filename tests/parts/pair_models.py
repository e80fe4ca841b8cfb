"""Pairs for tests: a tiny Llama, its tuned copy, and the same update as an adapter."""

import copy

import torch

from pegbox.parts.pairs import ModelPair
from pegbox.testing import tiny_llama

PAD = 258


def eager(seed=0, **sizes):
    return tiny_llama(seed, attn_implementation="eager", **{"num_hidden_layers": 3, **sizes}).eval()


def moved(base, scale=0.05, seed=1, embeddings=False):
    """A copy of a model whose blocks (and embeddings, if asked) have moved."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if embeddings or ".layers." in name:
                p += scale * torch.randn(p.shape, generator=generator)
    return tuned


def adapted(base, scale=1.0, seed=2, targets="all-linear"):
    """A copy of a model with a LoRA on all linears whose update is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(scale * 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def two_models(**sizes):
    base = eager(**sizes)
    return ModelPair(moved(base), base)


def batch_of(*lengths, side="right", seed=0):
    """Random prompts of the given lengths, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros((len(lengths), width), dtype=torch.long)
    for i, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, place] = torch.randint(0, 256, (n,), generator=generator)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
