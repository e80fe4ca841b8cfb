"""Balanced random draws: a fixed share of a model's matrices, spread evenly over blocks and categories.

In a category with m matrices in each of L cells (a cell is a block's attention, its MLP, its norms, or one expert):

    total = floor(ratio * m * L),   each cell gets floor(total / L), a random total mod L of the cells one more

Biases go with their matrix, routers with the norms. A fused matrix is one item, or (with `slices`) one per part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Units, Whole
from pegbox.parts.anatomy import Anatomy, Piece
from pegbox.parts.anatomy_registry import ROLES

__all__ = ["Balance", "Item", "Level", "as_allocation", "balanced_counts", "draw", "items_of"]

Level = Literal["category", "layer", "model"]
Balance = Literal["count", "params"]
_TRIES = 256  # random subsets compared where there are too many to list
_COARSE = 0.15  # how far a cell's share may lie from the ratio before fused matrices are blamed


@dataclass(frozen=True)
class Item:
    """What is drawn as one: a matrix with its bias, a norm, or one part of a fused matrix.

    Args:
        category: attention | mlp | mixer | norm.
        cell: the attention, block or expert it is balanced in. block: (stack, index).
        part: of a fused matrix, with `rows` its output positions and `axis` the weight's output axis.
        size: how many weights it has.
    """

    parameters: tuple[str, ...]
    category: str
    cell: str
    block: tuple[str, int]
    size: int
    part: str = ""
    rows: Tensor | None = None
    axis: int = 0
    fused: bool = False


def balanced_counts(per_block: int, blocks: int, ratio: float) -> tuple[int, int, int]:
    """(total drawn, drawn in each block at least, blocks that get one more)."""
    total = math.floor(ratio * per_block * blocks + 1e-9)  # 0.29 * 100 is 28.999999999999996
    low, more = divmod(total, blocks)
    return total, low, more


# ---- what can be drawn


def items_of(anatomy: Anatomy, categories: Sequence[str], slices: bool = False) -> list[Item]:
    """Everything in the blocks that is drawn. Raises `BadInput` for a category without a matrix."""
    items = [item for piece in anatomy.pieces for item in _items(piece, anatomy, slices)]
    present = {item.category for item in items}
    for category in categories:
        if category not in present and category != "norm":  # norms may have no weights
            names = ", ".join(sorted(ROLES.get(category, {}))) or category
            raise BadInput(
                f"No matrix of category '{category}' was found in the model's blocks (looked for modules called "
                f"{names}, and by shape). Name other categories: {', '.join(sorted(present)) or 'none are there'}."
            )
    return [item for item in items if item.category in categories]


def _items(piece: Piece, anatomy: Anatomy, slices: bool) -> Iterable[Item]:
    category = "norm" if piece.category == "router" else piece.category
    if piece.block is None or not (piece.is_matrix or category == "norm"):
        return
    names = tuple(anatomy.ties.get(name, name) for name in piece.parameters)
    cell = piece.group if category == "attention" or ".experts." in piece.group else "{}.{}".format(*piece.block)
    per_output = math.prod(piece.shape[1:]) + len(names) - 1
    fused = bool(piece.slices)
    if fused and slices:
        for part in piece.slices:
            rows = piece.rows(part)
            size = rows.numel() * per_output
            yield Item(names, category, cell, piece.block, size, part, rows, piece.out_axis, fused)
    else:
        yield Item(names, category, cell, piece.block, piece.shape[0] * per_output, fused=fused)


# ---- drawing


def draw(items: Sequence[Item], level: Level, ratio: float, balance: Balance, generator: torch.Generator) -> list[Item]:
    """A random share `ratio` of the items, in their order.

    Args:
        level: "category": balanced per category and cell; "layer": per block, whatever the category; "model": over
            the whole model. Norms are always balanced per block.
        balance: "count": by the number of matrices; "params": among subsets of that number, one whose share of
            parameters is nearest to `ratio`.

    Raises `BadInput` where a category would get nothing, or fused matrices make the balance impossible.
    """
    chosen: set[int] = set()
    for cells in _strata(items, level).values():
        per_cell = len(cells[0])
        total, low, more = balanced_counts(per_cell, len(cells), ratio)
        if total == 0:
            raise BadInput(_nothing(items[cells[0][0]], items, per_cell * len(cells), ratio))
        rich = set(_sample(range(len(cells)), more, generator))
        for at, cell in enumerate(cells):
            count = low + (at in rich)
            picked = _pick(cell, count, items, ratio, generator) if balance == "params" else None
            chosen |= set(_sample(cell, count, generator) if picked is None else picked)
    return [item for at, item in enumerate(items) if at in chosen]


def _strata(items: Sequence[Item], level: Level) -> dict[tuple[object, ...], list[list[int]]]:
    """Cells of equal size that share a count, as positions in `items`."""
    cells: dict[tuple[object, ...], list[int]] = {}
    for at, item in enumerate(items):
        if item.category == "norm":
            key: tuple[object, ...] = ("norm", item.block)
        elif level == "category":
            key = (item.category, item.cell, item.block[0])
        elif level == "layer":
            key = ("", item.block)
        else:
            key = ("",)
        cells.setdefault(key, []).append(at)
    strata: dict[tuple[object, ...], list[list[int]]] = {}
    for members in cells.values():
        first = items[members[0]]
        category = first.category if level == "category" or first.category == "norm" else ""
        stack = first.block[0] if level != "model" else ""
        strata.setdefault((category, stack, len(members)), []).append(members)
    return strata


def _sample(pool: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]


def _pick(
    cell: Sequence[int], count: int, items: Sequence[Item], ratio: float, generator: torch.Generator
) -> list[int]:
    """A random one of the subsets of `count` items whose parameter share is nearest to `ratio`."""
    if math.comb(len(cell), count) <= _TRIES:
        subsets = [list(subset) for subset in combinations(cell, count)]
    else:
        subsets = [_sample(cell, count, generator) for _ in range(_TRIES)]
    whole = sum(items[at].size for at in cell)
    distance = [abs(sum(items[at].size for at in subset) / whole - ratio) for subset in subsets]
    best = min(distance)
    if best > _COARSE and any(items[at].fused and not items[at].part for at in cell):
        fused = next(items[at] for at in cell if items[at].fused)
        raise BadInput(
            f"'{fused.parameters[0]}' is a fused matrix, so no subset of its {items[cell[0]].category} comes nearer "
            f"than {best:.0%} to a share of {ratio:.0%} of the parameters. Set slices: true to draw its parts "
            "separately (their gradients are masked), or balance: count."
        )
    nearest = [subset for subset, d in zip(subsets, distance) if d <= best + 1e-9]
    return nearest[int(torch.randint(len(nearest), (), generator=generator))]


def _nothing(item: Item, items: Sequence[Item], count: int, ratio: float) -> str:
    text = f"A share of {ratio:g} of {count} matrices of category '{item.category}' is less than one. Raise the ratio"
    if any(other.fused and other.category == item.category for other in items):
        text += ", or set slices: true: this model fuses matrices, and their parts can be drawn separately"
    return text + "."


# ---- as a selection


def as_allocation(items: Iterable[Item]) -> Allocation:
    """Whole tensors; rows where only some parts of a fused matrix were drawn."""
    allocation = Allocation()
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for item in items:
        for at, name in enumerate(item.parameters):
            if item.rows is None:
                allocation[name] = Whole()
            else:
                rows.setdefault(name, []).append((item.axis if at == 0 else 0, item.rows))
    for name, parts in rows.items():
        index = torch.cat([part for _, part in parts]).sort().values.to(torch.int32)
        allocation[name] = Units(parts[0][0], index)
    return allocation
