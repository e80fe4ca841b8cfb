"""The fingerprint of a checkpoint: which base an artefact belongs to.

    fingerprint = "pb1-" + sha256(sorted lines "name dtype shape digest"),  digest = sha256 of the tensor's stored bytes

It is taken from the tensors as stored, before any cast, so it doesn't depend on the dtype, device or quantization a
model is later loaded with, nor on how the tensors are spread over files. Names are canonical: the base-model prefix is
left out, vocabulary matrices enter once and by content (tied heads are stored by some writers and not by others), and
buffers that are recomputed on loading don't count. Configuration files don't count either: every release of
transformers rewrites them.

Large tensors are hashed in pieces by several threads; the result is cached by the files' sizes and times.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pegbox.errors import Corrupt, PegboxError
from pegbox.models.cache import cache_dir
from pegbox.models.gguf_file import packed_tensors
from pegbox.parts.files import read_json, write_json

__all__ = [
    "checkpoint_files",
    "fingerprint_gguf",
    "fingerprint_model",
    "fingerprint_safetensors",
    "fingerprint_tensors",
]

_PIECE = 1 << 25  # bytes per piece; part of the definition, so it never changes under "pb1"
_PREFIX = re.compile(r"^(model|transformer|bert|roberta|gpt_neox|base_model)\.")
_VOCABULARY = re.compile(
    r"(^|\.)(lm_head|embed_out|embed_tokens|wte|word_embeddings|shared|decoder|token_embd|output)\.weight$"
)
_RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias|position_ids)$")
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
}

Read = Callable[[int, int], bytes | memoryview]  # (start, stop) -> bytes of a tensor


class _Stored(NamedTuple):
    """A tensor where it lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Read


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files in `folder`: the index's shards, or the single file; [] if there are none.

    Raises:
        Corrupt: the index names a shard that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        return [single] if single.exists() else []
    shards = sorted(set(read_json(index)["weight_map"].values()))
    for shard in shards:
        if not (folder / shard).exists():
            raise Corrupt(f"{index} names the shard {shard}, which is missing. Copy or download the model again.")
    return [folder / shard for shard in shards]


def fingerprint_safetensors(paths: Iterable[Path]) -> str:
    """Fingerprint of a checkpoint from its safetensors files. Raises `Corrupt` if one is truncated or malformed."""
    paths = sorted(paths)
    return _remembered(paths, lambda: _combine(t for path in paths for t in _safetensors(path)))


def fingerprint_gguf(path: Path) -> str:
    """Fingerprint of a GGUF file from its tensors as packed. Raises `Corrupt`."""
    return _remembered([path], lambda: _combine(_gguf(path)))


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of tensors in memory; equals that of the files they'd be stored in."""
    return _combine(_in_memory(name, tensor) for name, tensor in tensors.items())


def fingerprint_model(model: nn.Module) -> str:
    """The fingerprint of the checkpoint a bare model came from.

    Models that pegbox loaded carry it. For any other it is worked out from the state dict, which gives the
    checkpoint's only while the model is as stored (not cast, not quantized, nothing attached).
    """
    source = getattr(model, "pegbox_source", None)
    if source is not None:
        return str(source.fingerprint)
    return fingerprint_tensors(model.state_dict())


def _combine(tensors: Iterable[_Stored]) -> str:
    tensors = [t for t in tensors if not _is_recomputed(t)]
    pieces = [(t, start) for t in tensors for start in range(0, max(t.nbytes, 1), _PIECE)]
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        digests = pool.map(lambda item: _piece(*item), pieces)
        found: dict[int, list[bytes]] = {}
        for (tensor, _), digest in zip(pieces, digests, strict=True):
            found.setdefault(id(tensor), []).append(digest)
    lines = {_line(t, found[id(t)]) for t in tensors}  # a set: a tied matrix stored twice counts once
    return "pb1-" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _piece(tensor: _Stored, start: int) -> bytes:
    return hashlib.sha256(tensor.read(start, min(start + _PIECE, tensor.nbytes))).digest()


def _line(tensor: _Stored, digests: list[bytes]) -> str:
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()
    name = _PREFIX.sub("", tensor.name)
    if len(tensor.shape) == 2 and _VOCABULARY.search(name):
        name = "vocabulary"
    return f"{name} {tensor.dtype} {list(tensor.shape)} {digest.hex()}"


def _is_recomputed(tensor: _Stored) -> bool:
    causal_mask = tensor.name.endswith(".attn.bias") and len(tensor.shape) == 4  # GPT-2 stores its mask
    return causal_mask or _RECOMPUTED.search(tensor.name) is not None


def _safetensors(path: Path) -> list[_Stored]:
    """The entries of a safetensors file, after checking that the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if 8 + length > size:
            raise Corrupt(f"{path} is truncated or not a safetensors file. Copy or download it again.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise Corrupt(f"{path} has an unreadable header ({error}). Copy or download it again.") from error
    header.pop("__metadata__", None)
    start = 8 + length
    if start + max((entry["data_offsets"][1] for entry in header.values()), default=0) != size:
        raise Corrupt(f"{path} is {size} bytes long, not what its header says. Copy or download it again.")
    return [_entry(path, start, name, entry) for name, entry in header.items()]


def _entry(path: Path, start: int, name: str, entry: dict[str, Any]) -> _Stored:
    low, high = entry["data_offsets"]
    return _Stored(name, entry["dtype"], tuple(entry["shape"]), high - low, _reads(path, start + low))


def _gguf(path: Path) -> list[_Stored]:
    tensors = packed_tensors(path)
    return [_Stored(t.name, t.type, t.shape, t.stop - t.start, _reads(path, t.start)) for t in tensors]


def _reads(path: Path, offset: int) -> Read:
    def read(start: int, stop: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(offset + start)
            return file.read(stop - start)

    return read


def _in_memory(name: str, tensor: Tensor) -> _Stored:
    flat: Any = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())
    return _Stored(name, dtype, tuple(tensor.shape), flat.nbytes, _slices(flat))


def _slices(flat: Any) -> Read:
    return lambda start, stop: flat[start:stop]


def _remembered(paths: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave last time for files of the same place, size and times."""
    paths = [path.resolve() for path in paths]
    stats = {str(p): [p.stat().st_size, p.stat().st_mtime_ns, p.stat().st_ctime_ns] for p in paths}
    key = hashlib.sha256("\0".join(stats).encode()).hexdigest()[:32]
    note = cache_dir() / "fingerprints" / f"{key}.json"
    with suppress(PegboxError, KeyError, TypeError):
        known = read_json(note)
        if known["files"] == stats:
            return str(known["fingerprint"])
    fingerprint = compute()
    with suppress(PegboxError, OSError):  # a read-only cache costs time, nothing else
        write_json(note, {"files": stats, "fingerprint": fingerprint})
    return fingerprint
