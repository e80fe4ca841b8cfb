"""What a sparse layer lends to one forward and its backward: the weight as it was, the gradient of the kept entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pegbox.errors import RunFailed
from pegbox.parts.parameterinfo import CLOCK
from pegbox.tuners.sparse.products import sampled_product
from pegbox.tuners.sparse.slots import add_entries

if TYPE_CHECKING:
    from pegbox.tuners.sparse.layer import SparseLayer

__all__ = ["Lent"]


class Lent:
    """A `products.Holder`: remembers which values the forward ran on, and refuses a backward on others."""

    __slots__ = ("adapters", "identities", "in_place", "layer", "module", "operation")

    def __init__(
        self, layer: SparseLayer, adapters: list[str], in_place: bool, operation: Any, identities: list[tuple[Any, ...]]
    ):
        self.layer, self.adapters, self.in_place, self.operation = layer, adapters, in_place, operation
        self.module = layer.base
        self.identities = identities

    def first_weight(self) -> Tensor:
        """The weight in the forward itself: it has just been brought up to date."""
        return self.module._parameters["weight"] if self.in_place else self.weight()

    def check(self) -> None:
        """Raise `RunFailed` unless the values are those of the forward."""
        if [self.layer.identity(a) for a in self.adapters] != self.identities:
            raise RunFailed(
                f"{self.layer.module_name}: the sparse values changed between a forward and its backward (an optimizer"
                " step or a refresh in between), so the gradient would be wrong. Run backward before stepping."
            )

    def weight(self) -> Tensor:
        layer = self.layer
        self.check()
        if not self.in_place:
            layer.revert()
            shape = layer.shape_of("weight")
            return add_entries(layer.pretrained("weight"), [layer.slot(a, "weight") for a in self.adapters]).view(shape)
        held, wanted = layer.in_place, (*self.identities[0], CLOCK.now)
        held.settle(layer.base.weight)
        if held.stamp is None or held.stamp[:-1] != wanted[:-1] or held.regathered:
            # a reference pass took the entries out, or the weight was gathered anew
            held.write(wanted, layer.slot(self.adapters[0], "weight"))
        return layer.base.weight.detach()

    def observe(self, which: int, g: Tensor, x: Tensor) -> None:
        """Show the weight's gradient to whoever watches it."""
        watch = self.layer.watches.get((self.adapters[which], "weight")) if self.layer.watches else None
        if watch is None or g.is_meta:
            return
        with torch.autocast(g.device.type, enabled=False):
            if self.operation.sparse_product:
                watch.see_product(*self.operation.sides(g, x))
            else:
                watch.see(self.operation.dense_gradient(self.module, g, x, torch.Size(self.layer.shape_of("weight"))))

    def kept_gradient(self, which: int, g: Tensor, x: Tensor) -> Tensor:
        layer, adapter = self.layer, self.adapters[which]
        if g.is_meta:
            return torch.empty_like(layer.sparse_values("weight", adapter))
        if self.operation.sparse_product and layer.option(adapter, "gradient") == "sampled":
            found = sampled_product(layer.pattern(adapter), *self.operation.sides(g, x))
            return found.to(layer.sparse_values("weight", adapter).dtype)
        slot, shape = layer.slot(adapter, "weight"), torch.Size(layer.shape_of("weight"))
        dense = self.operation.dense_gradient(self.module, g, x, shape)
        return dense.reshape(-1)[slot.index.long()].to(slot.values.dtype)
