"""The mathematics of combining many losses or gradients into one: K tasks, K numbers, one set of weights.

    task mean     sum_k w_k L_k / sum_k w_k   over the tasks that are present
    focal         -alpha (1 - P)^gamma Q                                            arXiv:1708.02002, per sample or task
    FAMO          w_k = (z_k / D_k) / c,  z = softmax(xi),  D_k = L_k - l_k + eps,  c = sum_k z_k / D_k
                  xi moves along z * (delta - <z, delta>),  delta = log D_before - log D_after       arXiv:2306.03792
    CoBa          slopes of validation losses -> softmax weights (see `Convergence`)                  arXiv:2410.06741
    min-norm      argmin over the simplex of |sum_k a_k g_k|^2, from the Gram matrix    arXiv:1810.04650

Tensors in, tensors out; what is measured, when, and what the weights multiply is decided elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = [
    "EPSILON",
    "Convergence",
    "famo_gap",
    "famo_slope",
    "famo_value",
    "famo_weights",
    "focal",
    "min_norm_simplex",
    "slope",
    "sums_by",
    "task_mean",
]

EPSILON = 1e-8  # FAMO's, added to every gap


def sums_by(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) sums of (n,) values by their (n,) index; 0 where there are none."""
    return values.new_zeros(count).index_add_(0, index.to(values.device), values)


def task_mean(losses: Tensor, weights: Tensor, present: Tensor) -> Tensor:
    """sum w L / sum w over the present tasks (K,); 0 where none is. An absent task's loss is not read."""
    kept = torch.where(present, weights, torch.zeros_like(weights))
    total = torch.where(present, losses, torch.zeros_like(losses))
    return (kept * total).sum() / kept.sum().clamp(min=torch.finfo(kept.dtype).tiny)


def focal(
    p: Tensor, logp: Tensor, gamma: float = 2.0, alpha: Tensor | float = 1.0, detach_focus: bool = False
) -> Tensor:
    """-alpha (1 - p)^gamma logp, any shape; with `detach_focus` the factor has no gradient."""
    focus = (1 - p) ** gamma
    return -alpha * (focus.detach() if detach_focus else focus) * logp


# ---- FAMO -----------------------------------------------------------------------------------------------------------


def famo_gap(losses: Tensor, minimum: Tensor | float = 0.0) -> Tensor:
    """(K,) D = L - l + eps. Raises `BadInput` where a loss is not above its minimum."""
    if bool((losses <= minimum).any()):
        low = [f"{float(v):.4g}" for v in losses.detach()]
        raise BadInput(
            f"FAMO takes logarithms of losses above their minima, and these are not: losses {', '.join(low)}. Lower "
            "objective.balance.minimum."
        )
    return losses - minimum + EPSILON


def famo_weights(logits: Tensor, losses: Tensor, minimum: Tensor | float = 0.0) -> Tensor:
    """(K,) weights of the task gradients, summing to 1: (z / D) / sum(z / D)."""
    shares = logits.softmax(-1) / famo_gap(losses, minimum)
    return shares / shares.sum()


def famo_value(logits: Tensor, losses: Tensor, minimum: Tensor | float = 0.0) -> Tensor:
    """sum z log D / c with c constant: what official FAMO back-propagates."""
    gap, z = famo_gap(losses, minimum), logits.softmax(-1)
    return (z * gap.log()).sum() / (z / gap).sum().detach()


def famo_slope(logits: Tensor, before: Tensor, after: Tensor, minimum: Tensor | float = 0.0) -> Tensor:
    """(K,) gradient for the logits: J_softmax^T delta = z (delta - <z, delta>)."""
    z = logits.softmax(-1)
    delta = famo_gap(before, minimum).log() - famo_gap(after, minimum).log()
    return z * (delta - (z * delta).sum())


# ---- CoBa -----------------------------------------------------------------------------------------------------------


def slope(values: Tensor, first: int = 0) -> Tensor:
    """Least-squares slope of (n,) values on first, first + 1, ...; entries that are exactly 0 were not measured."""
    x = torch.arange(first, first + values.shape[0], dtype=values.dtype, device=values.device)
    known = values != 0
    x, y = x[known], values[known]
    if x.numel() < 2:
        return values.new_zeros(())
    x = x - x.mean()
    return (x * (y - y.mean())).sum() / x.square().sum()


def _shares(values: Tensor) -> Tensor:
    """values / sum |values| along the last axis, 0 where all are 0."""
    total = values.abs().sum(-1, keepdim=True)
    return torch.where(total > 0, values / total.clamp(min=torch.finfo(values.dtype).tiny), torch.zeros_like(values))


@dataclass
class Convergence:
    """CoBa's balancer: fast-converging tasks get less weight, diverging ones least. Counts are of measurements.

    With a_k the slope of task k's last `history_length` losses, each divided by its first, and M the slopes of the
    worst task's curve since the warm-up:

        RCS = softmax_k(K a_k / sum_j |a_j|)
        ACS = softmax_k(-n a_k / sum |a_k over the n kept slopes|)
        DF  = m softmax_t(-m tau M / sum |M|)[now],  m = len(M)
        w   = softmax_k(K (DF RCS + (1 - DF) ACS)), mixed with a uniform share where one would fall below the floor

    0/0 (constant losses) counts as 0, so weights are then uniform. Before the warm-up ends they are uniform.

    Args:
        tasks: K.
        warmup, history_length: measurements; `warmup` must not exceed `history_length`.
        tau: how fast DF falls once the worst task diverges.
        floor: the smallest weight; None: 1 / (10 K).
        strict_window: keep exactly the last `history_length` slopes for ACS; False slices as the official code does.
        clamp_df: hold DF at 1 or below, so that 1 - DF is no negative share.
        final: "softmax" as in the code, or "mixture", DF RCS + (1 - DF) ACS itself.
    """

    tasks: int
    warmup: int = 100
    history_length: int = 200
    tau: float = 5.0
    floor: float | None = None
    strict_window: bool = True
    clamp_df: bool = False
    final: Literal["softmax", "mixture"] = "softmax"
    history: list[list[float]] = field(default_factory=list)  # one entry of K ratios per measurement
    slopes: list[list[float]] = field(default_factory=list)  # since the warm-up
    worst: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.warmup > self.history_length:
            raise BadInput(
                f"CoBa's warmup {self.warmup} exceeds its history_length {self.history_length}; take a history of 2 to "
                "5 times the warm-up."
            )
        if self.least * self.tasks >= 1:
            raise BadInput(f"A floor of {self.least} for each of {self.tasks} tasks leaves nothing to balance.")

    @property
    def least(self) -> float:
        return 1 / (10 * self.tasks) if self.floor is None else self.floor

    def measure(self, ratios: Tensor) -> Tensor:
        """Take in (K,) losses divided by the starting ones; returns (K,) weights, float64. Not finite: the last."""
        values = ratios.detach().double().cpu().tolist()
        last = self.history[-1] if self.history else [0.0] * self.tasks
        self.history.append([v if math.isfinite(v) else before for v, before in zip(values, last, strict=True)])
        if len(self.history) < max(1, self.warmup):
            return self.uniform()
        start = max(0, len(self.history) - self.history_length)
        window = torch.tensor(self.history[start:], dtype=torch.float64)  # (n, K)
        self.slopes.append([float(slope(window[:, k], start)) for k in range(self.tasks)])
        self.worst.append(float(slope(window.max(1).values, start)))
        return self.weights(start)

    def uniform(self) -> Tensor:
        return torch.full((self.tasks,), 1 / self.tasks, dtype=torch.float64)

    def weights(self, start: int) -> Tensor:
        """(K,) from the slopes so far; `start` is the first measurement in the window."""
        slopes = torch.tensor(self.slopes, dtype=torch.float64).T  # (K, m)
        kept = slopes[:, -self.history_length :] if self.strict_window else slopes[:, start:]
        relative = (self.tasks * _shares(slopes[:, -1])).softmax(0)
        absolute = (-kept.shape[1] * _shares(kept)[:, -1]).softmax(0)
        worst = torch.tensor(self.worst, dtype=torch.float64)
        count = worst.numel()
        divergence = count * (-count * self.tau * _shares(worst)).softmax(0)[-1]
        if self.clamp_df:
            divergence = divergence.clamp(max=1.0)
        mixture = divergence * relative + (1 - divergence) * absolute
        if self.final == "softmax":
            weights = (self.tasks * mixture).softmax(0)
        else:
            weights = mixture.clamp(min=0)
            weights = weights / weights.sum()
        if bool((weights < self.least).any()):
            weights = weights * (1 - self.tasks * self.least) + self.least
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [list(v) for v in self.history],
            "slopes": [list(v) for v in self.slopes],
            "worst": list(self.worst),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [list(v) for v in state["history"]]
        self.slopes = [list(v) for v in state["slopes"]]
        self.worst = list(state["worst"])


# ---- min-norm -------------------------------------------------------------------------------------------------------


def min_norm_simplex(gram: Tensor) -> Tensor:
    """(K,) float64 point a of the simplex with the least a^T M a, for a Gram matrix M = G G^T (K, K).

    Exact, through non-negative least squares: with R^T R = M, the solution x of |R x|^2 + (sum x - 1)^2 over x >= 0 is
    a times a positive number (their Karush-Kuhn-Tucker conditions are the same). A tie is broken as scipy does.

    Raises:
        BadInput: not square, not finite, or not symmetric.
    """
    from scipy.optimize import nnls

    m = gram.detach().double().cpu()
    if m.ndim != 2 or m.shape[0] != m.shape[1] or not m.shape[0]:
        raise BadInput(f"A Gram matrix is square with at least one row, got shape {tuple(gram.shape)}.")
    if not bool(torch.isfinite(m).all()) or not torch.allclose(m, m.T, rtol=1e-6, atol=1e-12 * float(m.abs().max())):
        raise BadInput("A Gram matrix is finite and symmetric; this one is not. Look for gradients that overflow.")
    scale = float(m.diagonal().max())
    if scale <= 0:
        return torch.full((m.shape[0],), 1 / m.shape[0], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(m / scale)
    root = (vectors * values.clamp(min=0).sqrt()).T  # (K, K), R^T R = M / scale
    system = torch.cat([root, torch.ones(1, m.shape[0], dtype=torch.float64)])
    wanted = torch.zeros(system.shape[0], dtype=torch.float64)
    wanted[-1] = 1
    found = torch.from_numpy(nnls(system.numpy(), wanted.numpy())[0])
    return found / found.sum()
