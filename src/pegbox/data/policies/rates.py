"""How the share of corrupted tokens changes over training: pure functions of the step.

    ratio        r(s) = min(R, R s / (rho S + 1))        s finished optimizer steps of S
    steps        r(k) = R k / W  for k < W, then R       k = s + 1
    late         0 for k < A, then the ramp of `steps` shifted by A
    decreasing   r(k) = 2 R (W - k) / W  for k < W, then R
    uniform      R u,  u ~ U(0, 1) per optimizer step
    constant     R

From the official code of Masked Thought (arXiv:2403.02178), which counts micro-batches of one process where this counts
optimizer steps: W and A are given in optimizer steps, or as a share of all of them.
"""

from __future__ import annotations

import random
import warnings
from typing import Annotated, Any, Literal

from pydantic import Field

from pegbox.errors import BadInput
from pegbox.parts.component import Axis, Component
from pegbox.parts.context import seed_of

__all__ = [
    "RATE",
    "RateSchedule",
    "decreasing_rate",
    "late_rate",
    "ratio_rate",
    "steps_rate",
]

Share = Annotated[float, Field(gt=0, le=1)]


def ratio_rate(rate: float, step: int, total: int, rho: float) -> float:
    """min(R, R s / (rho S + 1)), s counted from 0."""
    return min(rate, rate * step / (total * rho + 1))


def steps_rate(rate: float, count: int, warmup: float) -> float:
    """R k / W up to W, then R; k counted from 1. W = 0: R."""
    return rate * count / warmup if warmup > 0 and count < warmup else rate


def late_rate(rate: float, count: int, warmup: float, after: float) -> float:
    """0 before A, then the ramp shifted by A."""
    return 0.0 if count < after else steps_rate(rate, count - after, warmup)  # type: ignore[arg-type]


def decreasing_rate(rate: float, count: int, warmup: float) -> float:
    """2 R (W - k) / W up to W, then R."""
    return 2 * rate * (warmup - count) / warmup if warmup > 0 and count < warmup else rate


class RateSchedule(Component):
    """The corruption rate at a step."""

    def rate(self, rate: float, step: int, total: int, seed: int) -> float:
        """The rate after `step` finished optimizer steps of `total`, for the full rate R."""
        raise NotImplementedError

    def check(self, rate: float, total: int) -> None:
        """Raises `BadInput` where the schedule can't be followed; warns where it never reaches R."""


RATE: Axis[RateSchedule] = Axis("data.schedule", RateSchedule, "pegbox.data.policies.rates", default="ratio")


@RATE.register
class Constant(RateSchedule):
    """R throughout."""

    kind: Literal["constant"] = "constant"

    def rate(self, rate: float, step: int, total: int, seed: int) -> float:
        return rate


@RATE.register
class Ratio(RateSchedule):
    """A ramp over the share rho of training; the first step is clean."""

    kind: Literal["ratio"] = "ratio"
    rho: Share = 2 / 3

    def rate(self, rate: float, step: int, total: int, seed: int) -> float:
        return ratio_rate(rate, step, total, self.rho)


class _Warmed(RateSchedule):
    """Ramps over `warmup` optimizer steps (an integer) or that share of all steps (a fraction below 1)."""

    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0.6

    def _steps(self, total: int, value: Any = None) -> float:
        value = self.warmup if value is None else value
        return float(value) if isinstance(value, int) else value * total

    def check(self, rate: float, total: int) -> None:
        if 0 < total < self._steps(total):
            warnings.warn(
                f"The corruption ramp takes {self.warmup} optimizer steps, the training {total}: the rate never "
                f"reaches {rate}. Give the ramp as a share, e.g. warmup: 0.6.",
                stacklevel=2,
            )


@RATE.register
class Steps(_Warmed):
    """A ramp over W steps."""

    kind: Literal["steps"] = "steps"

    def rate(self, rate: float, step: int, total: int, seed: int) -> float:
        return steps_rate(rate, step + 1, self._steps(total))


@RATE.register
class Late(_Warmed):
    """Clean up to step A, then a ramp over W steps."""

    kind: Literal["late"] = "late"
    after: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0.2

    def rate(self, rate: float, step: int, total: int, seed: int) -> float:
        return late_rate(rate, step + 1, self._steps(total), self._steps(total, self.after))


@RATE.register
class Decreasing(_Warmed):
    """From 2 R down to 0 over W steps, then R."""

    kind: Literal["decreasing"] = "decreasing"

    def rate(self, rate: float, step: int, total: int, seed: int) -> float:
        return decreasing_rate(rate, step + 1, self._steps(total))

    def check(self, rate: float, total: int) -> None:
        super().check(rate, total)
        if rate > 0.5:
            raise BadInput(f"schedule 'decreasing' starts at twice the rate; {rate} is above 0.5.")


@RATE.register
class Uniform(RateSchedule):
    """A new rate between 0 and R at every optimizer step."""

    kind: Literal["uniform"] = "uniform"

    def rate(self, rate: float, step: int, total: int, seed: int) -> float:
        return rate * random.Random(seed_of(seed, "corruption rate", step)).random()
