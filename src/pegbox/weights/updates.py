"""Task vectors that are computed when they are looked at: the difference of each tuned model from one base.

    tau_t = theta_t - theta_0

One tensor of one model is in memory at a time. Integer tensors (position ids) have no task vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.algebra import State, check_alike, computed_in, difference, magnitude_threshold

__all__ = ["Merged", "Updates"]


@dataclass(frozen=True)
class Merged:
    """A merged update, tensor by tensor, and the plain sum of task vectors that its size is measured against."""

    update: Callable[[str], Tensor]
    summed: Callable[[str], Tensor]


class Updates:
    """The task vectors of K tuned models over one base.

    Args:
        base, tuned: states of one model (lazy readers or plain dicts).
        ties: second name of a tied tensor -> first name; second names are left out.

    Raises:
        BadInput: no tuned model, other names or shapes, quantized tensors.
    """

    def __init__(self, base: State, tuned: Sequence[State], ties: Mapping[str, str] | None = None):
        if not tuned:
            raise BadInput("There is no tuned model to take an update from. Give at least one.")
        second = {name for name, first in (ties or {}).items() if first in base}
        self.base = _without(base, second)
        self.tuned = [_without(state, second) for state in tuned]
        for i, state in enumerate(self.tuned):
            check_alike(self.base, state, f"tuned model {i + 1}")
        self.names: list[str] = []
        for name in self.base:
            tensor = self.base[name]
            if tensor.is_floating_point() and tensor.element_size() >= 2:
                self.names.append(name)
            elif tensor.ndim >= 2 and tensor.dtype in _PACKED:
                raise BadInput(f"'{name}' is {tensor.dtype}: quantized weights have no update. Dequantize the model.")
        if not self.names:
            raise BadInput("The states hold no floating tensor, so there is nothing to combine.")

    @property
    def count(self) -> int:
        """K."""
        return len(self.tuned)

    @property
    def size(self) -> int:
        """d, the entries of one task vector."""
        return sum(self.base[name].numel() for name in self.names)

    def delta(self, task: int, name: str) -> Tensor:
        """tau_t of one tensor, in float32 (float64 for float64); new memory that the caller may write to."""
        return difference(self.tuned[task][name], self.base[name])

    def deltas(self, name: str) -> list[Tensor]:
        """tau_1 .. tau_K of one tensor."""
        return [self.delta(t, name) for t in range(self.count)]

    def threshold(self, task: int, keep: float) -> float:
        """Magnitude from which on entries of a task vector are kept, so that `keep` percent (and ties, and one) stay.

        The (d - int(d keep/100))-th smallest magnitude over the whole vector, as the official code has it.
        """
        kept = int(self.size * (keep / 100))
        if kept >= self.size:
            return 0.0
        dtype = computed_in(*(self.base[n].dtype for n in self.names))
        return magnitude_threshold(lambda: self._stream(task, dtype), self.size - kept)

    def trimmed(self, task: int, name: str, threshold: float) -> Tensor:
        """tau_t of one tensor with magnitudes below `threshold` set to zero."""
        delta = self.delta(task, name)
        return delta.masked_fill_(delta.abs() < threshold, 0.0)

    def _stream(self, task: int, dtype: torch.dtype) -> Iterator[Tensor]:
        for name in self.names:
            yield self.delta(task, name).to(dtype)


_PACKED = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}


class _Subset(Mapping[str, Tensor]):
    """A state without some of its names; still lazy."""

    def __init__(self, state: State, dropped: set[str]):
        self.state, self.dropped = state, dropped

    def __getitem__(self, name: str) -> Tensor:
        if name in self.dropped:
            raise KeyError(name)
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.state if name not in self.dropped)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _without(state: State, names: set[str]) -> Mapping[str, Any]:
    return _Subset(state, names) if names & set(state) else state
