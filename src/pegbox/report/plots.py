"""The same plots as PNG or SVG files, by matplotlib, for papers and slides."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from pegbox.parts.findings import Picture
from pegbox.report.findings import as_lines
from pegbox.report.model import Comparison
from pegbox.report.points import Lines, Points, curve_plots, scatter_plots

__all__ = ["save_plots"]

# Okabe and Ito's colours, which most kinds of colour blindness tell apart, darkened where white paper asks for it.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7F5FC4", "#444444"]


def save_plots(c: Comparison, folder: Path, form: str = "png") -> list[Path]:
    """One file per plot, `<form>` png or svg; returns the paths."""
    import matplotlib

    drawn: list[tuple[str, Any]] = []
    settings: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "pegbox"}
    with matplotlib.rc_context(settings | {"savefig.bbox": "tight", "figure.facecolor": "white"}):
        drawn += [(p.key, _scatter(p)) for p in scatter_plots(c)]
        drawn += [(p.key, _lines(p)) for p in curve_plots(c)]
        drawn += [(p.key, _picture(p)) for f in c.findings for p in f.pictures]
        paths = []
        for key, figure in drawn:
            path = folder / f"{key}.{form}"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, metadata={"Date": None} if form == "svg" else None)
            paths.append(path)
    return paths


def _figure(plot: Points | Lines) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4))
    axes = figure.add_subplot()
    axes.set_title(plot.title, fontsize=10)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _scatter(plot: Points) -> Any:
    figure, axes = _figure(plot)
    for p in plot.points:
        colour = _COLOURS[p.index % len(_COLOURS)]
        x_error = [[p.x - p.x_range[0]], [p.x_range[1] - p.x]] if p.x_range else None
        y_error = [[p.y - p.y_range[0]], [p.y_range[1] - p.y]] if p.y_range else None
        axes.errorbar([p.x], [p.y], xerr=x_error, yerr=y_error, fmt="o", color=colour, elinewidth=1, markersize=6)
        axes.annotate(p.name, (p.x, p.y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    if plot.zero_x:
        axes.axvline(0, color="#888888", linewidth=0.8, linestyle=":")
    if plot.zero_y:
        axes.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
    return figure


def _picture(picture: Picture) -> Any:
    """A finding's picture: lines, points, bars or cells."""
    plot = as_lines(picture)
    if picture.form == "heat":
        return _heat(picture, plot)
    if picture.form == "lines":
        return _lines(plot)
    figure, axes = _figure(plot)
    places = sorted({x for line in plot.lines for x in line.xs})
    gap = min((b - a for a, b in pairwise(places)), default=1.0) * 0.86 / max(len(plot.lines), 1)
    for place, line in enumerate(plot.lines):
        colour = _COLOURS[line.index % len(_COLOURS)]
        if picture.form == "bars":
            shift = gap * (place - (len(plot.lines) - 1) / 2)
            axes.bar([x + shift for x in line.xs], line.ys, width=gap, color=colour, label=line.name or None)
        else:
            axes.plot(line.xs, line.ys, "o", color=colour, markersize=4, label=line.name or None)
    if any(line.name for line in plot.lines):
        axes.legend(frameon=False, fontsize=8)
    return figure


def _heat(picture: Picture, plot: Lines) -> Any:
    """Cells on a grid of whole numbers; what is missing or not finite stays white."""
    figure, axes = _figure(plot)
    known = [(x, y, v) for s in picture.series for x, y, v in zip(s.xs, s.ys, s.values) if math.isfinite(v)]
    top = max((abs(v) for _, _, v in known), default=0.0) or 1.0
    colours = [v for _, _, v in known]
    points = axes.scatter(
        [x for x, _, _ in known], [y for _, y, _ in known], c=colours, cmap="RdBu_r", vmin=-top, vmax=top, marker="s",
        s=36, edgecolors="#dddddd", linewidths=0.3,
    )  # fmt: skip
    figure.colorbar(points, ax=axes)
    return figure


def _lines(plot: Lines) -> Any:
    figure, axes = _figure(plot)
    for line in plot.lines:
        axes.plot(
            line.xs,
            line.ys,
            color=_COLOURS[line.index % len(_COLOURS)],
            linestyle="--" if line.dashed else "-",
            linewidth=1.4,
            marker="o" if len(line.xs) <= 12 else "",
            markersize=3,
            label=line.name or None,
        )
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    return figure
