"""Pruning the base by what a tuned update says: single entries, N of M, whole heads and MLP neurons.

    W <- W * S1      the round(p * size) entries of lowest score go: key and dense matrices by |W|, query and value by
                     the update |s (B A + S2)| (mode ABS), each pool for itself
    heads            sum over a head's rows of |B A + S2| of q and v; the lowest leave every layer
    neurons          ||W1 row|| * ||W2 column||; the lowest leave each layer, or the model

DSEE (arXiv:2111.00160): tune, prune, tune again. The tuned update is read from the stage `of`, cut to what is left
and handed to the next tuner; A, B and S2 are never pruned themselves. Without `of` this is plain pruning by weight.
Masks are baked into W once (it is frozen), units leave for good, and what is left is a smaller dense model; its counted
FLOPs stand in the record. What this file does not do: train, or speed up scattered zeros (that needs a sparse kernel).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.carried import Update, carry, read_updates
from pegbox.parts.context import Context
from pegbox.parts.cost import tensor_flops
from pegbox.parts.coupled import Coupled, moves, structures
from pegbox.parts.pruning import (
    Mode,
    global_masks,
    n_of_m_mask,
    pack_mask,
    unit_scores,
    unpack_mask,
    update_score,
)
from pegbox.parts.removal import remove_units, removed_rows
from pegbox.parts.view import Batch
from pegbox.prepare.base import PREPARE, Preparation

__all__ = ["Prune"]

Ratio = Annotated[float, Field(ge=0, lt=1)]


@PREPARE.register
class Prune(Preparation):
    """Prune entries, heads and neurons.

    Args:
        of: the stage whose adapter says what to keep; it is carried over to the next tuner.
        mode: what ranks adapted matrices (query and value): ABS (the method), AB, W, WABS, WAB, NABS, NAB, random.
        ratio, update_ratio: shares of entries that go, of key and dense matrices, and of adapted ones.
        pattern: [N, M] instead: N of every M neighbours in a row stay, everywhere.
        heads: query heads that leave every layer. neurons: MLP neurons, a number or a share in (0, 1) of each layer.
        neuron_scope: "per_layer", or "global": as many in all, the lowest anywhere.
    """

    kind: Literal["prune"] = "prune"
    of: str | None = None
    mode: Mode = "ABS"
    ratio: Ratio = 0.0
    update_ratio: Ratio = 0.0
    pattern: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=2)]] | None = None
    heads: Annotated[int, Field(ge=0)] = 0
    neurons: Annotated[float, Field(ge=0)] = 0
    neuron_scope: Literal["per_layer", "global"] = "per_layer"

    reproduces: ClassVar[str] = "arXiv:2111.00160"
    keeps_function: ClassVar[bool] = False

    @property
    def carries_update(self) -> bool:
        """Whether the next tuner has to take up an update."""
        return self.of is not None

    @model_validator(mode="after")
    def _consistent(self) -> Prune:
        entries = self.ratio > 0 or self.update_ratio > 0
        if self.pattern is not None and (entries or self.pattern[0] > self.pattern[1]):
            raise BadInput(
                "prepare.prune: a pattern [N, M] with N <= M stands alone; leave out ratio and update_ratio."
            )
        if not (entries or self.pattern or self.heads or self.neurons):
            raise BadInput("prepare.prune prunes nothing: set ratio, update_ratio, pattern, heads or neurons.")
        if self.neurons >= 1 and self.neurons != int(self.neurons):
            raise BadInput(f"prepare.prune: neurons is a whole number or a share below 1, got {self.neurons}.")
        return self

    # ---- doing it

    def apply(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], ctx: Context) -> dict[str, Any]:
        """Raises `BadInput` for a model without query and value matrices, an update that is zero, too many units."""
        anatomy = Anatomy.of(model)
        named = {name: p.detach() for name, p in model.named_parameters()}
        updates = self._updates(ctx, named)
        before = _flops(model)
        masks = self._masks(anatomy, named, updates, ctx)
        removed = self._removed(anatomy, named, updates)
        shapes = {name: list(named[name].shape) for name in masks}
        _apply_masks(model, masks)
        found = {s.name: s for s in structures(anatomy)}
        for name, units in removed.items():
            updates = _cut(updates, found[name], units)
        remove_units(model, removed)
        if self.of is not None:
            carry(model, updates)
        facts = {"flops_per_token": {"dense": before, "structured": _flops(model), **_unmerged(model, updates)}}
        facts["entries"] = {"kept": sum(int(m.sum()) for m in masks.values())} if masks else {}
        return {"masks": masks, "shapes": shapes, "removed": removed, "facts": facts}

    def _updates(self, ctx: Context, named: Mapping[str, Tensor]) -> dict[str, Update]:
        if self.of is None:
            return {}
        if ctx.folder_of is None:
            raise BadInput(f"prepare.prune: there is no stage '{self.of}' here to read an update from.")
        return read_updates(ctx.folder_of(self.of), {name: tuple(p.shape) for name, p in named.items()})

    def _masks(
        self, anatomy: Anatomy, named: Mapping[str, Tensor], updates: Mapping[str, Update], ctx: Context
    ) -> dict[str, Tensor]:
        if not (self.pattern or self.ratio or self.update_ratio):
            return {}
        adapted, others = _pools(anatomy, updates)
        scores = {name: self._score(name, named[name], updates, ctx) for name in adapted}
        plain = {name: _floating(name, named[name]).abs() for name in others}
        if self.pattern is not None:
            return {name: n_of_m_mask(score, *self.pattern) for name, score in {**plain, **scores}.items()}
        first = global_masks(plain, self.ratio) if self.ratio else {}
        second = global_masks(scores, self.update_ratio) if self.update_ratio else {}
        return {**first, **second}

    def _score(self, name: str, weight: Tensor, updates: Mapping[str, Update], ctx: Context) -> Tensor:
        update = updates.get(name.removesuffix(".weight"))
        if update is None:
            return update_score(self.mode, _floating(name, weight), generator=ctx.generator("prune", name))
        low, sparse = update.low_rank().to(weight), update.sparse().to(weight)
        try:
            return update_score(self.mode, _floating(name, weight), low, sparse, ctx.generator("prune", name))
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from None

    # ---- units

    def _removed(
        self, anatomy: Anatomy, named: Mapping[str, Tensor], updates: Mapping[str, Update]
    ) -> dict[str, list[int]]:
        gone: dict[str, list[int]] = {}
        if self.heads:
            found = structures(anatomy, ("heads",))
            _require(found, "heads")
            gone |= {s.name: self._lowest_heads(s, named, updates) for s in found}
        if self.neurons:
            found = structures(anatomy, ("channels",))
            _require(found, "neurons")
            gone |= self._lowest_neurons(found, named)
        return gone

    def _lowest_heads(
        self, structure: Coupled, named: Mapping[str, Tensor], updates: Mapping[str, Update]
    ) -> list[int]:
        per = structure.per_group
        if self.heads >= structure.units or self.heads % per:
            raise BadInput(
                f"prepare.prune: heads = {self.heads}, but '{structure.name}' has {structure.units}, {per} to a group. "
                "Take whole groups, and leave at least one."
            )
        scores = torch.zeros(structure.groups, dtype=torch.float64)
        for role in ("q", "v"):
            share = structure.share(role)
            matrix = self._head_matrix(share.parameter, named, updates)
            rows = matrix if share.axis == 0 else matrix.t()
            values = unit_scores({role: (rows, share.positions)})
            scores += values.view(structure.groups, -1).sum(dim=1)
        if not bool(scores.any()):
            raise BadInput(f"'{structure.name}': the update is zero, so heads have no rank. Tune first, or use mode W.")
        groups = scores.argsort(stable=True)[: self.heads // per].tolist()
        return sorted(u for g in groups for u in range(g * per, (g + 1) * per))

    def _head_matrix(self, name: str, named: Mapping[str, Tensor], updates: Mapping[str, Update]) -> Tensor:
        """|B A + S2| (ABS), |W| (W and without an update), or their sum (WABS)."""
        weight, update = _floating(name, named[name]), updates.get(name.removesuffix(".weight"))
        if update is None or self.mode == "W":
            return weight.abs()
        change = (update.low_rank() if self.mode in {"AB", "WAB", "NAB"} else update.dense()).to(weight).abs()
        if self.mode in {"WABS", "WAB"}:
            return weight.abs() + change
        return -change if self.mode in {"NABS", "NAB"} else change

    def _lowest_neurons(self, found: Iterable[Coupled], named: Mapping[str, Tensor]) -> dict[str, list[int]]:
        scores = {s.name: _neuron_scores(s, named) for s in found}
        counts = {n: int(self.neurons if self.neurons >= 1 else self.neurons * len(v)) for n, v in scores.items()}
        full = [n for n, v in scores.items() if counts[n] >= len(v)]
        if full:
            raise BadInput(
                f"prepare.prune: neurons = {self.neurons:g} would leave '{full[0]}' none of {len(scores[full[0]])}."
            )
        if self.neuron_scope == "per_layer":
            return {n: sorted(v.argsort(stable=True)[: counts[n]].tolist()) for n, v in scores.items()}
        masks = global_masks(scores, sum(counts.values()) / sum(len(v) for v in scores.values()))
        gone = {n: (~mask).nonzero().flatten().tolist() for n, mask in masks.items()}
        empty = [n for n, units in gone.items() if len(units) == len(scores[n])]
        if empty:
            raise BadInput(f"prepare.prune: all neurons of '{empty[0]}' would leave; use neuron_scope per_layer.")
        return {n: units for n, units in gone.items() if units}

    # ---- the record

    def save(self, record: dict[str, Any], folder: Path) -> None:
        """Masks as bits, units by number, the counts."""
        bits = {name: pack_mask(mask) for name, mask in record["masks"].items()}
        save_file(bits or {"none": torch.zeros(1, dtype=torch.uint8)}, folder / "masks.safetensors")
        plain = {"shapes": record["shapes"], "removed": record["removed"], "facts": record["facts"]}
        (folder / "prune.json").write_text(json.dumps(plain), encoding="utf-8")

    def replay(self, model: nn.Module, folder: Path) -> None:
        try:
            plain = json.loads((folder / "prune.json").read_text(encoding="utf-8"))
            bits = load_file(folder / "masks.safetensors")
            masks = {name: unpack_mask(bits[name], tuple(shape)) for name, shape in plain["shapes"].items()}
            removed = {str(name): [int(u) for u in units] for name, units in plain["removed"].items()}
        except Exception as error:
            raise Corrupt(f"{folder} is no readable record of a pruning ({error}).") from error
        named = dict(model.named_parameters())
        for name, mask in masks.items():
            if name not in named or named[name].shape != mask.shape:
                here = tuple(named[name].shape) if name in named else "missing"
                raise WrongBase(
                    f"The masks are of another model: '{name}' is {tuple(mask.shape)} there and {here} here."
                )
        _apply_masks(model, masks)
        try:
            remove_units(model, removed)
        except BadInput as error:
            raise WrongBase(f"The units that were taken out are of another model: {error}") from error


def _require(found: Iterable[Coupled], what: str) -> None:
    if not list(found):
        raise BadInput(f"prepare.prune: this model has no {what} that are known to be independent.")


def _pools(anatomy: Anatomy, updates: Mapping[str, Update]) -> tuple[list[str], list[str]]:
    """Query and value matrices (or what was adapted), and all other matrices in the blocks."""
    linears = list(anatomy.linears())
    adapted = [p.weight for p in linears if p.role in {"q", "v", "qkv"} or p.module in updates]
    if not adapted:
        raise BadInput("prepare.prune: the model has no query and value matrices, which the update is of.")
    return adapted, [p.weight for p in linears if p.weight not in set(adapted)]


def _floating(name: str, weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        raise BadInput(f"'{name}' is packed. Prune before quantizing.")
    return weight


@torch.no_grad()
def _apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    named = dict(model.named_parameters())
    for name, mask in masks.items():
        named[name].masked_fill_(~mask.to(named[name].device), 0)


def _neuron_scores(structure: Coupled, named: Mapping[str, Tensor]) -> Tensor:
    """(units,) the product of the norms of what makes a neuron and of what reads it."""
    score = torch.ones(structure.units, dtype=torch.float64)
    for role in ("gate", "up", "down"):
        if structure.has(role):
            share = structure.share(role)
            norms = _floating(share.parameter, named[share.parameter]).double().square().sum(1 - share.axis).cpu()
            score *= norms[share.positions].sum(dim=1).sqrt()
    return score


def _cut(updates: Mapping[str, Update], structure: Coupled, units: Iterable[int]) -> dict[str, Update]:
    """Updates without the rows and columns that leave with these units."""
    found, units = dict(updates), list(units)
    kept = [u for u in range(structure.units) if u not in set(units)]
    for parameter, (axis, _) in moves(structure, kept).items():
        module = parameter.removesuffix(".weight")
        if parameter.endswith(".weight") and module in found:
            found[module] = found[module].without(axis, removed_rows(structure, units, parameter))
    return found


def _flops(model: nn.Module) -> int:
    """FLOPs of the linear layers for one token."""
    return sum(cost.forward for cost in tensor_flops(model, 1).values())


def _unmerged(model: nn.Module, updates: Mapping[str, Update]) -> dict[str, int]:
    """What one token costs if zeros were skipped and the update stays beside: 2 (nnz(W S1) + r (m + n) + N)."""
    total, named = 0, dict(model.named_parameters(remove_duplicate=False))
    for parameter in tensor_flops(model, 1):
        weight, update, extra = named[parameter], updates.get(parameter.removesuffix(".weight")), 0
        if update is not None:
            extra += 0 if update.a is None else update.a.shape[0] * sum(update.shape)
            extra += 0 if update.values is None else update.values.numel()
        total += 2 * (int(weight.count_nonzero()) + extra)
    return {"unmerged_nonzero": total}
