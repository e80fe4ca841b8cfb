"""What a comparison was asked for, kept in its folder, so that `--add` and `--cell` need only `--out`.

`settings.json` holds the arguments of the first call; `rows.json` the rows with their resolved recipes, in table order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pegbox.compare.cells import Row
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.files import read_json, write_json
from pegbox.recipe import Recipe, load_recipe

__all__ = ["TUNING_SEED", "CompareSettings", "load_rows", "load_settings", "make_rows", "save_rows", "save_settings"]

TUNING_SEED = 1000  # outside the report's seeds, which count from 1


class CompareSettings(BaseModel):
    """One comparison's settings.

    Args:
        run: arguments of `pegbox.run.build_spec` that all rows share (model, data, batch, length, ...).
        budget, match: as on the command line. trials: rates per row; 0 takes the published ones.
        margin: differences below it count as equal, in the metric's own unit.
    """

    model_config = ConfigDict(extra="forbid")

    run: dict[str, Any]
    seeds: int = Field(3, ge=1)
    trials: int = Field(5, ge=0)
    budget: str = "tokens"
    match: str = "none"
    select: Literal["best", "last"] = "best"
    margin: float = Field(0.02, ge=0)
    reference: str | None = None
    overrides: list[str] = Field(default_factory=list)

    @property
    def report_seeds(self) -> list[int]:
        return list(range(1, self.seeds + 1))


def save_settings(folder: Path, settings: CompareSettings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings.model_dump(mode="json"))


def load_settings(folder: Path) -> CompareSettings | None:
    """The settings of the comparison in `folder`, None if there is none."""
    path = folder / "settings.json"
    return CompareSettings.model_validate(read_json(path)) if path.is_file() else None


def make_rows(
    refs: Sequence[str | Mapping[str, Any]], overrides: Iterable[str], shared: Mapping[str, Any]
) -> list[Row]:
    """Rows from recipes' names, files or mappings; a name that comes twice gets a number.

    Raises `BadInput`/`Unsupported` for a recipe that can't be run under the shared settings.
    """
    from pegbox.run import build_spec
    from pegbox.runner import check_spec

    rows: list[Row] = []
    for ref in refs:
        block = {k: v for k, v in ref.items() if k != "slug"} if isinstance(ref, Mapping) else ref
        recipe = load_recipe(block, overrides)
        check_spec(build_spec(recipe, **shared))
        rows.append(row_of(_free(_name_of(ref, recipe), {r.name for r in rows}), recipe))
    return rows


def row_of(name: str, recipe: Recipe) -> Row:
    """A row from a resolved recipe; its rate's key is checked."""
    if recipe.protocol.trains:
        recipe.get(recipe.knobs.rate)
    return Row(name, recipe.plain(), recipe.knobs.rate)


def _name_of(ref: str | Mapping[str, Any], recipe: Recipe) -> str:
    if isinstance(ref, str):
        return Path(ref).stem
    return str(ref.get("slug") or recipe.title or "recipe")


def _free(name: str, taken: set[str]) -> str:
    names = [name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))]
    return next(n for n in names if n not in taken)


def save_rows(folder: Path, rows: Sequence[Row]) -> None:
    entries = [
        {"name": r.name, "recipe": r.recipe, "rate_key": r.rate_key, "notes": list(r.notes), "train": r.train}
        for r in rows
    ]
    write_json(folder / "rows.json", entries)


def load_rows(folder: Path) -> list[Row]:
    """The rows kept in `folder`, in table order."""
    path = folder / "rows.json"
    if not path.is_file():
        return []
    return [Row(e["name"], e["recipe"], e["rate_key"], tuple(e["notes"]), e["train"]) for e in read_json(path)]


def find_row(rows: Sequence[Row], name: str) -> Row:
    """A row by name. Raises `BadInput`."""
    for row in rows:
        if row.name == name:
            return row
    raise BadInput(f"No row '{name}'.{did_you_mean(name, [r.name for r in rows])}")
