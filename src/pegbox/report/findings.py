"""Findings of analyses on the page: their headline numbers, tables and pictures."""

from __future__ import annotations

import math
from typing import Any

from pegbox.parts.findings import Finding, Picture
from pegbox.report.charts import bar_chart, line_chart
from pegbox.report.heat import heat_chart
from pegbox.report.points import Line, Lines

__all__ = ["as_lines", "number", "shown", "shown_all"]


def shown(finding: Finding) -> dict[str, Any]:
    """A finding for the template: texts for numbers, inline SVG for pictures."""
    return {
        "title": finding.title,
        "subject": finding.subject,
        "notes": finding.notes,
        "numbers": [(name.replace("_", " "), number(value)) for name, value in finding.numbers.items()],
        "tables": [
            {
                "title": grid.title,
                "columns": grid.columns,
                "numeric": [all(not isinstance(row[i], str) for row in grid.rows) for i in range(len(grid.columns))],
                "rows": [[(number(v), v) for v in row] for row in grid.rows],
            }
            for grid in finding.tables
        ],
        "pictures": [
            (picture, _drawn(picture), [(s.name, i + 1) for i, s in enumerate(picture.series) if s.name])
            for picture in finding.pictures
        ],
    }


def shown_all(findings: list[Finding]) -> list[dict[str, Any]]:
    return [shown(finding) for finding in findings]


def as_lines(picture: Picture) -> Lines:
    """The picture's series as the report's lines; what is not finite is left out."""
    lines = []
    for index, series in enumerate(picture.series):
        pairs = [(x, y) for x, y in zip(series.xs, series.ys) if math.isfinite(x) and math.isfinite(y)]
        lines.append(Line(series.name, index + 1, [p[0] for p in pairs], [p[1] for p in pairs], series.dashed))
    return Lines(
        picture.key, picture.title, picture.x_label, picture.y_label, lines, log_x=picture.log_x, log_y=picture.log_y
    )


def _drawn(picture: Picture) -> str:
    if picture.form == "heat":
        return heat_chart(picture)
    lines = as_lines(picture)
    if picture.form == "bars":
        return bar_chart(lines)
    return line_chart(lines, joined=picture.form == "lines")


def number(value: float | int | str | None) -> str:
    """A number as people read it: whole numbers whole, others to four digits."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−", 1) if value < 0 else f"{value:.4g}"
