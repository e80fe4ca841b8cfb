"""Token losses: what one target token costs, from the model's log-probability of it.

    sft    l = -log p[y]                         (label smoothing e: (1 - e) l - e mean_v log p[v])
    dft    l = sg(p[y]) * -log p[y]              gradient that of -p[y]; arXiv:2508.05629
    focal  l = (1 - p[y])^gamma * -log p[y]      arXiv:1708.02002

sg stops the gradient. A DFT loss is 0 at both ends of p and highest (1/e) at p = 1/e, so it may rise while training
goes well: the plain cross-entropy is logged beside it. Its gradient vanishes with p, so it can't teach tokens that the
base gives no mass; the weight is never clipped to hide that. Reduction and terms are not decided here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pegbox.parts.component import Axis, Component
from pegbox.parts.tokens import Scores

__all__ = ["TOKEN", "Dft", "Focal", "Sft", "TokenLoss"]


class TokenLoss(Component):
    """A loss per target token."""

    @property
    def needs_mean(self) -> bool:
        """Whether `scores.mean_logp` is needed."""
        return False

    def per_token(self, scores: Scores) -> Tensor:
        """(n,) losses from (n,) scores; tokens don't see each other."""
        raise NotImplementedError


TOKEN: Axis[TokenLoss] = Axis("objective.token", TokenLoss, "pegbox.objectives.token_losses", default="sft")


@TOKEN.register
class Sft(TokenLoss):
    """Cross-entropy, with label smoothing if asked for."""

    kind: Literal["sft"] = "sft"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def needs_mean(self) -> bool:
        return self.label_smoothing > 0

    def per_token(self, scores: Scores) -> Tensor:
        if scores.mean_logp is None:
            return -scores.logp
        return -(1 - self.label_smoothing) * scores.logp - self.label_smoothing * scores.mean_logp


@TOKEN.register
class Dft(TokenLoss):
    """Cross-entropy weighted by the model's own detached probability of the target."""

    kind: Literal["dft"] = "dft"
    reproduces: ClassVar[str] = "arXiv:2508.05629"

    def per_token(self, scores: Scores) -> Tensor:
        return scores.logp.detach().exp() * -scores.logp


@TOKEN.register
class Focal(TokenLoss):
    """Cross-entropy weighted by how wrong the model still is; the gradient flows through the weight."""

    kind: Literal["focal"] = "focal"
    reproduces: ClassVar[str] = "arXiv:1708.02002, equation 4"
    gamma: Annotated[float, Field(ge=0)] = 2.0

    def per_token(self, scores: Scores) -> Tensor:
        return (-scores.logp.expm1()) ** self.gamma * -scores.logp
