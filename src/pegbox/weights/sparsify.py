"""The smallest part of an update set to zero in some layers: a repair for paths on which interpolation fails.

    theta_1[e] <- theta_0[e]  for the share s of entries of a layer with the smallest |theta_1 - theta_0|   (delta)
    theta_1[e] <- 0           for the share s of entries of a layer with the smallest |theta_1|             (weight)

After arXiv:2410.16476, which reports that sparsity in straggler layers mitigates the failure; the details are ours
(decision 0151). Variants: the largest k entries of every row stay, or the best rank-r part. It does not find the layers
(`pegbox.analyze.stragglers` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.algebra import State, difference
from pegbox.weights.base import WEIGHTS, WeightOp
from pegbox.weights.interpolate import tensors_meant
from pegbox.weights.updates import Updates

__all__ = ["Sparsify", "largest_per_row", "rank_part", "smallest", "sparsify_update"]

Target = Literal["delta", "weight"]


def smallest(values: Tensor, count: int) -> Tensor:
    """True at the `count` entries of smallest magnitude; of equals the first ones by position."""
    order = values.abs().flatten().sort(stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[order[:count]] = True
    return mask.view(values.shape)


def largest_per_row(values: Tensor, count: int) -> Tensor:
    """True at the `count` entries of largest magnitude in every row (of everything behind the first axis)."""
    rows = values.abs().flatten(1) if values.ndim > 1 else values.abs()[None]
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view(values.shape)


def rank_part(values: Tensor, rank: int) -> Tensor:
    """The best approximation of rank r (of everything behind the first axis as columns); vectors stay."""
    if values.ndim < 2:
        return values
    u, s, v = torch.linalg.svd(
        values.flatten(1).to(torch.promote_types(values.dtype, torch.float32)), full_matrices=False
    )
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view(values.shape).to(values.dtype)


def sparsify_update(
    base: State,
    tuned: State,
    layers: Mapping[str, Sequence[str]],
    sparsity: float = 0.5,
    *,
    target: Target = "delta",
    per_row: int | None = None,
    rank: int | None = None,
    ties: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the tuned model once, those of `layers` thinned out; other layers bit for bit.

    Args:
        layers: layer -> tensor names; the share is of a layer's entries together, not of each tensor's.
        sparsity: 0 changes nothing; 1 puts the layers back to the base (delta) or to zero (weight).
        per_row, rank: instead of `sparsity`: how many entries of every row, or what rank of the update, stay.

    Raises:
        BadInput: sparsity outside [0, 1]; a layer of tensors that are not there; other names or shapes.
    """
    _check(sparsity, per_row, rank, target)
    updates = Updates(base, [tuned], ties)
    known = set(updates.names)
    for layer, names in layers.items():
        if missing := [n for n in names if n not in known]:
            raise BadInput(f"layer '{layer}': '{missing[0]}' is no floating tensor of these models.")
    named = [name for names in layers.values() for name in names]
    if len(set(named)) < len(named):
        raise BadInput(f"'{next(n for n in named if named.count(n) > 1)}' is in two of the layers. Give it to one.")
    layer_of = {name: layer for layer, names in layers.items() for name in names}
    ready: dict[str, Tensor] = {}  # of the layer that is being given out
    for name in updates.base:
        if name in layer_of and name not in ready:
            ready |= _thinner(base, tuned, list(layers[layer_of[name]]), sparsity, target, per_row, rank)
        yield name, ready.pop(name, tuned[name]).to(base[name].dtype)


def _thinner(
    base: State, tuned: State, names: list[str], sparsity: float, target: Target, per_row: int | None, rank: int | None
) -> dict[str, Tensor]:
    if per_row is None and rank is None:
        return _thinned(base, tuned, names, sparsity, target)
    return {name: _structured(base[name], tuned[name], per_row, rank) for name in names}


def _thinned(base: State, tuned: State, names: list[str], sparsity: float, target: Target) -> dict[str, Tensor]:
    """One layer: the share is taken over all its entries."""
    values = {n: difference(tuned[n], base[n]) if target == "delta" else tuned[n] for n in names}
    flat = torch.cat([v.flatten() for v in values.values()])
    drop, at, found = smallest(flat, round(sparsity * flat.numel())), 0, {}
    for name, value in values.items():
        mask = drop[at : at + value.numel()].view(value.shape)
        at += value.numel()
        filler = base[name].to(tuned[name].dtype) if target == "delta" else torch.zeros_like(tuned[name])
        found[name] = torch.where(mask, filler, tuned[name])
    return found


def _structured(base: Tensor, tuned: Tensor, per_row: int | None, rank: int | None) -> Tensor:
    change = difference(tuned, base)
    if per_row is not None:
        return torch.where(largest_per_row(change, per_row), tuned, base.to(tuned.dtype))
    assert rank is not None
    return tuned if tuned.ndim < 2 else (base.to(change.dtype) + rank_part(change, rank)).to(tuned.dtype)


def _check(sparsity: float, per_row: int | None, rank: int | None, target: str) -> None:
    if not 0 <= sparsity <= 1:
        raise BadInput(f"sparsity is a share, between 0 and 1; got {sparsity}.")
    if per_row is not None and rank is not None:
        raise BadInput("Give per_row or rank, not both: they are two ways to thin out an update.")
    if (per_row is not None or rank is not None) and target != "delta":
        raise BadInput("per_row and rank thin out the update; leave target at delta.")


@WEIGHTS.register
class Sparsify(WeightOp):
    """Thin out a tuned model's update in some layers.

    Args:
        layers: words of the anatomy ("block 3", "attention & blocks 0-2"), name prefixes or globs; each is one layer.
        sparsity: the share of entries that goes back. target: by the size of the update, or of the weight (to zero).
        per_row, rank: instead of `sparsity`: entries of every row, or the rank of the update, that stay.
    """

    tuned_models: ClassVar[int | None] = 1
    reproduces: ClassVar[str] = "arXiv:2410.16476"

    kind: Literal["sparsify"] = "sparsify"
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    sparsity: Annotated[float, Field(ge=0, le=1)] = 0.5
    target: Target = "delta"
    per_row: Annotated[int, Field(ge=1)] | None = None
    rank: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Sparsify:
        _check(self.sparsity, self.per_row, self.rank, self.target)
        return self

    def apply(
        self, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Any
    ) -> Iterator[tuple[str, Tensor]]:
        ties = getattr(anatomy, "ties", None)
        names = Updates(base, tuned, ties).names
        layers = {word: tensors_meant(word, names, anatomy) for word in self.layers}
        yield from sparsify_update(
            base, tuned[0], layers, self.sparsity,
            target=self.target, per_row=self.per_row, rank=self.rank, ties=ties,
        )  # fmt: skip
