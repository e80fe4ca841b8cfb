"""Running cells: a cell's settings, one run in its folder, and its outcome; a failure is an outcome with a reason."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.compare.budget import Probe, probe_from
from pegbox.compare.cells import Cell, Row
from pegbox.compare.settings import CompareSettings
from pegbox.errors import BadInput, DoesNotFit, PegboxError, RunFailed, Stopped
from pegbox.evaluate.run import read_examples
from pegbox.parts.files import read_json, write_json
from pegbox.parts.results import Measurement, Metrics
from pegbox.recipe import override
from pegbox.run import Run, build_spec, execute
from pegbox.spec import RunSpec

__all__ = ["Outcome", "cell_spec", "outcome_of", "probe_row", "run_cell"]

EVALUATIONS = 4  # evaluations on validation during a run that keeps its best checkpoint


@dataclass
class Outcome:
    """What a cell came to: "missing", "finished", "failed" (with the reason) or "stopped"."""

    status: str
    reason: str = ""
    metrics: Metrics | None = None
    folder: Path | None = None


def cell_spec(cell: Cell, settings: CompareSettings, steps: int | None) -> RunSpec:
    """The run of one cell: the row's recipe with the cell's overrides, its share of the budget, its seed."""
    recipe = copy.deepcopy(cell.row.recipe)
    for key, value in cell.overrides:
        override(recipe, key, value)
    suites = ["validation"] if cell.is_trial else settings.run.get("suites") or ["target", "retention"]
    block = build_spec(recipe, **{**settings.run, "seed": cell.seed, "suites": suites}).plain()
    train = block["train"]
    length: dict[str, Any] = (
        {"steps": steps} if steps is not None else {k: train[k] for k in ("steps", "tokens", "epochs") if train[k]}
    )
    for key, value in length.items():
        scaled = value * cell.budget_share
        length[key] = scaled if key == "epochs" else max(1, round(scaled))
    train |= {"steps": None, "tokens": None, "epochs": None, **length}
    train |= _selection(settings, length, cell) | cell.row.train
    return RunSpec.of(block)


def _selection(settings: CompareSettings, length: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Which checkpoint a run ends with; trials and `--select last` take the last."""
    if settings.select == "last" or cell.is_trial or "steps" not in length:
        return {"select": "last", "eval_every": None}
    return {"select": "best", "eval_every": max(1, length["steps"] // EVALUATIONS), "metric": "loss"}


def outcome_of(cell: Cell, root: Path) -> Outcome:
    """How a cell stands, from its folder alone."""
    folder = cell.folder(root)
    if not (folder / "run.yaml").is_file():
        return Outcome("missing", folder=folder)
    run = Run(folder)
    state = read_json(folder / "status.json") if (folder / "status.json").is_file() else {"status": "stopped"}
    status = str(state["status"])
    if status == "finished":
        return Outcome("finished", metrics=_with_examples(run), folder=folder)
    return Outcome(
        "failed" if status == "failed" else "stopped", str(state.get("reason", "interrupted")), folder=folder
    )


def run_cell(cell: Cell, spec: RunSpec, root: Path, *, progress: bool = False) -> Outcome:
    """Run a cell, or go on with it, or read its result. Failures of the run itself become outcomes.

    Raises `Stopped` and `KeyboardInterrupt`, which end the comparison and leave it resumable.
    """
    before = outcome_of(cell, root)
    if before.status in {"finished", "failed"}:
        return before
    folder = cell.folder(root)
    try:
        execute(spec, folder, resume=before.status == "stopped", progress=progress)
    except (Stopped, BadInput):
        raise
    except (RunFailed, DoesNotFit, PegboxError) as error:
        return Outcome("failed", str(error), folder=folder)
    except (RuntimeError, MemoryError) as error:
        reason = "out of memory" if "memory" in str(error).lower() else f"{type(error).__name__}: {error}"
        write_json(folder / "status.json", {"version": 1, "status": "failed", "reason": reason})
        return Outcome("failed", reason, folder=folder)
    return outcome_of(cell, root)


def probe_row(row: Row, settings: CompareSettings, root: Path, unit: str, short: int = 2, long: int = 5) -> Probe:
    """Fixed and per-step cost of a row by two short real runs, kept in the comparison's folder."""
    path = root / "probes" / f"{row.digest}-{unit}.json"
    if path.is_file():
        return Probe(**read_json(path))
    points = []
    for steps in (short, long):
        cell = Cell(row, f"probe-{steps}", seed=0)
        folder = root / "probes" / row.digest / str(steps)
        shutil.rmtree(folder, ignore_errors=True)
        spec = cell_spec(cell, settings.model_copy(update={"select": "last"}), steps)
        spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"suites": []})})
        cost = execute(spec, folder).metrics.cost
        points.append((steps, float(cost.seconds if unit == "seconds" else cost.training_flops or 0)))
        shutil.rmtree(folder, ignore_errors=True)
    probe = probe_from(points[0], points[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"fixed": probe.fixed, "per_step": probe.per_step})
    return probe


def _with_examples(run: Run) -> Metrics:
    """A run's metrics with the rows behind them."""
    metrics = run.metrics
    for when, measured in (("before", metrics.before), ("after", metrics.after)):
        for suite, measurement in measured.items():
            measured[suite] = _filled(measurement, run.path / "examples" / f"{_file_name(suite)}.{when}.jsonl")
    return metrics


def _filled(measurement: Measurement, path: Path) -> Measurement:
    return measurement.model_copy(update={"examples": read_examples(path)}) if path.is_file() else measurement


def _file_name(suite: str) -> str:
    return suite.replace(":", "-").replace("/", "-")
