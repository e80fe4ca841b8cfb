"""The steepest point in a small ball around the weights, by projected gradient ascent with a step size that adapts.

    max over |d / c| <= rho of L(w + d),   c = |w| entry by entry (adaptive) or 1;   norm l-infinity or l2

    z = P(d + s g'),  d_next = 0.75 z + 0.25 d_before,   s starts at 2 rho and is halved at checkpoints where too few
    steps went up; then the gradient is taken at the best point so far, and d goes on from where it was.

This is the procedure of Andriushchenko et al. (arXiv:2302.07011, code `sharpness-vs-generalization`) after Croce and
Hein's Auto-PGD (arXiv:2003.01690), to the last digit; decision 0150 has its oddities. Weights are moved in place and
put back bit for bit. What it does not know: models, losses, layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pegbox.errors import BadInput

__all__ = ["Ball", "Peak", "checkpoints", "climb", "project", "random_move"]

Norm = Literal["linf", "l2"]
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Ball:
    """Where the weights may go: radius, norm, and whether it scales with the weights."""

    rho: float
    norm: Norm = "linf"
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise BadInput(f"rho must be finite and 0 or more, got {self.rho}.")
        if self.norm not in ("linf", "l2"):
            raise BadInput(f"Unknown norm '{self.norm}'. Known: linf, l2.")


@dataclass(frozen=True)
class Peak:
    """The highest loss found, the loss at the start, and the l2 norm of the move that led there (0: none did)."""

    start: float
    best: float
    moved: float
    forwards: int
    backwards: int

    @property
    def sharpness(self) -> float:
        """How much higher: never below 0."""
        return self.best - self.start


def checkpoints(steps: int) -> list[int]:
    """The steps at which the step size is looked at: gaps that shrink from 0.22 to 0.06 of the whole."""
    found: list[int] = []
    before, share = 0.0, 0.22
    while True:
        at = math.ceil(share * steps)
        if at >= steps or (found and at == found[-1]):
            return found
        found.append(at)
        before, share = share, share + max(share - before - 0.03, 0.06)


class _Moves:
    """The weights on their way: a copy of where they started, the move, the one before, and the best."""

    def __init__(self, weights: Sequence[Tensor], ball: Ball):
        self.weights, self.ball = list(weights), ball
        self.start = [w.detach().clone() for w in weights]
        self.move = [torch.zeros_like(w) for w in self.start]
        self.before = [torch.zeros_like(w) for w in self.start]
        self.best: list[Tensor] | None = None

    def scale(self, i: int) -> Tensor | None:
        """c of one tensor; None stands for 1."""
        return self.start[i].abs() if self.ball.adaptive else None

    def put(self, move: Sequence[Tensor] | None) -> None:
        """w + d into the weights; None: w."""
        for i, weight in enumerate(self.weights):
            if move is None:
                weight.copy_(self.start[i])
            else:
                torch.add(self.start[i], move[i], out=weight)

    def keep_best(self) -> None:
        if self.best is None:
            self.best = [m.clone() for m in self.move]
        else:
            for best, move in zip(self.best, self.move):
                best.copy_(move)

    def advance(self, gradients: Sequence[Tensor], step: float) -> None:
        """d_next = 0.75 P(d + step g') + 0.25 d_before, into the memory of d_before."""
        if self.ball.norm == "linf":
            for i, gradient in enumerate(gradients):
                self._mix(i, self._signed(i, gradient, step))
        else:
            for i, z in enumerate(self._projected(gradients, step)):
                self._mix(i, z)
        self.move, self.before = self.before, self.move

    def _mix(self, i: int, z: Tensor) -> None:
        self.before[i].mul_(0.25).add_(z, alpha=0.75)

    def _signed(self, i: int, gradient: Tensor, step: float) -> Tensor:
        scale, z = self.scale(i), gradient.sign()
        z = z.mul_(step) if scale is None else z.mul_(step).mul_(scale)
        z.add_(self.move[i])
        if scale is None:
            return z.clamp_(-self.ball.rho, self.ball.rho)
        limit = scale * self.ball.rho
        return torch.minimum(torch.maximum(z, -limit), limit)

    def _projected(self, gradients: Sequence[Tensor], step: float) -> list[Tensor]:
        size = float(_norm(gradients)) + 1e-12
        moved = []
        for i, gradient in enumerate(gradients):
            scale = self.scale(i)
            z = gradient * step if scale is None else gradient * step * scale
            moved.append(z.div_(size).add_(self.move[i]))
        scales = [self.scale(i) for i in range(len(moved))] if self.ball.adaptive else None
        return project(moved, self.ball.rho, scales)


def project(moves: Sequence[Tensor], rho: float, scales: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """The nearest point with |d| <= rho, or with |d / c| <= rho where scales c are given (entries with c = 0 stay 0).

    The ellipsoid's multiplier is found by bisection, until the norm is within 1e-5 of rho.
    """
    if scales is None:
        size = float(_norm(moves))
        return list(moves) if size <= rho else [m * (rho / size) for m in moves]
    held = [torch.where(c > 0, m, torch.zeros_like(m)) for m, c in zip(moves, scales) if c is not None]
    safe = [torch.where(c > 0, c, torch.ones_like(c)) for c in scales if c is not None]
    if float(_norm([m / c for m, c in zip(held, safe)])) <= rho:
        return held
    if rho == 0:
        return [torch.zeros_like(m) for m in held]

    def size_at(multiplier: float) -> float:
        return float(_norm([m / (c + 2 * multiplier / c) for m, c in zip(held, safe)]))

    low, high = 0.0, 1.0
    while size_at(high) > rho:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        size = size_at(middle)
        if abs(size - rho) <= 1e-5 * min(1.0, rho):
            break
        low, high = (middle, high) if size > rho else (low, middle)
    return [m / (1 + 2 * middle / c.square()) for m, c in zip(held, safe)]


def random_move(weights: Sequence[Tensor], ball: Ball, generator: torch.Generator) -> list[Tensor]:
    """A random move: uniform in the box (linf), or normal with deviation rho c per entry (l2)."""
    moves = []
    for weight in weights:
        scale = weight.detach().abs() if ball.adaptive else 1.0
        options: dict[str, Any] = {"generator": generator, "dtype": weight.dtype, "device": generator.device}
        if ball.norm == "linf":
            drawn = torch.rand(weight.shape, **options) * 2 - 1
        else:
            drawn = torch.randn(weight.shape, **options)
        moves.append(drawn.to(weight.device) * ball.rho * scale)
    return moves


def climb(
    weights: Sequence[Tensor],
    loss: Loss,
    ball: Ball,
    *,
    steps: int = 20,
    begin: Sequence[Tensor] | None = None,
    sync: bool = False,
    on_best: Callable[[], None] = lambda: None,
) -> Peak:
    """Look for the highest loss in the ball around `weights`; they are as before afterwards, also on exceptions.

    Args:
        weights: leaf tensors that require gradients and that `loss` depends on.
        loss: the loss at the weights' present values, a scalar.
        begin: a first move (a random start), put into the ball; default: none.
        on_best: called after the loss at the start, and after each that is higher than all before.
        sync: after the step size was halved go on from the best move, rather than from the last (the reference).

    The forward that judges a step is the one whose gradient the next step takes: `steps` backward passes and
    `steps` + 1 forward passes, and one more forward after each halving.

    Raises:
        BadInput: a loss that is no finite scalar at the start, or steps below 1.
    """
    if steps < 1:
        raise BadInput(f"At least one step is needed, got {steps}.")
    moves = _Moves(weights, ball)
    counts = {"forwards": 0, "backwards": 0}

    def forward(gradient: bool) -> Tensor:
        counts["forwards"] += 1
        with torch.set_grad_enabled(gradient):
            return loss()

    try:
        if ball.rho == 0:
            with torch.no_grad():
                start = _scalar(forward(False))
            on_best()
            return Peak(start, start, 0.0, **counts)
        return _climbed(moves, forward, counts, steps, begin, sync, on_best)
    finally:
        with torch.no_grad():
            moves.put(None)


def _climbed(
    moves: _Moves,
    forward: Callable[[bool], Tensor],
    counts: dict[str, int],
    steps: int,
    begin: Sequence[Tensor] | None,
    sync: bool,
    on_best: Callable[[], None],
) -> Peak:
    judged = checkpoints(steps)
    step = before_step = 2 * moves.ball.rho
    value = forward(begin is None)
    start = best = _scalar(value)
    on_best()
    if begin is not None:
        with torch.no_grad():
            moves.move = _inside(begin, moves)
            moves.put(moves.move)
        value = forward(True)
        best = max(best, float(value.detach()))
        if best > start:
            moves.keep_best()
            on_best()
    rises, last, before_best = 0, 0, best
    for i in range(steps):
        counts["backwards"] += 1
        gradients = torch.autograd.grad(value, moves.weights, allow_unused=True)
        with torch.no_grad():
            moves.advance([_given(g, w) for g, w in zip(gradients, moves.weights)], step)
            moves.put(moves.move)
        del gradients
        cuts = False
        value = forward(i + 1 < steps)
        if float(value.detach()) > best:  # a loss that is not a number never is
            best, rises = float(value.detach()), rises + 1
            on_best()
            with torch.no_grad():
                moves.keep_best()
        if i in judged:
            cuts = rises < 0.75 * (i - last) or (step == before_step and best == before_best)
            before_step, before_best, rises, last = step, best, 0, i
        if cuts:
            step /= 2
            with torch.no_grad():
                moves.put(moves.best)
                if sync and moves.best is not None:
                    moves.move = [b.clone() for b in moves.best]
            if i + 1 < steps:
                value = forward(True)
    moved = 0.0 if moves.best is None else float(_norm(moves.best))
    return Peak(start, best, moved, **counts)


def _inside(begin: Sequence[Tensor], moves: _Moves) -> list[Tensor]:
    ball = moves.ball
    if ball.norm == "linf":
        limits = [ball.rho * (1.0 if (c := moves.scale(i)) is None else c) for i in range(len(begin))]
        return [
            torch.minimum(torch.maximum(b, -torch.as_tensor(li)), torch.as_tensor(li)) for b, li in zip(begin, limits)
        ]
    scales = [moves.scale(i) for i in range(len(begin))] if ball.adaptive else None
    return project(list(begin), ball.rho, scales)


def _given(gradient: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if gradient is None else gradient


def _scalar(value: Tensor) -> float:
    if value.ndim or not bool(torch.isfinite(value)):
        shape = f"shape {tuple(value.shape)}" if value.ndim else f"value {float(value)}"
        raise BadInput(f"The loss at the given weights must be one finite number, got {shape}.")
    return float(value.detach())


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The l2 norm over all of them."""
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors]).norm()
