"""MeZO: training with forward passes alone, in place, at the memory of inference.

    p = (L(w + eps z) - L(w - eps z)) / (2 eps);   w <- w - lr (p z + decay w)

The direction z is regenerated from a seed whenever it is needed and never stored, so a run is also a list of (seed, p).
L is the value of whatever objective the recipe has: a loss, or something without a gradient (accuracy, F1, a reward).
Any tuner's parameters can be moved; the frozen base may be quantized. Malladi et al., arXiv:2305.17333.

Where it differs from the official code: seeds and noise come from generators of its own (the host's random state does
not move), decay follows `groups.decays` instead of substrings, 16-bit weights are restored exactly by default, and
several micro-batches are simply one larger batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.optim import spsa
from pegbox.optim.base import OPTIM, Problem, Step, StepLog
from pegbox.optim.groups import decays
from pegbox.optim.isolation import isolated
from pegbox.optim.perturbation import Mover, Restore, make_mover
from pegbox.optim.trajectory import Header, Trajectory, describe
from pegbox.parts.context import Context
from pegbox.parts.directions import SEED_LIMIT, Distribution, Scheme, check_directions

__all__ = ["Mezo", "MezoState"]

TRAJECTORY_FILE = "trajectory.safetensors"


@dataclass
class MezoState:
    """What lives through a run: where seeds come from, and the steps so far."""

    model: nn.Module
    seeds: torch.Generator
    step: Callable[[], int]
    factor: Callable[[int], float]
    total_steps: int
    trajectory: Trajectory | None = None
    by_copy: set[str] = field(default_factory=set)  # tensors that `restore: exact` has to move by copy

    def draw(self, count: int) -> list[int]:
        """Fresh, distinct seeds for one step."""
        drawn: list[int] = []
        while len(drawn) < count:
            seed = int(torch.randint(SEED_LIMIT, (1,), generator=self.seeds))
            if seed not in drawn:
                drawn.append(seed)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        steps = self.trajectory.state_dict() if self.trajectory is not None else {}
        return {"seeds": self.seeds.get_state(), "trajectory": steps, "by_copy": sorted(self.by_copy)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seeds.set_state(state["seeds"])
        self.trajectory = Trajectory.from_state_dict(state["trajectory"]) if state["trajectory"] else None
        self.by_copy = set(state["by_copy"])


@OPTIM.register
class Mezo(Step):
    """Simultaneous-perturbation steps on the objective's value.

    Args:
        eps: length of the perturbation. 1e-3 for full tensors and losses, 1e-2 for LoRA, 1e-1 for prefixes; larger for
            objectives that are counts (ties give p = 0).
        samples: directions per step (n-SPSA), two forwards each.
        sample_schedule: constant, or linear: from 1 to `samples` over the run.
        combine: the mean of the samples' estimates, or their sum.
        sides: 2: central difference; 1: one evaluation per direction and one at the weights themselves.
        restore: in_place | exact | snapshot (see `perturbation.py`); auto: exact for 16-bit weights, else in_place.
        scheme: keyed noise, or sequential: the official code's stream.
        distribution: gaussian | rademacher | sphere.
        then: an optimizer that takes the estimate as a gradient (with clipping, momentum, Adam); costs one gradient
            buffer and its state. None: plain descent, nothing stored.
    """

    needs_backward: ClassVar[bool] = False
    needs_value: ClassVar[bool] = True
    leaves: ClassVar[str | None] = "data"  # a record beside the tuner's part, which holds the same weights
    reproduces: ClassVar[str] = "arXiv:2305.17333, algorithms 1 and 2"

    kind: Literal["mezo"] = "mezo"
    lr: Annotated[float, Field(gt=0)] = 1e-6
    schedule: Literal["linear", "cosine", "constant", "cosine_floor_linear"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    samples: Annotated[int, Field(ge=1, le=10_000)] = 1
    sample_schedule: Literal["constant", "linear"] = "constant"
    combine: Literal["mean", "sum"] = "mean"
    sides: Literal[1, 2] = 2
    restore: Literal["auto"] | Restore = "auto"
    scheme: Scheme = "keyed"
    distribution: Distribution = "gaussian"
    then: Annotated[Step, OPTIM] | None = None

    @model_validator(mode="after")
    def _one_home_for_each_value(self) -> Mezo:
        if self.then is None:
            if self.max_grad_norm:
                raise BadInput("optim.max_grad_norm: there is no gradient to clip. Set it to 0, or give optim.then.")
            return self
        if not self.then.needs_backward:
            raise BadInput(f"optim.then must be an optimizer of gradients, not '{self.then.kind}'.")
        for name in ("lr", "weight_decay", "schedule", "warmup", "max_grad_norm"):
            if getattr(self.then, name) != type(self.then).model_fields[name].default:
                raise BadInput(f"optim.then.{name}: set optim.{name} instead, which holds for both.")
        return self

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of `then`; without it an SGD that is never given a gradient and holds no state."""
        inner = self.then or OPTIM.validate("sgd")
        return inner.model_copy(update={"lr": self.lr, "weight_decay": self.weight_decay}).optimizer(groups)

    def setup(self, ctx: Context) -> MezoState:
        factor = self.factor(ctx.total_steps)
        return MezoState(ctx.model, ctx.generator("mezo"), ctx.step, factor, ctx.total_steps)

    def estimate(self, state: MezoState, problem: Problem) -> StepLog:
        """One step, applied. Raises `RunFailed` on a value that is not finite, with the weights as before."""
        params = dict(problem.params)
        self._refuse(params)
        header = self._header(state, params)
        count = spsa.sample_count(self.sample_schedule, self.samples, state.step(), state.total_steps)
        seeds = state.draw(count)
        rate = _rounded(self.lr * state.factor(state.step()), header)
        mover = make_mover(header.restore, params, header.directions(), self.eps, state.model, state.by_copy)
        try:
            with isolated(state.model) as rewind:
                values = list(self._values(mover, problem, seeds, rewind))
            projected = [_rounded(p, header) for _, p in values]
            log = StepLog(loss=sum(plus for plus, _ in values) / count)
            log.readings = {"projected_gradient": sum(projected) / count}
            if self.then is None:
                mover.settle(header.moves(seeds, projected, rate), header.shrink(rate))
                log.applied = True
            else:
                mover.settle([], {})
                _fill_gradients(params, header, seeds, projected)
        except BaseException:
            mover.home()
            raise
        if state.trajectory is not None:
            state.trajectory.append(seeds, projected, rate)
        return log

    def save(self, state: MezoState, folder: Path) -> dict[str, Any]:
        """Write the trajectory into the existing folder; nothing with `then`, whose state seeds don't describe."""
        if state.trajectory is None:
            return {}
        state.trajectory.save(folder / TRAJECTORY_FILE)
        header = state.trajectory.header
        return {"steps": len(state.trajectory), "start": header.start, "restore": header.restore}

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """Replay a saved trajectory on a model that holds the start weights."""
        trajectory = Trajectory.load(folder / TRAJECTORY_FILE)
        named = dict(model.named_parameters())
        trajectory.replay({n: named[n] for n in trajectory.header.names if n in named}, model=model)
        return model

    def _values(
        self, mover: Mover, problem: Problem, seeds: list[int], rewind: Callable[[], None]
    ) -> Iterator[tuple[float, float]]:
        """(L+, p) of every direction."""
        here = _value(mover, problem, None, 0, rewind) if self.sides == 1 else 0.0
        for seed in seeds:
            plus = _value(mover, problem, seed, +1, rewind)
            if self.sides == 1:
                yield plus, spsa.one_sided(plus, here, self.eps)
            else:
                yield plus, spsa.two_sided(plus, _value(mover, problem, seed, -1, rewind), self.eps)

    def _header(self, state: MezoState, params: dict[str, nn.Parameter]) -> Header:
        """What the run's trajectory is recorded under; made at the first step (the weights are hashed then)."""
        if state.trajectory is not None:
            if tuple(params) != state.trajectory.header.names:
                raise Unsupported("The set of trained tensors changed during a run of MeZO. Make it a new stage.")
            return state.trajectory.header
        described = describe(params) if self.then is None else {**_form(params), "start": ""}
        header = Header(
            **described,
            eps=self.eps,
            scheme=self.scheme,
            distribution=self.distribution,
            restore=self._restore(params),
            sides=self.sides,
            combine=self.combine,
            decay=self.weight_decay,
            decayed=tuple(i for i, (n, p) in enumerate(params.items()) if decays(n, p)) if self.weight_decay else (),
        )
        if self.then is None:
            state.trajectory = Trajectory(header)
        return header

    def _restore(self, params: dict[str, nn.Parameter]) -> Restore:
        if self.restore != "auto":
            return self.restore
        return "exact" if any(p.dtype.itemsize <= 2 for p in params.values()) else "in_place"

    def _refuse(self, params: dict[str, nn.Parameter]) -> None:
        try:
            check_directions(params)
        except ValueError as error:
            raise Unsupported(f"optim.kind=mezo: {error}. Train floating, unsharded tensors.") from None


def _value(mover: Mover, problem: Problem, seed: int | None, offset: int, rewind: Callable[[], None]) -> float:
    """The objective at an offset, repeated once for tensors whose move the model could not have seen."""
    for _ in range(2):
        if seed is not None:
            mover.move(seed, offset)
        rewind()
        with mover.evaluating():
            value = float(problem.value())
        if not math.isfinite(value):
            raise RunFailed(f"The objective is {value} at a perturbed point; the weights are as before the step.")
        if not mover.missed():
            break
    return value


def _rounded(value: float, header: Header) -> float:
    """To the precision of the trajectory file, so that a replay multiplies by the same number."""
    return float(torch.tensor(value, dtype=header.precision()))


@torch.no_grad()
def _fill_gradients(params: dict[str, nn.Parameter], header: Header, seeds: list[int], projected: list[float]) -> None:
    """Add the estimate to `.grad`, for an optimizer that keeps state."""
    for param in params.values():
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    grads: dict[str, Tensor] = {name: p.grad for name, p in params.items() if p.grad is not None}
    for seed, amount in header.moves(seeds, projected, -1.0):
        factor = header.directions().radius_factor(seed, params)
        for _, piece, z in header.directions().walk(seed, grads):
            piece.add_(z, alpha=amount * factor)


def _form(params: dict[str, nn.Parameter]) -> dict[str, Any]:
    kinds = {str(p.dtype).removeprefix("torch.") for p in params.values()}
    return {
        "names": tuple(params),
        "device": next(iter(params.values())).device.type,
        "dtypes": ",".join(sorted(kinds)),
    }
