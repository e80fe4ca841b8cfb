"""Import of composable-sft's difference files (`pytorch_diff.bin`).

Such a file is a pickle with two entries: `diffs`, name -> (size, steps between sorted flat indices with the FIRST
dimension running fastest, values), and `abs`, name -> dense tensor. Only tensors, plain containers and numpy's scalar
type are allowed to be unpickled. Source of the format: Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual
Transfer", ACL 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from pegbox.errors import Corrupt
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.indexsets import index_dtype, numel

__all__ = ["decode", "read_composable_sft"]

# The scalar constructor and the dtypes it is called with; neither runs code of the file's choosing.
_SCALAR: Any = numpy.int64(0).__reduce__()[0]
_SCALARS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    numpy.dtype,
    *(type(numpy.dtype(name)) for name in ("int64", "int32", "float64", "float32")),
]


def read_composable_sft(path: Path) -> Delta:
    """A `Delta`: `add` pieces for `diffs`, dense `set` pieces for `abs`. Raises `Corrupt`."""
    try:
        with torch.serialization.safe_globals(_SCALARS):
            content = torch.load(str(path), map_location="cpu", weights_only=True)
        delta = Delta({name: decode(coded) for name, coded in content["diffs"].items()})
        for name, tensor in content.get("abs", {}).items():
            delta[name] = Piece(tuple(tensor.shape), tensor.detach().clone(), None, "set")
    except Exception as error:  # whatever a damaged or hostile pickle raises
        raise Corrupt(f"{path} is not a readable composable-sft file ({error}).") from error
    return Delta({name: piece for name, piece in delta.items() if piece.values.numel()})


def decode(coded: Any) -> Piece:
    """One tensor's difference from (size, index steps, values), as a mapping or a triple."""
    size, steps, values = (
        (coded["size"], coded["index_steps"], coded["values"]) if isinstance(coded, Mapping) else coded
    )
    shape = tuple(int(n) for n in size)
    column_major = torch.as_tensor([int(step) for step in steps], dtype=torch.int64).cumsum(0)
    if column_major.numel() and not 0 <= int(column_major[-1]) < numel(shape):
        raise ValueError(f"a position lies outside a tensor of shape {shape}")
    flat = _row_major(column_major, shape)
    order = flat.argsort()
    held = values if isinstance(values, Tensor) else torch.as_tensor(numpy.asarray(values, dtype=_dtype(values)))
    return Piece(shape, held.detach().reshape(-1)[order].clone(), flat[order].to(index_dtype(numel(shape))))


def _dtype(values: Any) -> Any:
    """float32 only where every number is one already."""
    return numpy.float32 if all(isinstance(v, numpy.float32) for v in values) and len(values) else numpy.float64


def _row_major(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flat positions with the last dimension fastest, from flat positions with the first dimension fastest."""
    rest, coordinates = positions, []
    for length in shape:
        coordinates.append(rest % length)
        rest = rest // length
    flat = torch.zeros_like(positions)
    for length, coordinate in zip(shape, coordinates, strict=True):
        flat = flat * length + coordinate
    return flat
