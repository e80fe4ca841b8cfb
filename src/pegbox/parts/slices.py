"""Updates of whole rows and columns: original numbers I and a dense block D per matrix, as files and in memory.

    W[:, I] += D  (axis 1),    W[I, :] += D  (axis 0),    of the weight as it is stored

An adapter's folder (PEFT's layout) holds I as int32 and D in float32 or bfloat16; `adapter_config.json` says the axis
and its length. Nothing here depends on how a model's units are arranged while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.indexsets import index_dtype

__all__ = ["Slice", "SliceSet", "adapter_folder", "fuse", "read_slices", "to_sparse_delta"]

KIND = "PEGBOX_SLICES"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Slice:
    """One matrix's update.

    Args:
        axis, length: of the stored weight. index: (n,) int64 original positions on it, in the order of `values`.
        values: the weight's shape with n in place of `length`.
        mode: "add" (differences) or "set" (the new weights themselves).
    """

    axis: int
    length: int
    index: Tensor
    values: Tensor
    mode: Literal["add", "set"] = "add"

    def __post_init__(self) -> None:
        index = self.index
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.length):
            raise BadInput(f"an update of position {int(index.max())} on an axis of {self.length}.")
        if index.unique().numel() != index.numel() or self.values.shape[self.axis] != index.numel():
            raise BadInput(f"{index.numel()} positions for a block {tuple(self.values.shape)}, or one stands twice.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight."""
        return tuple(self.length if axis == self.axis else n for axis, n in enumerate(self.values.shape))


class SliceSet(dict[str, Slice]):
    """Parameter name -> slice. `base` marks the model it was made on ("" if unknown), `name` is for messages."""

    def __init__(self, slices: Mapping[str, Slice] | None = None, base: str = "", name: str = ""):
        super().__init__(slices or {})
        self.base, self.name = base, name

    def entries(self) -> int:
        """How many weights it changes."""
        return sum(piece.values.numel() for piece in self.values())


# ---- files


def adapter_folder(place: Path) -> Path:
    """The folder with the adapter's files, given it, its artefact's or its run's. Raises `BadInput`."""
    for pattern in (CONFIG, f"*/{CONFIG}", f"artefact/*/{CONFIG}"):
        found = sorted(place.glob(pattern))
        if found:
            return found[-1].parent
    raise BadInput(f"'{place}' holds no adapter: {CONFIG} is neither there nor in an artefact below it.")


def read_slices(place: Path) -> SliceSet:
    """An adapter of rows and columns from its files. Raises `BadInput` if nothing is there, `Corrupt`."""
    folder = adapter_folder(place)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("peft_type") != KIND:
            raise BadInput(f"{folder} holds a '{config.get('peft_type')}' adapter, not one of rows and columns.")
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        mode: Any = "set" if config["coordinates"] == "absolute" else "add"
        found = SliceSet({}, config.get("base", ""), str(place))
        for module, (axis, length) in config["slices"].items():
            stem = f"{_PREFIX}{module}.slice_"
            found[f"{module}.weight"] = Slice(
                axis, length, tensors[stem + "index"].long(), tensors[stem + "values"], mode
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{folder} is no readable adapter of rows and columns ({error}).") from error
    return found


# ---- algebra


def fuse(adapters: Iterable[SliceSet], weights: Iterable[float] | None = None) -> SliceSet:
    """The (weighted) sum of adapters over one base; units that only one of them changes keep its values bit for bit.

    Raises:
        WrongBase: adapters of different bases, or of other shapes.
        Unsupported: values in absolute coordinates that overlap, or are to be weighted.
        BadInput: none given, or another number of weights.
    """
    several = list(adapters)
    factors = [1.0] * len(several) if weights is None else [float(w) for w in weights]
    if not several or len(factors) != len(several):
        raise BadInput(f"{len(several)} adapters and {len(factors)} weights can't be fused.")
    marks = {one.base: one.name for one in several if one.base}
    if len(marks) > 1:
        (a, b), (one, two) = list(marks)[:2], list(marks.values())[:2]
        raise WrongBase(f"'{one}' was made on base {a} and '{two}' on {b}; adapters of different bases can't be fused.")
    result = SliceSet({}, next(iter(marks), ""), " + ".join(one.name for one in several if one.name))
    for adapter, factor in zip(several, factors, strict=True):
        for name, piece in adapter.items():
            if piece.mode == "set" and factor != 1:
                raise Unsupported(f"'{name}' is stored as values, not as differences, so it can't be weighted.")
            scaled = piece if factor == 1 else replace(piece, values=piece.values * factor)
            result[name] = _sum(name, result[name], scaled) if name in result else scaled
    return result


def _sum(name: str, a: Slice, b: Slice) -> Slice:
    if (a.shape, a.axis) != (b.shape, b.axis):
        raise WrongBase(f"'{name}': slices along axis {a.axis} of {a.shape}, and along {b.axis} of {b.shape}.")
    shared = torch.isin(b.index, a.index)
    if (a.mode != b.mode) or (a.mode == "set" and bool(shared.any())):
        raise Unsupported(f"'{name}' is stored as values, not as differences, and both adapters change a unit of it.")
    values = torch.cat([a.values, b.values.index_select(a.axis, (~shared).nonzero().flatten()).to(a.values)], a.axis)
    index = torch.cat([a.index, b.index[~shared]])
    if bool(shared.any()):
        at = torch.tensor([int((index == i).nonzero()) for i in b.index[shared]])
        values = values.index_add(a.axis, at, b.values.index_select(a.axis, shared.nonzero().flatten()).to(values))
    return replace(a, index=index, values=values)


def to_sparse_delta(adapter: SliceSet) -> Delta:
    """As single entries: a difference that every other tool of differences takes."""
    delta = Delta()
    for name, piece in adapter.items():
        order, sizes = piece.index.argsort(), piece.shape
        at, rows = piece.index[order], torch.arange(sizes[0])
        flat = at[:, None] * sizes[1] + torch.arange(sizes[1]) if piece.axis == 0 else rows[:, None] * sizes[1] + at
        count = sizes[0] * sizes[1]
        values = piece.values.detach().cpu().index_select(piece.axis, order).reshape(-1)
        delta[name] = Piece(sizes, values, flat.reshape(-1).to(index_dtype(count)), piece.mode)
    return delta
