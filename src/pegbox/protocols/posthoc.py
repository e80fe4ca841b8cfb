"""No training: the recipe's weight operations are applied to finished runs or checkpoints, and its analyses are run.

The tuned models are the recipe's roles (`models: {tuned: runs/a}`, in the order they are written). Without weight
operations nothing is made: the analyses look at the base and at each of these models.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pegbox.parts.protocol import BASE, PROTOCOL, Protocol, Report, Runner
from pegbox.parts.results import Metrics
from pegbox.protocols.single import findings, measure

__all__ = ["Posthoc"]


@PROTOCOL.register
class Posthoc(Protocol):
    """Apply `weights:` and measure the base, and the result; then run `analyze:`."""

    kind: Literal["posthoc"] = "posthoc"
    trains: ClassVar[bool] = False
    analyzes: ClassVar[bool] = True

    def run(self, runner: Runner) -> Report:
        if not runner.has_operations:
            return Report(Metrics(extra=findings(runner)), final=BASE)
        before = measure(runner, BASE)
        stage = runner.stage({"do": "apply"}, name="apply")
        after = measure(runner, stage.end)
        return Report(
            Metrics(before=before, after=after, cost=stage.cost, extra=findings(runner, stage.end)), stage.end
        )
