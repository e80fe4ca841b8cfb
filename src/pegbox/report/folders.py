"""Reading what runs and comparisons left: a folder to a `Comparison`.

A comparison's folder holds `comparison.json`. A run's folder holds `metrics.json`, `examples/<suite>.<when>.jsonl`,
`log.jsonl`, `recipe.yaml`, `run.yaml`; it becomes a comparison of the run with its bare base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pegbox.errors import BadInput, Corrupt
from pegbox.evaluate.run import read_examples
from pegbox.parts.files import read_json
from pegbox.parts.findings import Finding
from pegbox.parts.results import Measurement, Metrics
from pegbox.report.build import by_suite, changes, curve_of, mean_cost, pooled_scores, samples
from pegbox.report.model import Comparison, Entry, Rate

__all__ = ["comparison_of_run", "read_metrics", "report_of"]


def report_of(folder: Path) -> Comparison:
    """The report's data of a comparison's or a run's folder. Raises `BadInput` where there is neither."""
    if (folder / "comparison.json").is_file():
        return Comparison.load(folder / "comparison.json")
    if (folder / "metrics.json").is_file():
        return comparison_of_run(folder)
    raise BadInput(
        f"{folder} holds no report: neither comparison.json nor metrics.json. Give the folder of a finished run or "
        "comparison."
    )


def read_metrics(folder: Path) -> Metrics:
    """A run's metrics with the examples behind them. Raises `Corrupt`."""
    path = folder / "metrics.json"
    try:
        metrics = Metrics.model_validate(read_json(path))
    except ValidationError as error:
        raise Corrupt(f"{path} is not a readable metrics file ({error.error_count()} faults).") from error
    for when, measured in (("before", metrics.before), ("after", metrics.after)):
        for suite in measured:
            measured[suite] = _with_examples(measured[suite], folder, when)
    return metrics


def _with_examples(measurement: Measurement, folder: Path, when: str) -> Measurement:
    safe = measurement.suite.replace(":", "-").replace("/", "-")
    path = folder / "examples" / f"{safe}.{when}.jsonl"
    return measurement.model_copy(update={"examples": read_examples(path)}) if path.is_file() else measurement


def comparison_of_run(folder: Path) -> Comparison:
    """A run and its bare base as two rows."""
    metrics = read_metrics(folder)
    before, after = by_suite([metrics], "before"), by_suite([metrics], "after")
    spec, recipe, versions = _settings(folder)
    title = str(recipe.get("title") or folder.name)
    seed = int((spec.get("train") or {}).get("seed", spec.get("seed", 0)) or 0)
    tuned = Entry(
        name=folder.name,
        title=title,
        status=metrics.status,
        seeds=[seed],
        scores=pooled_scores(after),
        changes=changes(after, before),
        cost=mean_cost([metrics.cost]),
        rate=_rate(recipe),
        curves=[curve_of(folder / "log.jsonl", seed)],
        recipe=_text(folder / "recipe.yaml"),
        paper=str(recipe.get("paper") or ""),
    )
    base = Entry(name="base", title="the bare base", kind="free", scores=pooled_scores(before))
    primary = next((n for n in tuned.scores.get("target", {})), "")
    shown = (
        samples(before["target"][0] if "target" in before else None, {tuned.name: after["target"][0]}, primary)
        if "target" in after
        else []
    )
    return Comparison(
        title=title,
        model=str(spec.get("model") or ""),
        data=_data(spec),
        primary=primary,
        entries=[base, tuned] if before else [tuned],
        samples=shown if any(s.prompt for s in shown) else [],
        findings=[Finding.model_validate(block) for block in metrics.extra.get("findings", [])],
        notes=["One run with one seed: its intervals hold for these test rows, not for other seeds."] if after else [],
        versions=versions,
        machine=metrics.cost.machine,
    )


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """(run.yaml, the recipe block, the library versions), each empty where its file is absent."""
    spec = _yaml(folder / "run.yaml")
    resolved = _yaml(folder / "recipe.yaml")
    recipe = resolved.get("recipe", resolved)
    versions = {str(k): str(v) for k, v in (resolved.get("versions") or {}).items()}
    return spec, recipe if isinstance(recipe, dict) else {}, versions


def _yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        return {}
    try:
        block = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} is not readable YAML ({error}).") from error
    return block if isinstance(block, dict) else {}


def _rate(recipe: dict[str, Any]) -> Rate | None:
    value = (recipe.get("optim") or {}).get("lr")
    return Rate(value=float(value)) if isinstance(value, int | float) else None


def _data(spec: dict[str, Any]) -> str:
    sources = spec.get("rows")
    if isinstance(sources, dict):
        sources = sources.get("train") or sources.get("sources") or ""
    listed = sources if isinstance(sources, list) else [sources]
    return ", ".join(str(s.get("path") or s.get("source") or s) if isinstance(s, dict) else str(s) for s in listed if s)


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""
