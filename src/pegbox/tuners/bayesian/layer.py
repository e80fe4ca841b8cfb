"""A linear layer whose change has a Gaussian distribution: two pairs of factors, for mean and spread.

space "weight": the change dW (o, i) is Gaussian, entry by entry

    mean = s B A,   spread = s B' A' + c,   y = x W^T + x mean^T + noise

  sampling "local": one draw per output entry, noise = sqrt(x^2 (spread^2)^T) eps (arXiv:1506.02557): no (o, i) matrix
  sampling "weight": one dW per forward, shared by all tokens

space "factors": the entries of B and A themselves are Gaussian (mean, spread = S + c), one draw of both per forward.
B and B' (or all spreads) begin at zero: mean 0 and spread c, the base plus small noise. Zhang, Snell and Griffiths,
arXiv:2508.14285, for the form; the local draw and "factors" are ours. In evaluation the mean answers, unless
`parts.priors.drawn` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.gaussians import (
    TINY,
    by_rows,
    implicit_rows,
    kl_diagonal,
    neg_log_prior,
    output_variance,
    spread_of,
)
from pegbox.parts.priors import PriorLayer
from pegbox.tuners.sparse.execution import base_facts

__all__ = ["FACTORS", "GaussianLayer"]

FACTORS = ("mean_A", "mean_B", "spread_A", "spread_B")


class GaussianLayer(nn.Module, BaseTunerLayer, PriorLayer):
    """See the file's header. The active adapter's distribution is what `PriorLayer` speaks of."""

    adapter_layer_names = tuple(f"gauss_{name}" for name in FACTORS)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.module_name = name
        for factor in self.adapter_layer_names:
            setattr(self, factor, nn.ParameterDict())
        self.options: dict[str, Any] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        facts = base_facts(base_layer)
        self.shape: tuple[int, int] = (int(facts.shape[0]), int(facts.shape[1]))  # (o, i)
        self.in_features, self.out_features = self.shape[1], self.shape[0]
        self.transposed = type(base_layer).__name__ == "Conv1D"

    def add(self, adapter: str, config: Any) -> None:
        """A fresh distribution: A uniform as LoRA's, B zero. Raises `BadInput` for a rank above the shorter side."""
        rows, columns = self.shape
        if config.r > min(rows, columns):
            raise BadInput(
                f"tuner.r = {config.r} is above the shorter side of '{self.module_name}' ({rows} x {columns}); "
                f"use at most {min(rows, columns)}."
            )
        self.options[adapter] = config
        device = next((p.device for p in self.base_layer.parameters()), torch.device("cpu"))
        random_spread = config.space == "weight"  # in "factors" the spread's numbers are the spread itself
        made = {
            "mean_A": _uniform(config.r, columns),
            "mean_B": torch.zeros(rows, config.r),
            "spread_A": _uniform(config.r, columns) if random_spread else torch.zeros(config.r, columns),
            "spread_B": torch.zeros(rows, config.r),
        }
        for factor, value in made.items():
            self._table(factor)[adapter] = nn.Parameter(value.to(device))

    def _table(self, factor: str) -> nn.ParameterDict:
        table: nn.ParameterDict = getattr(self, f"gauss_{factor}")
        return table

    def _adapter(self) -> str:
        return str(self.active_adapters[0])

    def _scale(self, adapter: str) -> float:
        config = self.options[adapter]
        return float(config.alpha / config.r)

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        for adapter in self.active_adapters:
            if adapter in self.options:
                y = y + self._change(adapter, x).to(y.dtype)
        return y

    def _change(self, adapter: str, x: Tensor) -> Tensor:
        factors = {name: self._table(name)[adapter] for name in FACTORS}
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(factors["mean_A"].dtype)
        config, scale = self.options[adapter], self._scale(adapter)
        sampled = self.draw == "sample" or (self.draw == "auto" and self.training)
        a, b = factors["mean_A"], factors["mean_B"]
        if sampled and config.space == "factors":
            a = a + (factors["spread_A"] + config.c) * torch.randn_like(a)
            b = b + (factors["spread_B"] + config.c) * torch.randn_like(b)
        if not sampled or config.space == "factors":
            return F.linear(F.linear(x, a), b) * scale
        if config.draws == "weight":
            spread = spread_of(scale * (factors["spread_B"] @ factors["spread_A"]), config.c, config.spread)
            return F.linear(x, scale * (b @ a) + spread * torch.randn_like(spread))
        mean = F.linear(F.linear(x, a), b) * scale
        variance = output_variance(x, factors["spread_B"], factors["spread_A"], scale, config.c, config.spread)
        return mean + (variance + TINY).sqrt() * torch.randn_like(mean)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of what the active adapter adds to the output, (..., o) each; in space "weight"."""
        adapter = self._adapter()
        config, scale = self.options[adapter], self._scale(adapter)
        if config.space != "weight":
            raise Unsupported("The output is Gaussian where the weights are: tuner.space must be 'weight'.")
        f = self.gaussian()
        mean = F.linear(F.linear(x, f["mean_A"]), f["mean_B"]) * scale
        return mean, output_variance(x, f["spread_B"], f["spread_A"], scale, config.c, config.spread)

    # ---- the prior (see PriorLayer)

    def gaussian(self) -> dict[str, Tensor]:
        adapter = self._adapter()
        return {name: self._table(name)[adapter] for name in FACTORS}

    def entries(self) -> int:
        rows, columns = self.shape
        config = self.options[self._adapter()]
        return rows * columns if config.space == "weight" else config.r * (rows + columns)

    def kl(self, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> Tensor:
        if self._over_factors():
            pairs = [(_entries(phi, f, self._c()), _entries(theta, f, self._c())) for f in ("A", "B")]
            return kl_diagonal(*pairs[0][0], *pairs[0][1]) + kl_diagonal(*pairs[1][0], *pairs[1][1])

        def part(start: int, stop: int, *t: Tensor) -> Tensor:
            return kl_diagonal(*self._moments(t[:4], start, stop), *self._moments(t[4:], start, stop))

        given = [values[name] for values in (phi, theta) for name in FACTORS]
        return by_rows(part, *self.shape, *given)

    def energy(self, theta: Mapping[str, Tensor], a0: float, b0: float) -> Tensor:
        if self._over_factors():
            first, second = (neg_log_prior(*_entries(theta, f, self._c()), a0, b0) for f in ("A", "B"))
            return first + second

        def part(start: int, stop: int, *t: Tensor) -> Tensor:
            return neg_log_prior(*self._moments(t, start, stop), a0, b0)

        return by_rows(part, *self.shape, *(theta[name] for name in FACTORS))

    @torch.no_grad()
    def stiffness(self) -> float:
        assert self.prior is not None
        if self.prior.precision is None:
            self.prior.precision = max(float((1 / v).max()) for v in self._variances(self.prior.values))
        if self._over_factors():
            return 2 * self.prior.precision  # a spread has its own curvature beside the prior's
        f, scale = self.gaussian(), self._scale(self._adapter())
        bends = [n * (_square_norm(f[f"{k}_A"]) + _square_norm(f[f"{k}_B"])) for k, n in (("mean", 1), ("spread", 2))]
        return self.prior.precision * max(1.0, scale**2 * max(bends))

    @torch.no_grad()
    def implicit(self, grads: Mapping[str, Tensor], lr: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """The curvature is that of the divergence in one factor, twice: the other factor of the product moves too."""
        assert self.prior is not None
        phi, strength = self.gaussian(), self.prior.strength
        prior, now = self._variances(self.prior.values), self._variances(phi)
        if self._over_factors():
            moves = {}
            for name in FACTORS:
                at = 0 if name.endswith("A") else 1
                curvature = 1 / prior[at] + (1 / now[at] if name.startswith("spread") else 0)
                moves[name] = -lr[name] * grads[name] / (1 + lr[name] * strength * curvature)
            return moves
        factor = 2 * strength * self._scale(self._adapter()) ** 2
        bend = {"mean": factor / prior[0], "spread": factor * (1 / prior[0] + 1 / now[0]) * self._slope(phi)}
        moves = {}
        for kind, curvature in bend.items():
            a, b = phi[f"{kind}_A"], phi[f"{kind}_B"]
            moves[f"{kind}_B"] = implicit_rows(grads[f"{kind}_B"], a, curvature, lr[f"{kind}_B"])
            moves[f"{kind}_A"] = implicit_rows(grads[f"{kind}_A"].T, b.T, curvature.T, lr[f"{kind}_A"]).T
        return moves

    def _slope(self, phi: Mapping[str, Tensor]) -> Tensor | float:
        """(d spread / d product)^2."""
        config = self.options[self._adapter()]
        if config.spread == "linear":
            return 1.0
        product = self._scale(self._adapter()) * (phi["spread_B"] @ phi["spread_A"])
        return torch.sigmoid(product + math.log(math.expm1(config.c))).square()

    def _variances(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Of the weight [(o, i)], or of the factors [(r, i), (o, r)]."""
        if self._over_factors():
            return [_entries(values, f, self._c())[1] for f in ("A", "B")]
        return [self._moments([values[name] for name in FACTORS], 0, self.shape[0])[1]]

    def _moments(self, tensors: Any, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of rows of the change, (rows, i) each, from the four factors in order."""
        mean_a, mean_b, spread_a, spread_b = tensors
        adapter = self._adapter()
        scale, config = self._scale(adapter), self.options[adapter]
        spread = spread_of(scale * (spread_b[start:stop] @ spread_a), config.c, config.spread)
        return scale * (mean_b[start:stop] @ mean_a), spread.square() + TINY

    def _over_factors(self) -> bool:
        return bool(self.options[self._adapter()].space == "factors")

    def _c(self) -> float:
        return float(self.options[self._adapter()].c)

    # ---- merging the mean

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The mean change, in the base weight's own layout."""
        delta = self._scale(adapter) * (self._table("mean_B")[adapter] @ self._table("mean_A")[adapter])
        return delta.T if self.transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the mean to the base weight. Raises `Unsupported` on a packed base."""
        weight = self._floating()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.options:
                continue
            merged = weight.data + self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaN or infinity in the merged weights of adapter {adapter}.")
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        weight = self._floating()
        while self.merged_adapters:
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def _floating(self) -> Tensor:
        weight: Any = self.get_base_layer().weight
        if not weight.is_floating_point():
            raise Unsupported(
                f"'{self.module_name}' is packed, so nothing can be merged into it; load the base in fp32 or bf16."
            )
        return weight


def _uniform(rows: int, columns: int) -> Tensor:
    value = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(value, a=math.sqrt(5))
    return value


def _square_norm(factor: Tensor) -> float:
    """The square of a factor's largest singular value, from its small Gram matrix."""
    small = factor if factor.shape[0] <= factor.shape[1] else factor.T
    return float(torch.linalg.eigvalsh((small @ small.T).float())[-1])


def _entries(values: Mapping[str, Tensor], factor: str, c: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of a factor's own entries (space "factors")."""
    return values[f"mean_{factor}"], (values[f"spread_{factor}"] + c).square() + TINY
