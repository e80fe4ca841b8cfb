"""The file a full tuner leaves: present values of whole tensors, slices or entries, in one safetensors file.

Tensors are named as in the model; the positions of slices and entries stand beside them as "<name>#index". What each
is, and the full tensor's shape, is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pegbox.errors import Corrupt
from pegbox.parts.allocation import Choice, Entries, Units, Whole
from pegbox.parts.files import write_tensors

__all__ = ["VALUES", "Saved", "read_values", "write_values"]

VALUES = "values.safetensors"
_INDEX = "#index"


@dataclass(frozen=True)
class Saved:
    """One tensor's part of an update: which of its entries, their values, and the full tensor's shape."""

    choice: Choice
    values: Tensor
    shape: tuple[int, ...]


def write_values(saved: Mapping[str, Saved], folder: Path) -> None:
    """Write `values.safetensors` into an existing folder, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, piece in saved.items():
        tensors[name] = piece.values
        described[name] = {"shape": list(piece.shape), "of": "whole"}
        if isinstance(piece.choice, Entries | Units):
            tensors[name + _INDEX] = piece.choice.index.cpu().contiguous()
            described[name]["of"] = "entries" if isinstance(piece.choice, Entries) else "units"
        if isinstance(piece.choice, Units):
            described[name]["axis"] = piece.choice.axis
    write_tensors(folder / VALUES, tensors, metadata={"values": json.dumps(described)})


def read_values(folder: Path) -> dict[str, Saved]:
    """Read what `write_values` wrote. Raises `Corrupt`."""
    path = folder / VALUES
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {})["values"])
            return {name: _rebuild(file, name, entry) for name, entry in described.items()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise Corrupt(f"{path} is missing, truncated or no values file ({error}).") from error


def _rebuild(file: Any, name: str, entry: Mapping[str, Any]) -> Saved:
    values, shape = file.get_tensor(name), tuple(int(n) for n in entry["shape"])
    match entry["of"]:
        case "whole":
            choice: Choice = Whole()
            fits = tuple(values.shape) == shape
        case "entries":
            choice = Entries(file.get_tensor(name + _INDEX))
            fits = values.shape == choice.index.shape
        case "units":
            choice = Units(int(entry["axis"]), file.get_tensor(name + _INDEX))
            fits = values.shape[choice.axis] == choice.index.numel()
        case other:
            raise ValueError(f"'{name}' is of unknown form {other!r}")
    if not fits:
        raise ValueError(f"'{name}' holds {tuple(values.shape)} values for a tensor of shape {shape}")
    return Saved(choice, values, shape)
