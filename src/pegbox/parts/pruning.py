"""Pruning masks as pure functions: global by magnitude, N of M, what ranks an adapted matrix, what ranks heads.

    zeroed = round(p * pool size) entries of lowest score over a pool of matrices together
    ABS: |U|   AB: |B A|   W: |W|   WABS: |W + U|   WAB: |W + s B A|   NABS, NAB: the largest updates go first

U = s (B A + S2) is an adapter's update. From DSEE (arXiv:2111.00160); its script scales only S2 in WABS, which is taken
for a slip: both are scaled here. Which matrices make a pool, and what is done with a mask, is `prepare/prune.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pegbox.errors import BadInput, Corrupt, did_you_mean

__all__ = ["Mode", "global_masks", "n_of_m_mask", "pack_mask", "unit_scores", "unpack_mask", "update_score"]

Mode = Literal["ABS", "AB", "W", "WABS", "WAB", "NABS", "NAB", "random"]


def update_score(
    mode: Mode,
    weight: Tensor,
    low_rank: Tensor | None = None,
    sparse: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The score of each entry; low scores are pruned.

    Args:
        weight: (m, n) W. low_rank, sparse: s B A and s S2, where the mode asks for an update.

    Raises `BadInput` for an unknown mode, and for a ranking by an update that is zero: it would be arbitrary.
    """
    if mode not in get_args(Mode):
        raise BadInput(f"Unknown mode '{mode}'.{did_you_mean(str(mode), get_args(Mode))}")
    if mode == "W":
        return weight.abs()
    if mode == "random":
        return torch.rand(weight.shape, generator=generator).to(weight)
    alone = low_rank if low_rank is not None else torch.zeros_like(weight)
    update = alone if mode in {"AB", "WAB", "NAB"} or sparse is None else alone + sparse
    if not bool(update.any()):
        raise BadInput(f"mode '{mode}' ranks entries by the update, and that is zero: tune first, or use mode W.")
    if mode in {"WABS", "WAB"}:
        return (weight + update).abs()
    return update.abs() if mode in {"ABS", "AB"} else -update.abs()


def global_masks(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """True where an entry stays. The round(ratio * pool) lowest of all scores together go; ties by order.

    Raises `BadInput` for a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise BadInput(f"a pruning ratio lies in [0, 1), got {ratio}.")
    pool = sum(score.numel() for score in scores.values())
    gone = round(ratio * pool)
    if not gone:
        return {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    threshold = torch.cat([s.detach().flatten().cpu() for s in scores.values()]).kthvalue(gone).values
    masks, left = {}, gone - sum(int((score.cpu() < threshold).sum()) for score in scores.values())
    for name, score in scores.items():
        keep = score.cpu() >= threshold
        tied = (score.cpu() == threshold).flatten().nonzero().flatten()[:left]
        keep.view(-1)[tied] = False
        left -= len(tied)
        masks[name] = keep
    return masks


def n_of_m_mask(score: Tensor, keep: int, of: int) -> Tensor:
    """True for the `keep` largest of every `of` neighbours in a row (2 of 4: semi-structured sparsity).

    score: (m, n), n divisible by `of`. Ties go to the lowest position.
    """
    if not 0 < keep <= of:
        raise BadInput(f"a pattern keeps between 1 and all of its entries, got {keep} of {of}.")
    if score.shape[-1] % of:
        raise BadInput(f"rows of {score.shape[-1]} entries can't be divided into groups of {of}.")
    grouped = score.detach().reshape(-1, of)
    order = grouped.argsort(dim=1, descending=True, stable=True)[:, :keep]
    mask = torch.zeros(grouped.shape, dtype=torch.bool, device=score.device)
    return mask.scatter_(1, order, True).view(score.shape)


def unit_scores(rows: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """(units,) sums of a score over the rows that each unit owns.

    rows: name -> (score with one line per row (m, n), positions (units, k) of each unit's rows).
    """
    total: Tensor | None = None
    for score, positions in rows.values():
        by_row = score.detach().double().sum(dim=1).cpu()
        mine = by_row[positions].sum(dim=1)
        total = mine if total is None else total + mine
    if total is None:
        raise BadInput("no matrix to score units by.")
    return total


def pack_mask(mask: Tensor) -> Tensor:
    """A mask as bits, uint8 (ceil(numel / 8),)."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_mask`. Raises `Corrupt` where bits and shape don't fit."""
    count = int(torch.Size(shape).numel())
    if bits.dtype != torch.uint8 or bits.numel() != (count + 7) // 8:
        raise Corrupt(f"{bits.numel()} bytes are no mask of shape {list(shape)}.")
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).view(shape)
