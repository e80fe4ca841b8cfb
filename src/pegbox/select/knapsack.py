"""Whole tensors under a budget of training FLOPs: those that promise the largest loss drop for it.

    maximise sum_k m_k I_k   subject to   T_fp + T_bp(m) <= rho (T_fp + T_bp(all))

I_k is a tensor's first-order loss drop in a trial step (`parts.statistics_drop`), T the FLOPs of a step
(`parts.cost_trace`). "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation", ICLR 2024,
arXiv:2309.13192 (GreenTrainer). It composes with the full tuner, any optimizer with gradients and any objective whose
value exists; with a schedule the tensors are weighed and chosen again. Published heuristic and published costs stand
beside the exact ones (`solver: official`, `cost: official`).

What this file does not know: how importance is gathered, how the set is changed while training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.allocation import Allocation, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.cost_energy import Energy
from pegbox.parts.cost_trace import CostTable, StepCost
from pegbox.parts.statistics_drop import normalized
from pegbox.parts.statistics_step import StepSpec
from pegbox.select.base import SELECT, Schedule, Selector
from pegbox.select.knapsack_solve import floored, knapsack_suffix, official_suffix, quantized

__all__ = ["Knapsack", "backward_budget"]

CLAMP = 0.05  # of the backward FLOPs, in the official code, where rho leaves nothing for it
Rho = Annotated[float, Field(gt=0, le=1)]


def backward_budget(rho: float, forward: float, full: float, *, clamp: bool = False) -> float:
    """rho_bp = rho (1 + T_fp / T_bp) - T_fp / T_bp, the share of full back-propagation that is left by rho.

    Raises `BadInput` where nothing is left, unless `clamp` (then 0.05, with a warning).
    """
    if not 0 < rho <= 1:
        raise BadInput(f"rho is a share of full training's FLOPs in (0, 1], got {rho}.")
    left = rho * (1 + forward / full) - forward / full
    if left > 0:
        return left
    floor = forward / (forward + full)
    if not clamp:
        raise BadInput(
            f"rho {rho} leaves nothing for back-propagation: the forward pass alone is {floor:.3f} of full training. "
            "Raise select.rho, or set select.below=clamp to train with 5 % of the backward FLOPs."
        )
    warnings.warn(
        f"rho {rho} is below the forward pass's share {floor:.3f}; it is now {floor + CLAMP * (1 - floor):.3f}.",
        stacklevel=2,
    )
    return CLAMP


@SELECT.register
class Knapsack(Selector):
    """Tensors of the largest importance within a share of full training's FLOPs.

    Args:
        rho: that share, forward and backward together, in (0, 1].
        rho_from: [[progress, rho], ...]: other shares from these fractions of the training on (a supply of energy
            that changes); it acts where the schedule selects again.
        importance: "loss_drop" (the method), "weight_gradient", "gradient_norm", "fisher", "random".
        cost: "measured" (what really runs) or "official" (the published chain model).
        solver: "exact", or "official" (the published recursion).
        units: into how many units full back-propagation is divided for the exact programme.
        batches: how many calibration batches importance is averaged over.
        below: what to do with a rho below the forward pass's share: "refuse", or "clamp" to 5 % of the backward pass.
        keep_state: tensors that leave the set keep their optimizer state (as published), at the cost of its memory.
        energy: figures of a device, for an estimate of kWh and CO2e in the selection's facts.
        schedule: when to select again; `epochs: 2` is the published setting.
    """

    kind: Literal["knapsack"] = "knapsack"
    rho: Rho = 0.5
    rho_from: tuple[tuple[Annotated[float, Field(ge=0, le=1)], Rho], ...] = ()
    importance: Literal["loss_drop", "weight_gradient", "gradient_norm", "fisher", "random"] = "loss_drop"
    cost: Literal["measured", "official"] = "measured"
    solver: Literal["exact", "official"] = "exact"
    units: Annotated[int, Field(ge=10, le=1_000_000)] = 1000
    batches: Annotated[int, Field(ge=1)] = 1
    below: Literal["refuse", "clamp"] = "refuse"
    keep_state: bool = True
    energy: Energy | None = None
    schedule: Schedule = Schedule()

    reproduces: ClassVar[str] = "arXiv:2309.13192"
    produces: ClassVar[frozenset[str]] = frozenset({"whole"})
    moves: ClassVar[Literal["never", "slots", "set"]] = "set"
    picks_vectors: ClassVar[bool] = True
    budgets_backward: ClassVar[bool] = True

    def model_post_init(self, context: Any, /) -> None:
        if self.rho_from and not self.schedule.moves:
            raise BadInput("select.rho_from changes rho while training, so select.schedule has to say when to select.")
        if self.schedule.mode == "accumulative":
            raise BadInput("A budget of FLOPs is met anew by each selection; schedule.mode: accumulative is not.")

    def statistics(self) -> StepSpec:
        """Importance and costs on calibration batches."""
        if self.importance == "random":
            return StepSpec(None, self.cost, self.batches)
        most = max([self.rho, *(rho for _, rho in self.rho_from)])
        return StepSpec(self.importance, self.cost, self.batches, most)

    def rho_at(self, progress: float) -> float:
        """The share that holds after this fraction of the training."""
        reached = [rho for start, rho in sorted(self.rho_from) if start <= progress]
        return reached[-1] if reached else self.rho

    def select(
        self,
        anatomy: Anatomy,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Any] | None,
        generator: torch.Generator,
    ) -> Allocation:
        if stats is None:
            raise BadInput("select 'knapsack' weighs tensors on calibration batches; give training data.")
        table: CostTable = stats["table"]
        counted: StepCost | None = stats.get("counted")
        importance = self._importance(stats, table, weights, generator)
        rho = self.rho_at(float(stats.get("progress", 0.0)))
        budget = backward_budget(rho, table.forward, table.full, clamp=self.below == "clamp") * table.full
        names = self.choose(table, importance, budget, counted if self.cost == "measured" else None)
        facts = self._facts(rho, names, table, counted, importance)
        return Allocation({name: Whole() for name in weights if name in names}, facts=facts)

    def count(self, anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        raise Unsupported("How many weights a budget of FLOPs trains follows from data; shapes alone don't tell.")

    def choose(
        self, table: CostTable, importance: Mapping[str, float], budget: float, counted: StepCost | None = None
    ) -> set[str]:
        """The tensors within a backward `budget`, in the table's unit; at least one.

        With `counted`, what everything of positive importance costs is its exact cost, not the table's bound.
        """
        exact = counted.backward if counted is not None else table.backward
        useful = {name for name in table.names if importance.get(name, 0.0) > 0}
        if useful and exact(useful) <= budget:
            return useful
        names = list(reversed(table.names))  # nearest the loss first
        value = np.array([importance.get(name, 0.0) for name in names])
        own, steps = np.array(table.own[::-1], float), np.array(table.through[::-1], float)
        through, unit = np.cumsum(steps), table.full / self.units
        if self.solver == "official":
            own_q, steps_q = floored(own, unit), floored(steps, unit)
            limit = int(budget / table.full * (own_q.sum() + steps_q.sum()))
            chosen, _ = official_suffix(value, own_q, steps_q, limit)
        else:
            limit = int(budget / unit + 1e-9)
            chosen, _ = knapsack_suffix(value, quantized(own, unit), quantized(through, unit), limit)
            chosen = _filled(chosen, value, own, through, budget)
        if not chosen.any():
            chosen = _single(value, own, through, budget, names)
        return {name for name, taken in zip(names, chosen) if taken}

    def _importance(
        self, stats: Mapping[str, Any], table: CostTable, weights: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, float]:
        known = [name for name in table.names if name in weights]
        if not known:
            raise BadInput("The model has no tensor that could train and that the calibration batch used.")
        if self.importance == "random":
            drawn = torch.rand(len(known), generator=generator, dtype=torch.float64) * 2 - 1
            return normalized(dict(zip(known, drawn.tolist())))
        found = {name: float(stats["importance"].get(name, 0.0)) for name in known}
        broken = next((name for name, value in found.items() if not np.isfinite(value)), None)
        if broken is not None:
            raise BadInput(f"The importance of '{broken}' is {found[broken]}. Lower optim.lr, or look at the rows.")
        return found

    def _facts(
        self,
        rho: float,
        names: set[str],
        table: CostTable,
        counted: StepCost | None,
        importance: Mapping[str, float],
    ) -> dict[str, Any]:
        """What the selection has to tell: shares, where the FLOPs go, what that would be in electricity."""
        order = [name for name in table.names if name in names]
        own = dict(zip(table.names, table.own))
        facts: dict[str, Any] = {
            "rho_asked": rho,
            "rho_planned": table.share(order),
            "tensors": order,
            "importance": {name: importance[name] for name in order},
            "flops_own": {name: own[name] for name in order},
            "flops_through": table.backward(order) - sum(own[name] for name in order),
            "flops_forward": table.forward,
            "flops_full": table.forward + table.full,
        }
        if counted is not None:
            step = counted.forward + counted.backward(order)
            facts["rho_counted"] = step / (counted.forward + counted.full)
            if self.energy is not None:
                full = counted.forward + counted.full
                for name, flops in (("step", step), ("full_step", full)):
                    facts[f"kwh_{name}"] = self.energy.kwh(flops)
                    facts[f"grams_co2e_{name}"] = self.energy.grams(flops)
        return facts


def _filled(chosen: np.ndarray, value: np.ndarray, own: np.ndarray, through: np.ndarray, budget: float) -> np.ndarray:
    """What rounding to units left over is spent on further tensors before the deepest one, by value per FLOP."""
    if not chosen.any():
        return chosen
    deepest = int(np.flatnonzero(chosen)[-1])
    left = budget - through[deepest] - own[chosen].sum()
    filled = chosen.copy()
    useful = [r for r in range(deepest) if not chosen[r] and value[r] > 0]
    for r in sorted(useful, key=lambda r: -value[r] / max(own[r], 1e-30)):
        if own[r] <= left:
            filled[r] = True
            left -= own[r]
    return filled


def _single(value: np.ndarray, own: np.ndarray, through: np.ndarray, budget: float, names: list[str]) -> np.ndarray:
    """The best tensor that can be paid, whatever its sign."""
    affordable = np.flatnonzero(through + own <= budget)
    if not affordable.size:
        cheapest = float((through + own).min()) if len(own) else 0.0
        raise BadInput(
            f"No tensor fits the budget of {budget:.3g} backward FLOPs; the cheapest takes {cheapest:.3g}. Raise "
            "select.rho."
        )
    best = int(affordable[np.argmax(value[affordable])])
    warnings.warn(
        f"No tensor promises a loss drop within the budget; '{names[best]}' trains alone. A lower optim.lr or more "
        "select.batches may help.",
        stacklevel=3,
    )
    chosen = np.zeros(len(value), dtype=bool)
    chosen[best] = True
    return chosen
