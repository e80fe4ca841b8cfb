"""Weights of examples from logits, their energy, and what one wants to know of them.

    softmax   w = N softmax(s)     mean weight 1       sigmoid   w = 2 sigmoid(s)       linear   w = s
    energy    mean over a batch of w_i l_i   + priors on s

    its gradient, softmax:  dL/ds_j = ([j in B] w_j l_j - softmax_j sum_{i in B} w_i l_i) / |B|

    entropy   c sum p log p, p = softmax(s)          gaussian   sum ((s - mu) / sigma)^2 / 2 + log(sigma sqrt(2 pi))
    count     (sum w - floor(N beta))^2 / (2 sigma^2): about N beta benign examples, for sigmoid and linear weights only

From the Bayesian Data Scheduler (arXiv:2510.27172). Pure functions; who draws batches and steps is decided elsewhere.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = [
    "Activation",
    "auroc",
    "count_prior",
    "effective_samples",
    "energy",
    "entropy_prior",
    "gaussian_prior",
    "softmax_gradient",
    "weights_of",
]

Activation = Literal["softmax", "sigmoid", "linear"]


def weights_of(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """(N,) weights of (N,) logits."""
    if activation == "softmax":
        return logits.softmax(0) * logits.shape[0]
    return 2 * logits.sigmoid() if activation == "sigmoid" else logits


def energy(weights: Tensor, losses: Tensor) -> Tensor:
    """mean_b w_b l_b; the losses are constants."""
    return (weights * losses.detach()).mean()


def softmax_gradient(logits: Tensor, batch: Tensor, losses: Tensor) -> Tensor:
    """(N,) closed-form gradient of the energy of softmax weights; `batch` (B,) distinct positions."""
    shares = logits.softmax(0)
    weights = shares * logits.shape[0]
    weighted = weights[batch] * losses
    return torch.zeros_like(logits).index_add_(0, batch, weighted).sub(shares * weighted.sum()) / batch.shape[0]


def entropy_prior(logits: Tensor) -> Tensor:
    """sum p log p: its least value is uniform weights."""
    logp = logits.log_softmax(0)
    return (logp.exp() * logp).sum()


def gaussian_prior(logits: Tensor, mu: float = 0.0, sigma: float = 1.0) -> Tensor:
    """Negative log density of independent normal logits, summed."""
    return (0.5 * ((logits - mu) / sigma).square() + math.log(sigma * math.sqrt(2 * math.pi))).sum()


def count_prior(weights: Tensor, beta: float, sigma: float = 0.1) -> Tensor:
    """(sum w - floor(N beta))^2 / (2 sigma^2), to be added to an energy. Raises `BadInput`: beta outside (0, 1]."""
    if not 0 < beta <= 1:
        raise BadInput(f"The expected share of benign examples must lie in (0, 1], got {beta}.")
    return (weights.sum() - math.floor(weights.shape[0] * beta)).square() / (2 * sigma**2)


def effective_samples(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2: between 1 and N."""
    return float(weights.sum().square() / weights.square().sum().clamp(min=1e-300))


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive example scores above a negative one, ties half; NaN where one kind is missing."""
    positive = positive.bool()
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    order = scores.double().unique(return_inverse=True)
    ranks = torch.zeros(order[0].shape[0], dtype=torch.float64)
    counts = torch.bincount(order[1], minlength=ranks.shape[0]).double()
    ranks = counts.cumsum(0) - (counts - 1) / 2  # the mean rank of equal scores
    return float((ranks[order[1]][positive].sum() - n * (n + 1) / 2) / (n * m))
