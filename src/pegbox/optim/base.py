"""The step axis: how a step is found (gradient estimators) and applied (optimizers, schedules)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.component import Axis, Component
from pegbox.parts.context import Context

__all__ = ["OPTIM", "Problem", "Step", "StepLog"]


class Problem(Protocol):
    """ONE optimizer step, all its micro-batches. An estimator sees this and never the trainer."""

    micro: int  # number of micro-batches
    batches: Sequence[Mapping[str, Any]]  # them, on the device
    model: nn.Module
    params: dict[str, nn.Parameter]  # trained parameters by name, tied ones once, in named_parameters order

    def losses(self, i: int) -> Iterator[tuple[str, Tensor]]:
        """The objective's named losses on micro-batch i, with graph."""

    def apart(self, i: int, among: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """The objective's named losses on micro-batch i as if `among` were the whole step, with their graph."""

    def value(self) -> float:
        """The step's loss over all micro-batches and ranks, no graph. Raises `RunFailed` if not finite."""

    def backward(self, loss: Tensor, into: Sequence[Tensor] | None = None, retain: bool = False) -> None:
        """Back-propagate into `.grad` (or into the given buffers), through the accelerator's scaling."""

    def reduce(self, flat: Tensor) -> Tensor:
        """Mean of a flat tensor over the processes."""

    def untouched(self) -> AbstractContextManager[None]:
        """Weights, optimizer state, RNG and train/eval modes are as before when the context ends, also on error."""


@dataclass
class StepLog:
    """What a step reports. `applied`: the estimator updated the weights itself; `skip`: no update this time."""

    loss: float | Tensor
    applied: bool = False
    skip: bool = False
    readings: dict[str, float] = field(default_factory=dict)


class Step(Component):
    """A recipe's `optim:` block: learning rate, schedule, and the optimizer or estimator that uses them."""

    needs_backward: ClassVar[bool] = True
    needs_value: ClassVar[bool] = False  # works on the objective's value (zeroth order)
    frees_gradients_early: ClassVar[bool] = False
    needs_episodes: ClassVar[bool] = False  # learns from batches that say which episode they are of
    exchanges_parameters: ClassVar[bool] = False  # runs forwards with other tensors in the parameters' places
    keeps: ClassVar[frozenset[str]] = frozenset()  # of each entry: "moments"; of each matrix: "rows_columns"
    leaves: ClassVar[str | None] = None  # the kind of artefact part that `save` writes, e.g. "data"

    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["linear", "cosine", "constant", "cosine_floor_linear"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03  # fraction of all steps
    floor: Annotated[float, Field(ge=0, lt=1)] | None = None  # what linear and cosine end at, as a share of lr; None: 0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping

    @property
    def second_order(self) -> bool:
        """Whether the step differentiates through gradient steps."""
        return False

    @model_validator(mode="after")
    def _floor_has_a_use(self) -> Self:
        if self.floor is not None and self.schedule == "constant":
            raise BadInput("optim.floor is where schedules end that fall; a constant one has no use for it.")
        return self

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups (each with "params", maybe "lr", "weight_decay")."""
        raise NotImplementedError

    def factor(self, total_steps: int) -> Callable[[int], float]:
        """The multiplier of the peak rate at each finished step (for `LambdaLR`)."""
        from pegbox.parts import schedules

        if self.floor is None:
            return schedules.factor(self.schedule, total_steps, self.warmup)
        return schedules.factor(self.schedule, total_steps, self.warmup, floor=self.floor)

    def setup(self, ctx: Context) -> Any:
        """State with state_dict/load_state_dict (tensors and plain values), or None."""
        return None

    def estimate(self, state: Any, problem: Problem) -> StepLog:
        """Fill `.grad`, or apply the update, or ask to skip. Default: back-propagation of the summed losses."""
        total: Tensor | float = 0.0
        for i in range(problem.micro):
            parts = [loss for name, loss in problem.losses(i) if not name.startswith("_")]
            loss = sum(parts[1:], parts[0])
            problem.backward(loss)
            total = total + loss.detach()
        return StepLog(loss=total)

    def after_step(self, state: Any, problem: Problem) -> None:
        """Called after the optimizer has stepped."""

    def save(self, state: Any, folder: Path) -> dict[str, Any]:
        """Write the artefact part named by `leaves` into the existing empty `folder`; returns JSON for its entry, or {}
        if there is nothing to keep."""
        return {}

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """Put such a part onto the model it was made on. Raises `Corrupt`, `WrongBase`."""
        return model


OPTIM: Axis[Step] = Axis("optim", Step, "pegbox.optim", default="adamw")
