"""Batches of the same samples in several forms, and one optimizer step done the way the engine does it."""

import torch

from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView


def samples(lengths=(7, 11, 5, 9), seed=0, prompt=2):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, 256, (n,), generator=g), prompt) for n in lengths]


def padded(items, side="right", extra=0, ids=None):
    width = max(len(i) for i, _ in items) + extra
    out = {"input_ids": torch.full((len(items), width), 7), "labels": torch.full((len(items), width), -100)}
    mask = torch.zeros(len(items), width, dtype=torch.long)
    for row, (tokens, prompt) in enumerate(items):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        out["input_ids"][row, place], mask[row, place] = tokens, 1
        out["labels"][row, place] = torch.where(torch.arange(len(tokens)) < prompt, -100, tokens)
    if side == "left":
        out["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {**out, "attention_mask": mask, "sample_ids": torch.arange(len(items)) if ids is None else ids}


def packed(items):
    batch = {"input_ids": torch.cat([i for i, _ in items])[None]}
    batch["labels"] = torch.cat([torch.where(torch.arange(len(i)) < max(p, 1), -100, i) for i, p in items])[None]
    batch["position_ids"] = torch.cat([torch.arange(len(i)) for i, _ in items])[None]
    batch["sequence_ids"] = torch.cat([torch.full((len(i),), n) for n, (i, _) in enumerate(items)])[None]
    return {**batch, "sample_ids": torch.arange(len(items))}


def step(objective, model, batches, state=None, ctx=None):
    """One optimizer step's losses and gradient, the way the engine does it."""
    ctx = ctx or Context(model)
    state = state if state is not None else objective.setup(ctx)
    view, totals, losses = CausalView(model), {}, {}
    for b in batches:
        for name, n in objective.count(b).items():
            totals[name] = totals.get(name, 0) + n
    model.zero_grad()
    for b in batches:
        with torch.no_grad():
            ref = objective.reference(state, view, b)
        parts = list(objective.losses(state, view, b, totals, ref))
        sum(loss for n, loss in parts if not n.startswith("_")).backward()
        for name, loss in parts:
            losses[name] = losses.get(name, 0) + loss.detach() / (len(batches) if name.startswith("_") else 1)
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(a, b, atol=1e-6):
    return all(torch.allclose(a[n], b[n], rtol=1e-4, atol=atol) for n in a)
