"""A stream of tasks, learnt one after another, with the matrix that says what was forgotten.

R[t][i] = score on task i after training task t (row -1: the base). From it, with T tasks (HFT, section 4; Chaudhry et
al., arXiv:1801.10112; Lopez-Paz and Ranzato, arXiv:1706.08840):

    OP  = mean_i R[T-1][i]                              overall performance
    BWT = mean_{i<T-1} (R[T-1][i] - R[i][i])            backward transfer
    F   = mean_{i<T-1} (max_{t<T-1} R[t][i] - R[T-1][i])  forgetting
    FWT = mean_{i>0} (R[i-1][i] - base[i])              forward transfer

Scores whose smaller values are better (losses) are negated first, so the signs always read the same way.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pegbox.parts.protocol import BASE, PROTOCOL, ModelRef, Protocol, Report, Runner
from pegbox.parts.results import Measurement, Metrics
from pegbox.protocols.single import measure, total_cost

__all__ = ["Sequence", "StreamTask", "forgetting"]


class StreamTask(BaseModel):
    """One task of a stream: its name, its rows (a data source), and training settings of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    rows: Any
    settings: dict[str, Any] = Field(default_factory=dict)


@PROTOCOL.register
class Sequence(Protocol):
    """Train `tasks` in order, each from the end of the one before; evaluate all of them after each."""

    kind: Literal["sequence"] = "sequence"
    tasks: Annotated[list[StreamTask], Field(min_length=2)]

    @model_validator(mode="after")
    def _names(self) -> Sequence:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"task names must differ, got {', '.join(names)}")
        return self

    def run(self, runner: Runner) -> Report:
        names = [task.name for task in self.tasks]
        for task in self.tasks:
            runner.define(f"task:{task.name}", task.rows)
        before = measure(runner, BASE)
        base_row = [_main(runner.evaluate(BASE, f"task:{name}")) for name in names]
        matrix, costs, end = [], [], BASE
        for round_, task in enumerate(self.tasks):
            patch = {"rows": task.rows, "settings": dict(task.settings), "round": round_}
            stage = runner.stage(patch, start=end, name=task.name)
            end = stage.end
            costs.append(stage.cost)
            matrix.append([_main(runner.evaluate(end, f"task:{name}")) for name in names])
        extra = {"sequence": {"tasks": names, "base": base_row, "matrix": matrix, **forgetting(matrix, base_row)}}
        metrics = Metrics(before=before, after=measure(runner, end), cost=total_cost(costs), extra=extra)
        return Report(metrics, final=ModelRef(self.tasks[-1].name))


def forgetting(matrix: list[list[float]], base: list[float]) -> dict[str, float]:
    """OP, BWT, F and FWT of a (T, T) matrix R[t][i] and the base's (T,) scores; larger scores are better."""
    scores = np.asarray(matrix, dtype=float)
    count = len(base)
    last, diagonal = scores[-1], np.diag(scores)
    best_before = scores[:-1].max(axis=0)
    ahead = np.array([scores[i - 1, i] - base[i] for i in range(1, count)])
    return {
        "overall_performance": float(last.mean()),
        "backward_transfer": float((last - diagonal)[:-1].mean()),
        "forgetting": float((best_before - last)[:-1].mean()),
        "forward_transfer": float(ahead.mean()),
    }


def _main(measured: Measurement) -> float:
    score = next(iter(measured.scores.values()))
    return score.value if score.higher_is_better else -score.value
