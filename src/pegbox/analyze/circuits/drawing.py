"""A circuit as tables and pictures of a report, and its scores as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pegbox.analyze.circuits.circuit import Circuit
from pegbox.analyze.circuits.judging import Gap
from pegbox.parts.files import write_text
from pegbox.parts.findings import Grid, Picture, Series

__all__ = ["bars", "circuit_table", "diagram", "gap_table", "heat_map", "knockout_picture", "save_scores"]


def heat_map(key: str, title: str, scores: Tensor) -> Picture:
    """Scores (L, H): a cell for each head."""
    cells = [(layer, head) for layer in range(scores.shape[0]) for head in range(scores.shape[1])]
    series = Series(
        xs=[float(head) for _, head in cells],
        ys=[float(layer) for layer, _ in cells],
        values=[float(scores[cell]) for cell in cells],
    )
    return Picture(key=key, title=title, x_label="head", y_label="block", series=[series], form="heat")


def diagram(key: str, title: str, circuits: Mapping[str, Circuit]) -> Picture:
    """Which heads stand in which group, a point each; groups beside one another where they share a head."""
    series = []
    named = [(label, name, group) for label, circuit in circuits.items() for name, group in circuit.groups.items()]
    for place, (label, name, group) in enumerate(named):
        shift = 0.7 * (place / max(len(named) - 1, 1) - 0.5) if len(named) > 1 else 0.0
        title_of = f"{name}, {label}" if len(circuits) > 1 else name
        series.append(
            Series(name=title_of, xs=[h.head + shift for h in group.heads], ys=[float(h.layer) for h in group.heads])
        )
    series = [s for s in series if s.xs]
    return Picture(key=key, title=title, x_label="head", y_label="block", series=series, form="points")


def circuit_table(title: str, circuit: Circuit) -> Grid:
    rows: list[list[float | int | str | None]] = [
        [name, group.position, len(group.heads), ", ".join(f"{h.layer}.{h.head}" for h in group.heads)]
        for name, group in circuit.groups.items()
    ]
    return Grid(title=title, columns=["group", "position", "heads", "block.head"], rows=rows)


def gap_table(gaps: Sequence[Gap]) -> Grid:
    """Completeness: random halves as one line, groups by name."""
    halves = [gap for gap in gaps if gap.name.startswith("half ")]
    rows: list[list[float | int | str | None]] = []
    if halves:
        mean = [sum(getattr(g, what) for g in halves) / len(halves) for what in ("circuit", "model", "gap")]
        rows.append([f"random halves, mean of {len(halves)}", halves[0].size, *mean])
    rows += [[g.name, g.size, g.circuit, g.model, g.gap] for g in gaps if not g.name.startswith("half ")]
    columns = ["without", "heads", "circuit's accuracy", "model's accuracy", "gap"]
    return Grid(title="Completeness", columns=columns, rows=rows)


def bars(key: str, title: str, values: Mapping[str, float], y_label: str = "accuracy") -> Picture:
    """One bar for each name."""
    series = [Series(name=name, xs=[0.0], ys=[value]) for name, value in values.items()]
    return Picture(key=key, title=title, x_label="", y_label=y_label, series=series, form="bars")


def knockout_picture(curves: Mapping[str, Mapping[int, float]]) -> Picture:
    series = [
        Series(name=name, xs=[float(x) for x in curve], ys=list(curve.values()), dashed="random" in name)
        for name, curve in curves.items()
    ]
    return Picture(
        key="circuits-knockout", title="Accuracy where attention is cut from a block on", x_label="from block",
        y_label="accuracy", series=series,
    )  # fmt: skip


def save_scores(path: Path, scores: Mapping[str, Tensor]) -> None:
    """group, layer, head, score: a line each."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["group", "layer", "head", "score"])
    for name, table in scores.items():
        for layer in range(table.shape[0]):
            for head in range(table.shape[1]):
                writer.writerow([name, layer, head, float(table[layer, head])])
    write_text(path, out.getvalue())
