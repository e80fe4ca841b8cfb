"""Index sets: which entries of a tensor, as sorted, unique, row-major flat positions; and budgets: how many.

Pure functions. An index is a 1-d integer tensor, int32 where every position of the tensor fits, else int64. Budgets
turn into counts from shapes alone, so that they work on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput

__all__ = [
    "BYTES_PER_ENTRY",
    "Budget",
    "Scope",
    "block_of",
    "budget_counts",
    "check_index",
    "difference",
    "everything",
    "from_mask",
    "from_units",
    "index_dtype",
    "intersect",
    "locate",
    "matrix_shape",
    "overlap",
    "per_row_top",
    "random_entries",
    "row_top",
    "to_mask",
    "top_entries",
    "top_entries_across",
    "union",
]

Scope = Literal["per_tensor", "per_block", "global"]
BYTES_PER_ENTRY = 8  # of an artefact: an int32 position and a float32 value
Shape = tuple[int, ...]
_AT_ONCE = 1 << 24  # entries ranked at a time


class Budget(BaseModel):
    """How many entries may train, said in exactly one way.

    Args:
        density: a fraction of each tensor's entries (or of all, by scope), in (0, 1].
        count: a number of entries, per tensor, per block or in all, by scope.
        rank: as many as a LoRA of this rank has on the same matrices: (m + n) * rank each.
        bytes: what the artefact may take, at 8 bytes per entry.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    density: Annotated[float, Field(gt=0, le=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    bytes: Annotated[int, Field(ge=BYTES_PER_ENTRY)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise BadInput(
                f"A budget says how many entries in exactly one way, got {' and '.join(given) or 'none'}."
                " Choose density, count, rank or bytes."
            )
        return self

    def entries(self, shapes: Iterable[Shape]) -> int:
        """The budget over tensors of these shapes together; at least 1, at most all entries."""
        shapes = list(shapes)
        total = sum(numel(shape) for shape in shapes)
        if self.density is not None:
            wanted = int(self.density * total)
        elif self.rank is not None:
            wanted = sum(min(sum(matrix_shape(shape)) * self.rank, numel(shape)) for shape in shapes)
        elif self.count is not None:
            wanted = self.count
        else:
            assert self.bytes is not None
            wanted = self.bytes // BYTES_PER_ENTRY
        return max(1, min(wanted, total))


def numel(shape: Shape) -> int:
    """Entries of a tensor of this shape."""
    return int(torch.Size(shape).numel())


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """A tensor seen as a matrix (rows, rest): a convolution's (out, in * kh * kw), a vector's (n, 1)."""
    if len(shape) == 0:
        return 1, 1
    return shape[0], numel(shape[1:])


def block_of(name: str) -> str:
    """The block a tensor belongs to: its name up to the first number ("model.layers.3"), or "" outside blocks."""
    match = re.match(r"(.*?\.\d+)(?:\.|$)", name)
    return match.group(1) if match else ""


def budget_counts(budget: Budget, shapes: Mapping[str, Shape], scope: Scope) -> dict[str, int]:
    """Entries per group: per tensor name, per block name, or {"": all}, by `scope`."""
    groups: dict[str, list[Shape]] = {}
    for name, shape in shapes.items():
        key = {"per_tensor": name, "per_block": block_of(name), "global": ""}[scope]
        groups.setdefault(key, []).append(shape)
    return {key: budget.entries(members) for key, members in groups.items()}


def index_dtype(count: int) -> torch.dtype:
    """int32 where all of `count` positions fit, else int64."""
    return torch.int32 if count <= 2**31 - 1 else torch.int64


def everything(count: int, device: torch.device | str = "cpu") -> Tensor:
    """All positions of a tensor with `count` entries."""
    return torch.arange(count, dtype=index_dtype(count), device=device)


def from_mask(mask: Tensor) -> Tensor:
    """The index of the True entries of a mask."""
    return mask.flatten().nonzero().flatten().to(index_dtype(mask.numel()))


def to_mask(index: Tensor, shape: Shape) -> Tensor:
    """The bool mask of an index."""
    mask = torch.zeros(numel(shape), dtype=torch.bool, device=index.device)
    mask[index.long()] = True
    return mask.view(shape)


def from_units(axis: int, units: Tensor, shape: Shape) -> Tensor:
    """All entries of the given slices along `axis` (rows: 0, columns: 1)."""
    mask = torch.zeros(shape, dtype=torch.bool, device=units.device)
    mask.index_fill_(axis, units.long(), True)
    return from_mask(mask)


def check_index(index: Tensor, count: int, where: str) -> None:
    """Raise `BadInput` unless `index` is sorted, unique and within [0, count)."""
    if index.ndim != 1 or index.is_floating_point():
        raise BadInput(f"{where}: an index is a 1-d integer tensor, got {index.dtype} {tuple(index.shape)}.")
    if index.numel() == 0 or index.is_meta:
        return
    if int(index[0]) < 0 or int(index[-1]) >= count or not bool((index[1:] > index[:-1]).all()):
        raise BadInput(f"{where}: an index must be sorted, unique and lie within a tensor of {count} entries.")


# ---- set algebra on sorted indices


def union(a: Tensor, b: Tensor) -> Tensor:
    """Positions in a or b."""
    return torch.unique(torch.cat([a, b.to(a.dtype)]), sorted=True)


def intersect(a: Tensor, b: Tensor) -> Tensor:
    """Positions in both."""
    return a[locate(a, b) >= 0]


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Positions in a that are not in b."""
    return a[locate(a, b) < 0]


def locate(wanted: Tensor, within: Tensor) -> Tensor:
    """For each position in `wanted` its place in the sorted `within` (int64), or -1."""
    if within.numel() == 0:
        return torch.full_like(wanted, -1, dtype=torch.int64)
    place = torch.searchsorted(within.contiguous(), wanted.to(within.dtype).contiguous())
    place = place.clamp_(max=within.numel() - 1)
    return torch.where(within[place] == wanted, place, -1)


def overlap(a: Tensor, b: Tensor) -> float:
    """|a and b| / min(|a|, |b|): 1 if one contains the other, 0 if they share nothing (or one is empty)."""
    smaller = min(a.numel(), b.numel())
    return intersect(a, b).numel() / smaller if smaller else 0.0


# ---- the largest entries; ties go to the lowest flat position


def top_entries(score: Tensor, count: int) -> Tensor:
    """The `count` positions of largest score, in order of position; ties by lowest position."""
    flat = score.flatten()
    if count >= flat.numel():
        return everything(flat.numel(), flat.device)
    if count <= 0:
        return torch.empty(0, dtype=index_dtype(flat.numel()), device=flat.device)
    threshold = _kth_largest(flat, count)
    above = flat > threshold
    missing = count - int(above.sum())
    if missing:
        at = (flat == threshold).nonzero().flatten()[:missing]
        above[at] = True
    return from_mask(above)


def _kth_largest(flat: Tensor, count: int) -> Tensor:
    """The `count`-th largest number; on a CPU by partition, in linear time and a copy's memory."""
    if flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64):
        return torch.topk(flat, count, sorted=True).values[-1]
    numbers = flat.detach().numpy().copy()
    place = numbers.size - count
    numbers.partition(place)
    return torch.as_tensor(numbers[place], dtype=flat.dtype)


def row_top(score: Tensor, count: int) -> Tensor:
    """(rows, min(count, columns)) ascending column numbers of the largest scores of each row; ties: lowest column."""
    rows, columns = score.shape
    count = min(count, columns)
    if count == columns:
        return torch.arange(columns, device=score.device).expand(rows, -1).contiguous()
    step = max(1, _AT_ONCE // columns)
    return torch.cat([_row_top(score[start : start + step], count) for start in range(0, rows, step)])


def _row_top(score: Tensor, count: int) -> Tensor:
    top = score.topk(count, dim=1)
    threshold = top.values[:, -1:]
    chosen = top.indices
    tied = (score == threshold).sum(1) > (top.values == threshold).sum(1)  # topk chose among equals
    if bool(tied.any()):
        rows = tied.nonzero().flatten()
        some, limit = score[rows], threshold[rows]
        above, equal = some > limit, some == limit
        missing = count - above.sum(1, keepdim=True)
        keep = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
        chosen[rows] = keep.nonzero()[:, 1].view(len(rows), count)
    return chosen.sort(dim=1).values


def per_row_top(score: Tensor, count: int) -> Tensor:
    """The `count` positions of largest score in each row of a matrix, as flat positions."""
    columns = row_top(score, count)
    starts = torch.arange(score.shape[0], device=score.device)[:, None] * score.shape[1]
    return (columns + starts).flatten().to(index_dtype(score.numel()))


def random_entries(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `total` positions drawn without replacement, sorted; memory in proportion to `count`."""
    if count >= total:
        return everything(total)
    if 2 * count > total:
        return from_mask(~to_mask(random_entries(total, total - count, generator), (total,)))
    chosen = torch.empty(0, dtype=torch.int64)
    while chosen.numel() < count:  # a set that grows by random new members is a random set
        more = torch.randint(total, (count - chosen.numel(),), generator=generator)
        chosen = torch.cat([chosen, more]).unique()
    return chosen.to(index_dtype(total))


def top_entries_across(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """The `count` largest over several tensors together; ties by order of the tensors, then by position."""
    chosen = top_entries(torch.cat([score.flatten() for score in scores]), count).long()
    result, start = [], 0
    for score in scores:
        stop = start + score.numel()
        mine = chosen[(chosen >= start) & (chosen < stop)] - start
        result.append(mine.to(index_dtype(score.numel())))
        start = stop
    return result
