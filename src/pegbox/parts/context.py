"""What the engine tells a component when it sets it up: the model, the clock and where randomness comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Context", "seed_of"]


def seed_of(seed: int, *names: object) -> int:
    """A 63-bit seed derived from `seed` and names: independent streams that never depend on the order of use."""
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass
class Context:
    """Handed to `setup`, `prepare` and `on_batch`.

    Args:
        model: the model as trained (tuner attached), or the bare base before one is attached.
        seed: the run's seed; draw through `generator`, never from a global one.
        total_steps: optimizer steps of this stage (0 where nothing trains).
        step: finished optimizer steps, a live reading of the trainer's own counter.
        tokenizer: the text tokenizer or processor, if the task has one.
        reference: a context manager under which `model` answers as it did before tuning (adapter off), or None when
            no such view exists and a frozen copy has to be loaded.
        roles: other models of the run by role ("teacher", "reward"), loaded on first use.
        gather: (a selector's request, the running optimizer) -> its statistics on the model as it is now; None where
            nothing can be gathered while training.
        tasks: names of the training rows' tasks, in the order of their numbers; () where nobody knows.
        streams: rows by name ("train", "validation", and what data policies ask for) as `parts.rowsource.RowSource`s.
        batch: rows per optimizer step (0 where nothing trains). round: which round of a run of rounds this is.
        folder_of: a finished stage's name -> the folder of its artefact; None outside a run of stages.
    """

    model: nn.Module
    seed: int = 0
    total_steps: int = 0
    step: Callable[[], int] = lambda: 0
    tokenizer: Any = None
    reference: Callable[[], AbstractContextManager[Any]] | None = None
    roles: Mapping[str, nn.Module] = field(default_factory=dict)
    gather: Callable[[Any, Any], Mapping[str, Any] | None] | None = None
    tasks: tuple[str, ...] = ()
    streams: Mapping[str, Any] = field(default_factory=dict)
    folder_of: Callable[[str], Path] | None = None
    batch: int = 0
    round: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def generator(self, *names: object, device: str | torch.device = "cpu") -> torch.Generator:
        """A fresh generator for the stream called `names`."""
        return torch.Generator(device=device).manual_seed(seed_of(self.seed, *names))

    def as_reference(self) -> AbstractContextManager[Any]:
        """The reference view as a context; does nothing where the model is already the base."""
        return self.reference() if self.reference is not None else nullcontext()
