"""Whole tensors by their place in the model: all of them, some blocks, the norms, the biases.

No equation: what the words name trains, the rest is frozen. With `what: biases` this is BitFit (arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.select.base import SELECT, Selector

__all__ = ["WholeTensors"]


@SELECT.register
class WholeTensors(Selector):
    """Train the tensors that `scope` names.

    Args:
        scope: words for modules, as `Anatomy.resolve` takes them ("attention", "blocks 0-5", "not head").
        what: of these modules, "all" parameters, the "weights" only, or the "biases" only.
    """

    kind: Literal["whole"] = "whole"
    scope: tuple[str, ...] = ("all",)
    what: Literal["all", "weights", "biases"] = "all"

    produces: ClassVar[frozenset[str]] = frozenset({"whole"})
    needs_weights: ClassVar[bool] = False

    def select(
        self,
        anatomy: Anatomy,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        return Allocation({name: Whole() for name in self._names(anatomy) if name in weights})

    def count(self, anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        return {name: torch.Size(shapes[name]).numel() for name in self._names(anatomy) if name in shapes}

    def _names(self, anatomy: Anatomy) -> list[str]:
        every = anatomy.parameters(self.scope)
        weights = set(anatomy.weights(self.scope))
        keep = {"all": every, "weights": [n for n in every if n in weights]}.get(
            self.what, [n for n in every if n not in weights]
        )
        if not keep:
            raise BadInput(f"select.what: the modules named by select.scope {list(self.scope)} have no {self.what}.")
        return keep
