"""Tuned entries on disk, with what they were tuned on, and used at any strength.

    P = P0 + sum_i a_i (P_i - P0)         a single a = 1 gives the tuned entries, all a = 0 the base, both bit for bit

One safetensors file: values with their positions; or, `compact`, values alone, where the positions follow from the base
({|P0| < theta}). A digest of the base's entries goes with it, so that another base is refused. Source of the strengths:
arXiv:2409.06633, section 4.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts import deltas
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.indexsets import locate, union
from pegbox.parts.thresholds import below

__all__ = ["base_digest", "load_values", "mixed", "save_values"]


def base_digest(base: Delta) -> str:
    """sha256 over names, shapes, positions and bytes of the base's entries."""
    total = hashlib.sha256()
    for name in sorted(base):
        piece = base[name]
        total.update(json.dumps([name, list(piece.shape), str(piece.values.dtype)]).encode())
        total.update(piece.positions().to("cpu", torch.int64).numpy().tobytes())
        total.update(piece.values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_values(
    tuned: Delta, base: Delta, path: Path, *, theta: float | None = None, exclude_zeros: bool = False
) -> None:
    """Write tuned entries (mode "set") and the digest of the same entries of the base.

    theta: leave the positions out; they must be exactly those below it in the base.
    """
    meta = {"base": base_digest(base)}
    if theta is None:
        deltas.save(tuned, path, meta)
        return
    bare = Delta({n: Piece((p.values.numel(),), p.values, None, "set") for n, p in tuned.items()})
    shapes = {name: list(piece.shape) for name, piece in tuned.items()}
    deltas.save(bare, path, {**meta, "theta": repr(theta), "zeros": str(exclude_zeros), "shapes": json.dumps(shapes)})


def load_values(
    paths: Path | Sequence[Path], tensors: Mapping[str, Tensor], strengths: float | Sequence[float] = 1.0
) -> deltas.Undo:
    """Write one file's entries, or a mixture of several, into the base's tensors by name; `deltas.revert` undoes it.

    Raises `WrongBase` for another base or other shapes, `Corrupt` for a file that can't be read.
    """
    several = [paths] if isinstance(paths, Path) else list(paths)
    factors = [float(strengths)] if isinstance(strengths, int | float) else [float(a) for a in strengths]
    if len(several) != len(factors):
        raise BadInput(f"{len(several)} files but {len(factors)} strengths.")
    return deltas.apply(mixed([_read(path, tensors) for path in several], factors, tensors), tensors)


def mixed(several: Sequence[Delta], strengths: Sequence[float], tensors: Mapping[str, Tensor]) -> Delta:
    """P0 + sum_i a_i (P_i - P0) at every entry that one of the differences (mode "set") touches."""
    acting = [(delta, a) for delta, a in zip(several, strengths, strict=True) if a != 0]
    if len(acting) == 1 and acting[0][1] == 1:
        return acting[0][0]
    result = Delta()
    for name in dict.fromkeys(name for delta, _ in acting for name in delta):
        pieces = [(delta[name], a) for delta, a in acting if name in delta]
        index = pieces[0][0].positions()
        for piece, _ in pieces[1:]:
            index = union(index, piece.positions())
        before = tensors[name].detach().reshape(-1)[index.long().to(tensors[name].device)].cpu()
        values = before.double()
        for piece, a in pieces:
            at = locate(piece.positions(), index)
            values[at] += a * (piece.values.double() - before.double()[at])
        result[name] = Piece(pieces[0][0].shape, values.to(before.dtype), index, "set")
    return result


def _read(path: Path, tensors: Mapping[str, Tensor]) -> Delta:
    delta = deltas.load(path)
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata() or {}
    if "base" not in meta:
        raise Corrupt(f"{path} says nothing of the base that its values belong to.")
    if "theta" in meta:
        delta = _with_positions(delta, meta, tensors, path)
    held = Delta()
    for name, piece in delta.items():
        if name not in tensors or tuple(tensors[name].shape) != piece.shape:
            raise WrongBase(f"{path} holds entries of '{name}' {piece.shape}, which this model does not have.")
        flat = tensors[name].detach().reshape(-1)
        at = piece.positions().long().to(flat.device)
        held[name] = Piece(piece.shape, flat[at].cpu(), piece.index, "set")
    if base_digest(held) != meta["base"]:
        raise WrongBase(f"{path} was tuned on another base: the entries it changes are not those of this model.")
    return delta


def _with_positions(delta: Delta, meta: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> Delta:
    result, shapes = Delta(), json.loads(meta["shapes"])
    for name, piece in delta.items():
        if name not in tensors or list(tensors[name].shape) != shapes[name]:
            raise WrongBase(f"{path} holds entries of '{name}' {shapes[name]}, which this model does not have.")
        index = below(tensors[name], float(meta["theta"]), exclude_zeros=meta["zeros"] == "True", where=name).cpu()
        if index.numel() != piece.values.numel():
            raise WrongBase(f"{path} was tuned on another base: '{name}' has {index.numel()} entries below theta.")
        result[name] = Piece(tuple(shapes[name]), piece.values.reshape(-1), index, "set")
    return result
