"""No training: the recipe's weight operations are applied to finished runs or checkpoints.

The tuned models are the recipe's roles (`models: {tuned: runs/a}`, in the order they are written).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pegbox.parts.protocol import BASE, PROTOCOL, Protocol, Report, Runner
from pegbox.parts.results import Metrics
from pegbox.protocols.single import measure

__all__ = ["Posthoc"]


@PROTOCOL.register
class Posthoc(Protocol):
    """Apply `weights:` and measure the base, and the result."""

    kind: Literal["posthoc"] = "posthoc"
    trains: ClassVar[bool] = False

    def run(self, runner: Runner) -> Report:
        before = measure(runner, BASE)
        stage = runner.stage({"do": "apply"}, name="apply")
        return Report(Metrics(before=before, after=measure(runner, stage.end), cost=stage.cost), final=stage.end)
