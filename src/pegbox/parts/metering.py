"""Measuring what a piece of training uses: FLOPs, bytes that autograd saves, memory, parameters, optimizer state.

FLOPs are those of matrix products, convolutions and attention, 2 per multiply-add, recomputation under checkpointing
included. Saved bytes are the peak of what autograd holds for backward, parameters and buffers left out, shared storages
counted once; under non-reentrant checkpointing the recomputation's own peak is not seen. Both are counts: they do not
depend on the machine, and hold on the meta device too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FlopMeter",
    "SavedBytes",
    "flop_formulas",
    "machine",
    "measuring_flops",
    "memory_now",
    "optimizer_state_bytes",
    "parameter_counts",
    "saved_bytes",
    "tensor_bytes",
]


@dataclass
class FlopMeter:
    """FLOPs counted so far; read `total` inside or after the context."""

    total: int = 0


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of scaled dot-product attention, shapes (B, H, T, d): both products over all pairs."""
    b, h, t, d = query
    return 2 * b * h * t * key[-2] * (d + value[-1])


def _cpu_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Five products: the scores again, and the gradients of weights, query, key, value."""
    b, h, t, d = query
    return 2 * b * h * t * key[-2] * (3 * d + 2 * value[-1])


def _registry() -> dict[Any, Any]:
    """torch's formulas by operation, and the CPU's fused attention, which torch's counter does not know."""
    from torch.utils.flop_counter import flop_registry, shape_wrapper

    aten, known = torch.ops.aten, dict(flop_registry)
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", _cpu_attention),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_attention_backward),
    ):
        if hasattr(aten, name):
            known[getattr(aten, name)] = shape_wrapper(formula)
    return known


def flop_formulas() -> dict[Any, Any]:
    """Operation (an overload packet) -> function of its arguments and `out_val` that gives its FLOPs."""
    return _registry()


class _Counter(TorchDispatchMode):
    """Adds up formulas of what is run. Unlike torch's own counter it sets no hooks on modules, whose presence makes
    `torch.autograd.grad` inside a forward fail."""

    def __init__(self, meter: FlopMeter):
        super().__init__()
        self.meter, self.known = meter, _registry()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.known.get(getattr(func, "_overloadpacket", None))
        if formula is None and hasattr(func, "decompose") and func is not torch.ops.prim.device.default:
            with self:
                inner = func.decompose(*args, **kwargs)
            if inner is not NotImplemented:
                return inner
        out = func(*args, **kwargs)
        if formula is not None:
            self.meter.total += int(formula(*args, **kwargs, out_val=out))
        return out


@contextmanager
def measuring_flops() -> Iterator[FlopMeter]:
    """Count the FLOPs of everything inside."""
    meter = FlopMeter()
    with _Counter(meter):
        yield meter


@dataclass
class SavedBytes:
    """Bytes that autograd holds now, and at most so far."""

    now: int = 0
    peak: int = 0

    def add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class _Hold:
    """Lives as long as one saved tensor; gives its bytes back when the last holder of a storage goes."""

    __slots__ = ("book", "keys")

    def __init__(self, book: _Book, keys: list[int]):
        self.book, self.keys = book, keys

    def __del__(self) -> None:
        for key in self.keys:
            self.book.release(key)


class _Book:
    """Reference counts by storage."""

    def __init__(self, reading: SavedBytes, skip: set[int]):
        self.reading, self.skip = reading, skip
        self.holders: dict[int, list[int]] = {}  # storage -> [count, bytes]

    def take(self, tensor: Tensor) -> _Hold:
        keys = []
        for part in _parts(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            if key in self.skip:
                continue
            entry = self.holders.setdefault(key, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                self.reading.add(entry[1])
            keys.append(key)
        return _Hold(self, keys)

    def release(self, key: int) -> None:
        entry = self.holders[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.reading.now -= entry[1]
            del self.holders[key]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that a tensor is made of (sparse layouts have no storage of their own)."""
    match tensor.layout:
        case torch.strided:
            return [tensor]
        case torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        case torch.sparse_csr | torch.sparse_bsr:
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        case torch.sparse_csc | torch.sparse_bsc:
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


@contextmanager
def saved_bytes(*models: nn.Module) -> Iterator[SavedBytes]:
    """Watch what autograd saves inside, the models' own parameters and buffers left out."""
    skip = set()
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            skip |= {part.untyped_storage()._cdata for part in _parts(tensor.detach())}
    reading = SavedBytes()
    book = _Book(reading, skip)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t, book.take(t)), lambda pair: pair[0]):
        yield reading


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's content, whatever its layout."""
    return sum(part.numel() * part.element_size() for part in _parts(tensor))


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""

    def walk(value: Any) -> int:
        if isinstance(value, Tensor):
            return tensor_bytes(value)
        if isinstance(value, dict):
            return sum(walk(v) for v in value.values())
        if isinstance(value, list | tuple):
            return sum(walk(v) for v in value)
        return 0

    return sum(walk(state) for state in optimizer.state.values())


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters, tied ones once; 4-bit weights are counted unpacked."""
    trained = total = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        count = math.prod(state.shape) if state is not None else p.numel()
        total += count
        trained += count if p.requires_grad else 0
    return trained, total


def memory_now(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident size on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def machine() -> str:
    """The machine's name for a report: GPU, or processor and cores."""
    import os
    import platform

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
