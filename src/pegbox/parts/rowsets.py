"""Index sets with equally many entries in every row of a matrix: k column numbers per row instead of flat positions.

    flat position = row * columns + column        (stored transposed, (in, out): column * rows + row)

A row is an output of the layer, whatever the storage. In a file column numbers take 2 bytes (as unsigned 16-bit numbers
in the bits of an int16) where the matrix has at most 65 536 columns, else 4; columns that are the same for all rows are
written once. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.indexsets import Shape, index_dtype, matrix_shape

__all__ = [
    "all_rows",
    "columns_of",
    "flat_of_columns",
    "frequent_columns",
    "laid_out",
    "pack_columns",
    "rows_and_columns",
    "shared_columns_of",
    "transposed_names",
    "unpack_columns",
]


class _Matrices(dict[str, Any]):
    """Tensors (or shapes) by name that can carry a note."""


def laid_out(items: Mapping[str, Any], transposed: frozenset[str]) -> Mapping[str, Any]:
    """Tensors (or shapes) by name, without their model, that know which of them are stored transposed."""
    kept: Any = items if hasattr(items, "__dict__") else _Matrices(items)
    kept.transposed = transposed
    return kept


def transposed_names(anatomy: Anatomy | None, held: Mapping[str, Any]) -> frozenset[str]:
    """Which of a model's weights are stored (in, out), as in GPT-2's Conv1D."""
    if anatomy is None:
        return getattr(held, "transposed", frozenset())
    return frozenset(piece.weight for piece in anatomy.pieces if piece.transposed)


def rows_and_columns(shape: Shape, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a weight of this shape."""
    rows, columns = matrix_shape(shape)
    return (columns, rows) if transposed else (rows, columns)


# ---- between column numbers and flat positions


def flat_of_columns(columns: Tensor, shape: Shape, transposed: bool = False, rows: Tensor | None = None) -> Tensor:
    """The sorted flat index of column numbers (R, k), for all rows of the matrix or for those named in `rows` (R,).

    A single row of numbers (1, k) is meant for every row. Raises `BadInput` where numbers or rows don't fit the shape.
    """
    outputs, inputs = rows_and_columns(shape, transposed)
    if columns.ndim != 2 or columns.is_floating_point():
        raise BadInput(f"column numbers are an integer matrix (rows, k), got {columns.dtype} {tuple(columns.shape)}.")
    wide = columns.long()
    at = torch.arange(outputs, device=wide.device) if rows is None else rows.to(wide.device).long()
    if len(wide) not in (1, len(at)):
        raise BadInput(f"{len(wide)} rows of column numbers for a matrix with {len(at)} rows.")
    if wide.numel() and (int(wide.min()) < 0 or int(wide.max()) >= inputs):
        raise BadInput(f"column numbers must lie in [0, {inputs}), got {int(wide.min())} to {int(wide.max())}.")
    flat = wide * outputs + at[:, None] if transposed else at[:, None] * inputs + wide
    return flat.flatten().sort().values.to(index_dtype(math.prod(shape)))


def columns_of(index: Tensor, shape: Shape, transposed: bool = False) -> Tensor | None:
    """(rows, k) column numbers, ascending, of a sorted flat index; None if its rows don't have equally many."""
    outputs, inputs = rows_and_columns(shape, transposed)
    if not all_rows(index, shape, transposed):
        return None
    if transposed:
        by_row = (index % outputs).argsort(stable=True)
        return (index[by_row] // outputs).view(outputs, -1)
    return (index % inputs).view(outputs, -1)


def all_rows(index: Tensor, shape: Shape, transposed: bool = False) -> bool:
    """Whether every row of the matrix has equally many entries (at least one) in a sorted flat index."""
    outputs, inputs = rows_and_columns(shape, transposed)
    if len(shape) < 2 or not index.numel() or index.numel() % outputs or index.is_meta:
        return False
    each = index.numel() // outputs
    if transposed:
        return bool((torch.bincount(index % outputs, minlength=outputs) == each).all())
    rows = torch.arange(outputs, device=index.device)
    return torch.equal((index // inputs).view(outputs, each), rows[:, None].expand(-1, each).to(index.dtype))


def shared_columns_of(index: Tensor, shape: Shape, transposed: bool = False) -> Tensor | None:
    """(k,) column numbers that all rows of a matrix share; None if they don't."""
    columns = columns_of(index, shape, transposed)
    if columns is None or not bool((columns == columns[:1]).all()):
        return None
    return columns[0]


# ---- in a file


def pack_columns(columns: Tensor, inputs: int) -> Tensor:
    """Column numbers (rows, k) as they are written: int16 holding unsigned numbers, or int32; (1, k) if shared."""
    kept = columns[:1] if bool((columns == columns[:1]).all()) else columns
    if inputs > 1 << 16:
        return kept.to(torch.int32).contiguous()
    wide = kept.to(torch.int32)
    return torch.where(wide >= 1 << 15, wide - (1 << 16), wide).to(torch.int16).contiguous()


def unpack_columns(packed: Tensor) -> Tensor:
    """The int32 column numbers that `pack_columns` wrote."""
    wide = packed.to(torch.int32)
    return wide & 0xFFFF if packed.dtype == torch.int16 else wide


# ---- choosing


def frequent_columns(columns: Tensor, count: int, inputs: int, *, first_met: bool = False) -> Tensor:
    """(count,) the columns that most rows chose, in order of frequency.

    Columns chosen equally often: the lowest first, or (first_met) the one met first when reading row by row.
    """
    flat = columns.flatten().long()
    often = torch.bincount(flat, minlength=inputs)
    met = torch.full((inputs,), flat.numel(), dtype=torch.int64, device=flat.device)
    met.scatter_reduce_(0, flat, torch.arange(flat.numel(), device=flat.device), "amin")
    order = met.argsort(stable=True) if first_met else torch.arange(inputs, device=flat.device)
    return order[(-often[order]).argsort(stable=True)][:count]
