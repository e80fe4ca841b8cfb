"""Balances that learn while training: FAMO on training or validation losses, and CoBa.

    famo   every task's loss is to fall at the same relative speed             arXiv:2306.03792; MFTCoder's variant
           (arXiv:2311.02303) measures on validation rows, so that weights follow how fast tasks generalise
    coba   slopes of validation losses: slow tasks get more, diverging ones less               arXiv:2410.06741

The mathematics is in `parts/balance.py`; this file says what is measured when, and what is saved.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.objectives.balances import BALANCE, Balance, Observed, Tasks, checked
from pegbox.parts.balance import Convergence, famo_slope, famo_weights
from pegbox.parts.context import Context

__all__ = ["Coba", "CobaState", "Famo", "FamoState"]

Count = Annotated[int, Field(ge=1)]


def _validation_of(ctx: Context, tasks: Tasks, kind: str) -> None:
    source = ctx.streams.get("validation")
    if source is None or not len(source):
        raise BadInput(
            f"objective.balance {kind} measures on validation rows, and the run has none. Give --eval-data or "
            "rows.validation_split above 0."
        )
    missing = [name for k, name in enumerate(tasks.names) if not source.by_task.get(k)]
    if missing:
        raise BadInput(
            f"objective.balance {kind}: no validation row of the task '{missing[0]}' "
            f"(there: {len(source)} rows). Give validation rows of every task."
        )


@dataclass
class FamoState:
    """The logits with their Adam, current weights, and the losses that the next ones are compared with."""

    logits: torch.nn.Parameter
    optimizer: torch.optim.Optimizer
    weights: Tensor
    minimum: Tensor
    before: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "logits": self.logits.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "weights": self.weights,
            "before": self.before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.weights, self.before = state["weights"], state["before"]


@BALANCE.register
class Famo(Balance):
    """Fast adaptive multi-task optimisation. A task that a step's batch has no rows of keeps its logit's gradient at 0.

    Args:
        on: whose losses move the logits: the training batch's before and after the step, or the `valid`ation rows'.
        reevaluate: measure the training batch again after the step (one forward); False compares with the next
            step's losses, which costs nothing and is noisier.
        lr, decay: of Adam on the logits; the decay is added to their gradient.
        minimum: each task's least possible loss; one number for all, or one each.
        sample_num, rows: validation mini-batches and rows in each, the same ones throughout (each at least one row of
            every task).
    """

    reproduces: ClassVar[str] = "arXiv:2306.03792"
    needs_losses: ClassVar[bool] = True

    kind: Literal["famo"] = "famo"
    on: Literal["train", "valid"] = "train"
    reevaluate: bool = True
    lr: Annotated[float, Field(gt=0)] = 0.025
    decay: Annotated[float, Field(ge=0)] = 0.01
    minimum: float | tuple[float, ...] = 0.0
    sample_num: Count = 1
    rows: Count = 8

    def model_post_init(self, context: Any, /) -> None:
        if self.on == "valid" and not self.reevaluate:
            raise BadInput("objective.balance.reevaluate: false compares training losses; with on: valid leave it out.")

    @property
    def validates(self) -> bool:
        return self.on == "valid"

    def setup(self, ctx: Context, tasks: Tasks) -> FamoState:
        if self.validates:
            _validation_of(ctx, tasks, "famo")
        count = len(tasks)
        least = (self.minimum,) * count if isinstance(self.minimum, float | int) else self.minimum
        if len(least) != count:
            raise BadInput(f"objective.balance.minimum: {len(least)} minima for {count} tasks. Give one for each.")
        logits = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64))
        optimizer = torch.optim.Adam([logits], lr=self.lr, weight_decay=self.decay)
        uniform = torch.full((count,), 1 / count, dtype=torch.float64)
        return FamoState(logits, optimizer, uniform, torch.tensor(least, dtype=torch.float64))

    def begin(self, state: FamoState, seen: Observed) -> None:
        if self.on == "valid":
            state.before = seen.validation(self.sample_num, self.rows, 0)

    @torch.no_grad()
    def weigh(self, state: FamoState, losses: Tensor, present: Tensor) -> Tensor:
        weights = torch.zeros_like(state.weights)
        weights[present] = famo_weights(state.logits[present], losses[present].double(), state.minimum[present])
        state.weights = weights
        return weights

    def update(self, state: FamoState, seen: Observed) -> None:
        if self.on == "valid":
            before, after = state.before, seen.validation(self.sample_num, self.rows, 0)
            state.before = after
        elif self.reevaluate:
            before, after = seen.losses, seen.again()
        else:
            before, after = state.before, seen.losses
            state.before = after
        if before is not None:
            self.move(state, before, after)

    def move(self, state: FamoState, before: Tensor, after: Tensor) -> None:
        """One Adam step on the logits by (K,) losses before and after; NaN leaves a task out."""
        known = torch.isfinite(before) & torch.isfinite(after)
        if int(known.sum()) < 1:
            return
        gradient = torch.zeros_like(state.logits)
        with torch.no_grad():
            gradient[known] = famo_slope(
                state.logits[known], before[known].double(), after[known].double(), state.minimum[known]
            )
        state.logits.grad = gradient
        with torch.enable_grad():
            state.optimizer.step()
        state.logits.grad = None


@dataclass
class CobaState:
    """The balancer with its histories, the starting losses, the last ones, and the place in the validation rows."""

    tasks: Tasks
    balancer: Convergence
    weights: Tensor
    start: Tensor | None = None
    last: Tensor | None = None
    cursor: int = 0
    warned: set[str] = field(default_factory=set)

    def state_dict(self) -> dict[str, Any]:
        kept = {"weights": self.weights, "start": self.start, "last": self.last, "cursor": self.cursor}
        return {**kept, "balancer": self.balancer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.start, self.last = state["weights"], state["start"], state["last"]
        self.cursor = state["cursor"]
        self.balancer.load_state_dict(state["balancer"])


@BALANCE.register
class Coba(Balance):
    """The convergence balancer. `warmup` and `history_length` count measurements, one every `interval` steps.

    Args:
        warmup: measurements with equal weights; about as many as there are validation batches.
        history_length: measurements that a slope looks back on; 2 to 5 times the warm-up.
        tau: how fast a diverging worst task takes over.
        interval: optimizer steps between measurements.
        sample_num, rows: validation mini-batches per measurement, and rows in each (at least one of every task).
        floor: the smallest weight; None: 1 / (10 K).
        strict_window, clamp_df, final: see `parts.balance.Convergence`; strict_window: false is the released code.
    """

    reproduces: ClassVar[str] = "arXiv:2410.06741"

    kind: Literal["coba"] = "coba"
    warmup: Count = 100
    history_length: Annotated[int, Field(ge=2)] = 200
    tau: Annotated[float, Field(gt=0)] = 5.0
    interval: Count = 1
    sample_num: Count = 1
    rows: Count = 8
    floor: Annotated[float, Field(ge=0, lt=1)] | None = None
    strict_window: bool = True
    clamp_df: bool = False
    final: Literal["softmax", "mixture"] = "softmax"

    def model_post_init(self, context: Any, /) -> None:
        self._balancer(2 if self.floor is None else 1)  # refuses a warm-up longer than the history

    @property
    def validates(self) -> bool:
        return True

    def _balancer(self, tasks: int) -> Convergence:
        options = self.model_dump(include={"warmup", "history_length", "tau", "floor", "strict_window", "clamp_df"})
        return Convergence(tasks, final=self.final, **options)

    def setup(self, ctx: Context, tasks: Tasks) -> CobaState:
        _validation_of(ctx, tasks, "coba")
        balancer = self._balancer(len(tasks))
        return CobaState(tasks, balancer, balancer.uniform())

    def begin(self, state: CobaState, seen: Observed) -> None:
        state.start = state.last = self._measured(state, seen)
        checked(state.start.tolist(), state.tasks, "The starting validation losses")
        if bool((state.start == 0).any()):
            raise BadInput("CoBa divides by each task's starting validation loss, and one is 0. Look at its rows.")
        state.weights = state.balancer.measure(torch.ones_like(state.start))

    def update(self, state: CobaState, seen: Observed) -> None:
        if (seen.step + 1) % self.interval:
            return
        assert state.start is not None
        assert state.last is not None
        found = self._measured(state, seen)
        known = torch.isfinite(found)
        for k in (~known).nonzero()[:, 0].tolist():
            name = state.tasks.names[k]
            if name not in state.warned:
                state.warned.add(name)
                warnings.warn(
                    f"CoBa: the validation loss of task '{name}' is missing or not finite at step {seen.step + 1}; "
                    "its last value is kept.",
                    stacklevel=2,
                )
        state.last = torch.where(known, found, state.last)
        state.weights = state.balancer.measure(state.last / state.start)

    def _measured(self, state: CobaState, seen: Observed) -> Tensor:
        found = seen.validation(self.sample_num, self.rows, state.cursor)
        state.cursor += self.sample_num * max(self.rows, len(state.tasks))
        return found
