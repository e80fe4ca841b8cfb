"""Fast switching of a model's weights between slices adapters.

    W[:, I_old] -= D_old;   W[:, I_new] += D_new        O(out * s) per matrix and no product, where LoRA needs B A

By default the covered columns are kept and copied back, so that switching is exact; without that (`exact=False`) it
takes no memory and leaves the rounding of the differences. arXiv:2412.06289, "fast adapter switch".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pegbox.errors import Unsupported, WrongBase, did_you_mean
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.coupled import reordering_of
from pegbox.parts.slices import Slice, SliceSet

__all__ = ["Switcher"]


class Switcher:
    """Puts one adapter after the other into the weights of a bare model.

    Args:
        model: a model without attached adapters, or its weights by name.
        exact: copy the covered rows and columns back, bit for bit; else subtract what was added.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], exact: bool = True):
        if isinstance(model, nn.Module):
            if reordering_of(model) is not None:
                raise Unsupported(
                    "The units of this model are re-ordered; adapters go by original numbers. Undo it first."
                )
            anatomy = Anatomy.of(model)
            model = {anatomy.canonical(name): p for name, p in model.named_parameters()}
        self.tensors, self.exact = model, exact
        self.now: SliceSet | None = None
        self._covered: dict[str, Tensor] = {}

    @torch.no_grad()
    def to(self, adapter: SliceSet | None) -> None:
        """Make the weights those of `adapter` (None: the base's).

        Raises `WrongBase` before anything is written if it doesn't fit, `Unsupported` for values in absolute
        coordinates that can't be subtracted again.
        """
        for name, piece in (adapter or {}).items():
            self._check(name, piece)
        self._take_out()
        for name, piece in (adapter or {}).items():
            weight, index = self._place(name, piece)
            before = weight.index_select(piece.axis, index)
            if self.exact:
                self._covered[name] = before
            values = piece.values.to(weight.device)
            tuned = values if piece.mode == "set" else before.to(values.dtype) + values
            weight.index_copy_(piece.axis, index, tuned.to(weight.dtype))
        self.now = adapter

    def _take_out(self) -> None:
        for name, piece in (self.now or {}).items():
            weight, index = self._place(name, piece)
            if self.exact:
                weight.index_copy_(piece.axis, index, self._covered[name])
            else:
                weight.index_add_(piece.axis, index, piece.values.to(weight), alpha=-1)
        self._covered, self.now = {}, None

    def _place(self, name: str, piece: Slice) -> tuple[Tensor, Tensor]:
        weight = self.tensors[name].detach()
        return weight, piece.index.to(weight.device)

    def _check(self, name: str, piece: Slice) -> None:
        if name not in self.tensors:
            raise WrongBase(
                f"The adapter changes '{name}', which is not in this model.{did_you_mean(name, self.tensors)}"
            )
        weight = self.tensors[name]
        if not weight.is_floating_point():
            raise Unsupported(f"'{name}' is packed; adapters are switched in floating weights, or attached beside.")
        if tuple(weight.shape) != piece.shape:
            raise WrongBase(f"'{name}' has shape {tuple(weight.shape)} here and {piece.shape} in the adapter.")
        if piece.mode == "set" and not self.exact:
            raise Unsupported(f"'{name}' is stored as values, so it can't be subtracted. Use exact=True.")
