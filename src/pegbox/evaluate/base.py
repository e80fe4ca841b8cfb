"""Metrics: what a tuned model gained and forgot, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pegbox.parts.component import Axis, Component
from pegbox.parts.results import Example
from pegbox.parts.view import ModelView

__all__ = ["METRIC", "Generate", "Metric"]

# (list of message lists, max new tokens) -> answers; greedy by default, batched, tokenizer and stop ids inside
Generate = Callable[[Sequence[list[dict[str, Any]]], int], list[str]]


class Metric(Component):
    """One way to score rows. Per-row values are means over what the metric counts, so they can be paired by row."""

    higher_is_better: ClassVar[bool] = True
    needs_generation: ClassVar[bool] = False
    version: ClassVar[str] = "1"  # raised whenever a value could change
    unit: ClassVar[str] = ""

    def score(
        self, view: ModelView, rows: Sequence[Any], generate: Generate, encode: Callable[..., Any]
    ) -> list[Example]:
        """One `Example` per row, in order. `encode(rows)` gives collated evaluation batches of the view's inputs."""
        raise NotImplementedError


METRIC: Axis[Metric] = Axis("metric", Metric, "pegbox.evaluate.metrics")
