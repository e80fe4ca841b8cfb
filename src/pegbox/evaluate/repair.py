"""Repair evaluation: candidates are drawn, their code is cut out, compiled and run against tests, and counted.

    Top-k     share of bugs of which one of the first k samples passes
    pass@k    its unbiased form over all samples
    exact     share of bugs whose first sample is the reference repair, white space aside

`evaluate_repair` works on any generator and gives a table per bug; the metric `repair` is the same as a part of a
suite, for a model that pegbox holds. Source: arXiv:2404.12636 (10 samples at temperature 1; Top-1, 5, 10; an answer
without any code is drawn again with more room). What it does not do: build prompts or run code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from pegbox.errors import BadInput
from pegbox.evaluate.base import METRIC, Encode, Generate, Metric, expected_of, prompt_of
from pegbox.parts.generation import Messages, Sampling
from pegbox.parts.languages import Job, available, check_all, fenced, job_of, language_named
from pegbox.parts.passes import pass_at_k, top_k
from pegbox.parts.results import Example
from pegbox.parts.sandbox import DEFAULT, Limits, Outcome
from pegbox.parts.view import ModelView

__all__ = ["Bug", "Repair", "RepairResult", "evaluate_repair", "judge", "same_code", "sampled", "with_counts"]

# (message lists, max new tokens, which sample) -> one answer each
Draw = Callable[[Sequence[Messages], int, int], list[str]]


class Bug(BaseModel):
    """One bug's candidates: how each sample ended, in the order drawn, and whether the first is the reference."""

    model_config = ConfigDict(frozen=True)

    row_id: str
    name: str = ""
    group: str = ""
    statuses: tuple[str, ...]
    exact: bool
    answers: tuple[str, ...] = ()

    @property
    def passed(self) -> tuple[bool, ...]:
        return tuple(status == "passed" for status in self.statuses)


@dataclass(frozen=True)
class RepairResult:
    """The table per bug, the counts over it, and rows left out for want of a tool-chain, with the notice."""

    bugs: list[Bug]
    skipped: dict[str, int]

    def top_k(self, k: int) -> float:
        """See `parts.passes`."""
        return top_k([bug.passed for bug in self.bugs], k)

    def pass_at_k(self, k: int) -> float:
        """See `parts.passes`."""
        return pass_at_k([bug.passed for bug in self.bugs], k)

    @property
    def exact(self) -> float:
        """Share of bugs whose first sample is the reference repair."""
        return sum(bug.exact for bug in self.bugs) / len(self.bugs)

    @property
    def notice(self) -> str:
        """What was not measured, "" if everything was."""
        found = ", ".join(f"{count} {language}" for language, count in sorted(self.skipped.items()))
        return f"not measured, as their tool-chain is not installed: {found} rows" if found else ""


def evaluate_repair(
    rows: Sequence[Any],
    draw: Draw,
    *,
    samples: int = 10,
    max_new_tokens: int = 512,
    more_tokens: int = 500,
    most_tokens: int = 3000,
    limits: Limits = DEFAULT,
    workers: int = 2,
) -> RepairResult:
    """Draw, judge and count.

    Args:
        rows: with `tests` and `language` in their meta (`data.repair`). draw: see `Draw`, `sampled`.
        samples: candidates per bug. max_new_tokens: of each; one without any code is drawn again with `more_tokens`
            more, up to `most_tokens`.
        workers: candidates judged at a time.

    Raises:
        BadInput: no row that can be judged here; a row without tests.
    """
    if samples < 1:
        raise BadInput(f"samples must be at least 1, got {samples}.")
    kept, skipped = _judgeable(rows)
    prompts = [prompt_of(row) for row in kept]
    answers: list[list[str]] = [[] for _ in kept]
    for i in range(samples):
        for line, text in zip(answers, _drawn(kept, prompts, draw, i, max_new_tokens, more_tokens, most_tokens)):
            line.append(text)
    outcomes = judge(kept, answers, limits, workers)
    bugs = [
        Bug(
            row_id=row.id,
            name=str(row.meta.get("name", "")),
            group=row.task,
            statuses=tuple(o.status for o in found),
            exact=same_code(_code(row, line[0]), _reference(row)),
            answers=tuple(line),
        )
        for row, line, found in zip(kept, answers, outcomes, strict=True)
    ]
    return RepairResult(bugs, skipped)


def judge(
    rows: Sequence[Any], answers: Sequence[Sequence[str]], limits: Limits = DEFAULT, workers: int = 2
) -> list[list[Outcome]]:
    """How every answer ended, by row. Raises `BadInput` for a row without tests."""
    jobs = [[job_of(row, answer) for answer in line] for row, line in zip(rows, answers, strict=True)]
    flat = _judged(tuple(job for line in jobs for job in line), limits, workers)
    found = iter(flat)
    return [[next(found) for _ in line] for line in jobs]


def sampled(model: Any, tokenizer: Any, *, temperature: float = 1.0, seed: int = 0, batch_size: int = 16) -> Draw:
    """A `Draw` from a local model; sample i has a seed of its own, so more samples begin with the same ones."""
    from pegbox.parts.generation import LocalModel

    def draw(messages: Sequence[Messages], max_new_tokens: int, number: int) -> list[str]:
        how = Sampling(temperature=temperature, seed=seed + number)
        return LocalModel(model, tokenizer, batch_size, how)(messages, max_new_tokens)

    return draw


def same_code(one: str, other: str) -> bool:
    """Equal but for blanks at line ends and empty lines."""
    return _lines(one) == _lines(other)


def _lines(code: str) -> list[str]:
    return [line.rstrip() for line in code.splitlines() if line.strip()]


def _judgeable(rows: Sequence[Any]) -> tuple[list[Any], dict[str, int]]:
    here, skipped, kept = available(), dict[str, int](), []
    for row in rows:
        language = language_named(str(row.meta.get("language", "python")))
        if language in here:
            kept.append(row)
        else:
            skipped[language] = skipped.get(language, 0) + 1
    if not kept:
        missing = ", ".join(skipped) or "none"
        raise BadInput(f"No row can be judged here (languages of the rows: {missing}; here: {', '.join(here)}).")
    return kept, skipped


def _drawn(
    rows: Sequence[Any], prompts: Sequence[Messages], draw: Draw, number: int, first: int, more: int, most: int
) -> list[str]:
    answers, room = draw(prompts, first, number), first
    while room < most and more > 0:
        empty = [i for i, (row, text) in enumerate(zip(rows, answers)) if not _code(row, text).strip()]
        if not empty:
            break
        room = min(most, room + more)
        for i, text in zip(empty, draw([prompts[i] for i in empty], room, number)):
            answers[i] = text
    return answers


def _code(row: Any, answer: str) -> str:
    return fenced(answer, language_named(str(row.meta.get("language", "python"))))


def _reference(row: Any) -> str:
    return str(row.meta.get("fixed") or _code(row, expected_of(row)))


@lru_cache(maxsize=8)
def _judged(jobs: tuple[Job, ...], limits: Limits, workers: int) -> list[Outcome]:
    """Metrics of one suite judge the same candidates."""
    return check_all(jobs, limits, workers)


# --- the metric -----------------------------------------------------------------------------------------------------


@METRIC.register
class Repair(Metric):
    """Top-k, pass@k or exact match of sampled repairs, as a metric.

    Args:
        count: what is counted. k: of the first two. samples, temperature, seed: of the draws; temperature 0 draws one
            answer, which is then the only one. max_new_tokens, more_tokens, most_tokens: see `evaluate_repair`.
        limits: of each run.
    """

    needs_generation: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2404.12636"

    kind: Literal["repair"] = "repair"
    count: Literal["top", "pass", "exact"] = "top"
    k: Annotated[int, Field(ge=1)] = 1
    samples: Annotated[int, Field(ge=1)] = 10
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    more_tokens: Annotated[int, Field(ge=0)] = 500
    most_tokens: Annotated[int, Field(ge=1)] = 3000
    limits: Limits = DEFAULT

    def model_post_init(self, context: Any, /) -> None:
        if self.count != "exact" and self.samples < self.k:
            raise BadInput(f"repair: Top-{self.k} needs {self.k} samples, and samples is {self.samples}. Draw more.")
        if self.temperature == 0 and self.samples > 1:
            raise BadInput("repair: at temperature 0 all samples are the same. Give samples: 1, or a temperature.")

    @property
    def key(self) -> str:
        """top_5, pass_at_5 or exact_repair."""
        return {"top": f"top_{self.k}", "pass": f"pass_at_{self.k}", "exact": "exact_repair"}[self.count]

    def score(self, view: ModelView, rows: Sequence[Any], generate: Generate, encode: Encode) -> list[Example]:
        draw = self._draw(generate)
        found = evaluate_repair(
            rows,
            draw,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            more_tokens=self.more_tokens,
            most_tokens=max(self.most_tokens, self.max_new_tokens),
            limits=self.limits,
        )
        if found.skipped:
            raise BadInput(f"repair: {found.notice}. Install it, or leave these rows out.")
        return [self._example(row, bug) for row, bug in zip(rows, found.bugs, strict=True)]

    def _draw(self, generate: Generate) -> Draw:
        if self.temperature == 0:
            return lambda messages, tokens, number: generate(messages, tokens)
        draws = getattr(generate, "sampled", None)
        if draws is None:
            raise BadInput("repair: this decoder draws one answer only; give temperature: 0 and samples: 1.")

        def draw(messages: Sequence[Messages], tokens: int, number: int) -> list[str]:
            how = Sampling(temperature=self.temperature, seed=self.seed + number)
            answers: list[str] = draws(messages, tokens, how)
            return answers

        return draw

    def _example(self, row: Any, bug: Bug) -> Example:
        if self.count == "exact":
            value = float(bug.exact)
        else:
            value = (top_k if self.count == "top" else pass_at_k)([bug.passed], self.k)
        prompt = prompt_of(row)[-1]["content"]
        values = {self.key: value}
        return Example(
            row_id=row.id,
            values=values,
            group=row.task,
            prompt=prompt,
            expected=expected_of(row),
            answer=bug.answers[0],
        )


def with_counts(metric: Repair, ks: Sequence[int]) -> list[Repair]:
    """The same draws counted as Top-k and pass@k for every k, and as exact matches: the parts of a suite."""
    block = metric.model_dump() | {"limits": metric.limits}
    made = [Repair(**{**block, "count": count, "k": k}) for count in ("top", "pass") for k in ks]
    return [*made, Repair(**{**block, "count": "exact", "k": 1})]
