"""Whole heads and channels: which units of each attention and MLP train, and in which of their matrices.

    n_x = floor(ratio_x * units per block * blocks)  for x = v, o (heads), u, d (channels), over the whole model

"S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity" (arXiv:2412.06289): random (R),
or by a score per unit, the largest or the smallest: weight ||W2[:, unit]|| (W), activation, the mean norm of h_unit
over calibration tokens (A), their product (S), gradient, the norm of the loss gradient of the unit's block (G). The
formulas of W to G are ours; the paper's are not published. With grouped queries a unit of v is a key-value head.

What it does not do: re-order anything. It gives original rows and columns to any tuner that takes units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Units
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import seed_of
from pegbox.parts.coupled import Coupled, Kind, Share, structures
from pegbox.parts.indexsets import top_entries_across
from pegbox.parts.slices import read_slices
from pegbox.parts.statistics import StatSpec
from pegbox.select.base import SELECT, Selector

__all__ = ["Ratios", "UnitSelector"]

Ratio = Annotated[float, Field(ge=0, le=1)]
ROLES: dict[str, tuple[str, Kind]] = {
    "v": ("v", "heads"),
    "o": ("o", "heads"),
    "u": ("up", "channels"),
    "d": ("down", "channels"),
}
SECOND: dict[Kind, str] = {"heads": "o", "channels": "down"}  # the matrix that reads the units
WORDS: dict[Kind, str] = {"heads": "attention", "channels": "mlp"}


class Ratios(BaseModel):
    """The share of units that trains: v (rows of the values), o (columns of the attention's output), u (rows of the
    MLP's up matrix), d (columns of its down matrix)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    v: Ratio = 0.0
    o: Ratio = 0.0
    u: Ratio = 0.0
    d: Ratio = 0.0

    @model_validator(mode="after")
    def _some(self) -> Ratios:
        if not any((self.v, self.o, self.u, self.d)):
            raise BadInput("select.ratios are all zero, so nothing would train. Raise one of v, o, u, d.")
        return self

    def asked(self) -> dict[str, float]:
        """The ratios above zero."""
        return {name: ratio for name, ratio in self.model_dump().items() if ratio > 0}


@dataclass(frozen=True)
class Candidates:
    """The units of one structure for one ratio: `allowed` ones can be drawn, `share` says where they lie."""

    structure: Coupled
    share: Share
    allowed: Tensor  # (units,) bool

    def __len__(self) -> int:
        return len(self.share.positions)


@SELECT.register
class UnitSelector(Selector):
    """Heads and channels, chosen over the whole model or in every block.

    Args:
        ratios: shares by matrix; see `Ratios`.
        strategy: random (R) | weight (W) | activation (A) | product (S) | gradient (G).
        order: the largest or the smallest scores train.
        scope: "global": the count is met over the model, blocks differ; "per_block": in each block alike.
        target_modules: words for modules; only matrices among them train.
        exclude: adapters (their folder, a run's or an artefact's) whose units are not chosen again.
        batches: calibration batches for A, S and G.
        seed: of the random draw; default: the run's.
    """

    kind: Literal["units"] = "units"
    ratios: Ratios = Ratios(o=0.052, d=0.02)
    strategy: Literal["random", "weight", "activation", "product", "gradient"] = "random"
    order: Literal["largest", "smallest"] = "largest"
    scope: Literal["global", "per_block"] = "global"
    target_modules: Annotated[str | tuple[str, ...], Field(min_length=1)] = "all-linear"
    exclude: tuple[str, ...] = ()
    batches: Annotated[int, Field(ge=1)] = 8
    seed: int | None = None

    reproduces: ClassVar[str] = "arXiv:2412.06289"
    produces: ClassVar[frozenset[str]] = frozenset({"units"})

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        """A random choice follows from shapes and the seed."""
        return self.strategy != "random"

    def statistics(self) -> StatSpec | None:
        kinds = {"activation": "input_unit_norm", "product": "input_unit_norm", "gradient": "gradient_sum"}
        if self.strategy not in kinds:
            return None
        words = dict.fromkeys(WORDS[ROLES[name][1]] for name in self.ratios.asked())
        return StatSpec((kinds[self.strategy],), targets=tuple(words), batches=self.batches)

    def select(
        self,
        anatomy: Anatomy,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        """Rows and columns, sorted, as `Units` of the stored weight.

        Raises `BadInput` for a model without such structures, a ratio that gives no unit, and scores without data.
        """
        if self.statistics() is not None and stats is None:
            raise BadInput(
                f"select.strategy '{self.strategy}' scores units on calibration data, and there is none. Give the run "
                "training rows, or use strategy: weight or random."
            )
        chosen = self.choose(anatomy, weights, stats, generator.initial_seed() if self.seed is None else self.seed)
        return Allocation({name: choice for name, choice in chosen.items() if name in weights})

    def choose(
        self, anatomy: Anatomy, weights: Mapping[str, Tensor], stats: Mapping[str, Any] | None, seed: int
    ) -> Allocation:
        """The selection before it is restricted to `weights`' names."""
        allocation = Allocation()
        for name in self.ratios.asked():
            for group, count in self.groups(anatomy, name):
                scores = [self.score(c, weights, stats, seed_of(seed, name, c.structure.name)) for c in group]
                for candidates, units in zip(group, _best(group, scores, count, self.order, name), strict=True):
                    if len(units):
                        index = candidates.share.of(units.tolist()).sort().values.to(torch.int32)
                        allocation[candidates.share.parameter] = _joined(allocation, candidates.share, index)
        return allocation

    def groups(self, anatomy: Anatomy, name: str) -> Iterator[tuple[list[Candidates], int]]:
        """Candidates that share a count, with it. Raises `BadInput` where a ratio comes to nothing."""
        role, kind = ROLES[name]
        every = self.candidates(anatomy, role, kind)
        ratio = self.ratios.asked()[name]
        groups = [every] if self.scope == "global" else [[c] for c in every]
        counts = [math.floor(ratio * sum(map(len, group)) + 1e-9) for group in groups]  # 0.29 * 100 is 28.99...
        if not sum(counts):
            size = sum(map(len, groups[0]))
            where = "there are" if self.scope == "global" else "a block has"
            least = math.ceil(1e4 / size) / 1e4
            raise BadInput(
                f"select.ratios.{name} = {ratio:g} is less than one unit: {where} {size} {_noun(role, kind)} in all. "
                f"Use {least:g} or more, or 0."
            )
        yield from zip(groups, counts, strict=True)

    def candidates(self, anatomy: Anatomy, role: str, kind: Kind) -> list[Candidates]:
        """Every structure with a matrix of this role among the targets. Raises `BadInput` if there is none."""
        modules = set(anatomy.resolve(self.target_modules))
        found = [s for s in structures(anatomy, (kind,)) if s.has(role)]
        inside = [s for s in found if s.share(role).module in modules]
        if not inside:
            what = (
                "attention with separate or fused q, k, v and an output" if kind == "heads" else "MLP with up and down"
            )
            raise BadInput(
                f"The model has no coupled structure for '{role}' (an {what}) among {self.target_modules!r}. "
                + (f"There are {len(found)} outside these modules." if found else "Set that ratio to 0.")
            )
        gone = _excluded(self.exclude)
        return [Candidates(s, share := s.share(role), _allowed(share, gone)) for s in inside]

    def score(self, c: Candidates, weights: Mapping[str, Tensor], stats: Any, seed: int) -> Tensor:
        """(units,) float64; random where the weights are not there (the meta device)."""
        second = c.structure.share(SECOND[c.structure.kind])
        if self.strategy == "random" or any(weights[s.parameter].is_meta for s in (c.share, second)):
            return torch.rand(len(c), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if self.strategy == "gradient":
            return _norms(stats["gradient_sum"][c.share.parameter], c.share)
        by_unit = torch.ones(c.structure.units, dtype=torch.float64)
        if self.strategy in ("weight", "product"):
            by_unit = by_unit * _norms(weights[second.parameter], second)
        if self.strategy in ("activation", "product"):
            by_unit = by_unit * stats["input_unit_norm"][second.module].double().cpu()
        if len(c) != len(by_unit):  # a key-value head: the norm over its query heads
            by_unit = by_unit.view(len(c), -1).square().sum(1).sqrt()
        return by_unit

    def count(self, anatomy: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Weights per tensor; which blocks get how many is drawn for the seed 0."""
        anywhere = self.model_copy(update={"strategy": "random", "exclude": ()})
        stand_ins = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        allocation = anywhere.choose(anatomy, stand_ins, None, 0)
        return Allocation({n: c for n, c in allocation.items() if n in shapes}).trained(shapes)


# ---- scores and choices


def _norms(tensor: Tensor, share: Share) -> Tensor:
    """(units,) Frobenius norms of the slices that each unit owns."""
    other = tuple(axis for axis in range(tensor.ndim) if axis != share.axis)
    squares = tensor.detach().double().square().sum(other).cpu()
    return squares[share.positions].sum(1).sqrt()


def _best(group: Sequence[Candidates], scores: Sequence[Tensor], count: int, order: str, name: str) -> list[Tensor]:
    """The chosen units of each of several structures: the `count` best over all of them that are allowed."""
    free = sum(int(c.allowed.sum()) for c in group)
    if count > free:
        raise BadInput(
            f"select.ratios.{name} asks for {count} units, and only {free} of {sum(map(len, group))} are left outside "
            "the excluded adapters. Lower the ratio."
        )
    signed = [score if order == "largest" else -score for score in scores]
    masked = [score.masked_fill(~c.allowed, -math.inf) for c, score in zip(group, signed, strict=True)]
    return top_entries_across(masked, count)


def _joined(allocation: Allocation, share: Share, index: Tensor) -> Units:
    """With what is chosen of this tensor already (a fused one holds several roles)."""
    present = allocation.get(share.parameter)
    if isinstance(present, Units):
        index = torch.cat([present.index, index]).sort().values
    return Units(share.axis, index)


def _allowed(share: Share, gone: Mapping[str, list[Units]]) -> Tensor:
    allowed = torch.ones(len(share.positions), dtype=torch.bool)
    for units in gone.get(share.parameter, ()):
        if units.axis == share.axis:
            allowed[share.owners(units.index)] = False
    return allowed


def _excluded(places: Sequence[str]) -> dict[str, list[Units]]:
    gone: dict[str, list[Units]] = {}
    for place in places:
        for name, piece in read_slices(Path(place)).items():
            gone.setdefault(name, []).append(Units(piece.axis, piece.index))
    return gone


def _noun(role: str, kind: Kind) -> str:
    return "channels" if kind == "channels" else "key-value heads" if role == "v" else "query heads"
