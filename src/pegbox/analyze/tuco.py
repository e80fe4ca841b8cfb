"""TuCo as an analysis: the share of tuning in a model's answer to each prompt, and which prompts escape it.

The mathematics is in `contribution.py`. This file scores rows, compares kinds of rows (plain against attacked, chats
against web text), and draws them. Nuti et al., arXiv:2506.23423. A finding, not a bug: a strong full fine-tuning moves
all text, so the score tells chats from web text best where tuning was light or web text was replayed.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from pegbox.analyze.attacks import affixed, label_broken, many_shot
from pegbox.analyze.base import ANALYZE, Analysis, Subject
from pegbox.analyze.contribution import Contribution, tuning_contribution
from pegbox.analyze.prompts import in_batches, prompt_of, row_ids
from pegbox.analyze.separation import separation
from pegbox.errors import BadInput
from pegbox.parts.files import write_text
from pegbox.parts.findings import Finding, Grid, Picture, Series
from pegbox.parts.generation import Sampling, encode_prompt, generate
from pegbox.parts.pairs import ModelPair

__all__ = ["Tuco"]

BINS = 24


@ANALYZE.register
class Tuco(Analysis):
    """TuCo of every target row's prompt, at its last token.

    Args:
        against: further sets of rows by name; each is scored too, and told apart from the target rows, which should
            be higher (AUC, and hits at 5 % false alarms).
        affixes: attack strings; the target rows with each in turn make the set "affixed". affix_at: before or after.
        shots, shots_from: numbers of earlier question and answer pairs, drawn in order from the rows of `shots_from`;
            TuCo over them is a curve.
        label_broken: sample `samples` answers of at most `answer_tokens` and tell broken prompts from unbroken ones.
        tokens: also sum over all tokens (the bound's beta). output: also the share of the final states.
        norm: of the sums; 1 is the definition's. window: tokens of a text row. batch, max_length: of prompts.
    """

    kind: Literal["tuco"] = "tuco"
    against: dict[str, Any] = Field(default_factory=dict)
    affixes: list[str] = Field(default_factory=list)
    affix_at: Literal["before", "after"] = "after"
    shots: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    shots_from: Any = None
    label_broken: bool = False
    samples: Annotated[int, Field(ge=2)] = 8
    answer_tokens: Annotated[int, Field(ge=1)] = 30
    tokens: bool = False
    output: bool = False
    norm: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    window: Annotated[int, Field(ge=1)] = 97
    batch: Annotated[int, Field(ge=1)] = 8
    max_length: Annotated[int, Field(ge=1)] = 1024

    needs_causal_model: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2506.23423"

    def run(self, subject: Subject) -> Finding:
        if bool(self.shots) != (self.shots_from is not None):
            raise BadInput("analyze 'tuco': shots and shots_from (rows with questions and answers) go together.")
        rows = {"target": subject.rows(), **{name: subject.rows(source) for name, source in self.against.items()}}
        pair = subject.pair()
        prompts = {name: self._ids(subject, found) for name, found in rows.items()}
        if self.affixes:
            rows["affixed"], prompts["affixed"] = self._affixed(subject, rows["target"])
        scored = {name: self.score(pair, ids, _pad(subject.tokenizer)) for name, ids in prompts.items()}
        finding = Finding(kind=self.kind, title="Tuning contribution (TuCo)", notes=[_NOTE])
        _summarise(finding, scored)
        finding.pictures += [_histogram(scored), _by_block(scored)]
        if self.label_broken:
            self._broken(finding, subject, pair, rows["target"], [s.tuco for s in scored["target"]])
        if self.shots:
            self._many_shots(finding, subject, pair, rows["target"])
        self._save(finding, subject, rows, scored)
        return finding

    def score(self, pair: ModelPair, prompts: Sequence[Sequence[int]], pad: int = 0) -> list[Scored]:
        """Every prompt's values, in order."""
        found: list[Scored | None] = [None] * len(prompts)
        device = next(pair.tuned.parameters()).device
        for positions, batch in in_batches(prompts, self.batch, pad, device):
            values = tuning_contribution(pair, batch, norm=self.norm, tokens=self.tokens, output=self.output)
            for line, position in enumerate(positions):
                found[position] = Scored(values, line, len(prompts[position]))
        return [one for one in found if one is not None]

    def _ids(self, subject: Subject, rows: Sequence[Any]) -> list[list[int]]:
        options: dict[str, Any] = {"window": self.window, "longest": self.max_length, "seed": subject.seed}
        return [row_ids(subject.tokenizer, row, **options) for row in rows]

    def _affixed(self, subject: Subject, rows: Sequence[Any]) -> tuple[list[Any], list[list[int]]]:
        """Each target row under each affix."""
        both = [(row, text) for text in self.affixes for row in rows]
        ids = [encode_prompt(subject.tokenizer, affixed(prompt_of(r), t, self.affix_at), r.tools) for r, t in both]
        return [row for row, _ in both], ids

    def _broken(
        self, finding: Finding, subject: Subject, pair: ModelPair, rows: Sequence[Any], tuco: list[float]
    ) -> None:
        prompts = [prompt_of(row) for row in rows]

        def answer(asked: Sequence[Any], draw: int) -> list[str]:
            sampling = Sampling(temperature=1.0, seed=subject.seed + draw)
            limit = self.answer_tokens
            return generate(pair.tuned, subject.tokenizer, asked, max_new_tokens=limit, sampling=sampling)

        labels = label_broken(prompts, answer, samples=self.samples)
        finding.numbers["broken_share"] = sum(labels) / len(labels)
        finding.details["broken"] = labels
        if len(set(labels)) == 2:
            told = separation(tuco, [int(not label) for label in labels])
            finding.numbers |= {"auc_unbroken_broken": told.auc, "found_at_5_percent_unbroken": told.found}
        else:
            finding.notes.append("All prompts broke, or none did, so there is nothing to tell apart.")

    def _many_shots(self, finding: Finding, subject: Subject, pair: ModelPair, rows: Sequence[Any]) -> None:
        pool = [_question_and_answer(row) for row in subject.rows(self.shots_from)]
        if max(self.shots) > len(pool):
            raise BadInput(f"analyze 'tuco': {max(self.shots)} shots were asked for, and shots_from has {len(pool)}.")
        means = []
        for count in self.shots:
            ids = [encode_prompt(subject.tokenizer, many_shot(prompt_of(r), pool, count), r.tools) for r in rows]
            means.append(statistics.mean(s.tuco for s in self.score(pair, ids, _pad(subject.tokenizer))))
        curve = Series(name="mean TuCo", xs=[float(c) for c in self.shots], ys=means)
        finding.pictures.append(
            Picture(
                key="tuco-shots", title="By shots before the prompt", x_label="shots", y_label="TuCo", series=[curve]
            )
        )
        finding.details["shots"] = dict(zip(map(str, self.shots), means))

    def _save(
        self, finding: Finding, subject: Subject, rows: Mapping[str, Sequence[Any]], scored: Mapping[str, list[Scored]]
    ) -> None:
        """One line a prompt, as a table beside the report and (for few prompts) in it."""
        columns = ["set", "row", "tokens", "tuco", "beta", *(["output"] if self.output else [])]
        lines: list[list[Any]] = [
            [name, str(row.id), s.length, s.tuco, s.beta, *([s.output] if self.output else [])]
            for name, found in scored.items()
            for row, s in zip(rows[name], found)
        ]
        out = io.StringIO()
        csv.writer(out).writerows([columns, *lines])
        subject.folder.mkdir(parents=True, exist_ok=True)
        write_text(subject.folder / "prompts.csv", out.getvalue())
        ordered = sorted(lines, key=lambda line: line[3])
        finding.tables.append(Grid(title="Prompts, lowest first", columns=columns, rows=ordered[:200]))


class Scored:
    """One prompt's values: a line of a `Contribution`."""

    def __init__(self, found: Contribution, line: int, length: int):
        self.tuco = float(found.tuco[line])
        self.beta = float(found.beta[line])
        self.curve = found.curve[line].tolist()
        self.output = None if found.output is None else float(found.output[line])
        self.length = length


_NOTE = (
    "Share of tuning in the residual stream at the last token of the prompt: 0, nothing of the answer's computation "
    "comes from tuning; 1, all of it."
)


def _summarise(finding: Finding, scored: Mapping[str, list[Scored]]) -> None:
    rows: list[list[Any]] = []
    for name, found in scored.items():
        values = [s.tuco for s in found]
        spread = statistics.stdev(values) if len(values) > 1 else None
        told = None
        if name != "target":
            target = [s.tuco for s in scored["target"]]
            told = separation([*target, *values], [1] * len(target) + [0] * len(values))
            finding.numbers |= {f"auc_target_{name}": told.auc}
        rows.append(
            [name, len(values), statistics.mean(values), spread, min(values), max(values)]
            + ([told.auc, told.found] if told else [None, None])
        )
    finding.numbers = {"mean_tuco": rows[0][2], "prompts": float(rows[0][1]), **finding.numbers}
    columns = ["set", "prompts", "mean", "spread", "lowest", "highest", "AUC", "found at 5 %"]
    finding.tables.append(Grid(title="TuCo by set", columns=columns, rows=rows))


def _histogram(scored: Mapping[str, list[Scored]]) -> Picture:
    everything = [s.tuco for found in scored.values() for s in found]
    low, high = min(everything), max(everything)
    width = (high - low) / BINS or 1e-6
    series = []
    for name, found in scored.items():
        counts = torch.histc(torch.tensor([s.tuco for s in found]), BINS, low, low + BINS * width)
        centres = [low + (i + 0.5) * width for i in range(BINS)]
        series.append(Series(name=name, xs=centres, ys=(counts / len(found)).tolist()))
    return Picture(
        key="tuco-histogram", title="TuCo of the prompts", x_label="TuCo", y_label="share of prompts", series=series,
        form="bars",
    )  # fmt: skip


def _by_block(scored: Mapping[str, list[Scored]]) -> Picture:
    series = []
    for name, found in scored.items():
        mean = torch.tensor([s.curve for s in found]).mean(0).tolist()
        series.append(Series(name=name, xs=[float(i + 1) for i in range(len(mean))], ys=mean))
    return Picture(
        key="tuco-blocks", title="Share of tuning after each block", x_label="block", y_label="beta", series=series
    )


def _question_and_answer(row: Any) -> tuple[str, str]:
    answers = [m for m in row.messages if m.get("role") == "assistant"]
    questions = [m for m in row.messages if m.get("role") in ("user", "raw")]
    if not answers or not questions:
        raise BadInput(f"Row {row.id} is no question with an answer, which a shot must be.")
    return str(questions[-1]["content"]), str(answers[-1]["content"])


def _pad(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0
