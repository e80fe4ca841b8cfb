"""`compare`: lock, plan, tune rates, train seed by seed, and hand the outcomes to the table.

    settings -> rows -> lock -> (sizes matched, budget to steps) -> trials -> rates -> final cells -> Comparison

Test rows are read once per final cell, after all choices. Everything is resumable: a cell that has finished is read.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pegbox.compare.budget import parse_budget, steps_within
from pegbox.compare.cells import Cell, Row, final_cells, trial_cells
from pegbox.compare.execute import Outcome, cell_spec, outcome_of, probe_row, run_cell
from pegbox.compare.lock import Lock, open_lock
from pegbox.compare.locking import make_lock
from pegbox.compare.rates import choose, extend, settings_of
from pegbox.compare.settings import (
    TUNING_SEED,
    CompareSettings,
    find_row,
    load_rows,
    load_settings,
    make_rows,
    save_rows,
    save_settings,
)
from pegbox.errors import BadInput, Stopped
from pegbox.parts.files import lock_folder, read_json, write_json
from pegbox.parts.plugins import load_plugins
from pegbox.run import split_overrides

__all__ = ["LONG", "Plan", "compare"]

LONG = 30 * 60  # seconds above which a comparison asks first
TRIAL_SHARE = 1 / 3
Confirm = Callable[[str], bool]


@dataclass
class Plan:
    """A comparison, decided as far as it can be before training.

    Args:
        steps: optimizer steps per row, None where the training settings say them. chosen: overrides of the final cells.
        flags: remarks per row ("rate at the ladder's edge", "size not matched").
    """

    folder: Path
    settings: CompareSettings
    rows: list[Row]
    lock: Lock
    steps: dict[str, int | None] = field(default_factory=dict)
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    flags: dict[str, list[str]] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All cells in order; the final ones of a row only once its rate is chosen."""
        return [*self.trials(), *self.finals()]

    def trials(self) -> list[Cell]:
        """The rate trials, extensions included."""
        tried = {row.name: self.tried(row) for row in self.rows}
        return trial_cells([r for r in self.rows if _trains(r)], tried, TUNING_SEED, TRIAL_SHARE)

    def tried(self, row: Row) -> list[dict[str, Any]]:
        """The settings of a row's trials so far."""
        if self.settings.trials == 0 or not _trains(row):
            return []
        more = row.recipe.get("knobs", {}).get("more") or {}
        base = settings_of(row.rate_key, float(_value(row.recipe, row.rate_key)), self.settings.trials, more)
        path = self.folder / "extensions.json"
        added = read_json(path).get(row.digest, []) if path.is_file() else []
        return [*base, *added]

    def extend(self, row: Row, setting: dict[str, Any]) -> None:
        path = self.folder / "extensions.json"
        kept = read_json(path) if path.is_file() else {}
        kept[row.digest] = [*kept.get(row.digest, []), setting]
        write_json(path, kept)

    def finals(self) -> list[Cell]:
        return final_cells([r for r in self.rows if r.name in self.chosen], self.chosen, self.settings.report_seeds)

    def spec(self, cell: Cell) -> Any:
        return cell_spec(cell, self.settings, self.steps.get(cell.row.name))


def compare(
    recipes: Sequence[str | Mapping[str, Any]] | None = None,
    *,
    out: str | Path,
    add: Sequence[str] = (),
    import_run: Sequence[Path] = (),
    seeds: int = 3,
    trials: int = 5,
    budget: str = "tokens",
    match: str = "none",
    select: str = "best",
    margin: float = 0.02,
    reference: str | None = None,
    suite: Sequence[str] | None = None,
    overrides: Iterable[str] = (),
    list_cells: bool = False,
    cell: str | None = None,
    jobs: int = 1,
    confirm: Confirm | None = None,
    plugin: Sequence[Path] = (),
    estimate: bool = True,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **run: Any,
) -> Any:
    """Compare recipes under one lock; returns a `pegbox.report.Comparison`.

    Args:
        recipes: names, files or mappings. add: further rows for the comparison in `out`. import_run: finished runs to
            show as rows, marked as imported.
        seeds, trials, budget, match, select, margin, reference: see `pegbox compare --help`.
        suite: suites to evaluate. overrides: laid over every row's settings. run: see `pegbox.run.build_spec`.
        list_cells: run nothing; the result's `cells` say how each stands. cell: run just that one ("lift/seed-1").
        jobs: cells at once, in processes of their own.
        estimate: measure a few steps first and say how long all will take.
        confirm: asked before a long comparison; None goes on. say: told what happens, line by line.

    Raises:
        BadInput: settings that differ from the lock (all named), unknown recipes, too small a budget.
        Stopped: declined, or interrupted; a further call goes on.
    """
    load_plugins(plugin)
    folder = Path(out)
    if suite is not None:
        run["suites"] = list(suite)
    given = {"seeds": seeds, "trials": trials, "budget": budget, "match": match, "select": select, "margin": margin}
    for_run, for_recipe = split_overrides(overrides)
    if any(text.startswith("seed=") for text in for_run):
        raise BadInput("A comparison has seeds of its own, the same for all rows. Say how many: --seeds 3.")
    if for_run:
        run["overrides"] = for_run
    settings = _settings(folder, given, run, reference, for_recipe)
    with lock_folder(_made(folder)) if not (list_cells or cell) else _nothing():
        plan = _plan(folder, settings, list(recipes or []), list(add), say)
        if list_cells:
            return listing(plan)
        if cell is not None:
            return _one_cell(plan, cell, progress)
        if estimate:
            _ask(plan, confirm, say)
        _tune(plan, jobs, progress, say)
        _run_all(plan, plan.finals(), jobs, progress, say)
        from pegbox.compare.results import assemble

        return assemble(plan, imported=list(import_run))


# ---- planning


def _settings(
    folder: Path, given: dict[str, Any], run: dict[str, Any], reference: str | None, overrides: list[str]
) -> CompareSettings:
    """The kept settings, or the given ones where the folder is new; what differs is for the lock to refuse."""
    kept = load_settings(folder)
    if kept is None:
        if not run.get("model") or not run.get("data"):
            raise BadInput(f"{folder} holds no comparison yet. Give --model and --data.")
        settings = CompareSettings(run=run, reference=reference, overrides=overrides, **given)
        return settings
    changes: dict[str, Any] = {"run": {**kept.run, **run}}
    if reference is not None:
        changes["reference"] = reference
    defaults = CompareSettings(run={})
    changes |= {k: v for k, v in given.items() if v != getattr(defaults, k)}
    return kept.model_copy(update=changes)


def _plan(
    folder: Path, settings: CompareSettings, recipes: list[Any], add: list[str], say: Callable[[str], None]
) -> Plan:
    kept = load_rows(folder)
    wanted = make_rows(recipes, settings.overrides, settings.run)
    known = {row.digest for row in kept}
    new = [row for row in wanted if row.digest not in known]
    if kept and new and not add:
        names = ", ".join(row.name for row in new)
        raise BadInput(f"{folder} holds a comparison without {names}. Add a row with --add {new[0].name}.")
    rows = [*kept, *new, *(r for r in make_rows(add, settings.overrides, settings.run) if r.digest not in known)]
    if not rows:
        raise BadInput("No recipe to compare. Name some: pegbox compare lora lift hft ...")
    lock = open_lock(folder, make_lock(settings))
    plan = Plan(folder, settings, rows, lock)
    if settings.match != "none":
        from pegbox.compare.sizes import match_sizes

        plan.rows = match_sizes(rows, settings, set() if not kept else known)
    save_settings(folder, settings)
    save_rows(folder, plan.rows)
    plan.steps = _steps(plan, say)
    plan.chosen = {r.name: c for r in plan.rows if (c := _chosen(plan, r)) is not None}
    return plan


def _steps(plan: Plan, say: Callable[[str], None]) -> dict[str, int | None]:
    budget = parse_budget(plan.settings.budget)
    if budget.kind == "tokens":
        if budget.value is not None:
            plan.settings.run |= {"tokens": int(budget.value)}
        return {row.name: None for row in plan.rows}
    assert budget.value is not None
    steps: dict[str, int | None] = {}
    for row in plan.rows:
        if _trains(row):
            say(f"probing {row.name}")
            steps[row.name] = steps_within(
                budget.value, probe_row(row, plan.settings, plan.folder, budget.kind), row.name
            )
    return steps


def _ask(plan: Plan, confirm: Confirm | None, say: Callable[[str], None]) -> None:
    """Say what this comparison can show and how long it will take; above half an hour, ask."""
    from pegbox.compare.forecast import forecast

    seconds, lines = forecast(plan)
    for line in lines:
        say(line)
    if seconds > LONG and confirm is not None and not confirm(f"About {seconds / 60:.0f} minutes. Go on?"):
        raise Stopped("Not started. The lock and the plan are kept; the same command goes on.")


# ---- rates


def _chosen(plan: Plan, row: Row) -> dict[str, Any] | None:
    """The settings of a row's final cells: the best trial's, or the published ones; None while trials are open."""
    if plan.settings.trials == 0 or not _trains(row):
        return {}
    tried = plan.tried(row)
    outcomes = [outcome_of(c, plan.folder) for c in trial_cells([row], {row.name: tried}, TUNING_SEED, TRIAL_SHARE)]
    if any(o.status in {"missing", "stopped"} for o in outcomes):
        return None
    scores = [validation_score(o) for o in outcomes]
    best = choose([s[0] if s else None for s in scores], next((s[1] for s in scores if s), True))
    if best is None:
        plan.flags.setdefault(row.name, []).append("every rate failed; the published one is used")
        return {}
    rates = [float(t[row.rate_key]) for t in tried]
    further = extend(rates, rates[best], len(tried) - plan.settings.trials)
    if further is not None:
        plan.extend(row, {**tried[best], row.rate_key: further})
        return None
    if rates[best] in (min(rates), max(rates)) and len(rates) > 1:
        plan.flags.setdefault(row.name, []).append("best rate at the edge of those tried")
    return tried[best]


def _tune(plan: Plan, jobs: int, progress: bool, say: Callable[[str], None]) -> None:
    """Run trials until every row's rate is chosen."""
    while any(row.name not in plan.chosen for row in plan.rows):
        _run_all(plan, plan.trials(), jobs, progress, say)
        plan.chosen = {r.name: c for r in plan.rows if (c := _chosen(plan, r)) is not None}


def validation_score(outcome: Outcome) -> tuple[float, bool] | None:
    """(the first validation score, whether higher is better), None where the trial failed."""
    if outcome.metrics is None or "validation" not in outcome.metrics.after:
        return None
    score = next(iter(outcome.metrics.after["validation"].scores.values()))
    return score.value, score.higher_is_better


# ---- running


def _run_all(plan: Plan, cells: list[Cell], jobs: int, progress: bool, say: Callable[[str], None]) -> None:
    open_cells = [c for c in cells if outcome_of(c, plan.folder).status in {"missing", "stopped"}]
    if jobs > 1 and len(open_cells) > 1:
        with ThreadPoolExecutor(jobs) as pool:
            for c, error in zip(open_cells, pool.map(lambda c: _in_process(plan, c), open_cells), strict=True):
                say(f"{c.key}: {error or outcome_of(c, plan.folder).status}")
        return
    for number, c in enumerate(open_cells, 1):
        began = time.perf_counter()
        say(f"[{number}/{len(open_cells)}] {c.key}")
        outcome = run_cell(c, plan.spec(c), plan.folder, progress=progress)
        reason = f": {outcome.reason}" if outcome.reason else ""
        say(f"    {outcome.status} in {time.perf_counter() - began:.0f} s{reason}")


def _in_process(plan: Plan, c: Cell) -> str:
    """Run a cell in a process of its own; its error's last line if it could not even be run, else ""."""
    command = [sys.executable, "-m", "pegbox.cli", "compare", "--out", str(plan.folder), "--cell", c.key, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def _one_cell(plan: Plan, key: str, progress: bool) -> list[dict[str, Any]]:
    name, _, label = key.partition("/")
    row = find_row(plan.rows, name)
    for c in plan.cells():
        if c.row.name == row.name and c.label == label:
            run_cell(c, plan.spec(c), plan.folder, progress=progress)  # the run locks its own folder
            return [entry for entry in listing(plan) if entry["cell"] == key]
    known = ", ".join(c.key for c in plan.cells() if c.row.name == name)
    raise BadInput(f"No cell '{key}' yet. There are: {known}. Final cells appear once the row's trials have run.")


def listing(plan: Plan) -> list[dict[str, Any]]:
    """Every cell with its state and folder."""
    entries = []
    for c in plan.cells():
        outcome = outcome_of(c, plan.folder)
        entries.append(
            {"cell": c.key, "status": outcome.status, "reason": outcome.reason, "folder": str(c.folder(plan.folder))}
        )
    return entries


def _trains(row: Row) -> bool:
    from pegbox.parts.protocol import PROTOCOL

    return PROTOCOL[row.recipe["protocol"]["kind"]].trains


def _value(block: Mapping[str, Any], dotted: str) -> Any:
    for step in dotted.split("."):
        block = block[step]
    return block


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
