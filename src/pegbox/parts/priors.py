"""Layers whose weights have a distribution, and the prior that an episode holds up to them.

An episode begins with every such layer at its prior: `held(model)` remembers the layer's present tensors as theta.
While the episode adapts other tensors phi in their place, `divergence` compares the two. Which of them a gradient
reaches is the phase: "inner" (phi alone), "outer" (theta alone), "both" (for second order). Terms of an objective,
estimators and analyses meet here; none of them knows a particular layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

__all__ = ["Draw", "Held", "Phase", "PriorLayer", "drawn", "held", "prior_layers"]

Phase = Literal["inner", "outer", "both"]
Draw = Literal["auto", "mean", "sample"]


@dataclass
class Held:
    """A layer's prior during an episode.

    Args:
        values: theta by name. phase: what gradients reach. strength: of the divergence in the loss, per entry, as the
            term that weighs it said last (an inner step needs it to stay stable).
    """

    values: Mapping[str, Tensor]
    phase: Phase = "inner"
    strength: float = 0.0
    precision: float | None = None  # the largest of theta, once it has been asked for


class PriorLayer:
    """What a layer with a distribution over its weights offers (a mixin)."""

    prior: Held | None = None
    draw: Draw = "auto"  # auto: sample in training mode, the mean otherwise

    def gaussian(self) -> dict[str, Tensor]:
        """The layer's present tensors by name: phi in an episode, else theta."""
        raise NotImplementedError

    def entries(self) -> int:
        """How many weights have a distribution."""
        raise NotImplementedError

    def kl(self, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        """KL(q(. | phi) || p(. | theta)), summed over the layer's weights."""
        raise NotImplementedError

    def energy(self, theta: Mapping[str, Tensor], a0: float, b0: float) -> Tensor:
        """-log p(theta) without constants, summed: means under N(0, 1), precisions under Gamma(a0, b0)."""
        raise NotImplementedError

    def stiffness(self) -> float:
        """A bound on the curvature that the divergence has in the layer's tensors as they are now, at least 1 / the
        smallest variance of theta."""
        raise NotImplementedError

    def implicit(self, grads: Mapping[str, Tensor], lr: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """Steps by name, with the divergence's curvature taken implicitly (at its present strength)."""
        raise NotImplementedError

    # ---- what terms ask for

    def divergence(self) -> Tensor:
        """The divergence from the prior that is held, with gradients by its phase. Outside an episode a layer is its
        own prior, and this is 0."""
        phi = self.gaussian()
        if self.prior is not None and self.prior.phase == "outer":
            phi = _detached(phi)
        return self.kl(phi, self._theta())

    def prior_energy(self, a0: float, b0: float) -> Tensor:
        """`energy` of the prior that is held, or of the layer itself outside an episode; no gradient in the inner
        phase."""
        return self.energy(self._theta() if self.prior is not None else self.gaussian(), a0, b0)

    def _theta(self) -> Mapping[str, Tensor]:
        if self.prior is None:
            return _detached(self.gaussian())
        return _detached(self.prior.values) if self.prior.phase == "inner" else self.prior.values


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def prior_layers(model: nn.Module) -> list[PriorLayer]:
    """The model's layers with a distribution, in module order."""
    return [module for module in model.modules() if isinstance(module, PriorLayer)]


@contextmanager
def held(model: nn.Module) -> Iterator[list[PriorLayer]]:
    """Hold every layer's present tensors as its prior; gives the layers. Released at the end, also on errors."""
    layers = prior_layers(model)
    for layer in layers:
        layer.prior = Held(layer.gaussian())
    try:
        yield layers
    finally:
        for layer in layers:
            layer.prior = None


@contextmanager
def drawn(model: nn.Module, how: Draw) -> Iterator[None]:
    """Every layer answers with its mean, or with a fresh sample per forward."""
    layers = prior_layers(model)
    before = [layer.draw for layer in layers]
    for layer in layers:
        layer.draw = how
    try:
        yield
    finally:
        for layer, draw in zip(layers, before, strict=True):
            layer.draw = draw
