"""One adapter's share of one tensor: k trained values, their positions, and the entries that have left the trained set.

    tuned[index] = value            (absolute)        tuned[index] = pretrained[index] + value        (delta)

Values are float32 (float64 on a float64 base) whatever the base's dtype; the tensor holds their rounding. An entry that
left keeps the value it had reached. Pure functions over (tensor, slot); who holds the tensors is `layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pegbox.parts.indexsets import locate

__all__ = [
    "Moved",
    "Slot",
    "add_entries",
    "build_with_grad",
    "difference_of",
    "gather_parts",
    "move",
    "restore_entries",
    "touched",
    "values_dtype",
    "write_entries",
]


@dataclass
class Slot:
    """Views on a layer's tensors for one adapter and one target tensor.

    index, values: (k,) sorted flat positions and trained values. left_index, left_values: entries no longer trained.
    """

    index: Tensor
    values: Tensor
    left_index: Tensor | None
    left_values: Tensor | None
    absolute: bool

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """(index, values) of the entries that left and of the trained ones; disjoint."""
        trained = (self.index, self.values)
        return [trained] if self.left_index is None else [(self.left_index, self.left_values), trained]  # type: ignore[list-item]


def values_dtype(base: torch.dtype, wanted: str = "float32") -> torch.dtype:
    """float32, or float64 where the base is float64; bfloat16 if `wanted`."""
    if wanted == "bfloat16":
        return torch.bfloat16
    return torch.float64 if base == torch.float64 else torch.float32


def tuned_entries(original: Tensor, values: Tensor, absolute: bool) -> Tensor:
    """The tuned entries in the base's dtype. original, values: (k,)."""
    if absolute:
        return values.to(original.dtype)
    wide = torch.promote_types(torch.promote_types(original.dtype, values.dtype), torch.float32)
    return (original.to(wide) + values.to(wide)).to(original.dtype)


def difference_of(original: Tensor, values: Tensor, absolute: bool) -> Tensor:
    """What is added to the pretrained entries, in the values' dtype."""
    return values - original.to(values.dtype) if absolute else values


def touched(slot: Slot) -> Tensor:
    """(K,) positions of every entry ever trained, as int64 (not sorted)."""
    return torch.cat([index.long() for index, _ in slot.parts()])


def write_entries(flat: Tensor, slot: Slot, originals: list[Tensor], *, trained_only: bool = False) -> None:
    """Write a slot into a flat tensor that holds the pretrained entries `originals` (one per part) elsewhere."""
    pairs = list(zip(slot.parts(), originals, strict=True))
    for (index, values), original in pairs[-1:] if trained_only else pairs:
        flat.scatter_(0, index.long(), tuned_entries(original, values.detach(), slot.absolute))


def gather_parts(flat: Tensor, slot: Slot) -> list[Tensor]:
    """The entries of `flat` at the slot's positions, one tensor per part."""
    return [flat[index.long()] for index, _ in slot.parts()]


def restore_entries(flat: Tensor, slot_index: list[Tensor], originals: list[Tensor]) -> None:
    """Put pretrained entries back, bit for bit."""
    for index, original in zip(slot_index, originals, strict=True):
        flat.scatter_(0, index.long(), original)


def add_entries(pretrained: Tensor, slots: list[Slot]) -> Tensor:
    """A copy of the flat `pretrained` with every slot in it: the first written, further ones added. No gradient."""
    flat = pretrained.clone()
    for position, slot in enumerate(slots):
        originals = gather_parts(pretrained, slot)
        if position == 0:
            write_entries(flat, slot, originals)
            continue
        for (index, values), original in zip(slot.parts(), originals, strict=True):
            wide = index.long()
            change = difference_of(original, values.detach(), slot.absolute)
            flat[wide] = (flat[wide].to(values.dtype) + change).to(flat.dtype)
    return flat


def build_with_grad(pretrained: Tensor, slots: list[Slot]) -> Tensor:
    """As `add_entries`, through autograd (for tensors of layers without an operation of their own)."""
    flat = pretrained
    for position, slot in enumerate(slots):
        for index, values in slot.parts():
            wide = index.long()
            original = pretrained[wide]
            if position == 0:
                flat = flat.index_put((wide,), tuned_entries(original, values, slot.absolute))
            else:
                change = difference_of(original, values, slot.absolute)
                flat = flat.index_put((wide,), (flat[wide].to(values.dtype) + change).to(flat.dtype))
    return flat


@dataclass(frozen=True)
class Moved:
    """A slot's tensors after its trained set has moved.

    source: (k,) for each trained entry its place in the set before, -1 for one that was not trained.
    """

    index: Tensor
    values: Tensor
    left_index: Tensor
    left_values: Tensor
    source: Tensor


def move(slot: Slot, index: Tensor, pretrained: Tensor | None, leave: Literal["keep", "revert"] = "keep") -> Moved:
    """Train the entries `index` (k,) from now on.

    leave "keep": no entry of the tensor changes its value: entries that leave keep what they reached, those that come
    back bring it along, others start at the pretrained weight. "revert": entries that leave go back to the pretrained
    weight. pretrained: the flat tensor without the update (None will do for delta coordinates).
    """
    index = index.to(slot.index.device, slot.index.dtype)
    source = locate(index, slot.index)
    values = _start(pretrained, index, slot)
    known = source >= 0
    values[known] = slot.values.detach()[source[known]]
    gone = locate(slot.index, index) < 0
    if leave == "revert":
        gone = torch.zeros_like(gone)
    left_index, left_values = slot.index[gone], slot.values.detach()[gone]
    if slot.left_index is not None and slot.left_values is not None:
        back = locate(index, slot.left_index)
        values[back >= 0] = slot.left_values[back[back >= 0]]
        stays = locate(slot.left_index, index) < 0
        left_index = torch.cat([left_index, slot.left_index[stays]])
        left_values = torch.cat([left_values, slot.left_values[stays]])
    start = _start(pretrained, left_index, slot)
    changed = (left_values != start) | (left_values.signbit() != start.signbit())
    order = left_index[changed].argsort()
    return Moved(index, values, left_index[changed][order], left_values[changed][order], source)


def _start(pretrained: Tensor | None, index: Tensor, slot: Slot) -> Tensor:
    """Values that leave the tensor as it was pretrained."""
    if not slot.absolute:
        return torch.zeros(index.numel(), dtype=slot.values.dtype, device=slot.values.device)
    assert pretrained is not None
    return pretrained[index.long()].to(slot.values.dtype)
