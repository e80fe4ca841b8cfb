"""The arithmetic of emulated fine-tuning: log-probabilities in, scores out. Pure functions.

    s = log p_anchor + sum_i w_i (log p_tuned,i - log p_reference,i)        p = softmax(s)

"An Emulator for Fine-Tuning Large Language Models using Small Language Models", arXiv:2310.12962, sections 3 and 4.
With a filter the up-scaling weight p_anchor / p_reference acts only on the likely tokens of the tuned model; all others
keep the tuned model's own probability, so none is lost. The acceptance rule of speculative decoding is here too.

Inputs are logits or log-probabilities alike: every tensor is normalised first, in float32 or finer, because with a
filter a constant added to one model's logits would matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = ["check_weights", "combine", "residual", "top_p_set", "verify"]


def combine(
    anchor: Tensor,
    tuned: Sequence[Tensor],
    references: Sequence[Tensor],
    weights: Sequence[float],
    top_p: float | None = None,
) -> Tensor:
    """(..., V) normalised log-probabilities of the combination.

    Args:
        anchor, tuned, references: (..., V) logits of the anchor and, per delta, of the tuned model and its reference.
        weights: one per delta; negative ones take the tuning away.
        top_p: mass in (0, 1] of the tuned model's likely tokens on which the full combination holds; None or 1: all.

    A token that the anchor or a tuned model excludes (-inf) stays excluded; one that only a reference excludes has no
    delta there. Raises `BadInput` on weights that are not finite, or as many as there are deltas.
    """
    check_weights(weights, len(tuned), top_p)
    if not any(weights):
        return _log_probs(anchor)
    scores, banned = _log_probs(anchor), torch.isneginf(anchor)
    normal = [_log_probs(t) for t in tuned]
    for weight, ours, reference in zip(weights, normal, references, strict=True):
        if weight:
            scores = scores + weight * _delta(ours, _log_probs(reference))
            banned = banned | torch.isneginf(ours)
    if top_p is not None and top_p < 1:
        total = sum(weights)
        outside = sum((w / total * t for w, t in zip(weights, normal) if w), torch.zeros_like(scores))
        inside = top_p_set(outside, top_p)
        scores = torch.where(inside, scores, outside)
    return _log_probs(scores.masked_fill(banned, -torch.inf))


def check_weights(weights: Sequence[float], deltas: int, top_p: float | None = None) -> None:
    """Raise `BadInput` unless there is one finite weight per delta, and a filter has a sum to stand on."""
    if len(weights) != deltas:
        raise BadInput(f"There are {deltas} deltas and {len(weights)} weights; give one weight per delta.")
    if not all(torch.isfinite(torch.tensor(float(w))) for w in weights):
        raise BadInput(f"Weights must be finite numbers, got {list(weights)}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"top_p must be in (0, 1], got {top_p}.")
    if top_p is not None and top_p < 1 and any(weights) and abs(sum(weights)) < 1e-9:
        raise BadInput(
            f"The filter falls back on the weighted mean of the tuned models, and the weights {list(weights)} sum to "
            "0. Leave top_p out, or choose weights with another sum."
        )


def top_p_set(log_probs: Tensor, p: float) -> Tensor:
    """(..., V) bool: the smallest set of tokens, by falling probability, whose mass reaches `p`; ties by token id."""
    probabilities = log_probs.softmax(-1)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < p)


def verify(target: Tensor, draft: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    """(B, k) bool: which drafted tokens are accepted, taken one by one: u <= min(1, p[y] / q[y]), never where p[y] = 0.

    Args:
        target, draft: (B, k, V) distributions p and q at each drafted position. tokens: (B, k). uniforms: (B, k).
    """
    p, q = (d.gather(-1, tokens[..., None]).squeeze(-1) for d in (target, draft))
    return (uniforms * q <= p) & (p > 0)


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """(..., V) what is drawn from after a rejection: max(p - q, 0), normalised; p itself where nothing is left."""
    rest = (target - draft).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), target)


def _log_probs(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _delta(tuned: Tensor, reference: Tensor) -> Tensor:
    """log tuned - log reference, 0 where either excludes the token (the ban itself is handled apart)."""
    return torch.where(torch.isneginf(tuned) | torch.isneginf(reference), torch.zeros_like(tuned), tuned - reference)
