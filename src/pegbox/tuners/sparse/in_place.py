"""What is written into a base weight at the moment, and how it gets in and out, bit for bit.

A stamp says what the weight should hold: (adapter, its index set's number, its values' versions, the clock), or None
for the pretrained weight. Only a differing stamp writes. Under `fully_shard` a weight is gathered anew for each pass,
so nothing written lasts: then every pass writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pegbox.tuners.sparse.slots import Slot, gather_parts, restore_entries, write_entries

__all__ = ["InPlace", "is_sharded"]

Stamp = tuple[Any, ...] | None


class InPlace:
    """The state of one base weight."""

    def __init__(self) -> None:
        self.stamp: Stamp = None
        self.home: Tensor | None = None  # the tensor that was written into
        self.regathered = False
        self._positions: list[Tensor] = []
        self._originals: list[Tensor] = []

    def settle(self, weight: Tensor | None) -> None:
        """Note which tensor is the weight now; what was written into another one is gone with it."""
        if weight is self.home:
            return
        if self.home is not None:
            self.stamp, self._positions, self._originals = None, [], []
            self.regathered = self.regathered or _distributed()
        self.home = weight

    def up_to_date(self, stamp: Stamp) -> bool:
        return stamp == self.stamp and not self.regathered

    @torch.no_grad()
    def write(self, stamp: Stamp, slot: Slot | None) -> None:
        """Make the weight hold `slot` (None: the pretrained entries)."""
        weight = self.home
        if weight is None or weight.is_meta or is_sharded(weight):
            self.stamp = stamp
            return
        same_set = stamp is not None and self.stamp is not None and stamp[:2] == self.stamp[:2]
        if not same_set and self._positions:
            restore_entries(weight.detach().view(-1), self._positions, self._originals)
            self._positions, self._originals = [], []
        if slot is not None:
            flat = weight.detach().view(-1)
            if not same_set:
                self._positions = [index.clone() for index, _ in slot.parts()]
                self._originals = gather_parts(flat, slot)
            write_entries(flat, slot, self._originals, trained_only=same_set and not self.regathered)
        self.stamp = stamp


def is_sharded(weight: Tensor | None) -> bool:
    """A DTensor: this process holds a part of it."""
    return hasattr(weight, "device_mesh")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
