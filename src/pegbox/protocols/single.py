"""One training: base before, train, tuned after. Also the helpers that every protocol measures with."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pegbox.parts.protocol import BASE, PROTOCOL, ModelRef, Protocol, Report, Runner
from pegbox.parts.results import Cost, Measurement, Metrics

__all__ = ["Single", "findings", "measure", "measure_decoded", "total_cost"]


@PROTOCOL.register
class Single(Protocol):
    """Train once from the base, then apply the recipe's weight operations, if it has any.

    "Before" is always the bare base, never the wrapped model.
    """

    kind: Literal["single"] = "single"

    analyzes: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    def run(self, runner: Runner) -> Report:
        before = measure(runner, BASE)
        stages = [runner.stage({}, name="train")]
        if runner.has_operations:
            stages.append(runner.stage({"do": "apply"}, start=stages[0].end, name="apply"))
        end, cost = stages[-1].end, stages[0].cost
        cost = cost.model_copy(update={"seconds": sum(stage.cost.seconds for stage in stages)})
        after, decoding = measure_decoded(runner, end)
        extra = {**decoding, **findings(runner, end)}
        return Report(Metrics(before=before, after=after, cost=cost, extra=extra), final=end)


def measure(runner: Runner, ref: ModelRef) -> dict[str, Measurement]:
    """Every suite of the run on one model."""
    return {suite: runner.evaluate(ref, suite) for suite in runner.suites}


def measure_decoded(runner: Runner, ref: ModelRef) -> tuple[dict[str, Measurement], dict[str, Any]]:
    """Every suite on one model, by the recipe's decoder if it has one, and what that counted (key "decoding")."""
    if not runner.has_decoder:
        return measure(runner, ref), {}
    found = {suite: runner.evaluate(ref, suite, decoded=True) for suite in runner.suites}
    return found, {"decoding": runner.decoding()}


def findings(runner: Runner, ref: ModelRef | None = None) -> dict[str, Any]:
    """What the recipe's analyses found on a model, as `Metrics.extra` holds it; {} where it has none."""
    if not runner.has_analyses:
        return {}
    return {"findings": [found.model_dump(mode="json") for found in runner.analyze(ref)]}


def total_cost(costs: list[Cost]) -> Cost:
    """What several stages cost together: sums of work, maxima of memory; sizes are the last stage's."""
    last = costs[-1]
    flops = [c.training_flops for c in costs if c.training_flops is not None]
    saved = [c.peak_saved_bytes for c in costs if c.peak_saved_bytes is not None]
    device = [c.peak_device_bytes for c in costs if c.peak_device_bytes is not None]
    return last.model_copy(
        update={
            "trainable_parameters": max(c.trainable_parameters for c in costs),
            "optimizer_state_bytes": max(c.optimizer_state_bytes for c in costs),
            "training_flops": sum(flops) if flops else None,
            "peak_saved_bytes": max(saved) if saved else None,
            "peak_device_bytes": max(device) if device else None,
            "training_tokens": sum(c.training_tokens for c in costs),
            "steps": sum(c.steps for c in costs),
            "seconds": sum(c.seconds for c in costs),
        }
    )
