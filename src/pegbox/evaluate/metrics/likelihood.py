"""Metrics without generation: loss, perplexity, multiple choice by log-likelihood, classification accuracy.

perplexity = exp( - sum_r sum_t log p(x_rt | x_r<t) / number of tokens )
choice     = argmax_c log p(c | prompt) / length(c)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from pegbox.errors import BadInput
from pegbox.evaluate.base import METRIC, Encode, Generate, Item, Metric, prompt_of
from pegbox.evaluate.likelihood import row_log_likelihoods
from pegbox.parts.results import Example
from pegbox.parts.view import ModelView

__all__ = ["Accuracy", "Loss", "MultipleChoice", "Perplexity"]


class _PerToken(Metric):
    higher_is_better: ClassVar[bool] = False
    weight_key: ClassVar[str] = "tokens"

    def score(self, view: ModelView, rows: Sequence[Any], generate: Generate, encode: Encode) -> list[Example]:
        sums, counts = row_log_likelihoods(view, rows, encode)
        return [
            Example(row_id=row.id, values={self.key: -s / n, "tokens": float(n)}, group=row.task, prompt=_start(row))
            for row, s, n in zip(rows, sums.tolist(), counts.tolist(), strict=True)
        ]


@METRIC.register
class Loss(_PerToken):
    """Mean negative log-likelihood per trained token, in nats, under the task's own mask."""

    kind: Literal["loss"] = "loss"
    encoding: ClassVar[Literal["training", "scoring"]] = "training"
    unit: ClassVar[str] = "nats"


@METRIC.register
class Perplexity(_PerToken):
    """Perplexity per token. Rows hold their mean loss (its exponential is the row's own perplexity) and token count."""

    kind: Literal["perplexity"] = "perplexity"
    exp: ClassVar[bool] = True


@dataclass(frozen=True)
class _Choices:
    options: list[str]
    right: int
    items: list[Item] = field(default_factory=list)


@METRIC.register
class MultipleChoice(Metric):
    """Whether the right one of `meta["choices"]` is the likeliest; `answer` is its position or its text.

    Args:
        normalise: divide log p by the option's characters (so that tokenizers compare), its tokens, or nothing.

    Values beside it: `confidence`, the softmax over the options of the same scores (times their mean length, which
    puts it back on the scale of a log-likelihood), of the one chosen.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    normalise: Literal["characters", "tokens", "none"] = "characters"

    def score(self, view: ModelView, rows: Sequence[Any], generate: Generate, encode: Encode) -> list[Example]:
        questions = [_choices(row) for row in rows]
        sums, counts = row_log_likelihoods(view, [item for q in questions for item in q.items], encode)
        examples, start = [], 0
        for row, q in zip(rows, questions, strict=True):
            end = start + len(q.items)
            examples.append(self._example(row, q, sums[start:end], counts[start:end]))
            start = end
        return examples

    def _example(self, row: Any, q: _Choices, sums: np.ndarray, tokens: np.ndarray) -> Example:
        lengths = {"characters": np.array([len(o) for o in q.options]), "tokens": tokens, "none": np.ones(len(tokens))}
        length = lengths[self.normalise]
        scores = sums / length
        chosen = int(np.argmax(scores))
        scaled = (scores - scores.max()) * length.mean()
        values = {self.key: float(chosen == q.right), "confidence": float(1 / np.exp(scaled).sum())}
        prompt = str(prompt_of(q.items[0])[-1]["content"])
        return Example(
            row_id=row.id,
            values=values,
            group=row.task,
            prompt=prompt,
            expected=q.options[q.right].strip(),
            answer=q.options[chosen].strip(),
        )


def _choices(row: Any) -> _Choices:
    options = [str(o) for o in (row.meta or {}).get("choices", ())]
    if len(options) < 2 or not all(options):
        raise BadInput(f"Row {row.id}: multiple choice needs at least two non-empty texts in meta['choices'].")
    right = options.index(row.answer) if isinstance(row.answer, str) and row.answer in options else row.answer
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise BadInput(
            f"Row {row.id}: 'answer' must be a choice or its position (0-{len(options) - 1}), got {right!r}."
        )
    asked = [m for m in row.messages if m.get("role") != "assistant"]
    items = [
        Item(f"{row.id}/{i}", row.kind, [*asked, {"role": "assistant", "content": option}])
        for i, option in enumerate(options)
    ]
    return _Choices(options, right, items)


@METRIC.register
class Accuracy(Metric):
    """Share of rows whose likeliest class is the label. Values beside it: `confidence` in the chosen class."""

    kind: Literal["accuracy"] = "accuracy"
    encoding: ClassVar[Literal["training", "scoring"]] = "training"

    def score(self, view: ModelView, rows: Sequence[Any], generate: Generate, encode: Encode) -> list[Example]:
        found: dict[int, tuple[int, int, float]] = {}
        with torch.no_grad():
            for positions, batch in encode(rows):
                logits = view.logits(batch)
                if logits.ndim != 2 or batch["labels"].ndim != 1:
                    raise BadInput("accuracy is for classifiers: (B, C) logits and one label per row. Use exact_match.")
                sure, chosen = logits.float().softmax(-1).max(-1)
                lines = zip(chosen.tolist(), batch["labels"].tolist(), sure.tolist(), strict=True)
                found.update(zip(positions, lines, strict=True))
        return [
            Example(
                row_id=row.id,
                values={self.key: float(found[i][0] == found[i][1]), "confidence": found[i][2]},
                group=row.task,
                prompt=row.text,
                expected=str(row.label),
                answer=str(_label_names(view).get(found[i][0], found[i][0])),
            )
            for i, row in enumerate(rows)
        ]


def _label_names(view: ModelView) -> dict[int, str]:
    return getattr(getattr(view.model, "config", None), "id2label", None) or {}


def _start(row: Any, limit: int = 400) -> str:
    text = row.text or (str(row.messages[-1].get("content") or "") if row.messages else "")
    return text if len(text) <= limit else text[:limit] + " ..."
