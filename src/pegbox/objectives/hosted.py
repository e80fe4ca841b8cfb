"""Objectives whose loss TRL's own trainers compute.

The component holds what the method chooses, checked here; `options()` are fields of TRL's config, and the engine's host
passes them on. The loss comes from the trainer, so there is no value for a step without backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from pegbox.errors import Unsupported
from pegbox.objectives.base import Objective
from pegbox.parts.view import Batch, ModelView

__all__ = ["Hosted"]


class Hosted(Objective):
    """An objective that one of TRL's trainers computes. `options()` goes into that trainer's config."""

    has_value: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        """Fields of TRL's config that this objective sets."""
        raise NotImplementedError

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def losses(
        self, state: Any, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        raise Unsupported(
            f"The loss of objective '{self.kind}' is computed by TRL's trainer (host '{type(self).host}'), not by "
            "pegbox; it can't be run under another host."
        )
