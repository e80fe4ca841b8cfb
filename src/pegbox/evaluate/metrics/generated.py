"""Metrics on generated answers: exact match, token F1, the right number, a substring, and a row's own checker.

What this file does not do: generate (it is handed `generate`), or know any task's rules (`parts.answers` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pegbox.errors import BadInput
from pegbox.evaluate.base import METRIC, Encode, Generate, Metric, expected_of, prompt_of
from pegbox.parts.answers import (
    checker_for,
    contains,
    exact_match,
    final_answer,
    numbers_equal,
    prefix_match,
    squad_f1,
)
from pegbox.parts.results import Example
from pegbox.parts.view import ModelView

__all__ = ["F1", "Contains", "ExactMatch", "Generated", "Number", "Verified"]


class Generated(Metric):
    """A metric that compares a generated answer with a row."""

    needs_generation: ClassVar[bool] = True

    max_new_tokens: Annotated[int, Field(ge=1)] = 128

    def judge(self, answer: str, row: Any) -> dict[str, float]:
        """The row's values; `self.key` is among them."""
        raise NotImplementedError

    def score(self, view: ModelView, rows: Sequence[Any], generate: Generate, encode: Encode) -> list[Example]:
        prompts = [prompt_of(row) for row in rows]
        answers = generate(prompts, self.max_new_tokens)
        return [
            Example(
                row_id=row.id,
                values=self.judge(answer, row),
                group=row.task,
                prompt=_shown(prompt),
                expected=expected_of(row),
                answer=answer,
            )
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]


@METRIC.register
class ExactMatch(Generated):
    """Whether the answer is the expected one.

    Args:
        normalise: compare in SQuAD's form (case, punctuation, articles, blanks); else only outer blanks are cut.
        prefix: also count an answer that begins with the expected one (an optimistic form that some papers report).
    """

    kind: Literal["exact_match"] = "exact_match"
    normalise: bool = True
    prefix: bool = False

    def judge(self, answer: str, row: Any) -> dict[str, float]:
        golds = _golds(row)
        if self.normalise:
            right = exact_match(answer, golds) or (self.prefix and prefix_match(answer, golds))
        else:
            said = answer.strip()
            right = any(said == g.strip() or (self.prefix and said.startswith(g.strip())) for g in golds)
        return {self.key: float(right)}


@METRIC.register
class F1(Generated):
    """Token F1 with SQuAD's normalisation; golds that mean "no answer" count by exact match (as MeZO scores SQuAD)."""

    kind: Literal["f1"] = "f1"
    reproduces: ClassVar[str] = "arXiv:1606.05250"

    def judge(self, answer: str, row: Any) -> dict[str, float]:
        return {self.key: squad_f1(answer, _golds(row))}


@METRIC.register
class Contains(Generated):
    """Whether the answer contains the expected one as whole words."""

    kind: Literal["contains"] = "contains"

    def judge(self, answer: str, row: Any) -> dict[str, float]:
        return {self.key: float(contains(answer, _golds(row)))}


@METRIC.register
class Number(Generated):
    r"""Whether the answer's number is right: behind `####`, in `\boxed{}`, or the last one in the text."""

    kind: Literal["number"] = "number"
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    relative: Annotated[float, Field(ge=0)] = 0.0

    def judge(self, answer: str, row: Any) -> dict[str, float]:
        gold = row.answer if row.answer is not None else final_answer(expected_of(row)) or expected_of(row)
        return {self.key: float(numbers_equal(answer, gold, absolute=self.tolerance, relative=self.relative))}


@METRIC.register
class Verified(Generated):
    """Whether the row's own checker accepts the answer: its task's, or the comparison with its `answer`."""

    kind: Literal["verified"] = "verified"

    def judge(self, answer: str, row: Any) -> dict[str, float]:
        return {self.key: float(checker_for(row)(row, answer))}


def _golds(row: Any) -> list[str]:
    """The accepted answers: a list in `row.answer`, else the reference text, else the `answer`."""
    if isinstance(row.answer, list | tuple):
        return [str(a) for a in row.answer]
    gold = expected_of(row)
    if not gold:
        raise BadInput(f"Row {row.id} has neither an assistant turn nor an 'answer' to compare with.")
    return [gold]


def _shown(prompt: list[dict[str, Any]]) -> str:
    """The prompt as people read it: the last message, behind the others where there are several."""
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"[{m.get('role', '?')}] {m.get('content') or ''}" for m in prompt)
