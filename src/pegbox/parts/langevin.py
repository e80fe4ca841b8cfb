"""Stochastic gradient Langevin dynamics: optimisation that samples a posterior instead of finding its mode.

    x <- x - eta/2 G grad U(x) + sqrt(eta T G) n,   n ~ N(0, I)

G = 1 (SGLD, Welling and Teh 2011), or 1 / (eps + sqrt(v)) with v a running mean of squared gradients (pSGLD,
arXiv:1512.07666, without its curvature term). T = 1 samples exp(-U), T = 0 is gradient descent at rate eta / 2, bit for
bit. Noise comes from a generator of its own, whose state is saved with the optimizer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pegbox.errors import BadInput

__all__ = ["Langevin"]


class Langevin(torch.optim.Optimizer):
    """SGLD or pSGLD.

    Args:
        lr: eta, the step size. temperature: T. preconditioned: pSGLD, with `beta` and `eps`.
        generator: of the noise, on the parameters' device; None: torch's own.

    Raises:
        BadInput: a negative temperature, a step size that is not above 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        temperature: float = 1.0,
        *,
        preconditioned: bool = False,
        beta: float = 0.99,
        eps: float = 1e-5,
        generator: torch.Generator | None = None,
    ):
        if not lr > 0 or not math.isfinite(lr):
            raise BadInput(f"The step size must be above 0, got {lr}.")
        if not temperature >= 0 or not math.isfinite(temperature):
            raise BadInput(f"The temperature must be at least 0, got {temperature}.")
        self.generator = generator
        options = {"lr": lr, "temperature": temperature, "preconditioned": preconditioned, "beta": beta, "eps": eps}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One move of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)
        return loss

    def _move(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        eta, temperature, scale = group["lr"], group["temperature"], None
        assert p.grad is not None
        if group["preconditioned"]:
            state = self.state[p]
            v = state.setdefault("square", torch.zeros_like(p))
            v.mul_(group["beta"]).addcmul_(p.grad, p.grad, value=1 - group["beta"])
            scale = 1 / (group["eps"] + v.sqrt())
            p.add_(p.grad * scale, alpha=-eta / 2)
        else:
            p.add_(p.grad, alpha=-eta / 2)
        if temperature > 0:
            noise = torch.randn(p.shape, generator=self.generator, dtype=p.dtype, device=p.device)
            p.add_(noise if scale is None else noise * scale.sqrt(), alpha=math.sqrt(eta * temperature))

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return saved if self.generator is None else {**saved, "noise": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kept = dict(state_dict)
        noise = kept.pop("noise", None)
        super().load_state_dict(kept)
        if noise is not None and self.generator is not None:
            self.generator.set_state(noise)
