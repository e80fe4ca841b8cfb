"""The arithmetic of value-guided decoding: rewards of rollouts to values, values to a policy. Pure functions.

    Q(s, z) = mean_n r(x, y z tau_n)                            tau ~ a model aligned for r (direct transfer)
    Q(s, z) = E[w r] / E[w],  w = exp((r - r_BL) / beta)        tau ~ a model aligned for r_BL (indirect transfer)
    pi(z | s) = pi_ref(z | s) exp(Q(s, z) / alpha) / C(s)

"Transfer Q Star: Principled Decoding for LLM Alignment", arXiv:2405.20495, sections 3 and 4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = ["Estimator", "divergence", "estimate", "policy", "standardised"]

Estimator = Literal["self", "none"]


def estimate(
    rewards: Tensor, baseline: Tensor | None = None, beta: float | None = None, how: Estimator = "self"
) -> Tensor:
    """(...) values from (..., n) rewards of n rollouts.

    Args:
        baseline: (..., n) rewards r_BL that the rolling model is aligned for; None: direct, the mean.
        beta: the KL weight it was aligned with.
        how: "self": sum w r / sum w, consistent, n >= 2 (with one rollout the weight would cancel); "none": the mean of
            w r, biased by E[w], which is what the official code computes with n = 1.
    """
    if baseline is None:
        return rewards.mean(-1)
    if beta is None or not beta > 0:
        raise BadInput(f"Indirect values need beta > 0, the KL weight that the baseline was aligned with; got {beta}.")
    gap = (rewards - baseline) / beta
    if how == "none":
        return (gap.exp() * rewards).mean(-1)
    if rewards.shape[-1] < 2:
        raise BadInput(
            "The self-normalised estimator needs two rollouts or more: with one, its weight cancels and indirect "
            "becomes direct. Raise `rollouts`, or choose estimator: none."
        )
    return ((gap - gap.max(-1, keepdim=True).values).softmax(-1) * rewards).sum(-1)


def standardised(values: Tensor) -> Tensor:
    """(B, k) values with mean 0 and deviation 1 over each row's candidates; 0 where they are all equal."""
    spread = values.std(-1, keepdim=True, correction=0)
    return torch.where(spread > 0, (values - values.mean(-1, keepdim=True)) / spread.clamp(min=1e-12), 0.0)


def policy(log_probs: Tensor, values: Tensor, alpha: float) -> Tensor:
    """(..., k) unnormalised log-probabilities log pi_ref + Q / alpha. Raises `BadInput` unless alpha > 0."""
    if not alpha > 0:
        raise BadInput(f"alpha must be > 0, got {alpha}. Large values keep to the reference, small ones to the values.")
    return log_probs + values / alpha


def divergence(scores: Tensor, log_probs: Tensor) -> Tensor:
    """(...) KL(softmax(scores) || reference), in nats, from (..., k) scores and the reference's log-probabilities."""
    normal = scores.log_softmax(-1)
    return (normal.exp() * (normal - log_probs)).nan_to_num(0.0).sum(-1)
