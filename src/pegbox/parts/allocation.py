"""What may move: the answer of a selector, per tensor.

An `Allocation` maps parameter names (as in `model.named_parameters()` of the bare base, tied tensors once) to a choice.
It is saved with the artefact, so that loading never selects again, and hashed, so that ranks can compare theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pegbox.errors import Corrupt

__all__ = ["Allocation", "Choice", "Entries", "Frozen", "PerTensor", "Units", "Whole"]


@dataclass(frozen=True)
class Frozen:
    """The tensor does not move."""


@dataclass(frozen=True)
class Whole:
    """The whole tensor trains."""


@dataclass(frozen=True)
class Entries:
    """Single weights train.

    Args:
        index: (k,) sorted, unique row-major flat positions, int32 (int64 where the tensor has 2**31 entries or more).
    """

    index: Tensor

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.index.is_floating_point():
            raise ValueError(
                f"an entry index is a 1-d integer tensor, got {self.index.dtype} {tuple(self.index.shape)}"
            )


@dataclass(frozen=True)
class Units:
    """Whole slices along one axis train (rows: axis 0, columns: axis 1). `index`: (n,) sorted positions."""

    axis: int
    index: Tensor


@dataclass(frozen=True)
class PerTensor:
    """A tuner's or a codec's own options for this tensor.

    Args:
        role: "tuner" or "codec". options: plain JSON; of a tuner "trained" says how many weights it trains.
        index: (k,) flat positions of single entries that train beside it (other parts of a fused matrix).
    """

    role: str
    options: dict[str, Any] = field(default_factory=dict)
    index: Tensor | None = None


Choice = Frozen | Whole | Entries | Units | PerTensor


class Allocation(dict[str, Choice]):
    """Parameter name -> choice; a name that is absent is frozen.

    `facts` is what a selector has to tell of its choice (JSON; e.g. where a budget of FLOPs went). It is saved with the
    choice and is no part of it: the digest leaves it out.
    """

    def __init__(self, *args: Any, facts: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.facts: dict[str, Any] = dict(facts or {})

    def digest(self) -> str:
        """sha256 over names, kinds and index bytes: equal on every rank if the selections are equal."""
        total = hashlib.sha256()
        for name in sorted(self):
            choice = self[name]
            total.update(json.dumps([name, _describe(choice)], sort_keys=True).encode())
            if (index := _index_of(choice)) is not None:
                total.update(index.detach().to("cpu", torch.int64).contiguous().numpy().tobytes())
        return total.hexdigest()

    def trained(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """How many weights move in each tensor, given the tensors' shapes."""
        return {name: _count(choice, shapes[name]) for name, choice in self.items()}

    def save(self, path: Path) -> None:
        """Write one safetensors file: index tensors by name, everything else in its JSON metadata."""
        tensors = {n: i.cpu().contiguous() for n, c in self.items() if (i := _index_of(c)) is not None}
        meta = {"allocation": json.dumps({n: _describe(c) for n, c in self.items()}), "facts": json.dumps(self.facts)}
        save_file(tensors, str(path), metadata=meta)

    @classmethod
    def load(cls, path: Path) -> Allocation:
        """Read what `save` wrote. Raises `Corrupt`."""
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                described, facts = json.loads(meta["allocation"]), json.loads(meta.get("facts", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return cls({name: _rebuild(d, tensors.get(name)) for name, d in described.items()}, facts=facts)
        except Exception as error:
            raise Corrupt(f"{path} is not a readable allocation file ({error}).") from error


def _index_of(choice: Choice) -> Tensor | None:
    return choice.index if isinstance(choice, Entries | Units | PerTensor) else None


def _describe(choice: Choice) -> dict[str, Any]:
    match choice:
        case Units(axis=axis):
            return {"choice": "units", "axis": axis}
        case PerTensor(role=role, options=options):
            return {"choice": "per_tensor", "role": role, "options": options}
        case _:
            return {"choice": type(choice).__name__.lower()}


def _rebuild(described: dict[str, Any], index: Tensor | None) -> Choice:
    match described["choice"]:
        case "frozen":
            return Frozen()
        case "whole":
            return Whole()
        case "per_tensor":
            return PerTensor(described["role"], described["options"], index)
        case "entries" if index is not None:
            return Entries(index)
        case "units" if index is not None:
            return Units(described["axis"], index)
    raise ValueError(f"unknown or incomplete choice {described}")


def _count(choice: Choice, shape: tuple[int, ...]) -> int:
    numel = int(torch.Size(shape).numel())
    match choice:
        case Whole():
            return numel
        case Entries(index=index):
            return index.numel()
        case Units(axis=axis, index=index):
            return numel // shape[axis] * index.numel()
        case PerTensor(options=options, index=index):
            return int(options.get("trained", 0)) + (0 if index is None else index.numel())
        case _:
            return 0
