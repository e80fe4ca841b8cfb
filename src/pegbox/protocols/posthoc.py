"""No training: weight operations are applied to finished runs or checkpoints, answers are decoded, analyses are run.

The tuned models are the recipe's roles (`models: {tuned: runs/a}`, in the order they are written). Without weight
operations nothing is made: a decoder draws its answers from the base and these models, and the analyses look at the
base and at each of them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pegbox.parts.protocol import BASE, PROTOCOL, Protocol, Report, Runner
from pegbox.parts.results import Cost, Metrics
from pegbox.protocols.single import findings, measure, measure_decoded

__all__ = ["Posthoc"]


@PROTOCOL.register
class Posthoc(Protocol):
    """Apply `weights:`, measure the base and the result (by `decode:` where there is one); then run `analyze:`."""

    kind: Literal["posthoc"] = "posthoc"
    trains: ClassVar[bool] = False
    analyzes: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    def run(self, runner: Runner) -> Report:
        if not runner.has_operations and not runner.has_decoder:
            return Report(Metrics(extra=findings(runner)), final=BASE)
        before = measure(runner, BASE)
        end, cost = BASE, Cost()
        if runner.has_operations:
            stage = runner.stage({"do": "apply"}, name="apply")
            end, cost = stage.end, stage.cost
        after, decoding = measure_decoded(runner, end)
        extra = {**decoding, **findings(runner, None if end == BASE else end)}
        return Report(Metrics(before=before, after=after, cost=cost, extra=extra), end)
