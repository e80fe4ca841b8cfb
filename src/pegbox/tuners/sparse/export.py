"""A sparse adapter as a difference file over every entry it ever trained; applied to the base it gives the tuned model
bit for bit."""

from __future__ import annotations

from typing import Any

from torch import nn

from pegbox.errors import BadInput
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.indexsets import index_dtype, numel
from pegbox.tuners.sparse.layer import TENSORS
from pegbox.tuners.sparse.model import sparse_layers
from pegbox.tuners.sparse.slots import touched

__all__ = ["export_delta"]


def export_delta(model: nn.Module, adapter: str = "default") -> Delta:
    """`set` pieces for absolute coordinates (the weights themselves), `add` pieces for delta coordinates."""
    import torch

    delta = Delta()
    for module_name, layer in sparse_layers(model).items():
        if adapter in layer.sparse_sites:
            raise BadInput(
                f"'{module_name}' has a module of its own, which is no difference in single entries. Merge the adapter"
                " and compare whole weights instead."
            )
        for tensor in TENSORS:
            if adapter not in layer._of(tensor, "values"):
                continue
            slot, shape = layer.slot(adapter, tensor), layer.shape_of(tensor)
            positions = touched(slot)
            order = positions.argsort()
            values = torch.cat([values.detach() for _, values in slot.parts()])[order].cpu()
            index = positions[order].to("cpu", index_dtype(numel(shape)))
            mode: Any = "set" if slot.absolute else "add"
            delta[f"{module_name}.{tensor}"] = Piece(shape, values, index, mode)
    if not delta:
        raise BadInput(f"The model has no sparse adapter '{adapter}' to export.")
    return delta
