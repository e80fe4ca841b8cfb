"""Terms of amortized Bayesian meta-learning: a task's posterior is held to the prior, and the prior to its own.

    kl_to_prior   beta KL(q(phi | D) || p(phi | theta))
    prior         gamma (-log p(theta)),   means ~ N(0, 1), precisions ~ Gamma(a0, b0)

Ravi and Beatson, ICLR 2019; Zhang, Snell and Griffiths, arXiv:2508.14285 (beta and gamma repair the mismatch of
scales: a sum over millions of weights against a loss per token). Both need layers with a distribution (`tuner:
bayesian_lora`) and an episode that holds a prior (`optim: episodic`). Which gradients they have is the episode's
affair (`parts/priors.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.objectives.terms import TERM, Weight, WeightTerm
from pegbox.parts.context import Context
from pegbox.parts.priors import prior_layers

__all__ = ["KLToPrior", "Prior"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Clock:
    """The run's clock and tasks, as a term's state: nothing of its own."""

    def __init__(self, ctx: Context):
        self.ctx = ctx

    def share(self, warmup: float) -> float:
        """How much of a term acts now, rising to 1 over the first `warmup` of the steps."""
        span = warmup * self.ctx.total_steps
        return min(1.0, (self.ctx.step() + 1) / span) if span >= 1 else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class _PriorTerm(WeightTerm):
    needs_prior: ClassVar[bool] = True

    def setup(self, ctx: Context) -> _Clock:
        if not prior_layers(ctx.model):
            raise BadInput(
                f"objective.terms: '{self.kind}' needs layers with a distribution; use tuner: {{kind: bayesian_lora}}."
            )
        return _Clock(ctx)


@TERM.register
class KLToPrior(_PriorTerm):
    """beta KL(q(phi | D) || p(phi | theta)).

    Args:
        weight: beta. per: of the mean over all weights with a distribution ("weight"), or of their "sum".
        warmup: the share of the training over which beta rises from 0.
    """

    kind: Literal["kl_to_prior"] = "kl_to_prior"
    reproduces: ClassVar[str] = "arXiv:2508.14285"
    weight: Weight = 1.0
    per: Literal["weight", "sum"] = "weight"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1

    def penalty(self, state: Any, model: nn.Module) -> Tensor:
        layers = prior_layers(model)
        count = sum(layer.entries() for layer in layers) if self.per == "weight" else 1
        strength = self.weight * (state.share(self.warmup) if state is not None else 1.0) / count
        for layer in layers:
            if layer.prior is not None:
                layer.prior.strength = strength
        return strength * _total([layer.divergence() for layer in layers])


@TERM.register
class Prior(_PriorTerm):
    """gamma (-log p(theta)); its constants are left out.

    Args:
        weight: gamma. per: of the mean over weights and training tasks ("weight"), or of the "sum".
        a0, b0: shape and rate of the Gamma over precisions.
    """

    kind: Literal["prior"] = "prior"
    reproduces: ClassVar[str] = "arXiv:2508.14285"
    weight: Weight = 1.0
    per: Literal["weight", "sum"] = "weight"
    a0: Positive = 1.0
    b0: Positive = 0.01

    def penalty(self, state: Any, model: nn.Module) -> Tensor:
        layers = prior_layers(model)
        tasks = max(1, len(state.ctx.tasks)) if state is not None else 1
        count = tasks * sum(layer.entries() for layer in layers) if self.per == "weight" else 1
        return self.weight / count * _total([layer.prior_energy(self.a0, self.b0) for layer in layers])


def _total(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])
