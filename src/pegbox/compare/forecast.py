"""Said before a comparison runs: which differences its test rows can show, and about how long it will take.

Time: two short runs of the reference row give seconds per step; one timed evaluation of the base gives the rest.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pegbox.compare.execute import outcome_of, probe_row
from pegbox.parts.calibration import minimal_difference
from pegbox.parts.files import read_json, write_json
from pegbox.parts.protocol import BASE
from pegbox.recipe import Recipe
from pegbox.run import build_spec
from pegbox.runner import RecipeRunner
from pegbox.workspace import Workspace

if TYPE_CHECKING:
    from pegbox.compare.engine import Plan

__all__ = ["evaluation_seconds", "forecast"]


def forecast(plan: Plan) -> tuple[float, list[str]]:
    """(seconds for the cells still open, lines to say)."""
    rows = plan.lock.data.get("test") or plan.lock.data.get("validation") or {"rows": 0}
    lines = []
    if rows["rows"]:
        shown = minimal_difference(rows["rows"], plan.settings.seeds)
        lines.append(
            f"{rows['rows']} test rows, {plan.settings.seeds} seed(s): at an accuracy of 0.7, differences below about "
            f"{100 * shown:.1f} points can't be told apart."
        )
    if plan.settings.trials == 0:
        lines.append("Published rates, untuned: not a ranking.")
    open_cells = [c for c in plan.cells() if outcome_of(c, plan.folder).status in {"missing", "stopped"}]
    pending = [r for r in plan.rows if r.name not in plan.chosen]
    finals = len(open_cells) + len(pending) * plan.settings.seeds
    if not finals:
        return 0.0, lines
    trained = next((r for r in plan.rows if r.recipe["protocol"]["kind"] != "posthoc"), None)
    per_step = probe_row(trained, plan.settings, plan.folder, "seconds").per_step if trained is not None else 0.0
    evaluated = evaluation_seconds(plan)
    seconds = 0.0
    for cell in open_cells:
        seconds += per_step * (_steps(plan, cell.row.name) * cell.budget_share) + evaluated * (
            0.5 if cell.is_trial else 1
        )
    for row in pending:
        seconds += plan.settings.seeds * (per_step * _steps(plan, row.name) + evaluated)
    lines.append(f"About {seconds / 60:.0f} minutes for {finals} runs on this machine.")
    return seconds, lines


def _steps(plan: Plan, row: str) -> float:
    steps = plan.steps.get(row)
    if steps is not None:
        return steps
    train, rows = plan.lock.training, plan.lock.data["train"]["rows"]
    if train.get("steps"):
        return float(train["steps"])
    if train.get("tokens"):
        return float(train["tokens"]) / (train["batch"] * plan.lock.encoding["max_length"] / 4)
    return max(1.0, float(train.get("epochs") or 1) * rows / train["batch"])


def evaluation_seconds(plan: Plan) -> float:
    """Seconds that the base's suites took here when they were first measured."""
    path = plan.folder / "base-seconds.json"
    if path.is_file():
        return float(read_json(path))
    spec = build_spec(Recipe(), **{**plan.settings.run, "seed": 0})
    runner = RecipeRunner(spec, Workspace(plan.folder / "base"))
    began = time.perf_counter()
    for suite in runner.suites:
        runner.evaluate(BASE, suite)
    seconds = time.perf_counter() - began
    write_json(path, seconds)
    return seconds
