"""Lottery-ticket selection: the entries that moved most while everything was allowed to move.

    t = k-th largest |theta - theta_0| over all maskable entries not taken yet;   mask = {|theta - theta_0| >= t}

"Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (arXiv:2110.07560, section 3). The scope is global: tensors
compete. A protocol trains the probe, hands its start and end weights to `select`, rewinds and trains the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput, RunFailed
from pegbox.parts.allocation import Allocation, Entries, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.indexsets import Budget, index_dtype, union
from pegbox.parts.statistics import StageWeights
from pegbox.select.base import SELECT, Selector

__all__ = ["Change", "largest_changes"]

_CHUNK = 1 << 18  # entries compared at a time: they stay in the cache
_SAMPLE = 1 << 19  # entries that the bound below the threshold is guessed from


@SELECT.register
class Change(Selector):
    """The entries whose value changed most in an earlier stage.

    Args:
        of: the name of the stage whose change counts.
        since: the stage from whose start it is counted; default: `of`. A later round counts from the first one's start.
        taken: the stage that made the selection which this one adds to.
        budget: K, over all maskable entries together.
        iterations: K is given out in so many rounds of probing, K // iterations each.
        maskable: words for the modules whose entries compete. Default: all but norms and head.
        dense: words for modules that train whole beside the mask, such as a new task head.
    """

    kind: Literal["change"] = "change"
    of: str = "probe"
    since: str | None = None
    taken: str | None = None
    budget: Budget = Budget(density=0.01)
    iterations: Annotated[int, Field(ge=1)] = 1
    maskable: tuple[str, ...] | None = None
    dense: tuple[str, ...] = ()

    reproduces: ClassVar[str] = "arXiv:2110.07560"
    produces: ClassVar[frozenset[str]] = frozenset({"entries", "whole"})

    def statistics(self) -> StageWeights:
        """The weights where probing began and where it ended, and what earlier rounds took."""
        weights = {"start": (self.since or self.of, "start"), "end": (self.of, "end")}
        return StageWeights(weights, {"taken": self.taken} if self.taken is not None else {})

    def select(
        self,
        anatomy: Anatomy,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        """stats = {"start": name -> tensor, "end": name -> tensor, "taken": earlier iterations' allocation, if any}."""
        if stats is None or not {"start", "end"} <= set(stats):
            raise BadInput(
                f"select 'change' compares the weights before and after stage '{self.of}': give it the protocol "
                "'staged' with such a stage, or stats with 'start' and 'end'."
            )
        start, end = stats["start"], stats["end"]
        names = [name for name in self._maskable(anatomy) if name in weights and name in end]
        shapes = {name: tuple(weights[name].shape) for name in names}
        taken = stats.get("taken") or Allocation()
        count = self._share(shapes)
        picked = largest_changes({n: start[n] for n in names}, {n: end[n] for n in names}, count, _indices(taken))
        allocation = Allocation()
        for name, index in picked.items():
            before = taken.get(name)
            joined = union(before.index, index) if isinstance(before, Entries) else index
            if joined.numel():
                allocation[name] = Entries(joined)
        return Allocation({**allocation, **dict.fromkeys(self._dense(anatomy, weights), Whole())})

    def count(self, anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Of each tensor its share of K; which tensor really gets how many is known after the probe."""
        maskable = {name: shapes[name] for name in self._maskable(anatomy) if name in shapes}
        total = self._share(maskable) * self.iterations
        sizes = {name: torch.Size(shape).numel() for name, shape in maskable.items()}
        whole = sum(sizes.values())
        counts, given, seen = {}, 0, 0
        for name, size in sizes.items():
            seen += size
            counts[name] = total * seen // whole - given
            given += counts[name]
        return {**counts, **{n: torch.Size(shapes[n]).numel() for n in self._dense(anatomy, shapes)}}

    def _maskable(self, anatomy: Anatomy) -> list[str]:
        if self.maskable is not None:
            return anatomy.parameters(self.maskable)
        head = {piece.module for piece in anatomy.pieces if piece.category in ("head", "norm")}
        rest = [piece for piece in anatomy.pieces if piece.module not in head]
        names = dict.fromkeys(anatomy.ties.get(p, p) for piece in rest for p in piece.parameters)
        if not names:
            raise BadInput("select.maskable: the model has nothing but a head and norms. Name modules.")
        return list(names)

    def _dense(self, anatomy: Anatomy, weights: Mapping[str, Any]) -> list[str]:
        return [name for name in anatomy.parameters(self.dense) if name in weights] if self.dense else []

    def _share(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """K // iterations, checked."""
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        if not total:
            raise BadInput("select.maskable: none of the named tensors is among the weights.")
        if (self.budget.count or 0) > total:
            raise BadInput(f"select.budget.count is {self.budget.count}, but only {total} entries are maskable.")
        wanted = self.budget.entries(shapes.values())
        if wanted < self.iterations:
            raise BadInput(f"select.iterations is {self.iterations}, more than the {wanted} entries of the budget.")
        return wanted // self.iterations


def _indices(taken: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: choice.index for name, choice in taken.items() if isinstance(choice, Entries)}


# ---- the mathematics


def largest_changes(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], count: int, taken: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Flat indices of the `count` largest |end - start| over all tensors together, entries in `taken` left out.

    All entries tied at the threshold are taken, so there may be more than `count`; only where the threshold is 0 (fewer
    entries moved than were asked for) are unmoved ones filled in by position up to `count`.

    A sample brackets the threshold. One pass over the changes keeps the positions above the bracket's lower end, and
    the few values inside it, among which the threshold is then found; a bad guess costs a second pass.

    Raises `BadInput` where fewer entries are left than asked for, `RunFailed` on changes that are not finite.
    """
    taken = taken or {}
    left = sum(t.numel() for t in end.values()) - sum(index.numel() for index in taken.values())
    if count > left:
        raise BadInput(f"{count} entries are to be chosen, but only {left} are left unmasked. Lower the budget.")
    for low, high in (_bracket(start, end, count, left), (0.0, float("inf"))):
        found = {name: _candidates(name, start[name], end[name], taken.get(name), low, high) for name in end}
        within = torch.cat([f.values for f in found.values()])
        sure = sum(f.positions.numel() for f in found.values()) - within.numel()
        if sure < count <= sure + within.numel():
            break
    threshold = float(torch.kthvalue(within, within.numel() - (count - sure) + 1).values)
    missing = count - sure - int((within > 0).sum()) if threshold == 0 else 0
    chosen = {}
    for name in list(found):
        candidates = found.pop(name)
        chosen[name], filled = _settle(candidates, threshold, missing)
        missing -= filled
    return chosen


@dataclass
class _Candidates:
    """Positions whose change may reach the threshold; `at` are the places in `positions` of those inside the bracket,
    `values` their changes."""

    positions: Tensor
    at: Tensor
    values: Tensor


def _settle(candidates: _Candidates, threshold: float, missing: int) -> tuple[Tensor, int]:
    """The positions that reach the threshold (with threshold 0: that moved, and up to `missing` that did not)."""
    out = candidates.values < threshold if threshold > 0 else candidates.values <= 0
    filled = 0
    if missing > 0:
        unmoved = out.nonzero().flatten()[:missing]
        out[unmoved] = False
        filled = unmoved.numel()
    keep = torch.ones(candidates.positions.numel(), dtype=torch.bool)
    keep[candidates.at[out].long()] = False
    return candidates.positions[keep], filled


def _bracket(start: Mapping[str, Tensor], end: Mapping[str, Tensor], count: int, left: int) -> tuple[float, float]:
    """Bounds that very probably hold the `count`-th largest change, from a strided sample."""
    stride = max(1, sum(t.numel() for t in end.values()) // _SAMPLE)
    parts = [_difference(start[n].detach().flatten()[::stride], t.detach().flatten()[::stride]) for n, t in end.items()]
    sample = torch.cat([part.to("cpu", torch.float64) for part in parts]).sort(descending=True).values
    share, size = count / left, sample.numel()
    slack = 6 * (share * (1 - share) * size) ** 0.5 + 8
    first, last = int(share * size - slack), int(share * size + slack) + 1
    return (float(sample[last]) if last < size else 0.0, float(sample[first]) if first >= 0 else float("inf"))


def _difference(start: Tensor, end: Tensor) -> Tensor:
    """|end - start| in float32, or float64 where the weights are."""
    wide = torch.float64 if end.dtype == torch.float64 else torch.float32
    return end.to(wide, copy=True).sub_(start.to(end.device, wide)).abs_()


def _candidates(name: str, start: Tensor, end: Tensor, taken: Tensor | None, low: float, high: float) -> _Candidates:
    """What of one tensor lies at or above `low`, chunk by chunk."""
    first, last = start.detach().flatten(), end.detach().flatten()
    dtype = index_dtype(last.numel())
    positions, at, values, count = [torch.empty(0, dtype=dtype)], [torch.empty(0, dtype=dtype)], [], 0
    for offset in range(0, max(last.numel(), 1), _CHUNK):
        change = _difference(first[offset : offset + _CHUNK], last[offset : offset + _CHUNK])
        if not bool(torch.isfinite(change.sum())) and not bool(torch.isfinite(change).all()):
            raise RunFailed(
                f"The change of '{name}' isn't finite: the probing stage diverged. Lower its learning rate."
            )
        if taken is not None:
            bounds = torch.tensor([offset, offset + change.numel()], dtype=taken.dtype)
            begin, stop = torch.searchsorted(taken, bounds).tolist()
            change[taken[begin:stop].to(change.device).long() - offset] = -1
        here = _where(change >= low)
        above = change[here]
        inside = _where(above <= high)
        positions.append((here + offset).to("cpu", dtype))
        at.append((inside + count).to("cpu", dtype))
        values.append(above[inside].cpu())
        count += here.numel()
    return _Candidates(torch.cat(positions), torch.cat(at), torch.cat(values))


def _where(mask: Tensor) -> Tensor:
    """Positions of True; numpy's is the faster one on a CPU."""
    return mask.nonzero().flatten() if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
