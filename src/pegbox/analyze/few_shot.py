"""How well unseen tasks are learnt from a few examples, and whether the probabilities that come out can be trusted.

    for each task of the rows:  phi <- K steps from theta on `shots` rows;   p(option | prompt) on the others,
    p(option) = softmax_options( mean length x log p(option | prompt) / length ),   averaged over M samples of the
    weights

Accuracy, ECE and a reliability picture after adaptation and before it. A task is what rows call `task`; options are a
row's `choices`, or else all answers that its task has. The steps are those of training (`optim.inner`) unless given.
Works on any tuned model: a plain adapter is adapted by the same steps, with one prediction instead of M. Zhang, Snell
and Griffiths, arXiv:2508.14285; Guo et al., arXiv:1706.04599. It trains nothing that stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pegbox.analyze.base import ANALYZE, Analysis, Subject
from pegbox.errors import BadInput
from pegbox.parts.adapters import adapter_parameters
from pegbox.parts.calibration import Calibration, calibration, scaled_probabilities, temperature
from pegbox.parts.context import Context, seed_of
from pegbox.parts.episodes import Inner, adapt, swapped
from pegbox.parts.findings import Finding, Grid, Picture, Series
from pegbox.parts.priors import drawn, held, prior_layers

__all__ = ["FewShot", "Predictions", "option_probabilities", "reliability_picture"]

Count = Annotated[int, Field(ge=1)]


@dataclass
class Predictions:
    """Probabilities of options (each list as long as its row has options), the right ones, and whose rows they are."""

    probabilities: list[list[float]] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)

    def matrix(self) -> np.ndarray:
        """(N, C), rows with fewer options filled with zeros."""
        width = max(len(p) for p in self.probabilities)
        return np.array([[*p, *[0.0] * (width - len(p))] for p in self.probabilities])


def option_probabilities(scores: Sequence[float], lengths: Sequence[int]) -> np.ndarray:
    """softmax over options of log-likelihoods per token, times the options' mean length (back on the scale of a
    log-likelihood). Raises `BadInput` for an empty list of options."""
    if len(scores) == 0 or min(lengths, default=0) < 1:
        raise BadInput("Probabilities of options need at least one option, each of at least one token.")
    length = np.asarray(lengths, dtype=float)
    scaled = np.asarray(scores, dtype=float) / length * length.mean()
    powers = np.exp(scaled - scaled.max())
    return np.asarray(powers / powers.sum())


@dataclass(frozen=True)
class _TaskRows:
    name: str
    support: list[Any]
    query: list[Any]
    options: list[str]


@ANALYZE.register
class FewShot(Analysis):
    """Adaptation to the tasks of the target rows.

    Args:
        shots: rows of each task to learn from. query: at most so many to predict; the rest of the task.
        samples: M, predictions with sampled weights that are averaged. predict: by "samples" or the "mean" weights.
        inner: how a task is learnt; default: as in training (`optim.inner`).
        bins: of the reliability picture and the ECE.
        rows: another source of tasks than the run's target rows.
        batch: sequences per forward.
    """

    kind: Literal["few_shot"] = "few_shot"
    shots: Count = 16
    query: Count = 64
    samples: Count = 10
    predict: Literal["samples", "mean"] = "samples"
    inner: Inner | None = None
    bins: Count = 15
    rows: Any = None
    batch: Count = 16

    needs_causal_model: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2508.14285"

    def run(self, subject: Subject) -> Finding:
        tasks = self._tasks(subject.rows(self.rows), subject.seed)
        model = subject.opened()
        bench = _Bench(self, subject, model)
        before, after = Predictions(), Predictions()
        modes = [(m, m.training) for m in model.modules()]
        try:
            with torch.random.fork_rng(devices=[]):
                for task in tasks:
                    torch.manual_seed(seed_of(subject.seed, "few_shot", task.name))
                    bench.predict(task, {}, before)
                    bench.predict(task, bench.adapted(task), after)
        finally:
            for module, mode in modes:
                module.training = mode
        return self._finding(before, after, bench.inner, bench.samples)

    def _tasks(self, rows: Sequence[Any], seed: int) -> list[_TaskRows]:
        """Support and query of each task, the same for every model. Raises `BadInput` for tasks without either."""
        by_task: dict[str, list[Any]] = {}
        for row in rows:
            if row.kind not in ("chat", "completion") or not _answer(row):
                raise BadInput(
                    f"Row {row.id}: few_shot predicts answers, so it needs chat or completion rows with one."
                )
            by_task.setdefault(row.task, []).append(row)
        found = []
        for name, members in sorted(by_task.items()):
            if len(members) <= self.shots:
                raise BadInput(
                    f"Task '{name}' has {len(members)} rows: {self.shots} to learn from leave none to predict. Lower "
                    "analyze.shots, or give more rows per task."
                )
            order = torch.randperm(len(members), generator=_generator(seed, name)).tolist()
            mixed = [members[i] for i in order]
            options = sorted({_answer(row) for row in members})
            found.append(_TaskRows(name, mixed[: self.shots], mixed[self.shots :][: self.query], options))
        return found

    def _finding(self, before: Predictions, after: Predictions, inner: Inner, samples: int) -> Finding:
        first = calibration(before.matrix(), before.right, self.bins)
        last = calibration(after.matrix(), after.right, self.bins)
        numbers = {**_numbers(last), **{f"{k} before": v for k, v in _numbers(first).items()}}
        cooled = _cross_scaled(after, self.bins)
        numbers |= {"ECE after temperature": cooled} if cooled is not None else {}
        cells = [
            [
                b,
                round(float(last.bins.edges[b]), 4),
                int(n),
                float(last.bins.confidence[b]),
                float(last.bins.accuracy[b]),
            ]
            for b, n in enumerate(last.bins.count)
            if n
        ]
        return Finding(
            kind=self.kind,
            title=f"Unseen tasks from {self.shots} examples",
            numbers=numbers,
            tables=[
                _by_task(before, after),
                Grid(title="Reliability", columns=["bin", "from", "rows", "confidence", "accuracy"], rows=cells),
            ],
            pictures=[reliability_picture(first, last)],
            notes=[
                f"{inner.steps} steps of rate {inner.lr} per task; predictions averaged over {samples} samples of the "
                "weights."
                if samples > 1
                else f"{inner.steps} steps of rate {inner.lr} per task; one prediction.",
            ],
            details={
                "rows": after.rows,
                "tasks": after.tasks,
                "right": after.right,
                "probabilities": [[round(p, 6) for p in ps] for ps in after.probabilities],
            },
        )


class _Bench:
    """The model, its adaptable parameters theta, and what learning and predicting need of the run."""

    def __init__(self, analysis: FewShot, subject: Subject, model: nn.Module):
        self.analysis, self.subject, self.model = analysis, subject, model
        self.theta = adapter_parameters(model)
        self.inner = analysis.inner or getattr(subject.recipe.optim, "inner", None) or Inner()
        self.view = subject.task.view(model)
        self.objective = subject.recipe.objective
        if self.objective.host != "supervised" or not self.objective.has_value:
            raise BadInput(f"objective '{self.objective.kind}' has no loss to learn a task by from examples alone.")
        ctx = Context(model=model, seed=subject.seed, tokenizer=subject.tokenizer)
        self.state = self.objective.setup(ctx)
        sampled = bool(prior_layers(model)) and analysis.predict == "samples"
        self.samples = analysis.samples if sampled else 1
        self.draw: Literal["sample", "mean"] = "sample" if sampled else "mean"

    def adapted(self, task: _TaskRows) -> Mapping[str, Tensor]:
        """phi of a task."""
        batches = list(self.subject.batches(task.support, self.analysis.batch))
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.objective.count(batch).items():
                totals[name] = totals[name] + count if name in totals else count
        self.model.train()
        with held(self.model):
            losses = [partial(self._loss, batch, totals) for batch in batches]
            return adapt(self.model, self.theta, losses, self.inner)

    def _loss(self, batch: Any, totals: Mapping[str, Tensor]) -> Tensor:
        ref = None
        if self.objective.needs_reference:
            with torch.no_grad():
                ref = self.objective.reference(self.state, self.view, batch)
        named = self.objective.losses(self.state, self.view, batch, totals, ref)
        parts = [loss for name, loss in named if not name.startswith("_")]
        return sum(parts[1:], parts[0])

    @torch.no_grad()
    def predict(self, task: _TaskRows, phi: Mapping[str, Tensor], into: Predictions) -> None:
        """Probabilities of every query row's options, averaged over the samples."""
        self.model.eval()
        options = [_options(row, task.options) for row in task.query]
        asked = [_answered(row, option) for row, texts in zip(task.query, options) for option in texts]
        with swapped(self.model, phi), drawn(self.model, self.draw):
            runs = [self._scores(asked) for _ in range(self.samples)]
        start = 0
        for row, texts in zip(task.query, options, strict=True):
            part = slice(start, start + len(texts))
            each = [option_probabilities(scores[part], lengths[part]) for scores, lengths in runs]
            into.probabilities.append(np.mean(each, axis=0).tolist())
            into.right.append(texts.index(_answer(row)))
            into.tasks.append(task.name)
            into.rows.append(row.id)
            start = part.stop

    def _scores(self, rows: Sequence[Any]) -> tuple[list[float], list[int]]:
        """The log-likelihood of each row's answer, and its tokens."""
        scores: list[float] = []
        lengths: list[int] = []
        for batch in self.subject.batches(rows, self.analysis.batch):
            targets, valid = self.view.targets(batch)
            hidden = self.view.hidden(batch)
            valid = valid.to(hidden.device)
            logp = self.view.head(hidden[valid]).float().log_softmax(-1)
            picked = logp.gather(1, targets.to(hidden.device)[valid][:, None])[:, 0]
            line = valid.nonzero()[:, 0]
            sums = torch.zeros(len(valid), device=hidden.device).index_add_(0, line, picked)
            scores += sums.tolist()
            lengths += valid.sum(1).tolist()
        return scores, lengths


def reliability_picture(before: Calibration, after: Calibration) -> Picture:
    """Accuracy over confidence, bins that hold rows; on the diagonal a model is as sure as it is right."""
    lines = []
    for name, found in (("before", before), ("after", after)):
        full = found.bins.count > 0
        lines.append(Series(name=name, xs=found.bins.confidence[full].tolist(), ys=found.bins.accuracy[full].tolist()))
    diagonal = Series(name="as sure as right", xs=[0.0, 1.0], ys=[0.0, 1.0], dashed=True)
    return Picture(
        key="reliability",
        title="Reliability on unseen tasks",
        x_label="confidence",
        y_label="accuracy",
        series=[*lines, diagonal],
    )


def _numbers(found: Calibration) -> dict[str, float]:
    return {
        "accuracy": found.accuracy,
        "ECE": found.ece,
        "MCE": found.mce,
        "adaptive ECE": found.adaptive,
        "classwise ECE": found.classwise,
        "Brier": found.brier,
        "NLL": found.nll if np.isfinite(found.nll) else float("nan"),
    }


def _by_task(before: Predictions, after: Predictions) -> Grid:
    rows: list[list[float | int | str | None]] = []
    for name in dict.fromkeys(after.tasks):
        at = [i for i, task in enumerate(after.tasks) if task == name]
        shares = [sum(int(np.argmax(p.probabilities[i])) == p.right[i] for i in at) / len(at) for p in (before, after)]
        rows.append([name, len(at), *(round(share, 4) for share in shares)])
    return Grid(title="By task", columns=["task", "rows", "accuracy before", "accuracy"], rows=rows)


def _cross_scaled(found: Predictions, bins: int) -> float | None:
    """ECE when each half of the tasks is scaled by the temperature that suits the other; None for a single task."""
    names = list(dict.fromkeys(found.tasks))
    if len(names) < 2:
        return None
    p, y = found.matrix(), np.array(found.right)
    odd = np.array([names.index(task) % 2 == 1 for task in found.tasks])
    scaled = p.copy()
    for half in (odd, ~odd):
        scaled[half] = scaled_probabilities(p[half], temperature(p[~half], y[~half]))
    return calibration(scaled, y, bins).ece


def _options(row: Any, of_task: Sequence[str]) -> list[str]:
    given = [str(option) for option in (row.meta or {}).get("choices") or of_task]
    if len(given) < 2 or _answer(row) not in given:
        raise BadInput(
            f"Row {row.id}: its answer '{_answer(row)}' must be one of at least two options, got {given}. Give the row "
            "`choices`, or its task rows with other answers."
        )
    return given


def _answer(row: Any) -> str:
    last = row.messages[-1] if row.messages else {}
    return str(last.get("content") or "") if last.get("role") == "assistant" else ""


def _answered(row: Any, option: str) -> Any:
    """The row with another answer."""
    return replace(row, messages=[*row.messages[:-1], {**row.messages[-1], "content": option}])


def _generator(seed: int, *names: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, "few_shot", "rows", *names))
