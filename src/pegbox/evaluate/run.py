"""Measuring a model on a suite: the rows through their metrics, the scores with their intervals, the examples beside.

Answers are generated once per prompt and length, however many metrics read them. Nothing random moves: generation is
greedy unless the caller's `generate` says otherwise, and the bootstrap has its own seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput, Corrupt
from pegbox.evaluate.base import Encode, Generate, Metric
from pegbox.evaluate.encoding import scoring_encoder
from pegbox.evaluate.suites import Part, Suite
from pegbox.parts.calibration import Difference, bootstrap, expected_calibration_error, paired_difference
from pegbox.parts.context import seed_of
from pegbox.parts.files import write_text
from pegbox.parts.generation import LocalModel, Sampling, as_evaluated
from pegbox.parts.results import Example, Measurement, Score
from pegbox.parts.view import ModelView

__all__ = ["difference", "measure", "pooled", "read_examples", "write_examples"]

_LONGEST = 1024  # tokens a scored sequence may have, where the model's context is longer


def measure(
    view: ModelView,
    tokenizer: Any,
    suite: Suite,
    *,
    generate: Generate | None = None,
    encode: Encode | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Measurement:
    """Score `view` on `suite`, in evaluation mode, with the modes as they were afterwards.

    Args:
        generate: answers message lists; default: the view's own model, greedy.
        encode: the task's own encoding, for metrics under the training mask (loss, accuracy).
        batch_size: prompts generated at a time; scored batches hold as many tokens as `batch_size` x 256.
        max_length: of a scored sequence and of the windows of long texts; default: the model's context, at most 1024.
        seed: of the bootstrap.
        progress: told the name of each part as it begins.
    """
    answers = _Once(generate if generate is not None else LocalModel(view.model, tokenizer, batch_size))
    device = next(view.model.parameters()).device
    length = max_length if max_length is not None else _context_length(view)
    scoring = scoring_encoder(tokenizer, max_length=length, batch_tokens=256 * batch_size, device=device)
    scores: dict[str, Score] = {}
    examples: dict[str, Example] = {}
    with as_evaluated(view.model):
        for part in suite.parts:
            if progress is not None:
                progress(part.score)
            found = _scored(part, view, answers, scoring, encode)
            scores.update(_scores(part, found, seed))
            _merge(examples, found)
    return Measurement(suite=suite.name, version=suite.version, scores=scores, examples=list(examples.values()))


def _scored(part: Part, view: ModelView, answers: Generate, scoring: Encode, training: Encode | None) -> list[Example]:
    metric = part.metric
    if type(metric).encoding == "training" and training is None:
        raise BadInput(
            f"The metric {metric.kind} is taken under the task's own mask: hand measure() the task's `encode`."
        )
    encode = training if type(metric).encoding == "training" and training is not None else scoring
    found = metric.score(view, part.rows, answers, encode)
    if [e.row_id for e in found] != [row.id for row in part.rows]:
        raise BadInput(f"The metric {metric.kind} must give one example per row, in the rows' order.")
    if part.score == metric.key:
        return found
    return [e.model_copy(update={"values": _renamed(e.values, metric.key, part.score)}) for e in found]


def _renamed(values: dict[str, float], old: str, new: str) -> dict[str, float]:
    return {new if name == old else name: value for name, value in values.items()}


def _scores(part: Part, examples: list[Example], seed: int) -> dict[str, Score]:
    """The part's score, its scores by group where there are several, and its calibration error where rows say how
    sure the model was."""
    scores = {part.score: _score(part.score, part, examples, seed)}
    groups = sorted({e.group for e in examples})
    if len(groups) > 1:
        for group in groups:
            name = f"{part.score}/{group or 'other'}"
            scores[name] = _score(name, part, [e for e in examples if e.group == group], seed)
    if all("confidence" in e.values for e in examples):
        name = f"{part.score}.ece"
        error = expected_calibration_error(
            [min(1.0, e.values["confidence"]) for e in examples], [e.values[part.score] for e in examples]
        )
        scores[name] = Score(name=name, value=error, n=len(examples), higher_is_better=False)
    return scores


def _score(name: str, part: Part, examples: list[Example], seed: int) -> Score:
    kind: type[Metric] = type(part.metric)
    values = [e.values[part.score] for e in examples]
    weights = [e.values[kind.weight_key] for e in examples] if kind.weight_key else None
    interval = bootstrap(values, weights, exp=kind.exp, seed=seed_of(seed, "bootstrap", name))
    return Score(
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        higher_is_better=part.metric.direction,
        unit=kind.unit,
        weight=kind.weight_key,
        exp=kind.exp,
    )


def _merge(into: dict[str, Example], found: list[Example]) -> None:
    """One example per row: later metrics add their values, and their texts where there was none."""
    for new in found:
        old = into.get(new.row_id)
        if old is None:
            into[new.row_id] = new
            continue
        texts = {name: getattr(old, name) or getattr(new, name) for name in ("group", "prompt", "expected", "answer")}
        into[new.row_id] = old.model_copy(update={"values": {**old.values, **new.values}, **texts})


class _Once:
    """Answers each (prompt, length) once."""

    def __init__(self, generate: Generate):
        self._generate = generate
        self._known: dict[tuple[str, int], str] = {}
        self._drawn: dict[tuple[Sampling, int], _Once] = {}

    def __call__(self, messages: Sequence[list[dict[str, Any]]], max_new_tokens: int, /) -> list[str]:
        keys = [(json.dumps(m, sort_keys=True, default=str), max_new_tokens) for m in messages]
        missing = {k: m for k, m in zip(keys, messages, strict=True) if k not in self._known}
        if missing:
            new = self._generate(list(missing.values()), max_new_tokens)
            if len(new) != len(missing):
                raise BadInput(f"generate() gave {len(new)} answers to {len(missing)} prompts.")
            self._known.update(zip(missing, new, strict=True))
        return [self._known[k] for k in keys]

    def sampled(self, messages: Sequence[list[dict[str, Any]]], max_new_tokens: int, how: Sampling) -> list[str]:
        """Answers drawn with these settings, each (prompt, length, settings) once. Raises `BadInput` where the
        generator has settings of its own."""
        if not isinstance(self._generate, LocalModel):
            raise BadInput(
                "These answers are drawn by a decoder with settings of its own; it can't be asked to sample."
            )
        key = (how, max_new_tokens)
        if key not in self._drawn:
            self._drawn[key] = _Once(replace(self._generate, sampling=how))
        return self._drawn[key](messages, max_new_tokens)


def _context_length(view: ModelView) -> int:
    context = getattr(getattr(view.model, "config", None), "max_position_embeddings", None)
    return min(int(context), _LONGEST) if context else _LONGEST


# --- comparing ------------------------------------------------------------------------------------------------------


def difference(
    name: str, ours: Sequence[Measurement], theirs: Sequence[Measurement], *, samples: int = 4000, seed: int = 0
) -> Difference:
    """Ours against theirs on the score `name`, paired by (seed, row), oriented so that positive is better for us.

    One measurement per seed on each side, in the same order, with their examples. A score with `exp` (perplexity) is
    compared on its logarithm, where the difference is a mean over rows. Raises `BadInput` where rows differ.
    """
    score = ours[0].scores[name]
    rows = _rows_of(name, ours[0])
    a, b = ([_column(name, m, rows) for m in side] for side in (ours, theirs))
    weights = _column(name, ours[0], rows, score.weight) if score.weight else None
    sign = 1.0 if score.higher_is_better else -1.0
    signed_a, signed_b = ([[sign * v for v in line] for line in side] for side in (a, b))
    return paired_difference(signed_a, signed_b, weights, samples=samples, seed=seed)


def pooled(name: str, measured: Sequence[Measurement], *, samples: int = 4000, seed: int = 0) -> Score:
    """A score over seeds: the mean over seeds and rows with its two-level interval.

    Without the rows behind it (no examples, or a score that is no mean over rows) it is the mean over the seeds, and
    has no interval.
    """
    score = measured[0].scores[name]
    base, _, group = name.partition("/")
    if not any(base in e.values and (not group or (e.group or "other") == group) for e in measured[0].examples):
        if len(measured) == 1:
            return score
        mean = sum(m.scores[name].value for m in measured) / len(measured)
        return score.model_copy(update={"value": mean, "low": None, "high": None})
    rows = _rows_of(name, measured[0])
    values = [_column(name, m, rows) for m in measured]
    weights = _column(name, measured[0], rows, score.weight) if score.weight else None
    if all(line == values[0] for line in values):
        one = bootstrap(values[0], weights, exp=score.exp, seed=seed)
        return score.model_copy(update={"value": one.value, "low": one.low, "high": one.high, "n": one.n})
    d = paired_difference(values, [[0.0] * len(rows)] * len(values), weights, samples=samples, seed=seed)
    low, value, high = ((math.exp(x) if score.exp else x) for x in (d.low, d.value, d.high))
    if all(0 <= v <= 1 for line in values for v in line) and not score.exp:
        low, high = max(0.0, low), min(1.0, high)  # the rescaled bootstrap may step outside
    return score.model_copy(update={"value": value, "low": low, "high": high, "n": len(rows)})


def _rows_of(name: str, measurement: Measurement) -> list[str]:
    base, _, group = name.partition("/")
    chosen = [e for e in measurement.examples if base in e.values and (not group or (e.group or "other") == group)]
    if not chosen:
        raise BadInput(f"The suite {measurement.suite} holds no examples for '{name}'. Read them with read_examples.")
    return [e.row_id for e in chosen]


def _column(name: str, measurement: Measurement, rows: list[str], key: str = "") -> list[float]:
    by_id = {e.row_id: e for e in measurement.examples}
    base = key or name.partition("/")[0]
    missing = [r for r in rows if r not in by_id or base not in by_id[r].values]
    if missing or len(_rows_of(name, measurement)) != len(rows):
        raise BadInput(
            f"'{name}' was measured on different rows ({len(missing)} of {len(rows)} missing, e.g. {missing[:1]}), so "
            "it can't be paired. Evaluate both on the same data."
        )
    return [by_id[r].values[base] for r in rows]


def write_examples(measurement: Measurement, path: Path) -> None:
    """One JSON line per example."""
    lines = "".join(e.model_dump_json() + "\n" for e in measurement.examples)
    write_text(path, lines)


def read_examples(path: Path) -> list[Example]:
    """What `write_examples` wrote. Raises `Corrupt`."""
    try:
        return [Example.model_validate_json(line) for line in path.read_text("utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise Corrupt(f"{path} is not a readable file of examples ({error}).") from error
