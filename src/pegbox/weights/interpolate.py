"""A point on the line between the base and a tuned model (WiSE-FT).

    theta(a) = theta_0 + a (theta - theta_0)

0 is the base, 1 the tuned model (both exactly), values outside [0, 1] extrapolate. Wortsman et al., arXiv:2109.01903.
After LiNeS (`lines.py`) in a recipe's list of weight operations it gives the curve of the edited update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.algebra import interpolate
from pegbox.weights.base import WEIGHTS, WeightOp
from pegbox.weights.updates import Updates

__all__ = ["Interpolate"]


@WEIGHTS.register
class Interpolate(WeightOp):
    """Constant scaling of one update. `amount`: 0 the base, 1 the tuned model."""

    tuned_models: ClassVar[int | None] = 1
    reproduces: ClassVar[str] = "arXiv:2109.01903"

    kind: Literal["interpolate"] = "interpolate"
    amount: Annotated[float, Field(allow_inf_nan=False)] = 0.5

    def apply(
        self, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Any
    ) -> Iterator[tuple[str, Tensor]]:
        if len(tuned) != 1:
            raise BadInput(f"weights.kind=interpolate takes one tuned model, not {len(tuned)}. Merge them first.")
        updates = Updates(base, tuned, getattr(anatomy, "ties", None))
        moved = set(updates.names)
        for name in updates.base:
            yield name, interpolate(base[name], tuned[0][name], self.amount) if name in moved else base[name]
