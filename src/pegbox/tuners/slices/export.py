"""A slices adapter as plain data: rows and columns by their original numbers, and the whole tuned weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.coupled import inverse, reordering_of
from pegbox.parts.slices import SliceSet
from pegbox.tuners.slices.model import slice_layers

__all__ = ["export_slices", "to_full_weights"]


def export_slices(model: Any, adapter: str = "default") -> SliceSet:
    """An adapter's update; fuse, switch and serve it, or `parts.slices.to_sparse_delta` it."""
    layers = {n: layer for n, layer in slice_layers(model).items() if adapter in layer.slice_values}
    if not layers:
        raise BadInput(f"The model has no slices adapter '{adapter}' to export.")
    base = model.peft_config[adapter].base
    return SliceSet({f"{n}.weight": layer.slice_of(adapter) for n, layer in layers.items()}, base, adapter)


@torch.no_grad()
def to_full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tuned model's tensors by the base's names, units in their original order; the model stays as it is."""
    anatomy = Anatomy.of(model)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers = slice_layers(model)
    merged = [layer for layer in layers.values() if layer.adapters_on() and not layer.merged]
    for layer in merged:
        layer.merge()
    try:
        found = {anatomy.canonical(n): t.detach().clone() for n, t in model.named_parameters() if ".slice_" not in n}
    finally:
        for layer in merged:
            layer.unmerge()
    done = reordering_of(bare)
    for name, (axis, index) in inverse(done.moves).items() if done is not None else ():
        found[name] = found[name].index_select(axis, index.to(found[name].device))
    return found
