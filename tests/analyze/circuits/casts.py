"""Tiny decoders of several families, prompts for them, and naive versions of what the library vectorises."""

import torch

from pegbox.analyze.circuits import Head, HeadView, Patch, Prompts, capture
from pegbox.analyze.circuits.activations import last_logits, taken
from pegbox.testing import tiny_llama


def llama(seed=0, dtype=torch.float64, **sizes):
    sizes = {
        "num_hidden_layers": 3,
        "vocab_size": 60,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    } | sizes
    model = tiny_llama(seed, **sizes).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:  # the default init is so small that heads hardly matter
                p.copy_(0.25 * torch.randn(p.shape, generator=generator))
    return model


def family(name):
    import transformers as t

    torch.manual_seed(3)
    if name == "llama":
        return llama()
    common = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if name == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **common))
    elif name == "neox":
        config = t.GPTNeoXConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, **common
        )
        model = t.GPTNeoXForCausalLM(config)
    elif name == "qwen3":
        config = t.Qwen3Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=64, **common,
        )  # fmt: skip
        model = t.Qwen3ForCausalLM(config)
    elif name == "phi3":
        config = t.Phi3Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            **common,
        )  # fmt: skip
        model = t.Phi3ForCausalLM(config)
    else:
        config = t.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **common)
        model = t.BloomForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(6.0)
    return model.double().eval()


def prompts(rows=4, width=10, seed=0, lengths=None, answers=True, vocabulary=60):
    """Random prompts with positions "early" (differs by row), "mid" and "last"."""
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or [width] * rows
    ids = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    places = {"early": [1 + i % 2 for i in range(len(ids))], "mid": [n - 3 for n in lengths]}
    right = torch.randint(0, vocabulary, (len(ids),), generator=generator).tolist() if answers else None
    return Prompts.of(ids, places, right, pad=0)


def naive_scores(view, clean, corrupt, receivers, composition, position, corrupt_position=None):
    """Path patching as it is written down: one sender and one run at a time, whole prompts through all blocks."""
    from pegbox.analyze.circuits.paths import probabilities

    n = view.layers
    here, there = capture(view, clean), capture(view, corrupt)
    at, other = clean.at(position), corrupt.at(corrupt_position or position)
    rows = torch.arange(len(clean))
    p_clean = probabilities(here.logits, clean.right())
    scores = torch.zeros(n, view.heads, dtype=torch.float64)
    for layer in range(n):
        for head in range(view.heads):
            held = []
            for k in range(n):
                value = here["o", k].clone()
                if k == layer:
                    site = view.site("o", layer, head)
                    value[rows, at, site.columns] = there["o", k][rows, other, site.columns]
                held.append(Patch(view.site("o", k), value))
            if receivers:
                seen = capture(view, clean, (composition,), edits=held)
                edits = []
                for receiver in receivers:
                    site = view.site(composition, *receiver)
                    edits.append(Patch(site, taken(seen[composition, receiver[0]][rows, at], site), at))
                logits = last_logits(view, clean, edits)
            else:
                logits = last_logits(view, clean, held)
            p = probabilities(logits.detach(), clean.right())
            scores[layer, head] = ((p - p_clean) / p_clean).mean()
    return scores


def snapshot(model):
    """Everything that must be as before."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    others = [(m.training, "forward" in vars(m)) for m in model.modules()]
    return state, hooks, others, [(p.requires_grad, p.grad is None) for p in model.parameters()]


def same(a, b):
    return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]


__all__ = ["Head", "HeadView", "family", "llama", "naive_scores", "prompts", "same", "snapshot"]
