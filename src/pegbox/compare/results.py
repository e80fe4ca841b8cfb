"""From finished cells to a `Comparison`: entries in table order, free rows first, verdicts against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.compare.cells import Cell, Row
from pegbox.compare.execute import Outcome, outcome_of
from pegbox.compare.rates import choose
from pegbox.parts.protocol import BASE
from pegbox.parts.results import Measurement, Metrics
from pegbox.recipe import Recipe, dump_yaml
from pegbox.report import (
    Comparison,
    Curve,
    Entry,
    Rate,
    Trial,
    by_suite,
    changes,
    curve_of,
    mean_cost,
    pooled_scores,
    read_metrics,
    samples,
    verdicts,
    write_report,
)
from pegbox.run import build_spec
from pegbox.runner import RecipeRunner, RunData
from pegbox.runner.suites import Suites
from pegbox.workspace import Workspace

if TYPE_CHECKING:
    from pegbox.compare.engine import Plan

__all__ = ["SHOTS", "assemble"]

SHOTS = 4
Runs = dict[str, list[Measurement]]  # suite -> one measurement per seed


def assemble(plan: Plan, imported: Sequence[Path] = ()) -> Comparison:
    """The comparison as it stands: write comparison.json and report.html into its folder, and return it."""
    free = free_rows(plan)
    outcomes = {row.name: _outcomes(plan, row) for row in plan.rows}
    runs = {name: by_suite(_finished(found)) for name, found in outcomes.items() if _finished(found)}
    entries = [_free_entry(name, title, measured, free) for name, (title, measured) in free.items()]
    entries += [_entry(plan, row, outcomes[row.name], runs.get(row.name), free) for row in plan.rows]
    entries += [_imported(folder, free) for folder in imported]
    primary = next((n for e in entries for n in e.scores.get("target", {})), "")
    reference = plan.settings.reference or plan.rows[0].name
    if reference in runs and len(runs) > 1:
        _judge(entries, runs, reference, plan.settings.margin)
    found = Comparison(
        title=f"{len(plan.rows)} recipes on {_trained_on(plan)}",
        model=plan.lock.model,
        data=", ".join(plan.lock.data["sources"]),
        primary=primary,
        reference=reference,
        margin=plan.settings.margin,
        entries=entries,
        samples=_samples(free, runs, primary),
        lock={**plan.lock.model_dump(mode="json", exclude={"notes", "version"}), "digest": plan.lock.digest()},
        notes=_notes(plan),
        versions=plan.lock.libraries,
        machine=next((e.cost.machine for e in entries if e.cost is not None), ""),
    )
    found.save(plan.folder / "comparison.json")
    write_report(found, ("html", "csv"), out=plan.folder)
    return found


def _trained_on(plan: Plan) -> str:
    data = plan.settings.run.get("data")
    return ", ".join(str(source) for source in (data if isinstance(data, list) else [data]))


# ---- free rows: the base, and the base with examples in its prompt


def free_rows(plan: Plan) -> dict[str, tuple[str, Runs]]:
    """ "base" and "base + 4 shots" by suite; the second on the target alone, where its rows are conversations."""
    spec = build_spec(Recipe(), **{**plan.settings.run, "seed": 0})
    runner = RecipeRunner(spec, Workspace(plan.folder / "base"))
    rows = {"base": ("the bare base", {s: [runner.evaluate(BASE, s)] for s in runner.suites})}
    data = RunData(spec.rows)
    asked = [m.needs_generation for m in runner.measuring.metrics(data.target)] if data.target else [False]
    if asked[0] and len(data.rows("train")) >= SHOTS:
        runner.measuring = Suites(spec, data, shots=SHOTS)
        title = f"the bare base with {SHOTS} answered rows in its prompt"
        rows[f"base + {SHOTS} shots"] = (title, {"target": [runner.evaluate(BASE, "target")]})
    return rows


def _free_entry(name: str, title: str, measured: Runs, free: dict[str, tuple[str, Runs]]) -> Entry:
    base = free["base"][1]
    told = changes(measured, base) if name != "base" else {}
    return Entry(name=name, title=title, kind="free", scores=pooled_scores(measured), changes=told)


# ---- recipes


def _outcomes(plan: Plan, row: Row) -> list[tuple[Cell, Outcome]]:
    return [(c, outcome_of(c, plan.folder)) for c in plan.finals() if c.row.name == row.name]


def _finished(found: list[tuple[Cell, Outcome]]) -> list[Metrics]:
    return [o.metrics for _, o in found if o.metrics is not None]


def _entry(
    plan: Plan, row: Row, found: list[tuple[Cell, Outcome]], measured: Runs | None, free: dict[str, tuple[str, Runs]]
) -> Entry:
    failed = [o.reason for _, o in found if o.status == "failed"]
    done = _finished(found)
    status = "failed" if failed else "finished" if done and len(done) == len(found) else "incomplete"
    base = free["base"][1]
    return Entry(
        name=row.name,
        title=row.recipe.get("title", row.name),
        status=status,
        reason=failed[0] if failed else "",
        seeds=[c.seed for c, o in found if o.metrics is not None],
        scores=pooled_scores(measured) if measured else {},
        changes=changes(measured, base) if measured else {},
        cost=mean_cost([m.cost for m in done]),
        rate=_rate(plan, row),
        flags=[*row.notes, *plan.flags.get(row.name, [])],
        curves=[_curve(c, o) for c, o in found if o.folder is not None and o.status == "finished"],
        recipe=dump_yaml(row.recipe),
        paper=str(row.recipe.get("paper") or ""),
    )


def _curve(cell: Cell, outcome: Outcome) -> Curve:
    assert outcome.folder is not None
    return curve_of(outcome.folder / "log.jsonl", cell.seed)


def _rate(plan: Plan, row: Row) -> Rate | None:
    """The rate of a row's final cells, with the trials it was chosen from."""
    from pegbox.compare.engine import validation_score

    if row.name not in plan.chosen:
        return None
    value = plan.chosen[row.name].get(row.rate_key)
    if value is None:
        block: Any = row.recipe
        for step in row.rate_key.split("."):
            block = block.get(step) if isinstance(block, dict) else None
        value = block
    trials, seconds, score = [], 0.0, ""
    for cell in [c for c in plan.trials() if c.row.name == row.name]:
        outcome = outcome_of(cell, plan.folder)
        judged = validation_score(outcome)
        if outcome.metrics is not None:
            seconds += outcome.metrics.cost.seconds
            score = next(iter(outcome.metrics.after["validation"].scores), "")
        status = outcome.reason or outcome.status
        trials.append(
            Trial(rate=dict(cell.overrides)[row.rate_key], value=judged[0] if judged else None, status=status)
        )
    best = choose([t.value for t in trials], True) if trials else None
    edge = best is not None and value in (min(t.rate for t in trials), max(t.rate for t in trials))
    rate = float(value) if value is not None else None
    return Rate(key=row.rate_key, value=rate, trials=trials, score=score, at_edge=bool(edge), seconds=seconds)


def _imported(folder: Path, free: dict[str, tuple[str, Runs]]) -> Entry:
    """A finished run as a row; it was not trained under this lock, and says so."""
    metrics = read_metrics(folder)
    measured = by_suite([metrics])
    comparable = {s: m for s, m in measured.items() if s in free["base"][1] and _same_rows(m[0], free["base"][1][s][0])}
    flags = ["imported: not trained under this lock"]
    if len(comparable) < len(measured):
        flags.append("measured on other rows: shown without changes")
    return Entry(
        name=folder.name,
        kind="imported",
        status=metrics.status,
        seeds=[0],
        scores=pooled_scores(measured),
        changes=changes(comparable, free["base"][1]),
        cost=metrics.cost,
        flags=flags,
        curves=[curve_of(folder / "log.jsonl")],
    )


def _same_rows(left: Measurement, right: Measurement) -> bool:
    return [e.row_id for e in left.examples] == [e.row_id for e in right.examples] != []


# ---- judging


def _judge(entries: list[Entry], runs: dict[str, Runs], reference: str, margin: float) -> None:
    """Verdicts against the reference, over the seeds that both sides have."""
    seeds = {name: len(next(iter(suites.values()))) for name, suites in runs.items()}
    common = {n: s for n, s in runs.items() if seeds[n] == seeds[reference]}
    told = verdicts(common, reference, margin)
    for entry in entries:
        if entry.name in told:
            entry.verdicts = told[entry.name]


def _samples(free: dict[str, tuple[str, Runs]], runs: dict[str, Runs], primary: str) -> list[Any]:
    tuned = {name: suites["target"][0] for name, suites in runs.items() if suites.get("target")}
    base = free["base"][1].get("target")
    if not tuned or not primary:
        return []
    found = samples(base[0] if base else None, tuned, primary)
    return found if any(s.prompt for s in found) else []


def _notes(plan: Plan) -> list[str]:
    notes = []
    seeds = len(plan.settings.report_seeds)
    if plan.settings.trials == 0:
        many = "One seed" if seeds == 1 else f"{seeds} seeds"
        notes.append(f"{many}, published rates: not a ranking.")
    elif seeds == 1:
        notes.append("One seed: differences between seeds are not seen here.")
    shown = plan.lock.data.get("test")
    if shown is None:
        notes.append(
            "No test rows were given: the target is the validation rows, on which checkpoints were chosen too."
        )
    return [*notes, *plan.lock.notes]
