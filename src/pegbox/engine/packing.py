"""Any nested state as tensors plus JSON, and back, bit for bit: what stands in for a pickle.

A tree of dicts, lists, tuples, tensors, numpy arrays and plain values becomes one flat dict of tensors (safetensors
holds them) and one JSON value in which a tensor's place is taken by a marker. Floats survive JSON exactly (Python
writes the shortest text that reads back equal), and so do NaN and infinities. Anything else (an arbitrary object) is
refused, because restoring it would need code to be run.

What this file does not know: optimizers, trainers, files.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pegbox.errors import Corrupt, Unsupported

__all__ = ["pack", "restore_random", "take_random", "unpack"]

_PLAIN = (bool, int, float, str, type(None))
_MARK = "__kind__"


def pack(tree: Any, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a tree into flat tensors (by path) and a JSON value. Raises `Unsupported` on what can't be kept."""
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(tree, name or "root", tensors)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _keep(value, path, tensors)
    if isinstance(value, np.ndarray):
        kept = _keep(_from_numpy(value), path, tensors)
        return {_MARK: "numpy", "dtype": str(value.dtype), "shape": list(value.shape), "of": kept}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype):
        return {_MARK: "dtype", "of": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        items = [[_pack(k, f"{path}.key", tensors), _pack(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        if all(isinstance(k, str) for k in value) and _MARK not in value:
            return dict(items)
        return {_MARK: "items", "of": items}
    if isinstance(value, tuple | list | set | frozenset):
        ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        packed = [_pack(v, f"{path}.{i}", tensors) for i, v in enumerate(ordered)]
        return packed if isinstance(value, list) else {_MARK: _sequence_name(value), "of": packed}
    raise Unsupported(
        f"The state at '{path}' is a {type(value).__name__}, which a checkpoint can't hold. Allowed: tensors, numpy "
        "arrays, numbers, strings, None, and dicts, lists, tuples and sets of them; return these from state_dict()."
    )


def _sequence_name(value: Any) -> str:
    return "tuple" if isinstance(value, tuple) else "set"


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    # torch has no unsigned types above 8 bits everywhere: keep the bytes
    return torch.from_numpy(np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.uint8).copy())


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if type(tensor) not in {Tensor, torch.nn.Parameter}:
        raise Unsupported(
            f"The tensor at '{path}' is a {type(tensor).__name__}; a checkpoint holds plain tensors only."
        )
    mark = {_MARK: "tensor", "name": path, "cpu": tensor.device.type == "cpu"}
    if tensor.layout is not torch.strided:
        raise Unsupported(f"The tensor at '{path}' has layout {tensor.layout}; store its indices and values instead.")
    while path in tensors:
        path += "'"
        mark["name"] = path
    tensors[path] = tensor.detach().to("cpu", copy=True).contiguous()
    return mark


def unpack(tensors: Mapping[str, Tensor], tree: Any, device: torch.device | str = "cpu") -> Any:
    """What `pack` was given; tensors that were not on the CPU go to `device`. Raises `Corrupt`."""
    if isinstance(tree, list):
        return [unpack(tensors, v, device) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if _MARK not in tree:
        return {k: unpack(tensors, v, device) for k, v in tree.items()}
    match tree[_MARK]:
        case "tensor":
            if tree["name"] not in tensors:
                raise Corrupt(f"The checkpoint's tensor '{tree['name']}' is missing.")
            found = tensors[tree["name"]].clone()
            return found if tree["cpu"] else found.to(device)
    inner = unpack(tensors, tree["of"], device)
    match tree[_MARK]:
        case "numpy":
            return _to_numpy(inner, tree)
        case "dtype":
            return getattr(torch, inner)
        case "items":
            return dict(inner)
        case "tuple":
            return tuple(inner)
        case "set":
            return set(inner)
    raise Corrupt(f"The checkpoint holds an unknown kind of value: {tree[_MARK]!r}.")


def _to_numpy(raw: Tensor, tree: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(raw.numpy().tobytes(), dtype=np.dtype(tree["dtype"])).reshape(tree["shape"]).copy()


def take_random() -> dict[str, Any]:
    """The state of every global generator of this process: Python, numpy, torch, and the GPUs if there are any."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    """Put back what `take_random` took."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
