"""Metrics: what a tuned model gained and forgot, row by row.

Rows are `pegbox.data.Row`s, or anything with their fields (`Item` is such a thing, for sets that come with pegbox).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pegbox.errors import BadInput
from pegbox.parts.component import Axis, Component
from pegbox.parts.results import Example
from pegbox.parts.view import Batch, ModelView

__all__ = ["METRIC", "Encode", "Generate", "Item", "Metric", "expected_of", "prompt_of"]

# (list of message lists, max new tokens) -> answers; greedy by default, batched, tokenizer and stop ids inside
Generate = Callable[[Sequence[list[dict[str, Any]]], int], list[str]]

# rows -> (positions, batch): for each line of the collated batch the position of its row. Rows may come in any order,
# and one row in several lines (the windows of a long text, the turns of a long chat).
Encode = Callable[[Sequence[Any]], Iterator[tuple[list[int], Batch]]]


@dataclass(frozen=True)
class Item:
    """A row to evaluate, with those fields of `pegbox.data.Row` that evaluation reads."""

    id: str
    kind: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    text_pair: str | None = None
    label: int | float | str | None = None
    tools: list[dict[str, Any]] | None = None
    answer: Any = None
    task: str = ""
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class Metric(Component):
    """One way to score rows.

    Per-row values are means over what the metric counts, so they can be paired by row. The set's value is the mean of
    the rows' `key` values, weighted by their `weight_key` values where there is one, and exponentiated where `exp`.
    """

    higher_is_better: ClassVar[bool] = True
    needs_generation: ClassVar[bool] = False
    encoding: ClassVar[Literal["training", "scoring"]] = "scoring"  # the task's own encoding and mask, or plain scoring
    version: ClassVar[str] = "1"  # raised whenever a value could change
    unit: ClassVar[str] = ""
    weight_key: ClassVar[str] = ""
    exp: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """The name of this metric's value in `Example.values`, and of its score."""
        return self.kind

    @property
    def direction(self) -> bool:
        """Whether more is better, for this very configuration."""
        return type(self).higher_is_better

    def score(self, view: ModelView, rows: Sequence[Any], generate: Generate, encode: Encode) -> list[Example]:
        """One `Example` per row, in order."""
        raise NotImplementedError


METRIC: Axis[Metric] = Axis("metric", Metric, "pegbox.evaluate.metrics")


def prompt_of(row: Any) -> list[dict[str, Any]]:
    """What is asked: the messages before the last assistant turn; of a completion row its raw prompt."""
    messages = row.messages
    if row.kind not in ("chat", "completion") or not messages:
        raise BadInput(f"Row {row.id} is a {row.kind} row; generating an answer needs a chat or a completion row.")
    before = _split(messages)[0]
    if not before:
        raise BadInput(f"Row {row.id} has no message before its answer.")
    return [{"role": "raw", "content": before[-1]["content"]}] if row.kind == "completion" else before


def expected_of(row: Any) -> str:
    """The reference answer: the last assistant turn's text, else the row's `answer`; "" if there is neither."""
    answer = _split(row.messages)[1]
    if answer:
        return answer
    return "" if row.answer is None else str(row.answer)


def _split(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=-1)
    if last < 0:
        return messages, None
    return messages[:last], str(messages[last].get("content") or "")
