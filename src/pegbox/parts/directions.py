"""Random directions that are never stored: regenerated from (seed, name) as often as they are needed.

    z = the direction of the whole parameter vector, made tensor by tensor

Two schemes. `sequential`: one generator per device walks the tensors in their order (the stream of the official MeZO
code, which seeds the global generator and calls `torch.normal` per tensor). `keyed`: each tensor has a generator of its
own, seeded from (seed, name), so tensors may be visited in any order, alone, or on different machines. Noise has the
dtype and the device of its tensor. It does not know what a direction is used for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pegbox.parts.context import seed_of

__all__ = ["SEED_LIMIT", "Directions", "Distribution", "Scheme", "check_directions"]

Scheme = Literal["sequential", "keyed"]
Distribution = Literal["gaussian", "rademacher", "sphere"]

SEED_LIMIT = 1_000_000_000  # seeds lie in [0, this), so that they fit 4 bytes
_PIECE = 1 << 18  # numbers drawn at a time on a CPU: small enough for the cache, a multiple of 16
_VECTOR = 16  # torch's CPU kernel draws normals in blocks of 16; pieces cut at other places would change the stream


def check_directions(params: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for tensors that noise can't be added to: none, integer, or sharded over processes."""
    if not params:
        raise ValueError("there is no tensor to move")
    for name, param in params.items():
        if not param.is_floating_point():
            raise ValueError(f"'{name}' is {param.dtype}: only floating tensors can be moved")
        if hasattr(param, "to_local"):
            raise ValueError(f"'{name}' is sharded over processes: every process would draw other noise")


@dataclass(frozen=True)
class Directions:
    """A family of directions.

    Args:
        scheme: sequential (the official stream) or keyed (any order).
        distribution: gaussian N(0, I) | rademacher (+1, -1) | sphere (uniform, radius sqrt(d)). All have E zz^T = I.
    """

    scheme: Scheme = "keyed"
    distribution: Distribution = "gaussian"

    def walk(self, seed: int, params: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, a writable piece of the tensor, the noise of that piece), in the order of `params`.

        On the sphere the noise must still be multiplied by `radius_factor(seed, params)`.
        """
        source = self._generators(seed)
        for name, param in params.items():
            generator = source(name, param.device)
            if param.device.type != "cpu" or not param.is_contiguous():
                yield name, param, self._noise(param.shape, param, generator)
                continue
            flat = param.view(-1)
            for start, stop in _pieces(flat.numel()):
                piece = flat[start:stop]
                yield name, piece, self._noise(piece.shape, piece, generator)

    def access(self, seed: int, params: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        """A function from a name to the whole noise of that tensor, equal to what `walk` gives, in any order.

        The sequential scheme has to walk through the noise once to learn where each tensor's begins.
        """
        source = self._generators(seed)
        starts: dict[str, Tensor] = {}
        if self.scheme == "sequential":
            for name, param in params.items():
                generator = source(name, param.device)
                starts[name] = generator.get_state()
                self._skip(param, generator)

        def noise(name: str) -> Tensor:
            param = params[name]
            generator = source(name, param.device)
            if starts:
                generator.set_state(starts[name])
            return self._noise(param.shape, param, generator)

        return noise

    def radius_factor(self, seed: int, params: Mapping[str, Tensor]) -> float:
        """What the noise is multiplied by: sqrt(d) / ||g|| on the sphere (one pass over the noise), else 1."""
        if self.distribution != "sphere":
            return 1.0
        squares = sum(float(z.double().square().sum()) for _, _, z in self.walk(seed, params))
        return math.sqrt(sum(p.numel() for p in params.values()) / squares)

    def _generators(self, seed: int) -> Callable[[str, torch.device], torch.Generator]:
        if self.scheme == "keyed":
            return lambda name, device: torch.Generator(device).manual_seed(seed_of(seed, name))
        made: dict[torch.device, torch.Generator] = {}

        def sequential(name: str, device: torch.device) -> torch.Generator:
            if device not in made:
                made[device] = torch.Generator(device).manual_seed(seed)
            return made[device]

        return sequential

    def _noise(self, shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
        if self.distribution == "rademacher":
            bits = torch.randint(0, 2, shape, generator=generator, dtype=like.dtype, device=like.device)
            return bits.mul_(2).sub_(1)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    def _skip(self, param: Tensor, generator: torch.Generator) -> None:
        if param.device.type != "cpu":
            self._noise(param.shape, param, generator)
            return
        for start, stop in _pieces(param.numel()):
            self._noise(torch.Size([stop - start]), param, generator)


def _pieces(numel: int) -> Iterator[tuple[int, int]]:
    """Cut [0, numel) at multiples of `_PIECE`; the last piece is never shorter than a block of the random kernel."""
    start = 0
    while numel - start >= _PIECE + _VECTOR:
        yield start, start + _PIECE
        start += _PIECE
    yield start, numel
