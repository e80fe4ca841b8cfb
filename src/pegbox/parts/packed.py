"""Reading weights whatever their storage: a packed (quantized) parameter is given back as floats of its full shape.

Bitsandbytes keeps a 4-bit matrix as bytes with its quantization state on the parameter. Nothing else is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

__all__ = ["FloatingWeights", "floating", "full_shape"]


def floating(parameter: Tensor) -> Tensor:
    """The parameter as floats: itself, or dequantized."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state).float()


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the matrix that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape) if state is None else tuple(state.shape)


class FloatingWeights(Mapping[str, Tensor]):
    """A model's parameters by name, packed ones dequantized when they are read (one at a time)."""

    def __init__(self, model: nn.Module):
        self._named = dict(model.named_parameters())

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return floating(self._named[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)
