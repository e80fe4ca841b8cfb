"""`permute`: the units of attentions and MLPs in another order, the function of the model unchanged.

    h = act(W1 x) -> P h,   W1 <- P W1,   W2 <- W2 P^T          units: heads (in their key-value groups), MLP channels

The co-permutation of S2FT (arXiv:2412.06289) as a preparation of its own: ordered by weight, the units that matter
stand first, so that a range of rows and columns holds them; whatever is trained then lives on the re-ordered base, and
loading re-orders a fresh one in the same way. Nothing is computed, tensors are only moved (logits differ by how sums
round). The slices tuner needs no preparation: with `layout: contiguous` it re-orders by its own selection, and back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.coupled import Coupled, Kind, reorder, structures
from pegbox.parts.view import Batch
from pegbox.prepare.base import PREPARE, Preparation

__all__ = ["Permute"]


@PREPARE.register
class Permute(Preparation):
    """Re-order heads and channels.

    Args:
        order: "weight": by ||W2[:, unit]||, the largest first (groups by the norm over their heads); "random".
        units: what is re-ordered.
    """

    kind: Literal["permute"] = "permute"
    order: Literal["weight", "random"] = "weight"
    units: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("heads", "channels")

    def apply(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], ctx: Context) -> dict[str, Any]:
        """Raises `BadInput` for a model without such units, a packed or a re-ordered one; `Unsupported` where heads
        can't change places."""
        anatomy = Anatomy.of(model)
        found = structures(anatomy, self.units)
        if not found:
            raise BadInput(f"prepare.permute: the model has no coupled structure of {' or '.join(self.units)}.")
        named = dict(model.named_parameters())
        orders = {s.name: self._order(s, named, ctx.generator("permute", s.name)) for s in found}
        reorder(model, orders, anatomy)
        return {"orders": orders}

    def save(self, record: dict[str, Any], folder: Path) -> None:
        """The orders, as int32 by structure."""
        save_file(
            {n: o.to(torch.int32).contiguous() for n, o in record["orders"].items()}, folder / "orders.safetensors"
        )
        (folder / "permute.json").write_text(json.dumps({"structures": len(record["orders"])}), encoding="utf-8")

    def replay(self, model: nn.Module, folder: Path) -> None:
        try:
            orders = load_file(folder / "orders.safetensors")
            facts = json.loads((folder / "permute.json").read_text(encoding="utf-8"))
            assert facts["structures"] == len(orders)
        except Exception as error:
            raise Corrupt(f"{folder} is no readable record of a re-ordering ({error}).") from error
        sizes = {s.name: s.units for s in structures(Anatomy.of(model))}
        for name, order in orders.items():
            if sizes.get(name) != len(order):
                raise WrongBase(
                    f"The re-ordered '{name}' has {len(order)} units; this model's has {sizes.get(name, 0)}."
                )
        reorder(model, orders)

    def _order(self, structure: Coupled, named: dict[str, nn.Parameter], generator: torch.Generator) -> Tensor:
        """(units,) a complete order that keeps the units of a group together."""
        groups, per = structure.groups, structure.per_group
        if self.order == "random":
            first = torch.randperm(groups, generator=generator)
            inner = torch.stack([torch.randperm(per, generator=generator) for _ in range(groups)])
        else:
            score = _norms(structure, named).view(groups, per)
            first = score.square().sum(1).argsort(descending=True, stable=True)
            inner = score.argsort(dim=1, descending=True, stable=True)
        return (first[:, None] * per + inner[first]).reshape(-1)


def _norms(structure: Coupled, named: dict[str, nn.Parameter]) -> Tensor:
    """(units,) ||W2[:, unit]||."""
    share = structure.share("o" if structure.kind == "heads" else "down")
    weight = named[share.parameter].detach()
    if not weight.is_floating_point():
        raise BadInput(f"prepare.permute: '{share.parameter}' is packed. Permute before quantizing.")
    return weight.double().square().sum(1 - share.axis).cpu()[share.positions].sum(1).sqrt()
