"""A few incoming connections of every neuron: k entries of each row of a matrix, so that every neuron can move.

    idx[i, :] = the k columns of largest |W[i, :]|     for each output i (k >= in: all columns)

Zhang et al., "NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning", EMNLP 2025
(arXiv:2510.18940). A row is an output, whatever the storage; of a convolution it is an output channel. Composes with
the sparse tuner (the method) and, as its mask-based baseline, with the full tuner. What it does not do: train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import seed_of
from pegbox.parts.indexsets import block_of, numel, random_entries, row_top
from pegbox.parts.rowsets import flat_of_columns, frequent_columns, rows_and_columns, transposed_names
from pegbox.parts.statistics import StatSpec
from pegbox.select.base import SELECT, Selector
from pegbox.select.entries import as_matrix, covered

__all__ = ["PerNeuron", "active_rows"]

_ANYWHERE = {"random_layer": "per_tensor", "random_block": "per_block", "random_global": "global"}
Shapes = Mapping[str, tuple[int, ...]]


@SELECT.register
class PerNeuron(Selector):
    """k entries of each row.

    Args:
        k: entries per row; at most as many as the row has.
        criterion: "magnitude" (the method): the largest |w|; "reverse": the smallest; "gradient": the largest |sum
            of dL/dw over the data|; "random": any k of the row. "random_layer", "random_block", "random_global" give
            up the balance over rows: the same total, anywhere in the matrix, the block, all targets (ablations).
        active_fraction: only this share of the rows, drawn at random, keeps its entries.
        shared_columns: all rows of a matrix use the k columns that most rows would choose; `ties` says which of
            columns chosen equally often: the lowest, or the one met first when reading row by row (the official code).
        batches, batch_size: calibration batches for "gradient"; batches None: all of the training rows.
        target_modules: words for the matrices; "not block 3" leaves a block out.
        biases: the targets' biases train as well. whole: words for modules that train in full beside (a task's head).
    """

    kind: Literal["per_neuron"] = "per_neuron"

    k: Annotated[int, Field(ge=1)] = 1
    criterion: Literal[
        "magnitude", "reverse", "gradient", "random", "random_layer", "random_block", "random_global"
    ] = "magnitude"
    active_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    shared_columns: bool = False
    ties: Literal["lowest", "first"] = "lowest"
    batches: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    target_modules: Annotated[str | tuple[str, ...], Field(min_length=1)] = "all-linear"
    biases: bool = False
    whole: tuple[str, ...] = ()

    reproduces: ClassVar[str] = "arXiv:2510.18940"
    produces: ClassVar[frozenset[str]] = frozenset({"entries", "whole"})

    @model_validator(mode="after")
    def _consistent(self) -> PerNeuron:
        if self.criterion in _ANYWHERE and (self.active_fraction < 1 or self.shared_columns):
            raise BadInput(
                f"select.criterion '{self.criterion}' draws without regard to rows, so active_fraction and "
                "shared_columns have no meaning with it. Leave them out, or use criterion: random."
            )
        if self.ties != "lowest" and not self.shared_columns:
            raise BadInput("select.ties is about columns chosen equally often; it needs shared_columns: true.")
        return self

    @property
    def picks_vectors(self) -> bool:  # type: ignore[override]
        """Biases and modules that train whole may be vectors."""
        return self.biases or bool(self.whole)

    @property
    def needs_floating_base(self) -> bool:  # type: ignore[override]
        """Gradients are compared entry by entry of the weights that train; packed ones have none of their own."""
        return self.criterion == "gradient"

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        """Random choices follow from shapes and the seed."""
        return not self.criterion.startswith("random")

    def statistics(self) -> StatSpec | None:
        """The summed gradient of every target, for the criterion that ranks by it."""
        if self.criterion != "gradient":
            return None
        words = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        return StatSpec(("gradient_sum",), words, batches=self.batches, batch_size=self.batch_size)

    def select(
        self,
        anatomy: Anatomy | None,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        """Entries of every target, and what trains whole. Each tensor draws from its own stream."""
        names = covered(anatomy, list(weights), self.target_modules)
        turned = transposed_names(anatomy, weights)
        seed = generator.initial_seed()
        if self.criterion in _ANYWHERE:
            shapes = {name: _checked_shape(name, tuple(weights[name].shape)) for name in names}
            index = self._anywhere(shapes, turned, seed)
        else:
            sums = self._sums(stats)
            index = {}
            for name in names:
                draw = torch.Generator().manual_seed(seed_of(seed, name))
                index[name] = self._of_rows(name, weights[name], sums, name in turned, draw)
        allocation = Allocation({name: Entries(at) for name, at in index.items() if at.numel()})
        return Allocation({**allocation, **dict.fromkeys(self._beside(anatomy, names, weights), Whole())})

    def count(self, anatomy: Anatomy | None, shapes: Shapes) -> dict[str, int]:
        names = covered(anatomy, list(shapes), self.target_modules)
        turned = transposed_names(anatomy, shapes)
        inside = {name: _checked_shape(name, tuple(shapes[name])) for name in names}
        if self.criterion in _ANYWHERE:
            counts = {n: at.numel() for n, at in self._anywhere(inside, turned, 0).items()}
        else:
            counts = {n: self._entries(s, n in turned) for n, s in inside.items()}
        return {**counts, **{n: numel(tuple(shapes[n])) for n in self._beside(anatomy, names, shapes)}}

    # ---- one matrix

    def _entries(self, shape: tuple[int, ...], transposed: bool) -> int:
        """How many entries of a matrix train."""
        rows, columns = rows_and_columns(shape, transposed)
        return min(self.k, columns) * active_rows(rows, self.active_fraction)

    def _of_rows(
        self,
        name: str,
        weight: Tensor,
        sums: Mapping[str, Tensor] | None,
        transposed: bool,
        generator: torch.Generator,
    ) -> Tensor:
        shape = _checked_shape(name, tuple(weight.shape))
        rows, columns = rows_and_columns(shape, transposed)
        chosen = row_top(self._score(name, weight, sums, transposed, generator), self.k)
        if self.shared_columns and self.k < columns:
            chosen = frequent_columns(chosen, self.k, columns, first_met=self.ties == "first")[None].expand(rows, -1)
        if self.active_fraction == 1:
            return flat_of_columns(chosen, shape, transposed)
        kept = random_entries(rows, active_rows(rows, self.active_fraction), generator).to(chosen.device)
        return flat_of_columns(chosen[kept.long()], shape, transposed, rows=kept)

    def _score(
        self,
        name: str,
        weight: Tensor,
        sums: Mapping[str, Tensor] | None,
        transposed: bool,
        generator: torch.Generator,
    ) -> Tensor:
        """(rows, columns), larger is better."""
        if self.criterion == "random":
            shape = rows_and_columns(tuple(weight.shape), transposed)
            return torch.rand(shape, generator=generator).to(weight.device)
        value = weight
        if self.criterion == "gradient":
            if sums is None or name not in sums:
                raise BadInput(f"select: no gradient of '{name}' was gathered; it took no part in the loss.")
            value = sums[name].to(weight.device)
        size = as_matrix(value.detach()).abs()
        if not bool(torch.isfinite(size).all()):
            raise BadInput(f"{name} has NaN or infinite entries, so its largest can't be chosen.")
        size = size.T.contiguous() if transposed else size
        return -size if self.criterion == "reverse" else size

    def _sums(self, stats: Mapping[str, Any] | None) -> Mapping[str, Tensor] | None:
        if self.criterion != "gradient":
            return None
        if stats is None or "gradient_sum" not in stats:
            raise BadInput(
                "select.criterion 'gradient' ranks by gradients over the training data, and none were given. Train "
                "through a recipe with data, or pass pegbox.collect(model, selector.statistics(), batches)."
            )
        found: Mapping[str, Tensor] = stats["gradient_sum"]
        return found

    # ---- the ablations without balance

    def _anywhere(self, shapes: Shapes, turned: frozenset[str], seed: int) -> dict[str, Tensor]:
        """As many entries in all as k per row would be, anywhere in the matrix, the block or all targets."""
        scope = _ANYWHERE[self.criterion]
        groups: dict[str, list[str]] = {}
        for name in shapes:
            key = {"per_tensor": name, "per_block": block_of(name), "global": ""}[scope]
            groups.setdefault(key, []).append(name)
        index: dict[str, Tensor] = {}
        for key, members in groups.items():
            total = sum(numel(shapes[n]) for n in members)
            wanted = sum(self._entries(shapes[n], n in turned) for n in members)
            draw = torch.Generator().manual_seed(seed_of(seed, self.criterion, key))
            chosen = random_entries(total, wanted, draw).long()
            start = 0
            for name in members:
                stop = start + numel(shapes[name])
                inside = chosen[torch.searchsorted(chosen, start) : torch.searchsorted(chosen, stop)]
                index[name] = (inside - start).to(torch.int32 if stop - start < 2**31 else torch.int64)
                start = stop
        return index

    # ---- what trains whole

    def _beside(self, anatomy: Anatomy | None, names: list[str], held: Mapping[str, Any]) -> list[str]:
        found: list[str] = []
        if self.biases:
            found += [bias for name in names if (bias := name.removesuffix("weight") + "bias") in held]
        if self.whole:
            if anatomy is None:
                raise BadInput("select.whole names modules by words, which need the whole model: use a recipe.")
            found += [name for name in anatomy.parameters(self.whole) if name in held]
        return list(dict.fromkeys(found))


def active_rows(rows: int, fraction: float) -> int:
    """How many of `rows` keep their entries: all but floor((1 - fraction) rows)."""
    return rows - math.floor((1 - fraction) * rows)


def _checked_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        raise BadInput(
            f"select: '{name}' has shape {list(shape)}, and k entries per neuron need a matrix or a convolution. Leave "
            "its module out of target_modules, or name it in select.whole."
        )
    return shape
