"""Differences against a base, sparse or dense: apply and revert bit for bit, add, scale, compose, compare, save.

    add:   tuned[index] = (base[index] + value) rounded once to the base's dtype        set:   tuned[index] = value

`add` pieces compose with others over the same base; `set` pieces give a tuned tensor exactly, whatever the rounding. On
disk: one safetensors file, per tensor a sorted row-major flat position (int32, int64 where needed) and a float32 or
bfloat16 value; a dense piece has values only. What it does not do: know how a difference was trained.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pegbox.errors import BadInput, Corrupt, Unsupported, WrongBase, did_you_mean
from pegbox.parts.indexsets import check_index, everything, from_mask, intersect, locate, numel, overlap, union

__all__ = [
    "Delta",
    "Piece",
    "Undo",
    "add",
    "apply",
    "compose",
    "density",
    "difference",
    "intersection",
    "load",
    "overlaps",
    "revert",
    "save",
    "scale",
    "sign_conflicts",
]

FORMAT, VERSION = "pegbox.delta", 1
_ADDED: Any = WeakTensorKeyDictionary()  # tensor -> weak references to the pieces that stand on it


@dataclass(frozen=True)
class Piece:
    """One tensor's difference. index: (k,) sorted flat positions, None: dense. values: (k,) or the tensor's shape."""

    shape: tuple[int, ...]
    values: Tensor
    index: Tensor | None = None
    mode: Literal["add", "set"] = "add"

    def __post_init__(self) -> None:
        wanted = numel(self.shape) if self.index is None else self.index.numel()
        if self.values.numel() != wanted:
            raise BadInput(f"a difference of {self.values.numel()} values for {wanted} positions.")

    def positions(self) -> Tensor:
        """(k,) flat positions, also of a dense piece."""
        return everything(numel(self.shape)) if self.index is None else self.index


class Delta(dict[str, Piece]):
    """Tensor name -> piece."""

    def entries(self) -> int:
        """How many numbers it holds."""
        return sum(piece.values.numel() for piece in self.values())

    def nbytes(self) -> int:
        """Bytes of positions and values."""
        held = [tensor for piece in self.values() for tensor in (piece.values, piece.index) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@dataclass(frozen=True)
class Undo:
    """What `apply` overwrote: (tensor, positions or None, entries before), in order; and what it added to which."""

    steps: tuple[tuple[Tensor, Tensor | None, Tensor], ...]
    added: tuple[tuple[Tensor, Piece], ...] = ()


# ---- on a model's tensors


@torch.no_grad()
def apply(delta: Delta, tensors: Mapping[str, Tensor], *, strict: bool = True, again: bool = False) -> Undo:
    """Write a difference into tensors (parameters by name), in place. `revert` puts everything back bit for bit.

    Nothing is written if a name or shape does not fit (`WrongBase`), or if this very difference already stands on the
    tensors (`BadInput`), unless `again` allows it. strict=False leaves absent names out.
    """
    names = [name for name in delta if strict or name in tensors]
    for name in names:
        _check_place(name, delta[name], tensors)
        if not again and any(known() is delta[name] for known in _ADDED.get(tensors[name], ())):
            raise BadInput(
                f"This difference stands on '{name}' already; it would count twice. Revert it first, or say again=True."
            )
    steps: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for name in names:
        piece, tensor = delta[name], tensors[name].detach()
        if not tensor.is_contiguous():
            raise Unsupported(f"'{name}' is not contiguous in memory; a difference can't be written into it.")
        flat = tensor.view(-1)
        at = None if piece.index is None else piece.index.long().to(tensor.device)
        before = flat.clone() if at is None else flat[at]
        steps.append((tensor, at, before))
        after = _applied(before, piece.values.reshape(-1).to(tensor.device), piece.mode)
        if at is None:
            flat.copy_(after)
        else:
            flat.scatter_(0, at, after)
    added = tuple((tensors[name], delta[name]) for name in names if delta[name].mode == "add")
    for owner, one in added:
        _ADDED[owner] = [*_ADDED.get(owner, ()), weakref.ref(one)]
    return Undo(tuple(steps), added)


@torch.no_grad()
def revert(undo: Undo) -> None:
    """Put back what `apply` overwrote. Several applications are reverted in the opposite order."""
    for tensor, at, before in reversed(undo.steps):
        if at is None:
            tensor.view(-1).copy_(before)
        else:
            tensor.view(-1).scatter_(0, at, before)
    for owner, piece in undo.added:
        _ADDED[owner] = [known for known in _ADDED.get(owner, ()) if known() is not piece]


def _applied(before: Tensor, values: Tensor, mode: str) -> Tensor:
    if mode == "set":
        return values.to(before.dtype)
    wide = torch.promote_types(torch.float32, torch.promote_types(before.dtype, values.dtype))
    return (before.to(wide) + values.to(wide)).to(before.dtype)


def _check_place(name: str, piece: Piece, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise WrongBase(f"The difference changes '{name}', which is not in this model.{did_you_mean(name, tensors)}")
    if tuple(tensors[name].shape) != piece.shape:
        raise WrongBase(f"'{name}' has shape {tuple(tensors[name].shape)} here, {list(piece.shape)} in the difference.")


# ---- making one


def difference(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    mode: Literal["add", "set"] = "set",
    threshold: float = 0.0,
    names: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Delta:
    """What `tuned` changed, entry by entry, where |change| > threshold (at 0: where the bits differ in value).

    Values are in float32 (float64 where the base is), or `dtype`. `set` reproduces `tuned` exactly; `add` composes, and
    reproduces it exactly wherever the change is representable.
    """
    delta = Delta()
    for name in tuned if names is None else names:
        if name not in base or base[name].shape != tuned[name].shape:
            raise BadInput(f"'{name}' is not the same tensor in both models: {_shape_in(base, name)} before.")
        old, new = base[name].detach().reshape(-1), tuned[name].detach().reshape(-1)
        wide = torch.promote_types(torch.float32, old.dtype)
        change = new.to(wide) - old.to(wide)
        index = from_mask(change.abs() > threshold if threshold else new != old)
        if index.numel():
            values = (new if mode == "set" else change)[index.long()].to(dtype or wide)
            delta[name] = Piece(tuple(base[name].shape), values, index, mode)
    return delta


def _shape_in(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"shape {tuple(tensors[name].shape)}" if name in tensors else "absent"


# ---- algebra (over `add` pieces)


def add(a: Delta, b: Delta) -> Delta:
    """The sum of two differences over the same base."""
    result = Delta(a)
    for name, piece in b.items():
        result[name] = _add_pieces(name, a[name], piece) if name in a else piece
    return result


def _add_pieces(name: str, a: Piece, b: Piece) -> Piece:
    if a.shape != b.shape:
        raise BadInput(f"'{name}' has shape {list(a.shape)} in one difference and {list(b.shape)} in the other.")
    if "set" in (a.mode, b.mode):
        raise Unsupported(f"'{name}' is stored as values, not as a change, so two of them can't be added.")
    if a.index is None or b.index is None:
        return Piece(a.shape, (dense(a) + dense(b)).view(a.shape))
    index = union(a.index, b.index)
    values = torch.zeros(index.numel(), dtype=torch.promote_types(a.values.dtype, b.values.dtype))
    for piece in (a, b):
        assert piece.index is not None
        values[locate(piece.index, index)] += piece.values.to(values)
    return Piece(a.shape, values, index)


def scale(delta: Delta, factor: float) -> Delta:
    """factor times a difference."""
    for name, piece in delta.items():
        if piece.mode == "set" and factor != 1:
            raise Unsupported(f"'{name}' is stored as values, not as a change, so it can't be scaled.")
    return Delta({name: replace(piece, values=piece.values * factor) for name, piece in delta.items()})


def compose(deltas: Iterable[Delta], weights: Iterable[float] | None = None) -> Delta:
    """The weighted sum of differences over one base (any order gives the same up to rounding)."""
    several = list(deltas)
    factors = [1.0] * len(several) if weights is None else list(weights)
    if len(factors) != len(several):
        raise BadInput(f"{len(several)} differences but {len(factors)} weights.")
    result = Delta()
    for delta, factor in zip(several, factors, strict=True):
        result = add(result, delta if factor == 1 else scale(delta, factor))
    return result


def intersection(a: Delta, b: Delta) -> Delta:
    """`a` restricted to entries that `b` changes too."""
    result = Delta()
    for name in a.keys() & b.keys():
        index = intersect(a[name].positions(), b[name].positions())
        if index.numel():
            values = a[name].values.reshape(-1)[locate(index, a[name].positions())]
            result[name] = Piece(a[name].shape, values, index, a[name].mode)
    return result


def overlaps(a: Delta, b: Delta) -> dict[str, float]:
    """Per tensor in both: |common entries| / |entries of the smaller|."""
    return {name: overlap(a[name].positions(), b[name].positions()) for name in a if name in b}


def sign_conflicts(a: Delta, b: Delta) -> dict[str, float]:
    """Per tensor in both: the fraction of common entries that the two change in opposite directions."""
    found = {}
    for name in a:
        if name in b:
            common = intersect(a[name].positions(), b[name].positions())
            one, two = (p.values.reshape(-1)[locate(common, p.positions())] for p in (a[name], b[name]))
            found[name] = float((one * two < 0).double().mean()) if common.numel() else 0.0
    return found


def density(delta: Delta) -> float:
    """Changed entries over all entries of the tensors it touches."""
    total = sum(numel(piece.shape) for piece in delta.values())
    return delta.entries() / total if total else 0.0


def dense(piece: Piece) -> Tensor:
    """(n,) the change as a dense flat tensor, zeros elsewhere."""
    if piece.index is None:
        return piece.values.reshape(-1)
    flat = torch.zeros(numel(piece.shape), dtype=piece.values.dtype)
    flat[piece.index.long()] = piece.values
    return flat


# ---- files


def save(delta: Delta, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file."""
    tensors: dict[str, Tensor] = {}
    described = {}
    for name, piece in delta.items():
        described[name] = {"mode": piece.mode, "shape": list(piece.shape), "dense": piece.index is None}
        tensors[f"values:{name}"] = piece.values.detach().cpu().contiguous()
        if piece.index is not None:
            tensors[f"index:{name}"] = piece.index.detach().cpu().contiguous()
    meta = {**(metadata or {}), "format": FORMAT, "version": str(VERSION), "pieces": json.dumps(described)}
    save_file(tensors, str(path), metadata=meta)


def load(path: Path) -> Delta:
    """Read what `save` wrote; every position is checked. Raises `Corrupt`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT or meta.get("version") != str(VERSION):
                raise Corrupt(f"{path} is not a {FORMAT} file of version {VERSION}.")
            described = json.loads(meta["pieces"])
            return Delta({name: _read_piece(file, name, d) for name, d in described.items()})
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, BadInput) as error:
        raise Corrupt(f"{path} is not a readable difference file ({error}).") from error


def _read_piece(file: object, name: str, described: Mapping[str, object]) -> Piece:
    shape = tuple(int(n) for n in described["shape"])  # type: ignore[attr-defined]
    values = file.get_tensor(f"values:{name}")  # type: ignore[attr-defined]
    index = None if described["dense"] else file.get_tensor(f"index:{name}")  # type: ignore[attr-defined]
    if index is not None:
        check_index(index, numel(shape), name)
    if described["mode"] not in ("add", "set"):
        raise ValueError(f"unknown mode {described['mode']!r}")
    return Piece(shape, values.view(shape) if index is None else values, index, described["mode"])
