"""Half-Reset: put a balanced random half of the tuned matrices back to their old values.

    theta'[m] = theta_0[m] for m drawn, theta[m] otherwise

"HFT: Half Fine-Tuning for Large Language Models" (arXiv:2404.18466, pilot study). Restores part of what was forgotten
and keeps most of what was learnt; needs no training. What is not drawn (embeddings, head) stays tuned, unless named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Units, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import seed_of
from pegbox.parts.draws import Balance, Level, as_allocation, draw, items_of
from pegbox.weights.base import WEIGHTS, WeightOp

__all__ = ["HalfReset", "reset"]


@WEIGHTS.register
class HalfReset(WeightOp):
    """Reset a balanced random share of the matrices to the base.

    Args:
        ratio: the share that goes back; 0 leaves the tuned model, 1 gives the base's matrices back.
        level, balance, categories, slices: as in select 'half'.
        also: words for further modules to put back ("embedding", "head").
        seed: of the draw.
    """

    kind: Literal["half_reset"] = "half_reset"
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    level: Level = "category"
    balance: Balance = "count"
    categories: tuple[Literal["attention", "mlp", "mixer", "norm"], ...] = ("attention", "mlp", "norm")
    slices: bool = False
    also: tuple[str, ...] = ()
    seed: int = 0

    reproduces: ClassVar[str] = "arXiv:2404.18466"

    def apply(
        self, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Anatomy
    ) -> Iterator[tuple[str, Tensor]]:
        chosen = self._chosen(anatomy)
        yield from reset(base, tuned[0], chosen, anatomy.ties)

    def _chosen(self, anatomy: Anatomy) -> Allocation:
        chosen = Allocation()
        if self.ratio > 0:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "half", 0))
            items = items_of(anatomy, self.categories, self.slices)
            chosen = as_allocation(draw(items, self.level, self.ratio, self.balance, generator))
        if self.also:
            chosen.update(dict.fromkeys(anatomy.parameters(self.also), Whole()))
        return chosen


def reset(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], chosen: Allocation, ties: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the base once: the base's where chosen, the tuned one otherwise, in the base's dtype.

    Raises `BadInput` on missing names or unequal shapes, before anything is yielded for that name.
    """
    names = list(base)
    missing = [name for name in chosen if name not in base]
    if missing:
        raise BadInput(f"'{missing[0]}' is to be reset, but the base has no such tensor.")
    for name in names:
        old = base[name]
        if name not in tuned:
            raise BadInput(f"The tuned model has no tensor '{name}'; both must be of one architecture.")
        new = tuned[name]
        if new.shape != old.shape:
            raise BadInput(
                f"'{name}' has shape {tuple(old.shape)} in the base and {tuple(new.shape)} in the tuned model."
            )
        choice = chosen.get((ties or {}).get(name, name))
        if choice is None:
            yield name, new.to(old.dtype)
        elif isinstance(choice, Units):
            mixed = new.to(old.dtype, copy=True)
            yield name, mixed.index_copy_(choice.axis, choice.index.long(), old.index_select(choice.axis, choice.index))
        else:
            yield name, old
