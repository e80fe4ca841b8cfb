"""One optimizer step as estimators see it: `StepProblem`, the engine's side of `pegbox.optim.base.Problem`.

All micro-batches lie ready on the device, policies applied, denominators summed over micro-batches and processes. The
references are computed first, all of them: a reference pass may toggle an adapter, and toggled between a forward and
its backward it would break the graph. Each micro-batch keeps the random state of its first forward, so that a second
forward of the same micro-batch (zeroth order, sharpness) sees the same dropout.

What this file does not know: trainers, optimizers, particular estimators.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.engine.distributed import mean_over_ranks, names_everywhere, sum_over_ranks, world
from pegbox.engine.packing import restore_random, take_random
from pegbox.errors import RunFailed
from pegbox.objectives.base import Objective
from pegbox.parts.context import Context
from pegbox.parts.view import Batch, ModelView
from pegbox.parts.watching import paused

__all__ = ["MicroLoss", "NonFinite", "StepProblem", "named_trained", "total_counts"]


def named_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name, tied ones once, in `named_parameters` order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def total_counts(objective: Objective, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The objective's denominators summed over micro-batches and processes."""
    totals: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in objective.count(batch).items():
            value = torch.as_tensor(count, dtype=torch.float64)
            totals[name] = totals[name] + value if name in totals else value
    if world() > 1:
        names = names_everywhere(totals)  # a count may exist in some micro-batches only
        zero = next(iter(totals.values()), torch.zeros((), dtype=torch.float64)) * 0
        flat = sum_over_ranks(torch.stack([totals.get(n, zero) for n in names])) if names else zero
        totals = dict(zip(names, flat.unbind())) if names else {}
    return totals


class NonFinite(RunFailed):
    """The step's loss is not finite; whoever runs the step knows which it is and adds its rows."""

    def __init__(self, value: float):
        super().__init__(f"The loss is {value}. Lower the learning rate or the perturbation, or look at the rows.")
        self.value = value


class MicroLoss:
    """An objective bound to its state, view and context: losses, value and reference of one micro-batch."""

    def __init__(
        self,
        objective: Objective,
        state: Any,
        view: ModelView,
        ctx: Context,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        acting: Callable[[Batch], AbstractContextManager[Any]] = lambda batch: nullcontext(),
    ):
        self.objective, self.state, self.view, self.ctx, self.autocast = objective, state, view, ctx, autocast
        self.acting = acting  # held by the caller from a batch's first forward to the end of its backward

    def reference(self, batch: Batch) -> Any:
        """What the objective wants of the reference model; no graph. The objective enters the reference view itself."""
        if not self.objective.needs_reference:
            return None
        with torch.no_grad(), self.autocast():
            return self.objective.reference(self.state, self.view, batch)

    def losses(self, batch: Batch, totals: Mapping[str, Tensor], ref: Any) -> Iterator[tuple[str, Tensor]]:
        iterator = self.objective.losses(self.state, self.view, batch, totals, ref)
        while True:
            with self.autocast():
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def value(self, batch: Batch, totals: Mapping[str, Tensor], ref: Any) -> Tensor | None:
        with torch.no_grad(), self.autocast():
            return self.objective.value(self.state, self.view, batch, totals, ref)


class StepProblem:
    """See `pegbox.optim.base.Problem`.

    Args:
        micro_loss: the bound objective.
        batches: this process's micro-batches of the step, on the device.
        totals: the step's denominators.
        model: whose parameters train; `optimizer` is what `untouched` protects beside it.
        run: runs a job inside the wrapper's forward where gradients are sharded; a plain call otherwise.
    """

    def __init__(
        self,
        micro_loss: MicroLoss,
        batches: Sequence[Batch],
        totals: Mapping[str, Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        run: Callable[[Callable[[], Any]], Any] = lambda job: job(),
    ):
        self.loss, self.batches, self.totals, self.model = micro_loss, batches, totals, model
        self.optimizer, self.run = optimizer, run
        self.micro = len(batches)
        self.params = named_trained(model)
        self.refs = [self._reference(batch) for batch in batches]
        self.readings: dict[int, dict[str, Tensor]] = {}  # by micro-batch, of its first forward
        self._random: dict[int, dict[str, Any]] = {}

    def _reference(self, batch: Batch) -> Any:
        with self.loss.acting(batch):
            return self.run(partial(self.loss.reference, batch))

    @contextmanager
    def _same_random(self, i: int) -> Iterator[None]:
        """The first forward of micro-batch i goes on from the current random state, later ones repeat its numbers."""
        if i not in self._random:
            self._random[i] = take_random()
            yield
            return
        now = take_random()
        restore_random(self._random[i])
        try:
            yield
        finally:
            restore_random(now)

    def losses(self, i: int) -> Iterator[tuple[str, Tensor]]:
        with self.loss.acting(self.batches[i]), self._same_random(i):
            for name, loss in self.loss.losses(self.batches[i], self.totals, self.refs[i]):
                self.readings.setdefault(i, {}).setdefault(name, loss.detach())
                yield name, loss

    def apart(self, i: int, among: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        totals: dict[str, Tensor] = {}
        for j in among:
            for name, count in self.loss.objective.count(self.batches[j]).items():
                totals[name] = totals[name] + count if name in totals else count
        return self.loss.losses(self.batches[i], totals, self.refs[i])

    def value(self) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(self.batches):
            with self.loss.acting(self.batches[i]), self._same_random(i):
                part = self.run(partial(self.loss.value, batch, self.totals, self.refs[i]))
            if part is None:
                raise RunFailed("The objective has no value, so a step that works on values can't use it.")
            total = total + part.detach().double().cpu()
        value = float(sum_over_ranks(total))
        if not math.isfinite(value):
            raise NonFinite(value)
        return value

    def backward(self, loss: Tensor, into: Sequence[Tensor] | None = None, retain: bool = False) -> None:
        scaled = loss * world()  # gradients are averaged over processes, losses are shares of a sum
        if into is None:
            scaled.backward(retain_graph=retain)
            return
        params = list(self.params.values())
        grads = torch.autograd.grad(scaled, params, retain_graph=retain, allow_unused=True)
        for buffer, grad in zip(into, grads, strict=True):
            if grad is not None:
                buffer.add_(grad)

    def reduce(self, flat: Tensor) -> Tensor:
        return mean_over_ranks(flat)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        weights = {n: p.detach().clone() for n, p in self.params.items()}
        buffers = {n: (b, b.detach().clone()) for n, b in self.model.named_buffers() if b.is_floating_point()}
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in self.params.items()}
        modes = [(m, m.training) for m in self.model.modules()]
        numbers, optimizer = take_random(), _optimizer_copy(self.optimizer)
        try:
            with paused():
                yield
        finally:
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(weights[name])
                    p.grad = grads[name]
                for buffer, before in buffers.values():
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
            for module, mode in modes:
                module.training = mode
            _optimizer_restore(self.optimizer, optimizer)
            restore_random(numbers)


def _optimizer_copy(optimizer: torch.optim.Optimizer | None) -> Any:
    if optimizer is None:
        return None
    state = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return state, copy.deepcopy(groups)


def _optimizer_restore(optimizer: torch.optim.Optimizer | None, kept: Any) -> None:
    if optimizer is None:
        return
    state, groups = kept
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)
