"""Reading and writing a linear layer's weight as a dense (out, in) matrix, however it is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Piece

__all__ = ["dense_weight", "is_packed", "write_weight"]


def is_packed(module: nn.Module) -> bool:
    """Whether the weight is stored in fewer bits than a float's."""
    return not module.weight.is_floating_point()  # type: ignore[operator]


@torch.no_grad()
def dense_weight(module: nn.Module, piece: Piece) -> Tensor:
    """(out, in) float32 or wider; unpacked where it is packed. Raises `BadInput` for an unknown form."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if is_packed(module):
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise BadInput(f"'{piece.module}' is packed in a form that can't be unpacked here; load a floating base.")
        import bitsandbytes.functional as bnb

        weight = bnb.dequantize_4bit(weight.data, state)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return wide.T if piece.transposed else wide


@torch.no_grad()
def write_weight(module: nn.Module, piece: Piece, value: Tensor) -> None:
    """Put an (out, in) matrix in place of the weight, packed again where it was packed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    stored = value.T if piece.transposed else value
    if not is_packed(module):
        weight.copy_(stored)
        return
    import bitsandbytes as bnb

    old = weight.quant_state  # type: ignore[attr-defined]
    fresh: Any = bnb.nn.Params4bit(
        stored.to(old.dtype).cpu(),
        requires_grad=False,
        quant_type=old.quant_type,
        compress_statistics=old.nested,
        blocksize=old.blocksize,
        quant_storage=weight.dtype,
    )
    module.weight = fresh.to(weight.device)
