"""Reading weights whatever their storage: a packed (quantized) parameter is given back as floats of its full shape.

Bitsandbytes keeps a 4-bit matrix as bytes with its quantization state on the parameter. Nothing else is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FloatingWeights", "Share", "floating", "full_shape", "whole_count"]


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

    @property
    def whole(self) -> int:
        """Parameters of the model, packed ones at their full size."""
        return sum(torch.Size(full_shape(p)).numel() for p in self._named.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


class Share(dict[str, Any]):
    """Some of a model's tensors (or their shapes) by name, that know how many parameters the whole model has."""

    def __init__(self, items: Mapping[str, Any], whole: int):
        super().__init__(items)
        self.whole = whole


def whole_count(items: Mapping[str, Any]) -> int:
    """Parameters of the model that these tensors or shapes are from: as they say, else all of them together."""
    known = getattr(items, "whole", None)
    if known is not None:
        return int(known)
    return sum(torch.Size(getattr(item, "shape", item)).numel() for item in items.values())
