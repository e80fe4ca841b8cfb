"""The budget of a comparison, turned into a number of steps per row before training.

Tokens: the same for all rows (same steps, batch and order). FLOPs and seconds: a probe of real steps gives each row's
fixed cost (selection, calibration, preparation) and its cost per step, so that extra forwards and refreshes count:

    steps = floor((value - fixed) / per_step)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pegbox.errors import BadInput

__all__ = ["Budget", "Probe", "parse_budget", "probe_from", "steps_within"]


@dataclass(frozen=True)
class Budget:
    """What all rows may spend. `value` None (tokens only): what the training settings say."""

    kind: Literal["tokens", "flops", "seconds"] = "tokens"
    value: float | None = None


@dataclass(frozen=True)
class Probe:
    """A row's measured cost in the budget's unit."""

    fixed: float
    per_step: float


def parse_budget(text: str) -> Budget:
    """ "tokens" | "tokens=V" | "flops=V" | "seconds=V"."""
    kind, _, value = text.partition("=")
    if kind not in {"tokens", "flops", "seconds"}:
        raise BadInput(f"--budget {text}: write tokens, tokens=V, flops=V or seconds=V.")
    if not value:
        if kind != "tokens":
            raise BadInput(f"--budget {kind} needs a value, e.g. {kind}=1e15.")
        return Budget()
    try:
        number = float(value)
    except ValueError:
        raise BadInput(f"--budget {text}: '{value}' is not a number.") from None
    if not number > 0 or not math.isfinite(number):
        raise BadInput(f"--budget {text}: the value must be positive and finite.")
    return Budget(kind, number)  # type: ignore[arg-type]


def probe_from(short: tuple[int, float], long: tuple[int, float]) -> Probe:
    """Fixed and per-step cost from two measured runs (steps, cost); noise never makes either negative."""
    (few, cost_few), (many, cost_many) = short, long
    per_step = max((cost_many - cost_few) / (many - few), cost_many / many * 1e-3)
    return Probe(fixed=max(cost_few - few * per_step, 0.0), per_step=per_step)


def steps_within(value: float, probe: Probe, row: str) -> int:
    """How many steps fit. Raises `BadInput` when not even one does."""
    steps = math.floor((value - probe.fixed) / probe.per_step)
    if steps < 1:
        raise BadInput(
            f"The budget of {value:g} does not pay for one step of '{row}' "
            f"(fixed {probe.fixed:.3g}, {probe.per_step:.3g} per step). "
            f"Give at least {probe.fixed + probe.per_step:.3g}."
        )
    return steps
