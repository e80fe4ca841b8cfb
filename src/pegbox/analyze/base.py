"""Analyses: what changed inside a model. They look at a base and a tuned model, train nothing, and return findings.

A recipe's `analyze:` list is run by its protocol, on what it trained, on what its weight operations made, or on the
models that it names by role.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from pegbox.parts.component import Axis, Component
from pegbox.parts.findings import Finding
from pegbox.parts.pairs import ModelPair
from pegbox.parts.results import Measurement
from pegbox.parts.task import Task
from pegbox.parts.view import Batch

__all__ = ["ANALYZE", "Analysis", "Subject"]


class Subject(Protocol):
    """What an analysis may ask for. Models are opened on first use and kept until the analysis ends.

    Args:
        name: of the tuned model. seed: of everything random. folder: for files beside the report.
    """

    name: str
    seed: int
    folder: Path
    task: Task

    @property
    def tokenizer(self) -> Any:
        """The tuned model's tokenizer, or None."""

    @property
    def recipe(self) -> Any:
        """The run's recipe: what it was trained with."""

    def opened(self) -> nn.Module:
        """The tuned model as it stands."""

    def pair(self) -> ModelPair:
        """The base and the tuned model; one copy of the weights where the update is an adapter."""

    def weights(self) -> tuple[nn.Module, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """(a plain model whose weights may be overwritten, the base's state, the tuned state): parameters and buffers
        by the bare base's names."""

    def rows(self, source: Any = None) -> list[Any]:
        """The run's target rows, or those of another source (as `rows.test` takes them)."""

    def batches(self, rows: Sequence[Any], size: int = 8) -> Iterator[Batch]:
        """Rows as batches on the models' device, encoded as the task trains them."""

    def define(self, suite: str, source: Any) -> None:
        """Make a suite of other rows known to `measure`."""

    def measure(self, model: nn.Module, suite: str, *, generating: bool = True) -> Measurement:
        """Score any model in memory on a suite of the run ("target", "retention"), or on one that was defined.

        Without `generating` metrics that draw answers are left out where the suite has others.
        """


class Analysis(Component):
    """One analysis. Its fields are its options; `run` opens nothing that it does not need."""

    needs_causal_model: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False  # works on the run's target rows
    needs_weights: ClassVar[bool] = False  # moves weights between base and tuned model: floating ones, merged

    def run(self, subject: Subject) -> Finding:
        """Look at the subject. Raises `BadInput` before anything heavy where options and rows don't fit."""
        raise NotImplementedError


ANALYZE: Axis[Analysis] = Axis("analyze", Analysis, "pegbox.analyze")
