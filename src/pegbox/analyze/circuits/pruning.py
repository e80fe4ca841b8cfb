"""Greedy backward pruning: take away the head that is missed least, until too little is left.

    while max_v F(K minus v) >= stop * F(all candidates):   K := K minus argmax_v F(K minus v)

For tasks without a known cascade. Everything outside K is at its mean. Single-head ablation would not do: redundant
heads each look dispensable and are not so together, which the greedy order sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pegbox.analyze.circuits.circuit import Ablation, Circuit, Member
from pegbox.errors import BadInput

__all__ = ["Pruned", "prune"]


@dataclass(frozen=True)
class Pruned:
    """The circuit left, its accuracy, that of all candidates, and (member, accuracy after it) as they went."""

    circuit: Circuit
    accuracy: float
    whole: float
    gone: tuple[tuple[Member, float], ...]


def prune(
    ablation: Ablation, candidates: Circuit, *, stop: float = 0.85, at_once: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Pruned:  # fmt: skip
    """Prune `candidates` (e.g. `Circuit.whole`).

    Args:
        stop: share of the candidates' own accuracy that must be left.
        at_once: heads per round; more is faster and blinder. The last rounds take fewer where that many are too many.
        progress: called with the members left.

    Raises `BadInput` where the candidates answer nothing right, so that nothing could be kept.
    """
    if not 0 < stop <= 1 or at_once < 1:
        raise BadInput(
            f"Pruning stops at a share in (0, 1] and takes at least one head at once; got {stop}, {at_once}."
        )
    whole = ablation.circuits([candidates])[0]
    if whole.accuracy == 0:
        raise BadInput(
            "With all candidates kept, and every head elsewhere at its mean, nothing is right. Name more positions, or "
            "take an easier task."
        )
    kept, left, gone = candidates, whole.accuracy, []
    while len(kept):
        members = kept.members()
        scores = ablation.circuits([kept.without([m]) for m in members])
        order = sorted(range(len(members)), key=lambda i: (-scores[i].accuracy, -scores[i].logprob))
        for count in range(min(at_once, len(members)), 0, -1):
            chosen = [members[i] for i in order[:count]]
            smaller = kept.without(chosen)
            score = scores[order[0]] if count == 1 else ablation.circuits([smaller])[0]
            if score.accuracy >= stop * whole.accuracy:
                break
        else:
            break
        kept, left = smaller, score.accuracy
        gone += [(member, left) for member in chosen]
        if progress is not None:
            progress(len(kept))
    return Pruned(kept, left, whole.accuracy, tuple(gone))
