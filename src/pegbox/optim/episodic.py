"""`episodic`: one step over several tasks, each learnt for a few steps first; then the shared weights move.

    phi_i = theta after K steps on task i's support;   theta <- update( mean_i g_i )
    g_i = d/d phi L(query_i, phi_i)           "through": first-order MAML (arXiv:1803.02999)
        + d/d theta of the prior's terms at fixed phi_i           ABML's pull, beta (mu_theta - mu_phi) / sigma_theta^2
    or  theta - phi_i                         "difference": Reptile
    or  d/d theta L(query_i, phi_i(theta))    order 2: MAML (arXiv:1703.03400)

Finn et al., arXiv:1703.03400; Nichol et al., arXiv:1803.02999; Ravi and Beatson, ICLR 2019; for language models Zhang,
Snell and Griffiths, arXiv:2508.14285. Any tuner whose parameters are plain tensors, any objective with a value.
Batches say which episode they belong to (`data: episodes`, `protocol: meta`). It knows no term and no tuner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported
from pegbox.optim.base import OPTIM, Problem, Step, StepLog
from pegbox.parts.context import Context
from pegbox.parts.episodes import Inner, adapt, swapped
from pegbox.parts.priors import Phase, PriorLayer, held
from pegbox.parts.tokens import differentiable_twice

__all__ = ["Episode", "Episodic", "episodes_of"]


@dataclass
class Episode:
    """Which micro-batches of a step are one task's support and query. Without a query the support stands for it."""

    support: list[int] = field(default_factory=list)
    query: list[int] = field(default_factory=list)

    @property
    def judged(self) -> list[int]:
        """What the outer gradient is taken on."""
        return self.query or self.support


@dataclass
class _State:
    """The posterior that is carried from task to task; empty where each begins at theta."""

    phi: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.phi)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.phi = dict(state)


@OPTIM.register
class Episodic(Step):
    """Meta-learning over the episodes of a step.

    Args:
        inner: how a task is learnt.
        data_grad: the data's part of the outer gradient: "through" phi as it is, the "difference" theta - phi, or
        "none". order: 2 differentiates through the inner steps (small models; "through" only).
        begin: every task at "theta", or at the phi of the task before ("carry": one shared posterior; data_grad: none).
        update: the optimizer of theta, any kind with back-propagation.
    """

    needs_episodes: ClassVar[bool] = True
    exchanges_parameters: ClassVar[bool] = True

    kind: Literal["episodic"] = "episodic"
    inner: Inner = Field(default_factory=Inner)
    data_grad: Literal["through", "difference", "none"] = "through"
    order: Literal[1, 2] = 1
    begin: Literal["theta", "carry"] = "theta"
    update: str = "adamw"

    @model_validator(mode="after")
    def _fits(self) -> Episodic:
        if self.order == 2 and (self.data_grad != "through" or self.begin != "theta"):
            raise BadInput("optim.order: 2 goes with data_grad: through and begin: theta.")
        if self.begin == "carry" and self.data_grad != "none":
            raise BadInput(
                "optim.begin: a phi that is carried over is not theta plus steps; it goes with data_grad: none."
            )
        kind = OPTIM[self.update]
        if not kind.needs_backward or kind.estimate is not Step.estimate:
            raise BadInput(
                f"optim.update: '{self.update}' finds its own gradients; name a plain optimizer, e.g. adamw."
            )
        return self

    @property
    def second_order(self) -> bool:
        """Whether the outer gradient goes through the inner steps."""
        return self.order == 2

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return OPTIM.validate({"kind": self.update, "lr": self.lr, "weight_decay": self.weight_decay}).optimizer(groups)

    def setup(self, ctx: Context) -> _State:
        if self.second_order and getattr(ctx.model, "is_gradient_checkpointing", False):
            raise Unsupported("optim.order: 2 needs the inner steps' graphs; switch gradient checkpointing off.")
        return _State()

    def estimate(self, state: _State, problem: Problem) -> StepLog:
        """Put the mean outer gradient into `.grad`."""
        episodes = episodes_of(problem.batches)
        theta = dict(problem.params)
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in theta.items()}
        told: dict[str, float] = {}
        for episode in episodes:
            with held(problem.model) as layers, _kernels(self.second_order):
                losses = [partial(_loss, problem, i, episode.support) for i in episode.support]
                first: dict[int, float] = {}
                _phase(layers, "both" if self.second_order else "inner")
                phi = adapt(
                    problem.model,
                    theta,
                    losses,
                    self.inner,
                    second_order=self.second_order,
                    start=state.phi or None,
                    seen=first.__setitem__,
                )
                parts = self._outer(problem, episode, theta, phi, total, layers)
            _add(told, {**parts, **_told(theta, phi, first)})
            if self.begin == "carry":
                state.phi = {name: p.detach() for name, p in phi.items()}
        self._share(state, problem)
        for name, p in theta.items():
            p.grad = (total[name] / len(episodes)).to(p.dtype)
        readings = {name: value / len(episodes) for name, value in told.items()}
        loss = sum(v for k, v in readings.items() if not k.startswith("_"))
        return StepLog(loss=loss, readings={f"episode/{k.lstrip('_')}": v for k, v in readings.items()})

    def _outer(
        self,
        problem: Problem,
        episode: Episode,
        theta: Mapping[str, nn.Parameter],
        phi: Mapping[str, Tensor],
        total: dict[str, Tensor],
        layers: Sequence[PriorLayer],
    ) -> dict[str, float]:
        """Add one task's outer gradient to `total`; returns its named losses."""
        _phase(layers, "both" if self.second_order else "outer")
        wanted: list[Tensor] = [*theta.values()] if self.second_order else [*theta.values(), *phi.values()]
        told: dict[str, float] = {}
        needed = bool(layers) or self.data_grad == "through"
        for i in episode.judged:
            with swapped(problem.model, phi), torch.set_grad_enabled(needed):
                named = dict(problem.apart(i, episode.judged))
                _add(told, {n: float(v.detach()) for n, v in named.items() if v.ndim == 0 and not n.startswith("_")})
                if not needed:
                    continue
                loss = _sum(named)
                grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            self._collect(grads, list(theta), total)
        if self.data_grad == "difference":
            for name, p in theta.items():
                total[name] += (p - phi[name]).detach()
        return told

    def _collect(self, grads: Sequence[Tensor | None], names: list[str], total: dict[str, Tensor]) -> None:
        for name, grad in zip(names, grads):
            if grad is not None:
                total[name] += grad
        if not self.second_order and self.data_grad == "through":
            for name, grad in zip(names, grads[len(names) :], strict=True):
                if grad is not None:
                    total[name] += grad

    def _share(self, state: _State, problem: Problem) -> None:
        """The carried posterior is one over all processes."""
        for name in sorted(state.phi):
            state.phi[name] = problem.reduce(state.phi[name].flatten()).view_as(state.phi[name])


def episodes_of(batches: Sequence[Mapping[str, Any]]) -> list[Episode]:
    """The episodes of a step by the micro-batches' "episode" entries (number, 1 for a query).

    Raises `BadInput` for batches without one, and for a task without support.
    """
    found: dict[int, Episode] = {}
    for i, batch in enumerate(batches):
        mark = batch.get("episode")
        if mark is None:
            raise BadInput(
                "optim 'episodic' learns from episodes, and these batches are none. Use protocol: {kind: meta}, or the "
                "data policy 'episodes'."
            )
        number, query = (int(v) for v in mark)
        episode = found.setdefault(number, Episode())
        (episode.query if query else episode.support).append(i)
    for number, episode in found.items():
        if not episode.support:
            raise BadInput(f"Episode {number} of this step has no support rows to learn from; raise protocol.support.")
    return list(found.values())


def _loss(problem: Problem, i: int, among: Sequence[int]) -> Tensor:
    return _sum(dict(problem.apart(i, among)))


def _sum(named: Mapping[str, Tensor]) -> Tensor:
    parts = [loss for name, loss in named.items() if not name.startswith("_")]
    return sum(parts[1:], parts[0])


def _phase(layers: Sequence[PriorLayer], phase: Phase) -> None:
    for layer in layers:
        if layer.prior is not None:
            layer.prior.phase = phase


def _told(theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], inner: Mapping[int, float]) -> dict[str, float]:
    """How far phi went, and the support's loss at the first and last inner step."""
    with torch.no_grad():
        moved = sum(float((phi[name] - p).square().sum()) for name, p in theta.items()) ** 0.5
    ends = {"_support_first": inner[0], "_support_last": inner[len(inner) - 1]} if inner else {}
    return {"_moved": moved, **ends}


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


@contextmanager
def _kernels(second_order: bool) -> Iterator[None]:
    """Attention and token losses that can be differentiated twice, where that is needed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not second_order:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), differentiable_twice():
        yield
