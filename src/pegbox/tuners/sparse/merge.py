"""Merging a sparse adapter into some modules only, and into packed weights where that is asked for.

    W <- W + S(values)             packed:  W <- quantize(dequantize(W) + S(values)), lossy

`merge_modules` is what PEFT's own merging has no options for. Unmerging puts back what was there, bit for bit: entries
of a floating weight, the old packed weight as a whole. It needs bitsandbytes' 4-bit weights; others are refused.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported, did_you_mean
from pegbox.tuners.sparse.execution import base_facts
from pegbox.tuners.sparse.model import sparse_layers

__all__ = ["merge_modules", "repacked"]


def merge_modules(
    model: nn.Module, pattern: str = ".*", *, adapter: str = "default", requantize: bool = False
) -> list[str]:
    """Merge `adapter` into the modules whose name in the bare base matches `pattern` (a regular expression).

    The other modules keep it as an adapter. `model.unmerge_adapter()` takes it out again. requantize: also merge into
    4-bit weights, which are dequantized and quantized anew: entries near the update may round to another level.

    Returns the merged names. Raises `BadInput` where nothing matches, `Unsupported` for a packed weight without
    `requantize`.
    """
    layers = {n: m for n, m in sparse_layers(model).items() if adapter in m._options}
    wanted = {name: layer for name, layer in layers.items() if re.fullmatch(pattern, name)}
    if not wanted:
        raise BadInput(
            f"No module with a sparse adapter '{adapter}' matches '{pattern}'.{did_you_mean(pattern, layers)}"
        )
    packed = [name for name, layer in wanted.items() if base_facts(layer.base_layer).packed]
    if packed and not requantize:
        raise Unsupported(
            f"'{packed[0]}' is packed: merging would quantize the sum anew and lose some of the update. Give"
            " requantize=True if that is meant, or merge into a floating base."
        )
    for layer in wanted.values():
        layer.requantize = requantize
        layer.merge(adapter_names=[adapter])
    return list(wanted)


def repacked(weight: Any, values: Tensor, name: str) -> Any:
    """`values` (the full shape, floats) quantized as `weight` is. Raises `Unsupported` for any other packing."""
    if type(weight).__name__ != "Params4bit":
        raise Unsupported(f"'{name}' is packed as {type(weight).__name__}; only 4-bit weights can be quantized anew.")
    options = {k: getattr(weight, k) for k in ("compress_statistics", "quant_type", "blocksize", "quant_storage")}
    state = weight.quant_state
    dense = values.to("cpu", state.dtype if state is not None else torch.float32)
    return type(weight)(dense, requires_grad=False, **options).to(weight.device)
