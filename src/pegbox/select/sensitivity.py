"""Sensitivity-aware allocation: modules for matrices with many sensitive weights, single weights everywhere else.

    s_n = sum over a few batches of (dL/dw_n)^2;   of the tau largest, m_k lie in tensor k
    m_k >= cost / alpha: the matrix gets a module (LoRA or adapter);   m_k >= n / beta: the whole vector trains

He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023 (arXiv:2303.08566). tau is searched so
that the number of trained weights is nearest to the budget (`allotment.py`). Which parameters take part follows from
the model's anatomy and from name rules. Composes with the sparse tuner, any objective and optimizer. What it does not
do: train, or allocate to loose parameters such as a class token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Choice, Entries, PerTensor, Whole
from pegbox.parts.anatomy import Anatomy, Piece
from pegbox.parts.indexsets import Budget, index_dtype, numel
from pegbox.parts.statistics_parameters import ParameterSpec
from pegbox.select.allotment import Site, Split, allot, grid, module_cost
from pegbox.select.base import SELECT, Selector

__all__ = ["Place", "Sensitivity", "places"]

Kind = Literal["vector", "matrix", "skip"]
_LOOSE = re.compile(r"(cls|dist|distillation|mask)_token|class_embedding|pos(ition)?_embed|rel(ative)?_pos|logit_scale")


class Place:
    """A site with where it lies: all of a parameter, or some rows of a fused one.

    positions: (n,) flat positions in the parameter, None for all. rows: ranges of outputs. role: of its module.
    """

    def __init__(self, site: Site, piece: Piece, positions: Tensor | None = None, rows: list[list[int]] | None = None):
        self.site, self.piece, self.positions, self.rows = site, piece, positions, rows


@SELECT.register
class Sensitivity(Selector):
    """Spends a budget where the loss is most sensitive.

    Args:
        budget: how many weights shall train (density: a share of the candidates). tau: the level itself, instead.
        structured: what a sensitive matrix gets; rank: of it. dropout, drop_path: inside it while training.
        alpha, beta: from which share of a module's cost, or of a vector, on it is taken; larger means earlier.
        whole_vectors: vectors may train as a whole (and adapters have biases).
        reduce, batches, batch_size, deterministic: of the sensitivities; the paper has 16 batches of 32 images.
        search: "exact": every tau is looked at; "grid": the official levels, ceil(k * 0.02 * unit), k = 1 .. 79.
        tolerance: how far from the budget the nearest total may lie before it is refused.
        rules: regular expression on a parameter's name -> vector, matrix or skip, before what the anatomy says.
        drop_norm_singles: single entries of norms are counted and stay frozen, as in the official code.
    """

    kind: Literal["sensitivity"] = "sensitivity"

    budget: Budget | None = Budget(density=0.005)
    tau: Annotated[int, Field(ge=1)] | None = None
    structured: Literal["lora", "adapter"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 10.0
    beta: Annotated[float, Field(gt=0)] = 5.0
    whole_vectors: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    reduce: Literal["batch_sq", "per_sample_sq", "abs"] = "batch_sq"
    batches: Annotated[int, Field(ge=1)] = 16
    batch_size: Annotated[int, Field(ge=1)] = 8
    deterministic: bool = True
    search: Literal["exact", "grid"] = "exact"
    unit: Annotated[float, Field(gt=0)] = 1e6
    tolerance: Annotated[float, Field(gt=0)] = 0.1
    rules: dict[str, Kind] = Field(default_factory=dict)
    drop_norm_singles: bool = False

    reproduces: ClassVar[str] = "arXiv:2303.08566"
    produces: ClassVar[frozenset[str]] = frozenset({"entries", "whole", "tuner"})
    needs_floating_base: ClassVar[bool] = True
    picks_vectors: ClassVar[bool] = True

    @model_validator(mode="after")
    def _consistent(self) -> Sensitivity:
        if (self.tau is None) == (self.budget is None):
            raise BadInput("select: give either a budget or tau (set the other one to null).")
        for pattern in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadInput(f"select.rules: '{pattern}' is not a regular expression ({error}).") from None
        return self

    def statistics(self) -> ParameterSpec:
        """The sensitivity of every candidate."""
        return ParameterSpec(
            names=lambda anatomy: list(_kinds(anatomy, self.rules)),
            reduce=self.reduce,
            batches=self.batches,
            batch_size=self.batch_size,
            deterministic=self.deterministic,
        )

    def select(
        self,
        anatomy: Anatomy,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        """stats = {"sensitivity": name -> sums}, as `pegbox.collect(model, selector.statistics(), batches)` gives."""
        if stats is None or "sensitivity" not in stats:
            raise BadInput(
                "select 'sensitivity' needs gradients on the task's data: train through a recipe with data, or pass "
                "pegbox.collect(model, selector.statistics(), batches)."
            )
        shapes = {name: tuple(weights[name].shape) for name in weights}
        found = self._places(anatomy, shapes)
        scores = _checked(stats["sensitivity"], found, shapes)
        split, entries = self._allot(found, scores, shapes)
        return self._allocation(found, split, entries, shapes)

    def count(self, anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The budget, spread over the candidates by size; where it really goes is known after the gradients."""
        sizes: dict[str, int] = {}
        for place in self._places(anatomy, shapes):
            sizes[place.site.tensor] = sizes.get(place.site.tensor, 0) + place.site.size
        whole, wanted = sum(sizes.values()), self.tau if self.budget is None else self._wanted(shapes, sizes)
        counts, seen, given = {}, 0, 0
        for name, size in sizes.items():
            seen += size
            counts[name] = (wanted or 0) * seen // whole - given
            given += counts[name]
        return counts

    # ---- steps

    def _places(self, anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
        found = places(anatomy, shapes, self.rules, self.structured, self.rank, self.whole_vectors)
        if not found:
            raise BadInput("select.rules: nothing is left to allocate to; every parameter is skipped.")
        return found

    def _wanted(self, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> int:
        assert self.budget is not None
        whole = sum(sizes.values())
        if (self.budget.count or 0) > whole:
            raise BadInput(f"select.budget.count is {self.budget.count}, but there are only {whole} candidates.")
        return self.budget.entries([tuple(shapes[name]) for name in sizes])

    def _allot(
        self, found: list[Place], scores: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Split, dict[int, Tensor]]:
        sizes = {name: s.numel() for name, s in scores.items()}
        budget = None if self.budget is None else self._wanted(shapes, sizes)
        sites = [place.site for place in found]
        beta = self.beta if self.whole_vectors else 1e-12  # no vector is ever taken whole
        split, entries = allot(
            scores,
            sites,
            _parts(found, shapes),
            alpha=self.alpha,
            beta=beta,
            tau=self.tau,
            budget=budget,
            search=self.search,
            levels=grid(self.unit),
        )
        if budget is not None and abs(split.total - budget) > self.tolerance * budget:
            raise BadInput(
                f"select.budget: {budget} weights can't be reached; the nearest total is {split.total} (a matrix that "
                f"gets a module adds all of it at once). Ask for about that many, lower select.rank, or raise "
                "select.tolerance."
            )
        return split, entries

    def _allocation(
        self, found: list[Place], split: Split, entries: Mapping[int, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Allocation:
        sites: dict[str, list[dict[str, Any]]] = {}
        index: dict[str, list[Tensor]] = {}
        costs: dict[str, int] = {}
        whole: dict[str, Choice] = {}
        for at, (place, taken) in enumerate(zip(found, split.structured)):
            name = place.site.tensor
            if taken and place.site.kind == "matrix":
                sites.setdefault(name, []).append(self._module(place, shapes[name]))
                costs[name] = costs.get(name, 0) + place.site.cost
            elif taken and place.positions is None:
                whole[name] = Whole()
            elif taken and place.positions is not None:
                index.setdefault(name, []).append(place.positions)
            elif at in entries and not (self.drop_norm_singles and place.piece.kind == "norm"):
                index.setdefault(name, []).append(entries[at])
        allocation = Allocation(whole)
        for name in sites.keys() | index.keys():
            chosen = None
            if name in index:
                chosen = torch.cat(index[name]).sort().values.to("cpu", index_dtype(numel(tuple(shapes[name]))))
            if name in sites:
                allocation[name] = PerTensor("tuner", {"sites": sites[name], "trained": costs[name]}, chosen)
            elif chosen is not None:
                allocation[name] = Entries(chosen)
        return Allocation({name: allocation[name] for name in shapes if name in allocation})

    def _module(self, place: Place, shape: tuple[int, ...]) -> dict[str, Any]:
        """A module's options. The official LoRA drops no input of the attention's output projection."""
        dropout = 0.0 if place.piece.role == "o" and self.structured == "lora" else self.dropout
        block: dict[str, Any] = {
            "kind": self.structured,
            "r": self.rank,
            "dropout": dropout,
            "drop_path": self.drop_path,
        }
        if self.structured == "adapter":
            block["biases"] = self.whole_vectors
        return {**block, "shape": list(shape), **({} if place.rows is None else {"rows": place.rows})}


# ---- which parameters take part


def _kinds(anatomy: Anatomy, rules: Mapping[str, Kind]) -> dict[str, Kind]:
    """Parameter -> vector or matrix, in the model's order. Raises `BadInput` for one that nothing is known of."""
    found: dict[str, Kind] = {}
    for piece in anatomy.pieces:
        for name in piece.parameters:
            kind = _kind(piece, name, anatomy, rules)
            if kind != "skip":
                found[name] = kind
    return found


def _kind(piece: Piece, name: str, anatomy: Anatomy, rules: Mapping[str, Kind]) -> Kind:
    for pattern, kind in rules.items():
        if re.search(pattern, name):
            return kind
    if name in anatomy.ties or piece.category in ("embedding", "head") or _LOOSE.search(name):
        return "skip"
    if piece.kind in ("linear", "conv"):
        return "matrix" if name == piece.weight else "vector"
    if piece.kind == "norm":
        return "vector"
    raise BadInput(
        f"select.rules: nothing is known of the parameter '{name}'. Say what it is: vector, matrix or skip, e.g. "
        f"select.rules={{'{name.rsplit('.', 1)[-1]}$': skip}}."
    )


def places(
    anatomy: Anatomy,
    shapes: Mapping[str, tuple[int, ...]],
    rules: Mapping[str, Kind],
    structured: str,
    rank: int,
    biases: bool = True,
) -> list[Place]:
    """Every candidate; of a fused matrix (and its bias) each part by itself."""
    found = []
    owners = {name: piece for piece in anatomy.pieces for name in piece.parameters}
    for name, kind in _kinds(anatomy, rules).items():
        if name not in shapes:
            continue
        piece, shape = owners[name], tuple(shapes[name])
        parts = piece.slices if piece.slices and piece.kind == "linear" else {"": ()}
        for part in parts:
            rows = [list(span) for span in parts[part]] or None
            found.append(_place(name, kind, piece, shape, rows, structured, rank, biases))
    return found


def _place(
    name: str,
    kind: Kind,
    piece: Piece,
    shape: tuple[int, ...],
    rows: list[list[int]] | None,
    structured: str,
    rank: int,
    biases: bool,
) -> Place:
    positions = None if rows is None else _positions(rows, shape, piece.transposed and kind == "matrix")
    size = numel(shape) if positions is None else positions.numel()
    if kind == "vector":
        return Place(Site(name, size, "vector", size), piece, positions, rows)
    all_outputs = shape[1] if piece.transposed else shape[0]
    outputs = all_outputs if rows is None else sum(stop - start for start, stop in rows)
    inputs = numel(shape) // all_outputs
    if structured == "lora" and rank >= min(inputs, outputs):
        raise BadInput(
            f"select.rank is {rank}, and '{name}' is {outputs} x {inputs}: a LoRA needs a rank below both. Lower it, "
            f"or leave the matrix out with select.rules={{'{name}': skip}}."
        )
    cost = module_cost(structured, rank, inputs, outputs) - (0 if biases or structured == "lora" else rank + outputs)
    return Place(Site(name, size, "matrix", cost), piece, positions, rows)


def _positions(rows: list[list[int]], shape: tuple[int, ...], transposed: bool) -> Tensor:
    """Flat positions of some outputs of a weight, or of a bias."""
    outputs = torch.cat([torch.arange(start, stop) for start, stop in rows])
    if len(shape) == 1:
        return outputs
    grid_of = torch.arange(math.prod(shape)).view(shape)
    return (grid_of[:, outputs] if transposed else grid_of[outputs]).flatten().sort().values


def _parts(found: list[Place], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Of tensors with several places, the place of every entry."""
    parts: dict[str, Tensor] = {}
    for at, place in enumerate(found):
        if place.positions is not None:
            name = place.site.tensor
            held = parts.setdefault(name, torch.full((numel(tuple(shapes[name])),), -1, dtype=torch.int32))
            held[place.positions] = at
    return parts


def _checked(
    given: Mapping[str, Tensor], found: list[Place], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The candidates' scores, in order."""
    scores: dict[str, Tensor] = {}
    for place in found:
        name = place.site.tensor
        if name not in given:
            raise BadInput(f"select: no sensitivity was given for '{name}'. Skip it with select.rules, or measure it.")
        if tuple(given[name].shape) != tuple(shapes[name]):
            raise BadInput(
                f"select: the sensitivities of '{name}' have shape {list(given[name].shape)}, the model's weight has "
                f"{list(shapes[name])}. They were measured on another model."
            )
        if not bool(torch.isfinite(given[name]).all()):
            raise BadInput(f"select: the sensitivities of '{name}' are not finite.")
        scores[name] = given[name].detach().cpu()
    if not any(bool(score.any()) for score in scores.values()):
        raise BadInput("select: all sensitivities are 0. Is the head zero, so that no gradient passes it?")
    return scores
