"""An adapter's update read from its files, cut to a smaller model, and handed on as first values of the next adapter.

    W + s (B A + S2):   A (r, n), B (m, r), S2 as positions and values

A preparation that changes the base under a finished adapter (pruning) reads what was learnt, and leaves it on the model
for the tuner that is attached next. Reads adapters of ours (a sparse layer with a low-rank site) and PEFT's LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.files import read_json

__all__ = ["Update", "carried", "carry", "read_updates", "take"]

_ATTRIBUTE = "_pegbox_carried"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Update:
    """Of one matrix (m, n). `a`, `b` or `index`, `values` may be None; `scale` multiplies both parts."""

    shape: tuple[int, int]
    scale: float
    a: Tensor | None = None
    b: Tensor | None = None
    index: Tensor | None = None
    values: Tensor | None = None

    def low_rank(self) -> Tensor:
        """(m, n) s B A."""
        if self.a is None or self.b is None:
            return torch.zeros(self.shape)
        return self.scale * (self.b.double() @ self.a.double()).to(self.b.dtype)

    def sparse(self) -> Tensor:
        """(m, n) s S2."""
        dense = torch.zeros(self.shape, dtype=self._dtype())
        if self.index is not None and self.values is not None:
            dense.view(-1)[self.index.long()] = self.scale * self.values
        return dense

    def dense(self) -> Tensor:
        return self.low_rank().to(self._dtype()) + self.sparse()

    def without(self, axis: int, positions: Tensor) -> Update:
        """The update of the matrix without these rows (axis 0) or columns (axis 1)."""
        keep = torch.ones(self.shape[axis], dtype=torch.bool)
        keep[positions] = False
        new = replace(self, shape=(int(keep.sum()), self.shape[1]) if axis == 0 else (self.shape[0], int(keep.sum())))
        if self.a is not None and self.b is not None:
            new = replace(new, b=self.b[keep]) if axis == 0 else replace(new, a=self.a[:, keep])
        if self.index is None or self.values is None:
            return new
        at = torch.stack([self.index.long() // self.shape[1], self.index.long() % self.shape[1]])
        inside = keep[at[axis]]
        moved = (keep.cumsum(0) - 1)[at[axis][inside]]
        rows, columns = (moved, at[1][inside]) if axis == 0 else (at[0][inside], moved)
        return replace(new, index=(rows * new.shape[1] + columns).to(self.index.dtype), values=self.values[inside])

    def _dtype(self) -> torch.dtype:
        held = [t for t in (self.a, self.values) if t is not None]
        return held[0].dtype if held else torch.float32


def read_updates(artefact: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Update]:
    """Updates by module name, of the last adapter in an artefact folder (or of an adapter folder itself).

    shapes: of the base's weights by parameter name. Raises `BadInput` where there is no such adapter, `Corrupt` for
    tensors that don't belong together.
    """
    folder = _adapter_folder(artefact)
    config, tensors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for ending, name in _NAMES.items():
            if key.endswith(ending):
                found.setdefault(key.removeprefix(_PREFIX).removesuffix(ending), {})[name] = tensor
    if not found:
        raise BadInput(f"{folder} holds no low-rank or sparse update (it is a '{config.get('peft_type')}' adapter).")
    return {module: _update(module, parts, config, shapes) for module, parts in found.items()}


_NAMES = {
    ".sparse_sites.0.A": "a",
    ".sparse_sites.0.B": "b",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".sparse_weight_index": "index",
    ".sparse_weight_values": "values",
}


def _update(
    module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Update:
    shape = shapes.get(f"{module}.weight")
    if shape is None or len(shape) != 2:
        raise Corrupt(f"The adapter has an update of '{module}', which is no matrix of this model.")
    if "r" in config and "lora_alpha" in config:
        rank = float(config["r"])
        scale = float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    else:
        scale = float(config.get("scale", 1.0))
    index = parts.get("index")
    if index is not None and index.ndim == 2:  # column numbers per row
        index = (index.long() + torch.arange(shape[0])[:, None] * shape[1]).flatten()
    return Update((shape[0], shape[1]), scale, parts.get("a"), parts.get("b"), index, parts.get("values"))


def _adapter_folder(artefact: Path) -> Path:
    if (artefact / "adapter_config.json").is_file():
        return artefact
    if not (artefact / "artefact.json").is_file():
        raise BadInput(f"{artefact} holds no finished adapter; tune first.")
    adapters = [p for p in read_json(artefact / "artefact.json")["parts"] if p["kind"] == "adapter"]
    if not adapters:
        raise BadInput(f"{artefact} holds no adapter to read an update from.")
    return artefact / str(adapters[-1]["path"])


# ---- handing over


def carry(model: nn.Module, updates: Mapping[str, Update]) -> None:
    """Leave first values on a bare model for the tuner that is attached next."""
    model.__dict__[_ATTRIBUTE] = dict(updates)


def carried(model: nn.Module) -> dict[str, Update]:
    """What waits on this model."""
    return model.__dict__.get(_ATTRIBUTE, {})


def take(model: nn.Module) -> dict[str, Update]:
    """What waits, taken up."""
    return model.__dict__.pop(_ATTRIBUTE, {})
