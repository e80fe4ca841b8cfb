"""Tuners say in what form an update lives: PEFT adapters (ours and PEFT's own), or the full tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from pegbox.parts.allocation import Allocation
from pegbox.parts.component import Component
from pegbox.parts.context import Context

__all__ = ["Tuner"]


class Tuner(Component):
    """How the update is held, attached, saved and loaded."""

    part_kind: ClassVar[str] = "adapter"  # what it leaves in an artefact: adapter | delta
    takes: ClassVar[frozenset[str]] = frozenset()  # the choices of a selector it can hold: entries, whole, units
    needs_floating_base: ClassVar[bool] = False
    needs_resident_base: ClassVar[bool] = False  # the whole weight in this process (no offload)
    needs_unsharded_base: ClassVar[bool] = False
    holds_vectors: ClassVar[bool] = True  # norms and biases too, not just matrices
    moves: ClassVar[frozenset[str]] = frozenset()  # the moves of a selection it can follow while training: slots, set
    additive: ClassVar[bool] = False  # what it leaves is a difference that adds to others over the same base
    takes_factors: ClassVar[bool] = False  # begins at low-rank factors that a preparation took out of the weights
    takes_up: ClassVar[bool] = False  # begins at an update that a preparation carried over from an earlier adapter
    rewrites_base: ClassVar[bool] = False  # the base's own tensors change during training
    keeps_causality: ClassVar[bool] = True
    has_prior: ClassVar[bool] = False  # its layers have a distribution over weights (`parts.priors`)
    several_active: ClassVar[bool] = True
    reference_view: ClassVar[bool] = True  # the base can be had back without a copy
    merge: ClassVar[Literal["exact", "lossy", "no"]] = "lossy"

    def attach(self, model: nn.Module, allocation: Allocation | None, ctx: Context) -> nn.Module:
        """Make `model` trainable in this form and return what trains (a PeftModel, or the model itself)."""
        raise NotImplementedError

    def schedules(self, selector: Any, ctx: Context) -> list[Any]:
        """Work between optimizer steps that a selection which moves needs, as the engine's schedules (`every`,
        `refresh(step, model, optimizer)`); none by default."""
        return []

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context under which the attached `model` answers as the bare base; exact on leaving, also on exceptions."""
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Write the update into the existing empty `folder`; returns JSON for the artefact's part entry."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
        """Put a saved update onto a bare base. Raises `Corrupt`, `WrongBase`."""
        raise NotImplementedError
