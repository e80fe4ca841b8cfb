"""Where a budget goes when sensitive matrices get a module and other sensitive weights train one by one.

Of the tau most sensitive entries overall, m_k lie in tensor k:

    vector:  m_k >= n / beta      -> the whole vector trains, cost n          else its m_k entries do
    matrix:  m_k >= cost / alpha  -> it gets a module of this cost            else its m_k entries do
    total(tau) = sum of costs                                   (m_k = 0: frozen, costs nothing)

Since a promotion changes the total, tau is searched for: on the official grid, or over every tau at once, by the sum of
what each further entry adds. Source: He et al., arXiv:2303.08566. Pure functions; which tensors take part, and under
which names, is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = ["Site", "Split", "allot", "grid", "module_cost", "nearest", "ranked", "split_at", "totals"]

_SAMPLE = 1 << 19
Finder = Callable[[Tensor, Tensor], Tensor]  # (tensor numbers, positions) -> site numbers


@dataclass(frozen=True)
class Site:
    """A candidate: a tensor, or some output rows of a fused matrix.

    Args:
        tensor: the parameter it lies in. size: how many entries it has. kind: "vector" or "matrix".
        cost: of the module that a matrix would get (a vector's is its size).
    """

    tensor: str
    size: int
    kind: Literal["vector", "matrix"]
    cost: int

    def threshold(self, alpha: float, beta: float) -> float:
        """From how many selected entries on it is taken as a whole; at least one."""
        return max(1.0, self.size / beta if self.kind == "vector" else self.cost / alpha)


@dataclass(frozen=True)
class Split:
    """An allocation in numbers: which sites are taken whole (or get a module), and the entries of all others.

    tau: the level. total: weights that train. entries: (sites,) how many of each site's entries were selected.
    """

    tau: int
    total: int
    structured: tuple[bool, ...]
    entries: tuple[int, ...]


def module_cost(kind: str, rank: int, inputs: int, outputs: int) -> int:
    """Weights of a module beside a matrix (outputs, inputs): "lora" r (in + out); "adapter" 2 r out + r + out."""
    return rank * (inputs + outputs) if kind == "lora" else 2 * rank * outputs + rank + outputs


# ---- ranking


def ranked(scores: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of all scores, in order: (count,) number of the tensor, (count,) flat position in it.

    Ties go by order of the tensors, then by position. Only what may be among them is held.
    """
    total = sum(s.numel() for s in scores.values())
    count = min(count, total)
    for bound in (_bound(scores, count, total), -math.inf):
        places = [_at_least(s, bound) for s in scores.values()]
        if sum(p.numel() for p in places) >= count:
            break
    values = torch.cat([s.detach().flatten()[p] for s, p in zip(scores.values(), places)])
    tensors = torch.cat([torch.full_like(p, at) for at, p in enumerate(places)])
    order = values.argsort(descending=True, stable=True)[:count]
    return tensors[order], torch.cat(places)[order]


def _at_least(score: Tensor, bound: float) -> Tensor:
    return (score.detach().flatten() >= bound).nonzero().flatten()


def _bound(scores: Mapping[str, Tensor], count: int, total: int) -> float:
    """A value that very probably at least `count` scores reach, from a strided sample."""
    stride = max(1, total // _SAMPLE)
    sample = torch.cat([s.detach().flatten()[::stride].double() for s in scores.values()]).sort(descending=True).values
    share = count / total
    last = int(share * sample.numel() + 6 * (share * sample.numel()) ** 0.5 + 8)
    return float(sample[last]) if last < sample.numel() else -math.inf


# ---- costs


def split_at(
    tau: int, counts: Sequence[int], sites: Sequence[Site], alpha: float, beta: float, extra: int = 0
) -> Split:
    """The allocation at level tau, given how many of its entries lie in each site. extra: what trains in any case."""
    structured = tuple(m > 0 and m >= s.threshold(alpha, beta) for m, s in zip(counts, sites))
    total = extra + sum(s.cost if whole else m for m, s, whole in zip(counts, sites, structured))
    return Split(tau, total, structured, tuple(counts))


def totals(site_of: Tensor, sites: Sequence[Site], alpha: float, beta: float, extra: int = 0) -> Tensor:
    """(n + 1,) the total for every tau from 0 to n, given the site of each entry in order of sensitivity."""
    order = site_of.argsort(stable=True)
    counts = torch.bincount(site_of, minlength=len(sites))
    starts = counts.cumsum(0) - counts
    before = torch.empty_like(site_of)  # entries of the same site that are ranked higher
    before[order] = torch.arange(site_of.numel()) - starts.repeat_interleave(counts)
    first = torch.tensor([math.ceil(s.threshold(alpha, beta) - 1e-9) for s in sites])
    cost = torch.tensor([s.cost for s in sites])
    now, limit, whole = before + 1, first[site_of], cost[site_of]
    adds = torch.where(now < limit, 1, torch.where(now == limit, whole - before, 0))
    return extra + torch.cat([torch.zeros(1, dtype=torch.int64), adds.cumsum(0)])


# ---- searching


def grid(unit: float, steps: int = 79, width: float = 0.02) -> list[int]:
    """The official levels: ceil(k * width * unit), k = 1 .. steps (unit: 1e6)."""
    return [math.ceil(k * width * unit) for k in range(1, steps + 1)]


def nearest(found: Sequence[int] | Tensor, wanted: float) -> int | None:
    """Where the total nearest to `wanted` stands; of several the last; None if all are farther from it than 0 is."""
    distances = (torch.as_tensor(found, dtype=torch.float64) - wanted).abs()
    if not distances.numel() or float(distances.min()) > abs(wanted):
        return None
    return int((distances == distances.min()).nonzero()[-1])


def allot(
    scores: Mapping[str, Tensor],
    sites: Sequence[Site],
    site_of: Mapping[str, Tensor] | None = None,
    *,
    alpha: float = 10.0,
    beta: float = 5.0,
    extra: int = 0,
    tau: int | None = None,
    budget: int | None = None,
    search: Literal["exact", "grid"] = "exact",
    levels: Iterable[int] | None = None,
) -> tuple[Split, dict[int, Tensor]]:
    """The allocation for a level or for a budget, and each site's selected entries (flat, sorted, in its tensor).

    Args:
        scores: tensor -> sensitivities. sites: the candidates.
        site_of: tensor -> (entries,) number of the site that each entry belongs to, where a tensor has several.
        tau: the level. budget: else the total whose nearest is searched for, over every tau or over `levels`.

    Raises `BadInput` for a budget or level that is not positive or larger than the candidates.
    """
    whole = sum(s.numel() for s in scores.values())
    _check(alpha, beta, tau, budget, whole, extra)
    place = _site_finder(scores, sites, site_of)
    if tau is None:
        assert budget is not None
        tau = _search(scores, sites, place, alpha, beta, extra, budget, search, levels)
    tensors, positions = ranked(scores, tau)
    here = place(tensors, positions)
    counts = torch.bincount(here, minlength=len(sites)).tolist()
    split = split_at(tau, counts, sites, alpha, beta, extra)
    return split, {at: positions[here == at].sort().values for at, m in enumerate(counts) if m}


def _check(alpha: float, beta: float, tau: int | None, budget: int | None, whole: int, extra: int) -> None:
    if not (alpha > 0 and beta > 0):
        raise BadInput(f"alpha and beta divide costs and must be positive, got {alpha} and {beta}.")
    if (tau is None) == (budget is None):
        raise BadInput("Give either a level tau or a budget.")
    wanted = tau if budget is None else budget
    assert wanted is not None
    if not 0 < wanted <= whole + extra:
        raise BadInput(f"The budget must lie between 1 and the {whole + extra} weights that may train, got {wanted}.")


def _site_finder(scores: Mapping[str, Tensor], sites: Sequence[Site], site_of: Mapping[str, Tensor] | None) -> Finder:
    """(tensor numbers, positions) -> site numbers."""
    alone = {s.tensor: at for at, s in enumerate(sites)}
    parted = {at: (site_of or {})[n] for at, n in enumerate(scores) if n in (site_of or {})}
    first = torch.tensor([alone.get(name, -1) for name in scores])

    def find(tensors: Tensor, positions: Tensor) -> Tensor:
        found = first[tensors]
        for at, parts in parted.items():
            mine = tensors == at
            found[mine] = parts[positions[mine]].to(found.dtype)
        return found

    return find


def _search(
    scores: Mapping[str, Tensor],
    sites: Sequence[Site],
    place: Finder,
    alpha: float,
    beta: float,
    extra: int,
    budget: int,
    search: str,
    levels: Iterable[int] | None,
) -> int:
    whole = sum(s.numel() for s in scores.values())
    if search == "grid":
        wanted = [level for level in (levels or grid(1e6)) if level <= whole]
        if not wanted:
            raise BadInput(f"The grid's first level lies above the {whole} candidates. Use search: exact.")
        found = totals(place(*ranked(scores, max(wanted))), sites, alpha, beta, extra)[torch.tensor(wanted)]
        at = nearest(found, budget)
        if at is None:
            raise BadInput(f"No level of the grid comes nearer to a budget of {budget} than nothing does.")
        return wanted[at]
    reach = min(whole, 4 * budget)
    while True:  # until the totals have gone past the budget
        found = totals(place(*ranked(scores, reach)), sites, alpha, beta, extra)
        if reach == whole or int(found[-1]) >= 2 * budget:
            break
        reach = min(whole, 4 * reach)
    at = nearest(found[1:], budget)
    return 1 + (at if at is not None else int((found[1:] - budget).abs().argmin()))
