"""`pegbox evaluate`: score a run or a bare model on suites, and pair it with another row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput
from pegbox.evaluate.run import difference
from pegbox.parts.results import Measurement
from pegbox.recipe import Recipe, Role
from pegbox.runner.data import RunData
from pegbox.runner.suites import Suites
from pegbox.spec import DataSettings, EvalSettings, RunSpec
from pegbox.workspace import read_spec

__all__ = ["Scored", "evaluate"]


@dataclass
class Scored:
    """Measurements of one model, and of the one it is compared with."""

    target: str
    measured: dict[str, Measurement]
    vs: str | None = None
    other: dict[str, Measurement] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One entry per score; with a comparison, the paired difference (positive: better) and its interval."""
        found = []
        for suite, measurement in self.measured.items():
            for name, score in measurement.scores.items():
                entry: dict[str, Any] = {"suite": suite, **score.model_dump(mode="json")}
                if self.other:
                    entry["vs"] = self.other[suite].scores[name].value
                    entry |= _paired(name, measurement, self.other[suite])
                found.append(entry)
        return found

    def plain(self) -> dict[str, Any]:
        return {"target": self.target, "vs": self.vs, "scores": self.rows()}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.target, title_justify="left", box=None, pad_edge=False)
        headings = ["suite", "metric", "value", "95 % interval", "rows"]
        for heading in [*headings, *([f"{self.vs}", "difference"] if self.vs else [])]:
            table.add_column(heading)
        for entry in self.rows():
            interval = "" if entry["low"] is None else f"{entry['low']:.4g} to {entry['high']:.4g}"
            cells = [entry["suite"], entry["name"], f"{entry['value']:.4g}", interval, str(entry["n"])]
            if self.vs:
                shown = (
                    f"{entry['difference']:+.4g} ({entry['difference_low']:+.4g} to {entry['difference_high']:+.4g})"
                )
                cells += [f"{entry['vs']:.4g}", shown if "difference" in entry else ""]
            table.add_row(*cells)
        return table


def _paired(name: str, ours: Measurement, theirs: Measurement) -> dict[str, float]:
    try:
        found = difference(name, [ours], [theirs])
    except (BadInput, KeyError):  # a derived score (calibration) has no rows of its own
        return {}
    return {"difference": found.value, "difference_low": found.low, "difference_high": found.high}


def evaluate(
    target: str | Path,
    *,
    suites: Sequence[str] | None = None,
    data: Any = None,
    map: Mapping[str, str] | None = None,
    metric: str | None = None,
    vs: str | None = None,
    max_new_tokens: int = 128,
    limit: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    decode: Any = None,
    roles: Mapping[str, Role] | None = None,
) -> Scored:
    """Score `target` (a run's folder or a model) and, with `vs`, another model on the same rows.

    Without `data`, a run is scored on its own target rows. Raises `BadInput` where "target" has no rows. `decode` and
    `roles` say how the target's answers are drawn (see `pegbox.ask.open_any`); the other is scored as it is.
    """
    from pegbox.ask import beside_of, open_any

    spec = _spec_of(str(target), data, map, metric, suites, max_new_tokens, limit)
    if decode is not None:
        from pegbox.runner.decoding import read_decoder

        decode = read_decoder(decode)
        spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"decode": decode[0]})})
        roles, decode = {**decode[1], **(roles or {})}, decode[0]
    measuring = Suites(spec, RunData(spec.rows))
    if not measuring.names:
        raise BadInput("Nothing to score: no rows for 'target'. Give --data, or --suite retention.")
    measured: dict[str, dict[str, Measurement]] = {}
    other = beside_of(str(target), vs)
    for name, ref in {"target": str(target), **({"vs": other} if other else {})}.items():
        how: dict[str, Any] = {"decode": decode, "roles": roles} if name == "target" else {}
        model, tokenizer = open_any(ref, device=device, trust_remote_code=trust_remote_code, **how)
        measured[name] = {s: measuring.measure(model, tokenizer, spec.recipe, s) for s in measuring.names}
        del model
    return Scored(str(target), measured["target"], vs, measured.get("vs", {}))


def _spec_of(
    target: str,
    data: Any,
    map: Mapping[str, str] | None,
    metric: str | None,
    suites: Sequence[str] | None,
    max_new_tokens: int,
    limit: int | None,
) -> RunSpec:
    own = read_spec(Path(target)) if (Path(target) / "run.yaml").is_file() else None
    rows = DataSettings(test=data if isinstance(data, list) else [data], map=dict(map or {})) if data else None
    chosen = list(suites) if suites else ["target", "retention"] if (rows or own) else ["retention"]
    evaluation = EvalSettings(suites=chosen, metric=metric, max_new_tokens=max_new_tokens, limit=limit)
    if own is None:
        return RunSpec(recipe=Recipe(), model=target, rows=rows or DataSettings(), evaluation=evaluation)
    kept = own.evaluation.metric if metric is None else metric
    return own.model_copy(
        update={"rows": rows or own.rows, "evaluation": evaluation.model_copy(update={"metric": kept})}
    )
