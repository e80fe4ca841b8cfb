"""Statistics gathered in one streaming pass over calibration batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["StageWeights", "StatSpec"]


@dataclass(frozen=True)
class StatSpec:
    """What to gather, over which tensors.

    kinds: "input_norm" | "input_covariance" | "gradient_square" | "gradient_abs" | "gradient_sum" | ...
    per: how gradients are squared: per batch, per sample or per token.
    """

    kinds: tuple[str, ...]
    targets: tuple[str, ...] = ()  # module selectors as anatomy resolves them; empty: all linears in blocks
    per: Literal["batch", "sample", "token"] = "batch"
    batches: int = 32


@dataclass(frozen=True)
class StageWeights:
    """Asks the protocol's runner for the weights of other stages: key -> (stage, "start" | "end")."""

    weights_of: Mapping[str, tuple[str, str]]
