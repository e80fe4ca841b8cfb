"""State-dict algebra without models in memory: lazy readers, sums and differences, exact order statistics, a writer.

A *state* is a mapping from names to tensors: a plain state dict, or a `StateReader` over safetensors files, which reads
a tensor when it is asked for. A *stream* is an iterator of (name, tensor). Whoever writes arithmetic over states takes
readers and yields a stream, so that a few tensors are in memory at a time; `write_state` puts a stream on the disk as
shards, tensor by tensor. Half-precision tensors are computed on in float32 and rounded once.

What this file does not know: layers, tasks, methods.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pegbox.errors import BadInput, Corrupt, did_you_mean
from pegbox.parts.files import staged_folder, write_json

__all__ = [
    "State",
    "StateReader",
    "check_alike",
    "computed_in",
    "difference",
    "ema_",
    "interpolate",
    "l1_norm",
    "magnitude_threshold",
    "weighted_sum",
    "write_state",
]

State = Mapping[str, Tensor]
Stream = Iterator[tuple[str, Tensor]]


class StateReader(Mapping[str, Tensor]):
    """The tensors of safetensors files, read on access (memory-mapped: reading costs no copy).

    Args:
        source: a .safetensors file, a folder with one, with an index, or with several shards.

    Raises:
        BadInput: nothing there, or only pickles.
        Corrupt: a file that is damaged, or an index that names what isn't there.
    """

    def __init__(self, source: Path | str):
        self.source = Path(source)
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        for path in _shards(self.source):
            try:
                self._files[path] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise Corrupt(f"{path} is truncated or damaged ({error}). Get the file again.") from error
            for name in self._files[path].offset_keys():
                self._where[name] = path

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._where:
            raise KeyError(name)
        return self._files[self._where[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())


def _shards(source: Path) -> list[Path]:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise BadInput(f"{source} is not a safetensors file. Convert it (save_pretrained writes safetensors).")
        return [source]
    index = source / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (source / name).is_file()]
        if absent:
            raise Corrupt(f"{index} names {absent[0]}, which is not in the folder. Get the missing shard.")
        return [source / name for name in names]
    found = sorted(source.glob("*.safetensors"))
    if not found:
        pickles = [p.name for p in source.glob("*.bin")] if source.is_dir() else []
        said = f"It holds only pickles ({pickles[0]}). " if pickles else ""
        raise BadInput(f"No safetensors file at {source}. {said}Give a .safetensors file or a folder with some.")
    return found


# ---- arithmetic


def computed_in(*dtypes: torch.dtype) -> torch.dtype:
    """What tensors of these dtypes are computed in: float32, or float64 where one is."""
    result = torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype) if dtype.is_floating_point else result
    return result


def check_alike(base: State, other: State, what: str = "the tuned model", skip: Iterable[str] = ()) -> None:
    """The same names and shapes, or a `BadInput` that names the first difference. `skip`: names with other shapes."""
    missing, extra = set(base) - set(other), set(other) - set(base)
    if missing or extra:
        name = min(missing or extra)
        where, near = (what, other) if missing else ("the base", base)
        raise BadInput(
            f"'{name}' is not in {where}.{did_you_mean(name, list(near)[:200])} Give two states of one model."
        )
    skipped = set(skip)
    for name in base:
        ours, theirs = _shape(base, name), _shape(other, name)
        if ours != theirs and name not in skipped:
            raise BadInput(f"'{name}' is {ours} in the base and {theirs} in {what}. Give two states of one model.")


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """tuned - base, in float32 (float64 for float64)."""
    dtype = computed_in(tuned.dtype, base.dtype)
    return tuned.to(dtype) - base.to(dtype)


def interpolate(base: Tensor, tuned: Tensor, amount: float) -> Tensor:
    """base + amount (tuned - base) in the base's dtype: exactly `base` at 0 and exactly `tuned` at 1."""
    if amount == 0.0:
        return base
    if amount == 1.0:
        return tuned.to(base.dtype)
    if base.dtype == tuned.dtype:
        return torch.lerp(base, tuned, amount)  # torch computes halves in float32 and rounds once
    dtype = computed_in(base.dtype, tuned.dtype)
    return torch.lerp(base.to(dtype), tuned.to(dtype), amount).to(base.dtype)


def weighted_sum(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """sum of weight * tensor, added up one at a time in float32 (float64 for float64)."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        part = tensor.to(computed_in(tensor.dtype))
        total = part * weight if total is None else total.add_(part, alpha=weight)
    if total is None:
        raise BadInput("A sum of no tensors: give at least one model.")
    return total


def ema_(average: Mapping[str, Tensor], new: State, decay: float) -> None:
    """average <- decay * average + (1 - decay) * new, in place; integers are taken over."""
    for name, tensor in average.items():
        if tensor.is_floating_point():
            tensor.lerp_(new[name].to(tensor.dtype), 1.0 - decay)
        else:
            tensor.copy_(new[name])


def l1_norm(tensors: Iterable[Tensor]) -> float:
    """Sum of magnitudes over all tensors, added up in float64."""
    return sum(float(t.abs().sum(dtype=torch.float64)) for t in tensors)


def magnitude_threshold(stream: Callable[[], Iterable[Tensor]], rank: int) -> float:
    """The `rank`-th smallest magnitude (from 1) over all numbers of a stream, exactly, in any amount of numbers.

    Magnitudes of IEEE numbers sort like their bits read as integers, so the answer is found 16 bits at a time from
    histograms: two passes for float32, four for float64, and never more than one tensor in memory.

    Args:
        stream: gives the tensors, anew at each call; all float32 or all float64.
    """
    prefix, shift, double = 0, None, False
    while shift is None or shift > 0:
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tensor in stream():
            double = tensor.dtype == torch.float64
            bits = tensor.abs().flatten().view(torch.int64 if double else torch.int32)
            if shift is not None:
                bits = bits[(bits >> shift) == prefix]
            at = (48 if double else 16) if shift is None else shift - 16
            counts += torch.bincount(((bits >> at) & 0xFFFF).long(), minlength=1 << 16)
        total = int(counts.sum())
        if not 1 <= rank <= total:
            raise BadInput(f"The magnitude of rank {rank} was asked for among {total} numbers.")
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, rank))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << 16) | digit
        shift = (48 if double else 16) if shift is None else shift - 16
    integer = torch.tensor(prefix, dtype=torch.int64 if double else torch.int32)
    return float(integer.view(torch.float64 if double else torch.float32))


def _shape(state: State, name: str) -> tuple[int, ...]:
    return state.shape(name) if isinstance(state, StateReader) else tuple(state[name].shape)


# ---- writing


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class _Shard:
    """One safetensors file, written tensor by tensor: room for the header is kept and filled at the end."""

    def __init__(self, path: Path, room: int):
        self.path, self.room = path, (room + 7) // 8 * 8
        self.file = path.open("wb")
        self.file.seek(8 + self.room)
        self.entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self.file.write(data.numpy().data)
        span = [self.size, self.size + data.numel()]
        self.entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        self.size = span[1]

    def close(self) -> None:
        header = json.dumps(self.entries, separators=(",", ":")).encode()
        assert len(header) <= self.room, "the room kept for the header was too small"
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()


def write_state(
    stream: Iterable[tuple[str, Tensor]], folder: Path, names: Iterable[str], *, max_shard_bytes: int = 5 << 30
) -> list[Path]:
    """Write a stream as safetensors shards with transformers' names and index, one tensor in memory at a time.

    Args:
        stream: every name of `names` once, in any order.
        folder: made whole or not at all; a folder that stands there is replaced.
        max_shard_bytes: a shard is closed before it would grow beyond this.

    Raises:
        BadInput: a name missing, unexpected or given twice, a dtype that safetensors doesn't know, no write permission.
        RunFailed: the disk is full.
    """
    expected = set(names)
    room = sum(len(json.dumps(name)) + 120 for name in expected) + 64
    placed: dict[str, int] = {}
    total = 0
    with staged_folder(folder) as staged, ExitStack() as stack:
        shards: list[_Shard] = []
        for name, tensor in stream:
            _check_entry(name, tensor, expected, placed)
            nbytes = tensor.numel() * tensor.element_size()
            if not shards or _is_full(shards[-1], tensor, nbytes, max_shard_bytes):
                shards.append(_Shard(staged / f"part-{len(shards)}", room))
                stack.callback(shards[-1].file.close)
            shards[-1].add(name, tensor)
            placed[name] = len(shards) - 1
            total += nbytes
        if missing := expected - set(placed):
            raise BadInput(f"'{min(missing)}' was to be written and never came ({len(missing)} such tensors).")
        files = _named(shards, staged)
        if len(files) > 1:
            weight_map = {name: files[i] for name, i in placed.items()}
            write_json(
                staged / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
    return [folder / name for name in files]


def _is_full(shard: _Shard, tensor: Tensor, nbytes: int, most: int) -> bool:
    """No room left, or the next tensor would start at an address that its dtype can't be read from."""
    return (shard.size > 0 and shard.size + nbytes > most) or shard.size % tensor.element_size() != 0


def _named(shards: list[_Shard], folder: Path) -> list[str]:
    n = len(shards)
    names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for shard, name in zip(shards, names, strict=True):
        shard.close()
        os.replace(shard.path, folder / name)
    return names


def _check_entry(name: str, tensor: Tensor, expected: set[str], placed: Mapping[str, int]) -> None:
    if name not in expected or name in placed:
        raise BadInput(f"'{name}' came {'twice' if name in placed else 'without being expected'} in a stream to write.")
    if tensor.dtype not in _DTYPES:
        raise BadInput(f"'{name}' is {tensor.dtype}, which safetensors can't hold.")
