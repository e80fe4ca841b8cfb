"""Where the tensors lie in a GGUF file, without reading its vocabulary into objects (gguf's own reader takes seconds).

    "GGUF" | version u32 | tensors u64 | keys u64 | (key, type, value)* | (name, dims, type, offset)* | padding | data

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

from pegbox.errors import Corrupt

__all__ = ["PackedTensor", "packed_tensors"]

_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
_UINT32, _STRING, _ARRAY = 4, 8, 9


class PackedTensor(NamedTuple):
    """One tensor: its quantization's name, its shape as stored, and the span of its bytes in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


def packed_tensors(path: Path) -> list[PackedTensor]:
    """The tensors of a GGUF file, in its order. Raises `Corrupt` if the file is none, or truncated."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _Cursor(data).tensors()
                size = len(data)
        except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise Corrupt(f"{path} is not a readable GGUF file ({error}). Copy or download it again.") from error
    if any(tensor.stop > size for tensor in found):
        raise Corrupt(f"{path} is truncated. Copy or download it again.")
    return found


class _Cursor:
    """Reads forward through the header."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return int(value)

    def string(self) -> str:
        length = self.number("<Q")
        text = self.data[self.at : self.at + length]
        self.at += length
        return text.decode()

    def skip(self, kind: int) -> None:
        """Pass over one value; arrays of fixed-size items in one step."""
        if kind == _STRING:
            length = self.number("<Q")  # moves the cursor, so it comes first
            self.at += length
        elif kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item in _FIXED:
                self.at += _FIXED[item] * count
            else:
                for _ in range(count):
                    self.skip(item)
        else:
            self.at += _FIXED[kind]
        if self.at > len(self.data):
            raise ValueError("it ends inside its header")

    def tensors(self) -> list[PackedTensor]:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        self.at = 4
        if (version := self.number("<I")) not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are known")
        count, keys = self.number("<Q"), self.number("<Q")
        alignment = 32
        for _ in range(keys):
            key, kind = self.string(), self.number("<I")
            if key == "general.alignment" and kind == _UINT32:
                alignment = self.number("<I")
            else:
                self.skip(kind)
        entries = [self.entry() for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        return [_placed(*entry, start) for entry in entries]

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset from the data's start)"""
        name, dims = self.string(), self.number("<I")
        shape = tuple(self.number("<Q") for _ in range(dims))
        return name, shape, self.number("<I"), self.number("<Q")


def _placed(name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> PackedTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    quantization = GGMLQuantizationType(kind)
    block, nbytes = GGML_QUANT_SIZES[quantization]  # values per block, bytes per block
    values = 1
    for n in shape:
        values *= n
    length = values // block * nbytes
    return PackedTensor(name, quantization.name, shape, start + offset, start + offset + length)
