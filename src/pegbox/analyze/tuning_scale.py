"""How strongly tuning should count: accuracy of answer choices over the scale alpha, cross-validated.

    choice(prompt) = a  where p_alpha(a | prompt) > p_alpha(a' | prompt) for all other choices; a tie is no choice
    fold i: alpha_i = argmax of the accuracy on the other folds, scored on fold i

Nuti et al., arXiv:2506.23423, section 5. Every block's tuning is scaled by alpha (`parts.mixing`); to answer with the
alpha that was found use `decode: {kind: scaled, alpha: ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from pegbox.analyze.base import ANALYZE, Analysis, Subject
from pegbox.analyze.prompts import in_batches, prompt_of
from pegbox.errors import BadInput
from pegbox.parts.context import seed_of
from pegbox.parts.findings import Finding, Grid, Picture, Series
from pegbox.parts.generation import encode_prompt
from pegbox.parts.mixing import mixed
from pegbox.parts.pairs import ModelPair

__all__ = ["GRID", "Chosen", "Question", "TuningScale", "choose_alpha", "chosen_right", "questions_of"]

GRID = (0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25)
Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Question:
    """A prompt with choices at its next token: ids of the prompt, one id per choice, the right choice's position."""

    prompt: tuple[int, ...]
    choices: tuple[int, ...]
    right: int


@dataclass(frozen=True)
class Chosen:
    """The outcome of a cross-validated choice.

    Args:
        alpha: the best on all rows. accuracy: cross-validated. plain: at alpha 1. delta: accuracy - plain.
        by_alpha: accuracy on all rows. by_fold: the alpha of each fold.
    """

    alpha: float
    accuracy: float
    plain: float
    by_alpha: dict[float, float]
    by_fold: tuple[float, ...]

    @property
    def delta(self) -> float:
        return self.accuracy - self.plain


def choose_alpha(
    right: Mapping[float, Sequence[bool]], *, folds: int = 5, seed: int = 0, attenuate: bool = False
) -> Chosen:
    """Choose alpha from which rows were right at each alpha of a grid.

    Args:
        right: alpha -> one verdict per row. attenuate: take the least accurate alpha (to weaken a behaviour).

    Raises `BadInput`: a grid without 1.0, more folds than rows, other counts of rows.
    """
    if 1.0 not in right:
        raise BadInput("The grid of alpha needs 1.0, which everything is compared with.")
    table = {alpha: torch.tensor(list(map(float, verdicts)), dtype=torch.float64) for alpha, verdicts in right.items()}
    counts = {len(v) for v in table.values()}
    if len(counts) != 1:
        raise BadInput(f"Every alpha needs a verdict on every row, got {sorted(counts)} of them.")
    rows = counts.pop()
    if not 2 <= folds <= rows:
        raise BadInput(f"{folds} folds of {rows} rows: give at least 2, and no more folds than rows.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed_of(seed, "folds")))
    parts = [order[i::folds] for i in range(folds)]
    taken, hits = [], torch.zeros(rows, dtype=torch.float64)
    for part in parts:
        rest = torch.ones(rows, dtype=torch.bool)
        rest[part] = False
        alpha = _best({a: float(v[rest].mean()) for a, v in table.items()}, attenuate)
        taken.append(alpha)
        hits[part] = table[alpha][part]
    by_alpha = {a: float(v.mean()) for a, v in table.items()}
    return Chosen(_best(by_alpha, attenuate), float(hits.mean()), by_alpha[1.0], by_alpha, tuple(taken))


def _best(scores: Mapping[float, float], attenuate: bool) -> float:
    """The best alpha; of equals the one nearest to 1, so that nothing is changed for nothing."""
    sign = -1.0 if attenuate else 1.0
    return max(scores, key=lambda a: (sign * scores[a], -abs(a - 1.0)))


@torch.no_grad()
def chosen_right(
    pair: ModelPair, alpha: float, questions: Sequence[Question], *, batch: int = 8, pad: int = 0
) -> list[bool]:
    """Whether the right choice alone is the likeliest, per question, with tuning scaled by alpha."""
    found = [False] * len(questions)
    device = next(pair.tuned.parameters()).device
    with pair.as_evaluated(), mixed(pair, alpha) as model:
        for positions, inputs in in_batches([q.prompt for q in questions], batch, pad, device):
            logits: Tensor = model(**inputs, use_cache=False).logits
            last = inputs["attention_mask"].sum(-1) - 1
            rows = logits[torch.arange(len(last), device=device), last]
            for line, position in enumerate(positions):
                found[position] = _is_right(rows[line], questions[position])
    return found


def _is_right(logits: Tensor, question: Question) -> bool:
    values = logits[list(question.choices)].tolist()
    others = [v for i, v in enumerate(values) if i != question.right]
    return all(values[question.right] > v for v in others)


def questions_of(rows: Sequence[Any], tokenizer: Any) -> list[Question]:
    """Rows with `choices` (texts) and `answer` (a choice's text or position) as questions; a choice is its first token.

    Raises `BadInput`: no choices, fewer than two, two that begin alike, an answer that is none of them.
    """
    return [_question(row, tokenizer) for row in rows]


def _question(row: Any, tokenizer: Any) -> Question:
    choices = [str(c) for c in (row.meta.get("choices") or ())]
    if len(choices) < 2:
        raise BadInput(f"Row {row.id} has no two choices. Give each row 'choices': a list of answers to tell apart.")
    answer = row.answer if row.answer is not None else _last_answer(row)
    if isinstance(answer, int) and not isinstance(answer, bool):
        right = answer
    else:
        right = choices.index(str(answer)) if str(answer) in choices else -1
    if not 0 <= right < len(choices):
        raise BadInput(f"Row {row.id}: the answer {answer!r} is none of its choices {choices}.")
    firsts = [tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in choices]
    if len(set(firsts)) < len(firsts):
        raise BadInput(f"Row {row.id}: two of the choices {choices} begin with the same token and can't be told apart.")
    return Question(tuple(encode_prompt(tokenizer, prompt_of(row), row.tools)), tuple(firsts), right)


def _last_answer(row: Any) -> str:
    last = row.messages[-1] if row.messages else {}
    return str(last.get("content") or "") if last.get("role") == "assistant" else ""


@ANALYZE.register
class TuningScale(Analysis):
    """Accuracy over alpha on rows with choices, and the alpha that cross-validation takes.

    Args:
        grid: of alpha; holds 1.0. folds: of the cross-validation. attenuate: look for the alpha that weakens most.
    """

    kind: Literal["tuning_scale"] = "tuning_scale"
    grid: list[Number] = Field(default_factory=lambda: list(GRID))
    folds: Annotated[int, Field(ge=2)] = 5
    attenuate: bool = False
    batch: Annotated[int, Field(ge=1)] = 8

    needs_causal_model: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2506.23423, section 5"

    @field_validator("grid")
    @classmethod
    def _has_one(cls, grid: list[float]) -> list[float]:
        if 1.0 not in grid or len(grid) < 2 or min(grid) < 0:
            raise BadInput(f"analyze.grid: alphas of 0 or more, 1.0 among them and at least one other; got {grid}.")
        return sorted(set(grid))

    def run(self, subject: Subject) -> Finding:
        rows = subject.rows()
        if self.folds > len(rows):
            raise BadInput(f"{self.folds} folds of {len(rows)} rows: give no more folds than rows.")
        pair = subject.pair()
        questions = questions_of(rows, subject.tokenizer)
        pad = subject.tokenizer.pad_token_id or 0
        right = {a: chosen_right(pair, a, questions, batch=self.batch, pad=pad) for a in self.grid}
        chosen = choose_alpha(right, folds=self.folds, seed=subject.seed, attenuate=self.attenuate)
        curve = Series(name="accuracy", xs=list(chosen.by_alpha), ys=list(chosen.by_alpha.values()))
        return Finding(
            kind=self.kind,
            title="Accuracy over the scale of tuning",
            numbers={
                "alpha": chosen.alpha,
                "cross_validated": chosen.accuracy,
                "at_alpha_1": chosen.plain,
                "delta": chosen.delta,
            },
            tables=[
                Grid(title="By fold", columns=["fold", "alpha"], rows=[[i, a] for i, a in enumerate(chosen.by_fold)])
            ],
            pictures=[
                Picture(
                    key="tuning-scale", title="Accuracy over alpha", x_label="alpha", y_label="accuracy", series=[curve]
                )
            ],
        )
