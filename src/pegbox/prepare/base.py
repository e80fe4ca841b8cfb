"""Preparations rewrite the base before anything is attached: quantize, decompose, permute, add a token.

They form a list in a recipe, are recorded in the artefact, and are replayed from the original base when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from pegbox.parts.component import Axis, Component
from pegbox.parts.context import Context
from pegbox.parts.view import Batch

__all__ = ["PREPARE", "Preparation"]


class Preparation(Component):
    """One rewrite of the base."""

    needs_batches: ClassVar[bool] = False  # calibration batches
    needs_floating_base: ClassVar[bool] = True
    packs_base: ClassVar[bool] = False  # afterwards the weights are no longer floating
    leaves_factors: ClassVar[bool] = False  # takes low-rank factors out of the weights, for the tuner to take up
    keeps_function: ClassVar[bool] = True  # the model computes the same before training, up to rounding

    @property
    def carries_update(self) -> bool:
        """Whether it hands an earlier adapter's update to the tuner that is attached next."""
        return False

    def load_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained` where the rewrite happens while loading (e.g. a quantization config)."""
        return {}

    def apply(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], ctx: Context) -> dict[str, Any]:
        """Rewrite `model` in place; returns what `replay` needs (tensors and plain values)."""
        return {}

    def finish(self, model: nn.Module, record: dict[str, Any]) -> None:
        """Called after training, before anything is saved: takes out of `model` what was there for training only."""

    def save(self, record: dict[str, Any], folder: Path) -> None:
        """Write the record (safetensors and JSON) into the existing empty `folder`."""

    def replay(self, model: nn.Module, folder: Path) -> None:
        """Rewrite a fresh original base as recorded, without data. Raises `WrongBase`, `Corrupt`."""


PREPARE: Axis[Preparation] = Axis("prepare", Preparation, "pegbox.prepare")
