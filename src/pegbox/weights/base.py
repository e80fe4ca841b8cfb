"""Weight operations: what is done to weights afterwards. Streams of (name, tensor); no model in memory is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from pegbox.parts.component import Axis, Component

__all__ = ["WEIGHTS", "WeightOp"]


class WeightOp(Component):
    """An operation over a base and one or more tuned versions of it."""

    tuned_models: ClassVar[int | None] = 1  # how many tuned inputs it takes; None: any number

    def apply(
        self, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the result once, in the base's dtype, holding a few tensors at a time.

        `base` and `tuned` are lazy mappings (`parts.algebra.StateReader` over shards, or a plain state dict).
        Raises `BadInput` on missing names or unequal shapes, with the name and both shapes.
        """
        raise NotImplementedError


WEIGHTS: Axis[WeightOp] = Axis("weights", WeightOp, "pegbox.weights")
