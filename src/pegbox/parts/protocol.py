"""Protocols: what a run is made of. A protocol trains and evaluates only through the runner it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from typing import Protocol as TypingProtocol

from pegbox.parts.component import Axis, Component
from pegbox.parts.findings import Finding
from pegbox.parts.results import Cost, Measurement, Metrics

__all__ = ["BASE", "PROTOCOL", "ModelRef", "Protocol", "Report", "Runner", "StageResult"]


@dataclass(frozen=True)
class ModelRef:
    """A model by where it stands in the run: the bare base, or a stage's start or end."""

    stage: str | None = None  # None: the base
    point: str = "end"  # start | end


BASE = ModelRef()


@dataclass
class StageResult:
    """What a stage left: its artefact folder, its cost, and whatever it collected."""

    name: str
    folder: Path
    start: ModelRef
    end: ModelRef
    cost: Cost = field(default_factory=Cost)
    collected: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Report:
    """What a protocol returns: the run's metrics, and the model that the run's artefact is made from."""

    metrics: Metrics
    final: ModelRef


class Runner(TypingProtocol):
    """What a protocol may do. Stages are cached by the hash of what they are made of, and resumable."""

    suites: tuple[str, ...]  # what this run evaluates, "target" first where there are target rows
    has_operations: bool  # whether the recipe has weight operations
    has_analyses: bool  # whether the recipe has analyses
    has_decoder: bool  # whether the recipe says how answers are drawn

    def stage(self, patch: Mapping[str, Any], *, start: ModelRef = BASE, name: str) -> StageResult:
        """Run one stage: the recipe with `patch` laid over it, from `start`.

        Beside recipe blocks, a patch may hold: `do`: "train" (default) | "select" (make the allocation only) | "apply"
        (weight operations only); `rows`: another data source for this stage; `use`: {"selection": an earlier stage's
        name}; `settings`: training settings of this stage (steps, epochs, ...); `also`: entries laid behind the
        recipe's own lists, by key (data policies).
        """

    def define(self, suite: str, rows: Any) -> None:
        """Make a suite of other rows known to `evaluate`: their test rows by the metrics that suit them."""

    def evaluate(self, ref: ModelRef, suite: str, *, decoded: bool = False) -> Measurement:
        """Score a model on a suite ("target", "retention", or a task's name); `decoded`: by the recipe's decoder."""

    def decoding(self) -> dict[str, Any]:
        """What the recipe's decoder counted while it was measured; {} where nothing was decoded."""

    def analyze(self, ref: ModelRef | None = None) -> list[Finding]:
        """Run the recipe's analyses on the base and `ref`; None: on the base and each model that the recipe names."""

    def generate(self, ref: ModelRef, messages: list[list[dict[str, Any]]]) -> list[str]:
        """Greedy answers of a model."""


class Protocol(Component):
    """The story of a run, told in calls to the runner."""

    trains: ClassVar[bool] = True
    gives_episodes: ClassVar[bool] = False  # its stages train over episodes
    analyzes: ClassVar[bool] = False  # runs the recipe's analyses at its end
    decodes: ClassVar[bool] = False  # measures what it made through the recipe's decoder

    def run(self, runner: Runner) -> Report:
        """Tell the story; raise `PegboxError`s of the runner unchanged."""
        raise NotImplementedError


PROTOCOL: Axis[Protocol] = Axis("protocol", Protocol, "pegbox.protocols", default="single")
