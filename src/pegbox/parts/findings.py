"""What an analysis found, as plain data that a report shows: numbers, tables and pictures, with a note on each.

`metrics.json` holds findings under `extra.findings`. They need no model to be read again, and what draws them
(`pegbox.report`) knows no analysis.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pegbox.errors import BadInput

__all__ = ["Finding", "Grid", "Picture", "Series"]


def _number(value: Any) -> Any:
    return float("nan") if value is None else value


Number = Annotated[float, BeforeValidator(_number)]  # JSON has no NaN: null stands for it


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Series(_Plain):
    """One line, one set of points, bars or cells of a picture: lists of equal length. `values`: of cells alone."""

    name: str = ""
    xs: list[Number]
    ys: list[Number]
    dashed: bool = False
    values: list[Number] = Field(default_factory=list)

    @model_validator(mode="after")
    def _alike(self) -> Series:
        if len(self.xs) != len(self.ys):
            raise BadInput(f"series '{self.name}' has {len(self.xs)} x and {len(self.ys)} y; give pairs.")
        if self.values and len(self.values) != len(self.xs):
            raise BadInput(f"series '{self.name}' has {len(self.values)} values for {len(self.xs)} cells.")
        return self


class Picture(_Plain):
    """A plot. `key` names its file; `form`: lines through the points, points alone, bars from zero, or cells of a heat
    map at whole numbers x and y, coloured by the values of one series, below zero and above it."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    form: Literal["lines", "points", "bars", "heat"] = "lines"
    log_x: bool = False
    log_y: bool = False


class Grid(_Plain):
    """A table: a title, its columns' headings, and rows of as many numbers or texts (None: not known)."""

    title: str
    columns: list[str]
    rows: list[list[float | int | str | None]]

    @model_validator(mode="after")
    def _alike(self) -> Grid:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise BadInput(f"table '{self.title}': a row of {len(row)} under {len(self.columns)} headings.")
        return self


class Finding(_Plain):
    """The result of one analysis on one model.

    Args:
        kind: the analysis. subject: what was looked at (a run's name, or a role).
        numbers: the headline values by name. details: anything else as plain JSON values, not shown.
        notes: what the reader must know to read the numbers.
    """

    kind: str
    title: str
    subject: str = ""
    numbers: dict[str, Number] = Field(default_factory=dict)
    tables: list[Grid] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)
