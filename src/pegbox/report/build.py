"""From measured runs to the entries of a `Comparison`: pooled scores, changes against the base, verdicts, samples.

Runs come as `parts.results.Metrics` with their examples read (`evaluate.run.read_examples`), one per seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pegbox.errors import BadInput
from pegbox.evaluate.run import difference, pooled
from pegbox.parts.calibration import Difference, holm, verdict
from pegbox.parts.results import Cost, Measurement, Metrics, Score
from pegbox.report.model import Curve, Sample, Told

__all__ = ["by_suite", "changes", "curve_of", "mean_cost", "pooled_scores", "samples", "verdicts"]

Suites = Mapping[str, Sequence[Measurement]]  # suite -> one measurement per seed, in the seeds' order
_POINTS = 240  # of a curve; longer logs are thinned


def pooled_scores(runs: Suites) -> dict[str, dict[str, Score]]:
    """Every score over the seeds, with its two-level interval where the rows are at hand."""
    return {
        suite: {name: pooled(name, measured) for name in measured[0].scores}
        for suite, measured in runs.items()
        if measured
    }


def changes(ours: Suites, base: Suites) -> dict[str, dict[str, Told]]:
    """What changed against the bare base, paired by row. Its one measurement stands for every seed."""
    found: dict[str, dict[str, Told]] = {}
    for suite, measured in ours.items():
        before = base.get(suite)
        if not before or not measured:
            continue
        spread = before if len(before) == len(measured) else [before[0]] * len(measured)
        told = {n: _told(n, measured, spread) for n in measured[0].scores if _paired(n, measured, spread)}
        if told:
            found[suite] = told
    return found


def verdicts(runs: Mapping[str, Suites], reference: str, margin: float | None) -> dict[str, dict[str, dict[str, Told]]]:
    """Every recipe against the reference, per suite and score: Holm over the recipes, then the verdict in words.

    Seeds that either side lacks are the caller's to leave out. Raises `BadInput` for an unknown reference.
    """
    if reference not in runs:
        raise BadInput(f"The reference '{reference}' has no finished run. Known: {', '.join(sorted(runs))}.")
    found: dict[str, dict[str, dict[str, Told]]] = {name: {} for name in runs if name != reference}
    for suite, theirs in runs[reference].items():
        for score in theirs[0].scores if theirs else ():
            told = {n: _told_against(n, score, runs[n].get(suite, ()), theirs, margin) for n in found}
            kept = {n: t for n, t in told.items() if t is not None}
            adjusted = holm({n: d.p for n, (d, _) in kept.items()})
            for n, (d, exp) in kept.items():
                words = verdict(d, adjusted[n], margin=None if exp else margin)
                found[n].setdefault(suite, {})[score] = _as_told(d, exp, adjusted[n], words)
    return found


def _told_against(
    name: str, score: str, ours: Sequence[Measurement], theirs: Sequence[Measurement], margin: float | None
) -> tuple[Difference, bool] | None:
    if len(ours) != len(theirs) or not ours or score not in ours[0].scores or not _paired(score, ours, theirs):
        return None
    return difference(score, ours, theirs), ours[0].scores[score].exp


def _paired(name: str, *sides: Sequence[Measurement]) -> bool:
    """Whether a score has rows behind it on both sides (calibration errors have none of their own)."""
    base = name.partition("/")[0]
    return all(name in m.scores and any(base in e.values for e in m.examples) for side in sides for m in side)


def _told(name: str, ours: Sequence[Measurement], theirs: Sequence[Measurement]) -> Told:
    return _as_told(difference(name, ours, theirs), ours[0].scores[name].exp)


def _as_told(d: Difference, exp: bool, adjusted: float | None = None, words: object = None) -> Told:
    return Told.model_validate(
        {
            "value": d.value,
            "low": d.low,
            "high": d.high,
            "p": d.p,
            "adjusted": adjusted,
            "verdict": words,
            "log": exp,
        }
    )


def mean_cost(costs: Sequence[Cost]) -> Cost | None:
    """The mean over the seeds of every count; a count that some seed lacks stays unknown."""
    if not costs:
        return None
    mean: dict[str, object] = {}
    for name in Cost.model_fields:
        values = [getattr(c, name) for c in costs]
        if isinstance(values[0], str):
            mean[name] = ", ".join(sorted(set(values)))
        elif any(v is None for v in values):
            mean[name] = None
        else:
            total = sum(values) / len(values)
            mean[name] = total if isinstance(values[0], float) else round(total)
    return Cost.model_validate(mean)


def samples(
    base: Measurement | None, runs: Mapping[str, Measurement], primary: str, limit: int = 15, longest: int = 1500
) -> list[Sample]:
    """Test rows with everybody's answers: some that tuning set right, some it broke, some of the rest, in this order.

    Rows are taken in turn from these three lots and by group, so that no one kind fills the page.
    """
    sides = {**({"base": base} if base is not None else {}), **runs}
    by_row = {name: {e.row_id: e for e in m.examples if primary in e.values} for name, m in sides.items()}
    common = [
        e.row_id for e in next(iter(sides.values())).examples if all(e.row_id in rows for rows in by_row.values())
    ]
    found = []
    for row_id in common:
        first = next(iter(by_row.values()))[row_id]
        found.append(
            Sample(
                row_id=row_id,
                prompt=_cut(first.prompt, longest),
                expected=_cut(first.expected, longest),
                group=first.group,
                answers={name: _cut(rows[row_id].answer, longest) for name, rows in by_row.items()},
                values={name: rows[row_id].values[primary] for name, rows in by_row.items()},
            )
        )
    return _spread(found, limit)


def _spread(found: list[Sample], limit: int) -> list[Sample]:
    lots: dict[tuple[str, str], list[Sample]] = {}
    for sample in found:
        before = sample.values.get("base", 0.0)
        tuned = [v for n, v in sample.values.items() if n != "base"]
        lot = "broken" if tuned and min(tuned) < before else "fixed" if tuned and max(tuned) > before else "same"
        lots.setdefault((lot, sample.group), []).append(sample)
    chosen: list[Sample] = []
    while len(chosen) < min(limit, len(found)):
        for key in sorted(lots):
            if lots[key] and len(chosen) < limit:
                chosen.append(lots[key].pop(0))
    return chosen


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + " ..."


def curve_of(log: Path, seed: int = 0) -> Curve:
    """The curve in a run's `log.jsonl`; unreadable lines (a line cut by a kill) are left out."""
    steps, evaluations = [], []
    for line in log.read_text("utf-8").splitlines() if log.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("event") == "step" and record.get("loss") is not None:
            steps.append(record)
        elif record.get("event") == "eval" and record.get("metrics"):
            evaluations.append(record)
    every = max(1, math.ceil(len(steps) / _POINTS))
    kept = steps[::every] + (steps[-1:] if steps and (len(steps) - 1) % every else [])
    name = next(iter(evaluations[0]["metrics"])) if evaluations else ""
    return Curve(
        seed=seed,
        steps=[r["step"] for r in kept],
        loss=[r["loss"] for r in kept],
        rate=[r.get("lr") for r in kept],
        eval_steps=[r["step"] for r in evaluations],
        eval_values=[r["metrics"].get(name) for r in evaluations],
        eval_name=name,
    )


def by_suite(runs: Sequence[Metrics], when: str = "after") -> dict[str, list[Measurement]]:
    """One list per suite over the seeds, for suites that every seed has."""
    sides = [getattr(run, when) for run in runs]
    common = [suite for suite in sides[0] if all(suite in side for side in sides)] if sides else []
    return {suite: [side[suite] for side in sides] for suite in common}
