"""Watching a tensor's gradient while only some of its entries train, in memory for a few candidates.

    first gradient G:  C = the k positions of largest |G|          later:  sum g, sum g^2 at C over updates

The micro-batches of one update are summed before they are squared. With several processes the first gradient is
averaged before C is chosen, so that C is the same everywhere, and each update's sum is averaged. A pass that must leave
no trace runs under `paused()`. What this does not know: layers, optimizers, why somebody watches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pegbox.parts.indexsets import top_entries

__all__ = ["Watch", "is_paused", "paused"]

_depth = 0


@contextmanager
def paused() -> Iterator[None]:
    """Backward passes in here are not watched: they repeat or probe a step, and are not part of one."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_paused() -> bool:
    """Whether gradients of now are to be left alone."""
    return _depth > 0


class Watch:
    """The gradient of one tensor at `count` candidates, over the updates since it was made.

    index: (k,) sorted candidates, None before the first gradient. total, square: (k,) sums over finished updates of the
    gradient and of its square; current: of the running update. samples: finished updates in which a gradient came.
    """

    def __init__(self, count: int, dtype: torch.dtype = torch.float32):
        self.count, self.dtype = count, dtype
        self.index: Tensor | None = None
        self.current = self.total = self.square = torch.empty(0, dtype=dtype)
        self.samples, self._seen = 0, False

    @torch.no_grad()
    def see(self, gradient: Tensor) -> None:
        """A gradient of the whole tensor, any shape."""
        if is_paused():
            return
        flat = gradient.detach().reshape(-1).to(self.dtype)
        if self.index is None:
            self._choose(flat)
        assert self.index is not None
        self._add(flat[self.index.long()])

    @torch.no_grad()
    def see_product(self, a: Tensor, b: Tensor) -> None:
        """A gradient a b of a matrix: a (m, N), b (N, n). Dense the first time only, and not kept."""
        if is_paused():
            return
        a, b = a.detach().to(self.dtype), b.detach().to(self.dtype)
        if self.index is None:
            self.see(a @ b)
        else:
            self._add(_sampled(self.index, a, b))

    def close(self) -> None:
        """The update is complete: take its sum into the statistics. Does nothing if no gradient came."""
        if self.index is None or not _any_rank(self._seen, self.index.device):
            return
        _average(self.current)
        self.total += self.current
        self.square.addcmul_(self.current, self.current)
        self.samples += 1
        self.current.zero_()
        self._seen = False

    def _choose(self, flat: Tensor) -> None:
        if _distributed():
            flat = flat.clone()
            _average(flat)
        self.index = top_entries(flat.abs(), min(self.count, flat.numel()))
        self.current, self.total, self.square = (
            torch.zeros(self.index.numel(), dtype=self.dtype, device=flat.device) for _ in range(3)
        )

    def _add(self, values: Tensor) -> None:
        self.current += values
        self._seen = True

    def nbytes(self) -> int:
        """Bytes held: a position and three sums per candidate."""
        held = (self.current, self.total, self.square, *(() if self.index is None else (self.index,)))
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        tensors = {"index": self.index, "current": self.current, "total": self.total, "square": self.square}
        return {**tensors, "samples": self.samples, "seen": self._seen, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index, self.count = state["index"], state["count"]
        self.current, self.total, self.square = (state[key] for key in ("current", "total", "square"))
        self.dtype, self.samples, self._seen = self.total.dtype, state["samples"], state["seen"]


def _sampled(index: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(a b) at the sorted flat `index` (k,)."""
    rows, columns = a.shape[0], b.shape[1]
    wide = index.long()
    crow = torch.searchsorted(wide, torch.arange(rows + 1, device=index.device) * columns)
    zeros = torch.zeros(index.numel(), dtype=a.dtype, device=index.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            crow.int(), (wide % columns).int(), zeros, size=(rows, columns), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, a, b, beta=0.0).values()


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _average(tensor: Tensor) -> None:
    if _distributed():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()


def _any_rank(flag: bool, device: torch.device) -> bool:
    if not _distributed():
        return flag
    seen = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(seen)
    return bool(seen > 0)
