"""`sweep`: one recipe over values of its own fields, each scored on validation; interrupted sweeps go on.

A field is `key=low:high` (evenly), `key=low:high:log` (evenly in the logarithm), `key=a,b,c` (these values), or
`key=value` (fixed). Ranges of several fields are drawn together by a scrambled Sobol sequence, so that any number of
trials covers them; value lists cycle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.compare.cells import Cell
from pegbox.compare.engine import validation_score
from pegbox.compare.execute import run_cell
from pegbox.compare.rates import choose
from pegbox.compare.settings import CompareSettings, row_of
from pegbox.errors import BadInput, RunFailed
from pegbox.parts.files import lock_folder, write_json
from pegbox.parts.plugins import load_plugins
from pegbox.recipe import load_recipe, parse_override, parse_yaml
from pegbox.run import build_spec, split_overrides

__all__ = ["Field", "Sweep", "parse_field", "points", "sweep"]


@dataclass(frozen=True)
class Field:
    """A swept field: a range (`low`, `high`, `log`, whole numbers only if `whole`), or a list of `values`."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    values: tuple[Any, ...] = ()

    def at(self, u: float, index: int) -> Any:
        """The value at u in [0, 1), for the index-th trial."""
        if self.values:
            return self.values[index % len(self.values)]
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        return round(value) if self.whole else value


@dataclass
class Sweep:
    """The trials in order, and the best."""

    trials: list[dict[str, Any]]
    best: dict[str, Any]
    metric: str

    def plain(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best, "trials": self.trials}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"best on validation: {self.best['settings']}", title_justify="left", box=None)
        for heading in ("trial", *self.best["settings"], self.metric, "status"):
            table.add_column(heading)
        for trial in self.trials:
            score = "" if trial["score"] is None else f"{trial['score']:.4g}"
            values = [_short(v) for v in trial["settings"].values()]
            mark = " *" if trial["trial"] == self.best["trial"] else ""
            table.add_row(f"{trial['trial']}{mark}", *values, score, trial["status"])
        return table


def parse_field(text: str) -> Field | tuple[str, Any]:
    """A swept field, or (key, value) for a fixed one. Raises `BadInput`."""
    key, equals, value = text.partition("=")
    if not equals or not value:
        raise BadInput(f"'{text}': write key=low:high, key=low:high:log, key=a,b,c or key=value.")
    if "," in value and not value.startswith("["):
        return Field(key, values=tuple(parse_yaml(v, f"a value of '{key}'") for v in value.split(",")))
    if ":" not in value:
        return parse_override(text)
    low, high, *rest = value.split(":")
    try:
        bounds = (float(low), float(high))
    except ValueError:
        raise BadInput(f"'{text}': '{low}' and '{high}' must be numbers.") from None
    log = rest == ["log"]
    if (rest and not log) or bounds[0] >= bounds[1] or (log and bounds[0] <= 0):
        raise BadInput(f"'{text}': the range needs low < high (and low > 0 for log); a third part can only be 'log'.")
    whole = all("." not in v and "e" not in v.lower() for v in (low, high))
    return Field(key, *bounds, log, whole)


def points(fields: Sequence[Field], trials: int, seed: int) -> list[dict[str, Any]]:
    """`trials` settings that cover the fields' ranges; the same for a seed, and a longer list begins with a shorter."""
    from scipy.stats import qmc

    sobol = qmc.Sobol(d=max(len(fields), 1), seed=seed)
    drawn = sobol.random_base2(max(1, math.ceil(math.log2(trials))))[:trials]
    return [{f.key: f.at(float(u), i) for f, u in zip(fields, line)} for i, line in enumerate(drawn)]


def sweep(
    recipe: str,
    fields: Sequence[str],
    *,
    model: str,
    data: Any,
    out: str | Path,
    trials: int = 8,
    seed: int = 0,
    plugin: Sequence[Path] = (),
    progress: bool = False,
    **run: Any,
) -> Sweep:
    """Try `trials` settings of `recipe` and score each on the validation rows.

    Raises `BadInput` for a field the recipe has not, or nothing to sweep; `RunFailed` when every trial failed.
    """
    load_plugins(plugin)
    parsed = [parse_field(text) for text in fields]
    swept = [f for f in parsed if isinstance(f, Field)]
    if not swept:
        raise BadInput("Nothing to sweep: give at least one range (key=low:high) or list (key=a,b,c).")
    fixed = [f"{key}={_text(value)}" for key, value in (f for f in parsed if not isinstance(f, Field))]
    for_run, for_recipe = split_overrides(fixed)
    row = row_of(Path(recipe).stem, load_recipe(recipe, for_recipe))
    settings = CompareSettings(run={"model": model, "data": data, "overrides": for_run, **run}, select="last", trials=0)
    cells = [
        Cell(row, f"trial-{i}-{_name(s)}", seed, tuple(s.items())) for i, s in enumerate(points(swept, trials, seed))
    ]
    specs = [_spec(c, settings) for c in cells]  # every setting is validated before the first one runs
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    with lock_folder(root):
        outcomes = [run_cell(c, s, root, progress=progress) for c, s in zip(cells, specs)]
    return _summary(cells, outcomes, root)


def _spec(cell: Cell, settings: CompareSettings) -> Any:
    from pegbox.compare.execute import cell_spec

    spec = cell_spec(cell, settings, None)
    if not build_spec(spec.recipe, **settings.run).rows.train:
        raise BadInput("A sweep needs training rows: give --data.")
    return spec


def _summary(cells: list[Cell], outcomes: list[Any], root: Path) -> Sweep:
    scores = [validation_score(o) for o in outcomes]
    best = choose([s[0] if s else None for s in scores], next((s[1] for s in scores if s), True))
    found = [
        {
            "trial": i,
            "settings": dict(c.overrides),
            "score": s[0] if s else None,
            "status": o.status if not o.reason else f"{o.status}: {o.reason}",
            "folder": str(c.folder(root)),
        }
        for i, (c, o, s) in enumerate(zip(cells, outcomes, scores))
    ]
    if best is None:
        raise RunFailed("Every trial failed; the first: " + str(found[0]["status"]))
    metric = next(iter(outcomes[best].metrics.after["validation"].scores))
    result = Sweep(found, found[best], metric)
    write_json(root / "sweep.json", result.plain())
    return result


def _name(setting: Mapping[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(repr(sorted(setting.items())).encode()).hexdigest()[:8]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
