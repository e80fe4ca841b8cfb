"""Stages in a row: each a patch over the recipe, from the base, from another stage's start (rewind) or from its end.

Written for "probe, pick, rewind, train" (lottery-ticket methods), and for any chain such as "first the adapter, then
the head". The stages' names are the recipe's own; this file knows none of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pegbox.parts.protocol import BASE, PROTOCOL, ModelRef, Protocol, Report, Runner
from pegbox.parts.results import Measurement, Metrics
from pegbox.protocols.single import measure, total_cost

__all__ = ["Stage", "Staged"]


class Stage(BaseModel):
    """One stage.

    Args:
        name: unique; letters, digits, '-' and '_'.
        start: "base", "<stage>.start" (rewind) or "<stage>.end"; default: the previous stage's end for a stage that
            trains after one that trained, else the base.
        do: train | select | apply.
        use: {"selection": stage}: take that stage's allocation instead of selecting.
        settings: training settings of this stage (steps, epochs, ...).
        Every other key is a recipe block laid over the recipe.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    start: str = "base"
    do: Literal["train", "select", "apply"] = "train"
    use: dict[Literal["selection"], str] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    rows: Any = None

    def patch(self) -> dict[str, Any]:
        """What the runner lays over the recipe."""
        given = {"do": self.do, "use": dict(self.use), "settings": dict(self.settings), **(self.model_extra or {})}
        return {**given, "rows": self.rows} if self.rows is not None else given


@PROTOCOL.register
class Staged(Protocol):
    """Run `stages` in order; the last one that trained (or applied) is the run's result.

    Args:
        measure_each: evaluate the end of every stage that trained or applied, not only the last one's.
    """

    kind: Literal["staged"] = "staged"
    measure_each: bool = False
    stages: Annotated[list[Stage], Field(min_length=1)]

    @model_validator(mode="after")
    def _names(self) -> Staged:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called '{stage.name}'")
            wanted = [stage.start.partition(".")[0]] if stage.start != "base" else []
            for other in [*wanted, *stage.use.values()]:
                if other not in seen:
                    raise ValueError(
                        f"stage '{stage.name}' refers to '{other}', which is not an earlier stage "
                        f"(earlier: {', '.join(sorted(seen)) or 'none'})"
                    )
            if stage.start != "base" and stage.start.partition(".")[2] not in {"start", "end"}:
                raise ValueError(
                    f"stage '{stage.name}': start is base, <stage>.start or <stage>.end, got '{stage.start}'"
                )
            seen.add(stage.name)
        if all(stage.do == "select" for stage in self.stages):
            raise ValueError("no stage trains or applies anything")
        return self

    def run(self, runner: Runner) -> Report:
        before = measure(runner, BASE)
        results = []
        for stage in self.stages:
            point = parse_ref(stage.start)
            results.append((stage, runner.stage(stage.patch(), start=point, name=stage.name)))
        done = [result for stage, result in results if stage.do != "select"]
        each = {r.name: _scores(measure(runner, r.end)) for r in done[:-1]} if self.measure_each else {}
        final = [result for stage, result in results if stage.do != "select"][-1]
        cost = total_cost([result.cost for _, result in results])
        extra = {"stages": each} if each else {}
        return Report(Metrics(before=before, after=measure(runner, final.end), cost=cost, extra=extra), final=final.end)


def _scores(measured: dict[str, Measurement]) -> dict[str, dict[str, float]]:
    """suite -> metric -> value."""
    return {suite: {name: s.value for name, s in found.scores.items()} for suite, found in measured.items()}


def parse_ref(text: str) -> ModelRef:
    """ "base" | "<stage>.start" | "<stage>.end"."""
    if text == "base":
        return BASE
    stage, _, point = text.partition(".")
    return ModelRef(stage, point)
