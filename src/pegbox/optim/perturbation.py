"""Putting weights at w + offset * eps * z, and back: three ways, of different cost and exactness.

`in_place` adds and subtracts noise on the weights themselves: no memory beyond a piece of noise, but back is only back
up to rounding (harmless in float32; in bfloat16 the random walk of these errors is larger than the updates).
`exact` leaves the weights alone: while the model runs, every torch function that reads a trained tensor is given
w + offset * eps * z instead, made for that call and dropped after it; extra memory is the largest tensor.
`snapshot` keeps a copy of the trained weights. Exact and snapshot compute the same bits.

What none of them does: evaluate, choose a direction, or know why the weights move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pegbox.parts.directions import Directions
from pegbox.parts.parameterinfo import info_of, touch

__all__ = ["Exact", "InPlace", "Mover", "Restore", "Snapshot", "make_mover"]

Restore = Literal["in_place", "exact", "snapshot"]
Moves = list[tuple[int, float]]  # (seed, what its direction is multiplied by)


class Mover:
    """Moves `params` along seeded directions. One object serves one step; `settle` ends it.

    Args:
        params: trained tensors by name, in order.
        directions: where noise comes from.
        eps: length of a perturbation.
        model: its modules with a `touch()` method are told after every write.
    """

    def __init__(
        self, params: Mapping[str, Tensor], directions: Directions, eps: float, model: nn.Module | None = None
    ):
        self.params, self.directions, self.eps = dict(params), directions, eps
        self.listeners: list[Any] = []
        if model is not None:
            self.listeners = [m for m in model.modules() if callable(getattr(m, "touch", None))]

    def move(self, seed: int, offset: int) -> None:
        """From here on the model is seen at w + offset * eps * z(seed)."""
        raise NotImplementedError

    def home(self) -> None:
        """Back to w. Safe at any time, also after an interrupted move."""
        raise NotImplementedError

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model must be run inside this."""
        yield

    def missed(self) -> set[str]:
        """Tensors that the evaluation since `move` can't have seen moved. Then it has to be repeated."""
        return set()

    @torch.no_grad()
    def settle(self, moves: Moves, shrink: Mapping[str, float]) -> None:
        """Back to w, then w <- shrink[name] * w + sum of multiples of directions."""
        self.home()
        _step(self.params, self.directions, moves, shrink)
        self._tell()

    def _tell(self) -> None:
        touch(self.params.values())
        for module in self.listeners:
            module.touch()


class InPlace(Mover):
    """The official way: add to the weights, and take off again."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seed: int | None = None
        self.factor = 1.0
        self.reached: list[int] = []  # per piece of the walk, where it stands; more than one value inside a move only

    def move(self, seed: int, offset: int) -> None:
        if self.seed is not None and seed != self.seed:
            self.home()
        if self.seed is None:
            self.seed, self.factor = seed, self.directions.radius_factor(seed, self.params)
        self._go(offset)

    def home(self) -> None:
        if self.seed is not None:
            self._go(0)
            self.seed, self.reached = None, []

    @torch.no_grad()
    def _go(self, offset: int) -> None:
        assert self.seed is not None
        for i, (_, piece, z) in enumerate(self.directions.walk(self.seed, self.params)):
            if i == len(self.reached):
                self.reached.append(0)
            if self.reached[i] != offset:
                piece.add_(z, alpha=(offset - self.reached[i]) * self.eps * self.factor)
                self.reached[i] = offset
        self._tell()

    @torch.no_grad()
    def settle(self, moves: Moves, shrink: Mapping[str, float]) -> None:
        """One pass over the noise for the way back and the update of the direction that is still applied."""
        here = dict(moves).get(self.seed) if self.seed is not None else None
        if here is None or self.seed is None:
            super().settle(moves, shrink)
            return
        rest = [(seed, amount) for seed, amount in moves if seed != self.seed]
        for i, (name, piece, z) in enumerate(self.directions.walk(self.seed, self.params)):
            piece.add_(z, alpha=-self.reached[i] * self.eps * self.factor)
            self.reached[i] = 0
            _add(piece, z, here * self.factor, shrink.get(name, 1.0))
        self.seed, self.reached = None, []
        _step(self.params, self.directions, rest, {})
        self._tell()


class Snapshot(Mover):
    """A copy of the weights is kept while the step lasts."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.copies = {name: p.detach().clone() for name, p in self.params.items()}
        self.away = False

    @torch.no_grad()
    def move(self, seed: int, offset: int) -> None:
        self.home()
        if offset == 0:
            return
        self.away = True
        alpha = offset * self.eps * self.directions.radius_factor(seed, self.copies)
        for _, piece, z in self.directions.walk(seed, self.params):
            piece.add_(z, alpha=alpha)
        self._tell()

    @torch.no_grad()
    def home(self) -> None:
        if self.away:
            for name, copy in self.copies.items():
                self.params[name].copy_(copy)
            self.away = False
            self._tell()


class Exact(Mover):
    """The weights are never written to before the update.

    Tensors that torch functions can't be watched on are moved by copy instead: those of tuners that write their values
    into the base (`parameterinfo`) or have a `touch()` method, and, found at the first evaluation, those that reach
    the model by another way (custom autograd functions). `by_copy` carries that knowledge from step to step.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        directions: Directions,
        eps: float,
        model: nn.Module | None = None,
        by_copy: set[str] | None = None,
    ):
        super().__init__(params, directions, eps, model)
        self.by_copy = set() if by_copy is None else by_copy
        if model is not None:
            self.by_copy |= _names_below(self.listeners, self.params)
        self.by_copy |= {name for name, p in self.params.items() if info_of(p) is not None}
        self.copies = {n: self.params[n].detach().clone() for n in self.by_copy if n in self.params}
        self.away = False
        self.mode: _Shifted | None = None

    @torch.no_grad()
    def move(self, seed: int, offset: int) -> None:
        if offset == 0:
            self.home()
            return
        alpha = offset * self.eps * self.directions.radius_factor(seed, self._origin())
        noise = self.directions.access(seed, self._origin())
        self.mode = _Shifted({n: p for n, p in self.params.items() if n not in self.copies}, noise, alpha)
        self.away = bool(self.copies)
        for name, copy in self.copies.items():
            self.params[name].copy_(torch.add(copy, noise(name), alpha=alpha))
        if self.copies:
            self._tell()

    @torch.no_grad()
    def home(self) -> None:
        self.mode = None
        if self.away:
            for name, copy in self.copies.items():
                self.params[name].copy_(copy)
            self.away = False
            self._tell()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        if self.mode is None:
            yield
            return
        with self.mode:
            yield

    def missed(self) -> set[str]:
        unseen = set(self.mode.names.values()) - self.mode.seen if self.mode is not None else set()
        self.by_copy |= unseen
        self.copies.update({n: self.params[n].detach().clone() for n in unseen})
        return unseen

    def _origin(self) -> dict[str, Tensor]:
        return {name: self.copies.get(name, p) for name, p in self.params.items()}


class _Shifted(TorchFunctionMode):
    """Every torch function sees the shifted weights; asking for shapes and types costs no noise."""

    def __init__(self, params: Mapping[str, Tensor], noise: Any, alpha: float):
        super().__init__()
        self.names = {id(p): name for name, p in params.items()}
        self.noise, self.alpha = noise, alpha
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not _asks_only(func):
            args, kwargs = tree_map_only(Tensor, self._shift, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _shift(self, tensor: Tensor) -> Tensor:
        name = self.names.get(id(tensor))
        if name is None:
            return tensor
        self.seen.add(name)
        return torch.add(tensor.detach(), self.noise(name), alpha=self.alpha)


_QUESTIONS = frozenset(
    {"size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_floating_point", "is_complex"}
    | {"is_contiguous", "data_ptr", "storage_offset", "get_device", "untyped_storage", "is_pinned", "is_shared"}
    | {"__len__", "__hash__", "_is_view"}
)
_READING_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})


def _asks_only(func: Any) -> bool:
    """True for attribute look-ups and questions about a tensor's form, which the values play no part in."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _READING_PROPERTIES
    return name in _QUESTIONS


def make_mover(
    restore: Restore,
    params: Mapping[str, Tensor],
    directions: Directions,
    eps: float,
    model: nn.Module | None = None,
    by_copy: set[str] | None = None,
) -> Mover:
    """The mover of that name."""
    match restore:
        case "in_place":
            return InPlace(params, directions, eps, model)
        case "snapshot":
            return Snapshot(params, directions, eps, model)
        case "exact":
            return Exact(params, directions, eps, model, by_copy)


def _names_below(modules: list[Any], params: Mapping[str, Tensor]) -> set[str]:
    below = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in params.items() if id(p) in below}


def _step(params: Mapping[str, Tensor], directions: Directions, moves: Moves, shrink: Mapping[str, float]) -> None:
    """w <- shrink w + sum of amount * z(seed); the shrinking goes with the first direction, once."""
    for k, (seed, amount) in enumerate(moves):
        factor = directions.radius_factor(seed, params)
        for name, piece, z in directions.walk(seed, params):
            _add(piece, z, amount * factor, shrink.get(name, 1.0) if k == 0 else 1.0)


def _add(piece: Tensor, z: Tensor, amount: float, shrink: float) -> None:
    """piece <- shrink * piece + amount * z, rounded once for 16-bit weights."""
    if piece.dtype.itemsize <= 2:
        piece.copy_(piece.float().mul_(shrink).add_(z.float(), alpha=amount))
        return
    if shrink != 1.0:
        piece.mul_(shrink)
    piece.add_(z, alpha=amount)
