"""Balances: how much each task counts in a multi-task loss. The contract, and those that need no measurement.

    static        the user's weights, or 1/K each
    inverse_size  w_k ~ n_k^-power, n_k the task's training rows
    function      a user's own, asked again after every so many steps

A balance gives K weights. Most are known before a step's forward; one that needs the step's own losses for that
(`needs_losses`) gets them. After a step it is told the losses seen, and may measure again or on validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.component import Axis, Component
from pegbox.parts.context import Context
from pegbox.parts.functions import function_at

__all__ = ["BALANCE", "Balance", "FunctionBalance", "InverseSize", "Observed", "Static", "Tasks", "checked"]


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run: names by number, and how many training rows each has (None where nobody counted)."""

    names: tuple[str, ...]
    sizes: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Observed:
    """What a balance is told of a step.

    Args:
        step: finished steps. losses: (K,) float64 token means seen in its forward, NaN for absent tasks.
        again: measures them anew on the same batches. validation: measures on validation rows; takes how many
            mini-batches, of how many rows, and where in their order to begin.
    """

    step: int
    losses: Tensor
    again: Callable[[], Tensor]
    validation: Callable[[int, int, int], Tensor]


class Balance(Component):
    """Weights of K tasks. State: a dataclass with `weights` (K,) float64 and state_dict/load_state_dict."""

    needs_losses: ClassVar[bool] = False  # the weights of a step depend on that step's losses

    @property
    def validates(self) -> bool:
        """Whether validation rows are needed."""
        return False

    def setup(self, ctx: Context, tasks: Tasks) -> Any:
        """The state. Raises `BadInput` where the run has not what is needed."""
        raise NotImplementedError

    def begin(self, state: Any, seen: Observed) -> None:
        """Before the first step, with `seen.losses` all NaN."""

    def weigh(self, state: Any, losses: Tensor, present: Tensor) -> Tensor:
        """(K,) weights for (K,) detached losses, where `needs_losses`; absent tasks get 0."""
        raise NotImplementedError

    def update(self, state: Any, seen: Observed) -> None:
        """After a step: new `state.weights`, if it is time."""


BALANCE: Axis[Balance] = Axis("objective.balance", Balance, "pegbox.objectives.balances_all", default="static")


@dataclass
class Fixed:
    """(K,) weights that a balance decided on."""

    weights: Tensor

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"].to(self.weights)


def checked(weights: Sequence[float], tasks: Tasks, where: str = "objective.balance.weights") -> Tensor:
    """(K,) float64. Raises `BadInput`: another number than tasks, negative, not finite, all zero."""
    if len(weights) != len(tasks):
        named = ", ".join(tasks.names)
        raise BadInput(f"{where}: {len(weights)} weights for {len(tasks)} tasks ({named}). Give one for each task.")
    if any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
        raise BadInput(f"{where} must be finite, not negative and not all 0, got {list(weights)}.")
    return torch.tensor([float(w) for w in weights], dtype=torch.float64)


@BALANCE.register
class Static(Balance):
    """Fixed weights.

    Args:
        weights: by position, or by the task's name (unnamed tasks get 1); None: 1/K each. Only their ratios matter.
    """

    kind: Literal["static"] = "static"
    weights: tuple[float, ...] | dict[str, float] | None = None

    def setup(self, ctx: Context, tasks: Tasks) -> Fixed:
        given = self.weights
        if given is None:
            return Fixed(torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64))
        if isinstance(given, Mapping):
            for name in given:
                if name not in tasks.names:
                    raise BadInput(
                        f"objective.balance.weights names no task '{name}'.{did_you_mean(name, tasks.names)}"
                    )
            given = tuple(given.get(name, 1.0) for name in tasks.names)
        return Fixed(checked(given, tasks))


@BALANCE.register
class InverseSize(Balance):
    """w_k ~ n_k^-power over the number of training rows: small tasks count more per row."""

    kind: Literal["inverse_size"] = "inverse_size"
    power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def setup(self, ctx: Context, tasks: Tasks) -> Fixed:
        if tasks.sizes is None or not all(tasks.sizes):
            raise BadInput("objective.balance inverse_size needs the number of training rows of every task.")
        shares = [n**-self.power for n in tasks.sizes]
        return Fixed(checked([s / sum(shares) for s in shares], tasks))


@BALANCE.register
class FunctionBalance(Balance):
    """A user's function (step, {task: last training loss}, {task: weight}) -> {task: weight}, every `every` steps.

    Its weights take the place of the last ones, which start at 1/K; tasks not yet seen have a loss of NaN.
    """

    kind: Literal["function"] = "function"
    function: str
    every: Annotated[int, Field(ge=1)] = 1

    def setup(self, ctx: Context, tasks: Tasks) -> Asked:
        function_at(self.function)
        count = len(tasks)
        return Asked(torch.full((count,), 1 / count, dtype=torch.float64), tasks, torch.full((count,), torch.nan))

    def update(self, state: Asked, seen: Observed) -> None:
        state.losses = torch.where(torch.isfinite(seen.losses), seen.losses, state.losses.double())
        if (seen.step + 1) % self.every:
            return
        names = state.tasks.names
        found = function_at(self.function)(
            seen.step + 1, dict(zip(names, state.losses.tolist())), dict(zip(names, state.weights.tolist()))
        )
        if not isinstance(found, Mapping) or set(found) != set(names):
            raise BadInput(f"{self.function} must return a weight for each of {list(names)}, got {found!r}.")
        state.weights = checked([float(found[name]) for name in names], state.tasks, self.function)


@dataclass
class Asked(Fixed):
    """Weights, and each task's last training loss."""

    tasks: Tasks
    losses: Tensor

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.losses = state["weights"], state["losses"]
