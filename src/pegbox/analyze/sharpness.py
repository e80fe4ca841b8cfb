"""Sharpness: how much the loss rises in a small ball around the weights, at worst or on average; also layer by layer.

    S(rho) = mean over batches [ max_{|d / c| <= rho} L(w + d) - L(w) ],   c = |w| (adaptive) or 1

Andriushchenko et al., arXiv:2302.07011. Each batch is attacked alone (`apgd.climb`); layer-wise only one layer's
tensors move (arXiv:2410.16476). Any torch model with a loss works; weights, buffers, modes and flags are as before
afterwards, and only the tensors that move are copied. Layers are chosen and repaired in `stragglers.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.analyze.apgd import Ball, Peak, climb, random_move
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.context import seed_of

__all__ = ["Loss", "Sharpness", "layerwise_sharpness", "normalized", "sharpness", "task_loss", "tensors_of"]

Loss = Callable[[nn.Module, Any], Any]
Mode = Literal["worst", "average"]


@dataclass(frozen=True)
class Sharpness:
    """Means over batches.

    Args:
        base_loss: at the weights themselves. sharpness: how much higher the loss gets.
        moved: the largest l2 norm of a best move over the batches (0: nothing rose).
        error: the rise of the share of wrong targets at the best move, where the loss is one of targets.
        by_batch: (base loss, sharpness) of each batch. backwards, forwards: passes that it took.
    """

    base_loss: float
    sharpness: float
    moved: float = 0.0
    error: float | None = None
    by_batch: tuple[tuple[float, float], ...] = ()
    forwards: int = 0
    backwards: int = 0


def sharpness(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    ball: Ball,
    params: str | Sequence[str] = "all",
    mode: Mode = "worst",
    steps: int = 20,
    restarts: int = 1,
    random_start: bool = False,
    draws: int = 10,
    normalize: bool = False,
    sync: bool = False,
    seed: int = 0,
) -> Sharpness:
    """Sharpness of `model` at its weights.

    Args:
        loss: (model, batch) -> one number, or (logits (N, C), targets (N,)), of which the cross-entropy is taken.
        ball: radius, norm and scale. params: "all", or names, prefixes or globs of parameters that move.
        mode: "worst" climbs `steps` steps, the best of `restarts` starts (the first at rest, unless `random_start`);
            "average" is the mean over `draws` random moves.
        normalize: centre logits and divide them by their length before the loss (see `normalized`).
        sync: see `apgd.climb`.

    Raises:
        BadInput: no batch, nothing to move, half-precision weights, a loss that is no finite number at the weights.
    """
    batches = list(batches)
    if not batches:
        raise BadInput("Sharpness needs at least one batch.")
    if restarts < 1 or draws < 1:
        raise BadInput(f"At least one start and one draw are needed, got restarts={restarts}, draws={draws}.")
    tensors = tensors_of(model, params)
    generator = torch.Generator().manual_seed(seed_of(seed, "sharpness"))
    found: list[tuple[Peak, float | None]] = []
    with _at_rest(model, list(tensors.values())):
        for batch in batches:
            probe = _Probe(model, loss, batch, normalize)
            if mode == "average":
                found.append(_average(probe, list(tensors.values()), ball, draws, generator))
            else:
                begins = _begins(list(tensors.values()), ball, restarts, random_start, generator)
                found.append(_worst(probe, list(tensors.values()), ball, steps, begins, sync))
    return _summary(found)


def layerwise_sharpness(
    model: nn.Module, loss: Loss, batches: Sequence[Any], groups: Mapping[str, Sequence[str]], **options: Any
) -> dict[str, Sharpness]:
    """Sharpness with only one group's tensors moving, for each of `groups` (name -> parameter names)."""
    batches = list(batches)
    return {name: sharpness(model, loss, batches, params=list(names), **options) for name, names in groups.items()}


def normalized(logits: Tensor) -> Tensor:
    """Logits without their mean, divided by their length (at least 1e-10): blind to shift and scale."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True).clamp(min=1e-10)


def task_loss(view: Any) -> Loss:
    """The loss of a task's targets: next tokens of a language model, labels of a classifier.

    Args:
        view: a `ModelView` of the model that is looked at.
    """

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        targets, counted = view.targets(batch)
        logits = view.logits(batch)
        logits = logits[:, None] if logits.ndim == 2 else logits
        return logits[counted], targets[counted]

    return loss


def tensors_of(model: nn.Module, params: str | Sequence[str] = "all") -> dict[str, Tensor]:
    """Floating parameters by name, tied ones once. Raises `BadInput` where a name, prefix or glob matches nothing."""
    known: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if params == "all":
        chosen = known
    else:
        chosen = {}
        for pattern in [params] if isinstance(params, str) else params:
            hit = [n for n in known if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)]
            if not hit:
                raise BadInput(f"'{pattern}' matches no parameter that could move.{did_you_mean(pattern, known)}")
            chosen |= {n: known[n] for n in hit}
    if not chosen:
        raise BadInput("There is no parameter to move. Name at least one layer.")
    half = next((n for n, p in chosen.items() if p.element_size() < 4), None)
    if half is not None:
        raise BadInput(f"'{half}' is {chosen[half].dtype}: a small move rounds to nothing. Load the model in float32.")
    return chosen


# ---- one batch


class _Probe:
    """The loss of one batch as a closure; remembers the share of wrong targets of its last call."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Any, normalize: bool):
        self.model, self.loss, self.batch, self.normalize = model, loss, batch, normalize
        self.error: float | None = None

    def __call__(self) -> Tensor:
        value = self.loss(self.model, self.batch)
        if isinstance(value, Tensor):
            if self.normalize:
                raise BadInput("normalize needs a loss that returns (logits, targets), and this one returns a number.")
            return value
        logits, targets = value
        if targets.numel() == 0:
            raise BadInput("A batch has no target that counts, so it has no loss. Leave it out.")
        self.error = float((logits.detach().argmax(-1) != targets).double().mean())
        return nn.functional.cross_entropy(normalized(logits) if self.normalize else logits, targets)


def _worst(
    probe: _Probe, tensors: list[Tensor], ball: Ball, steps: int, begins: Sequence[Any], sync: bool
) -> tuple[Peak, float | None]:
    best: tuple[Peak, float | None] | None = None
    for begin in begins:
        errors: list[float | None] = []
        note = partial(_note, errors, probe)
        peak = climb(tensors, probe, ball, steps=steps, begin=begin, sync=sync, on_best=note)
        rise = None if not errors or errors[0] is None else float(errors[-1] or 0.0) - errors[0]
        if best is None or peak.best > best[0].best:
            best = (peak, rise)
    assert best is not None
    return best


def _note(errors: list[float | None], probe: _Probe) -> None:
    errors.append(probe.error)


def _begins(tensors: list[Tensor], ball: Ball, restarts: int, random: bool, generator: torch.Generator) -> list[Any]:
    return [random_move(tensors, ball, generator) if random or i else None for i in range(restarts)]


@torch.no_grad()
def _average(
    probe: _Probe, tensors: list[Tensor], ball: Ball, draws: int, generator: torch.Generator
) -> tuple[Peak, float | None]:
    start, error = float(probe()), probe.error
    kept = [t.clone() for t in tensors]
    values, errors = [], []
    try:
        for _ in range(draws):
            for tensor, move in zip(tensors, random_move(kept, ball, generator)):
                tensor.add_(move)
            values.append(float(probe()))
            errors.append(probe.error)
            for tensor, value in zip(tensors, kept):
                tensor.copy_(value)
    finally:
        for tensor, value in zip(tensors, kept):
            tensor.copy_(value)
    rise = None if error is None else statistics.mean(e or 0.0 for e in errors) - error
    return Peak(start, statistics.mean(values), 0.0, draws + 1, 0), rise


def _summary(found: Sequence[tuple[Peak, float | None]]) -> Sharpness:
    peaks = [peak for peak, _ in found]
    rises = [rise for _, rise in found if rise is not None]
    return Sharpness(
        base_loss=statistics.fmean(p.start for p in peaks),
        sharpness=statistics.fmean(p.sharpness for p in peaks),
        moved=max(p.moved for p in peaks),
        error=statistics.fmean(rises) if len(rises) == len(peaks) else None,
        by_batch=tuple((p.start, p.sharpness) for p in peaks),
        forwards=sum(p.forwards for p in peaks),
        backwards=sum(p.backwards for p in peaks),
    )


@contextmanager
def _at_rest(model: nn.Module, moving: Sequence[Tensor]) -> Iterator[None]:
    """Evaluation mode, gradients for what moves alone; everything as before afterwards, buffers included."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for tensor in moving:
            tensor.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
