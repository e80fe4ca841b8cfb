"""What two differences over one base have in common: shared entries, against chance, and pulls in opposite directions.

    common = |A and B|,  share = common / min(|A|, |B|),  chance = sum_t |A_t| |B_t| / n_t    (t: tensors, n_t: entries)
    conflict = share of common entries with a_i b_i < 0,  cosine = <a, b> / (|a| |b|)

A share far above chance says that both found the same entries important; whether adding them up hurts is told by the
conflicts. Nothing dense is built for sparse differences. Source of the question: Ansell et al., arXiv:2110.07560.
"""

from __future__ import annotations

from dataclasses import dataclass

from pegbox.errors import BadInput
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.indexsets import locate, numel

__all__ = ["Overlap", "overlap_of"]


@dataclass(frozen=True)
class Overlap:
    """Of two differences, or of one tensor in them. entries: of each; chance: common entries of random sets alike."""

    entries: tuple[int, int]
    common: int
    chance: float
    opposed: int
    product: float
    squares: tuple[float, float]

    @property
    def share(self) -> float:
        """Of the smaller one's entries; 0 where one is empty."""
        return self.common / min(self.entries) if min(self.entries) else 0.0

    @property
    def over_chance(self) -> float | None:
        """How many times the entries that chance would share; None where it would share none."""
        return self.common / self.chance if self.chance else None

    @property
    def conflict(self) -> float:
        """Share of the common entries that are moved in opposite directions."""
        return self.opposed / self.common if self.common else 0.0

    @property
    def cosine(self) -> float:
        """Of the two as vectors over all entries."""
        size = (self.squares[0] * self.squares[1]) ** 0.5
        return self.product / size if size else 0.0


def overlap_of(a: Delta, b: Delta) -> tuple[Overlap, dict[str, Overlap]]:
    """(over everything, by tensor that both touch). Raises `BadInput` for tensors of unequal shape or stored values."""
    for delta in (a, b):
        for name, piece in delta.items():
            if piece.mode == "set":
                raise BadInput(f"'{name}' is stored as values, not as a change, so its overlap says nothing.")
    both = {name: _of_pieces(name, a[name], b[name]) for name in a if name in b}
    squares = [sum(float(p.values.double().square().sum()) for p in delta.values()) for delta in (a, b)]
    whole = Overlap(
        (a.entries(), b.entries()),
        sum(o.common for o in both.values()),
        sum(o.chance for o in both.values()),
        sum(o.opposed for o in both.values()),
        sum(o.product for o in both.values()),
        (squares[0], squares[1]),
    )
    return whole, both


def _of_pieces(name: str, a: Piece, b: Piece) -> Overlap:
    if a.shape != b.shape:
        raise BadInput(f"'{name}' has shape {list(a.shape)} in one difference and {list(b.shape)} in the other.")
    first, second = a.positions(), b.positions()
    place = locate(first, second)
    here = place >= 0
    one = a.values.reshape(-1)[here].double()
    two = b.values.reshape(-1)[place[here].long()].double()
    sizes = (first.numel(), second.numel())
    squares = (float(a.values.double().square().sum()), float(b.values.double().square().sum()))
    chance = sizes[0] * sizes[1] / numel(a.shape)
    return Overlap(sizes, int(here.sum()), chance, int((one * two < 0).sum()), float(one @ two), squares)
