"""Interference of differences over one base: which entries they share, where they pull apart, what composing costs.

    score(theta + phi_i)  against  score(theta + sum_j phi_j)      on each one's own rows

The subject's own update and every one of `others` are compared in pairs; then base, each alone and all together are
measured on the target rows and on further rows by name. Sparse differences learnt apart should share few entries and
lose little (Ansell et al., arXiv:2110.07560). What it does not do: resolve conflicts (weight operations do).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from pegbox.analyze.base import ANALYZE, Analysis, Subject
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts import deltas
from pegbox.parts.deltas import Delta
from pegbox.parts.differences import acting, checked_difference
from pegbox.parts.findings import Finding, Grid, Picture, Series
from pegbox.parts.overlap import Overlap, overlap_of
from pegbox.parts.results import Score

__all__ = ["Interference"]


@ANALYZE.register
class Interference(Analysis):
    """Overlap, sign conflicts and the cost of composing.

    Args:
        others: further differences by name: runs or artefacts whose update is additive, difference files, or
            composable-sft's `pytorch_diff.bin`.
        rows: rows of their own by name ("tuned" or one of `others`); each model is measured on them too.
        weights: what each is multiplied by in the composition (by name, default 1).
        measure: measure models at all; without it no rows are needed.
        threshold: changes of the subject up to this size don't count.
        other_base: take others that were made on another base.
    """

    kind: Literal["interference"] = "interference"
    others: dict[str, str] = Field(min_length=1)
    rows: dict[str, Any] = Field(default_factory=dict)
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    measure: bool = True
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    other_base: bool = False

    reproduces: ClassVar[str] = "arXiv:2110.07560"
    needs_weights: ClassVar[bool] = True

    def model_post_init(self, context: Any, /) -> None:
        if OWN in self.others:
            raise BadInput(f"analyze.interference.others: '{OWN}' is the model looked at; choose another name.")
        known = [OWN, *self.others]
        for option in ("rows", "weights"):
            for name in getattr(self, option):
                if name not in known:
                    raise BadInput(f"analyze.interference.{option}: no part '{name}'.{did_you_mean(name, known)}")

    def run(self, subject: Subject) -> Finding:
        if self.measure:
            subject.rows()  # says what is missing, before a model is opened
        model, base, tuned = subject.weights()
        names = [name for name, tensor in base.items() if tensor.is_floating_point() and name in tuned]
        own = deltas.difference(base, tuned, mode="add", threshold=self.threshold, names=names)
        parts = {OWN: Delta({n: p for n, p in own.items() if p.values.numel()})}
        for name, place in self.others.items():
            where = f"analyze.interference.others.{name}"
            parts[name] = checked_difference(place, model, where, other_base=self.other_base)
        finding = Finding(kind=self.kind, title="Interference of differences", notes=[_NOTE])
        self._compare(finding, parts)
        if self.measure:
            self._compose(finding, subject, model, parts)
        return finding

    def _compare(self, finding: Finding, parts: Mapping[str, Delta]) -> None:
        rows: list[list[Any]] = []
        series = []
        for one, two in itertools.combinations(parts, 2):
            whole, by_tensor = overlap_of(parts[one], parts[two])
            rows.append([one, two, *whole.entries, whole.common, whole.share, whole.over_chance, whole.conflict])
            rows[-1].append(whole.cosine)
            finding.details[f"{one} and {two}"] = {n: _told(o) for n, o in by_tensor.items()}
            shares = [o.share for o in by_tensor.values()]
            series.append(Series(name=f"{one}, {two}", xs=[float(i) for i in range(len(shares))], ys=shares))
        finding.numbers |= {"largest_overlap": max(r[5] for r in rows), "largest_conflict": max(r[7] for r in rows)}
        heads = ["first", "second", "entries", "entries of second", "common", "share of smaller", "times chance"]
        finding.tables.append(Grid(title="Pairs", columns=[*heads, "opposed", "cosine"], rows=rows))
        if any(s.xs for s in series):
            finding.pictures.append(
                Picture(
                    key="interference-overlap", title="Common entries by tensor", x_label="tensor, in model order",
                    y_label="share of the smaller one's entries", series=series, form="points",
                )
            )  # fmt: skip

    def _compose(self, finding: Finding, subject: Subject, model: nn.Module, parts: Mapping[str, Delta]) -> None:
        suites = {"target": "target"} | {name: f"interference:{name}" for name in self.rows}
        for name, source in self.rows.items():
            subject.define(suites[name], source)
        scaled = {n: d if (w := self.weights.get(n, 1.0)) == 1 else deltas.scale(d, w) for n, d in parts.items()}
        sets = {"base": [], **{name: [name] for name in parts}, "all": list(parts)}
        scores: dict[str, dict[str, Score]] = {}
        for label, members in sets.items():
            with ExitStack() as stack:
                for name in members:
                    stack.enter_context(acting(model, (scaled if label == "all" else parts)[name]))
                scores[label] = {n: _first(subject.measure(model, suite).scores) for n, suite in suites.items()}
        columns = [f"{name}: {scores['base'][name].name}" for name in suites]
        rows: list[list[Any]] = [[label, *(s.value for s in found.values())] for label, found in scores.items()]
        finding.tables.append(Grid(title="Base, each alone, all together", columns=["model", *columns], rows=rows))
        for name in suites:
            alone, together = scores[OWN if name == "target" else name][name], scores["all"][name]
            better = together.value - alone.value
            finding.numbers[f"{name}_gain_by_composing"] = better if alone.higher_is_better else -better


OWN = "tuned"
_NOTE = (
    "Times chance: common entries over those that two random sets of these sizes would share. Opposed: the share of "
    "common entries that the two move in opposite directions. Gain by composing: all together over the part alone, on "
    "its own rows; below 0 the parts interfere."
)


def _told(overlap: Overlap) -> dict[str, Any]:
    return {"entries": list(overlap.entries), "common": overlap.common, "opposed": overlap.conflict}


def _first(scores: Mapping[str, Score]) -> Score:
    return next(iter(scores.values()))
