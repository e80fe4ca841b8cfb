"""The report on a terminal (rich)."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from pegbox.parts.findings import Finding
from pegbox.report.findings import number
from pegbox.report.model import Comparison
from pegbox.report.table import Cell, Table, main_table

__all__ = ["terminal"]

_STYLES = {"good": "green", "bad": "red", "quiet": "dim", "": ""}
_COSTS = ("trainable", "memory", "seconds", "rate")


def terminal(c: Comparison) -> RenderableType:
    """Title, notes, results with their intervals, costs, and what failed or was flagged: two tables, for 80 columns."""
    table = main_table(c)
    about = Text(" · ".join(part for part in (c.model, c.data, c.machine) if part), style="dim")
    notes = [Text(f"! {note}", style="yellow") for note in c.notes]
    results = _shown(table, [i for i, k in enumerate(table.columns) if k.key not in _COSTS])
    costs = _shown(table, [0, *(i for i, k in enumerate(table.columns) if k.key in _COSTS)], only_costly=True)
    failed = [Text(f"{e.name}: {e.status}, {e.reason}", style="red") for e in c.entries if e.reason]
    flags = [Text(f"{e.name}: {flag}", style="dim") for e in c.entries for flag in e.flags]
    measured = any(entry.scores for entry in c.entries)
    shown: list[RenderableType] = [Text(), results, Text(), costs] if measured or not c.findings else []
    found = [part for finding in c.findings for part in _finding(finding)]
    return Group(Text(c.title, style="bold"), about, *notes, *shown, *found, *failed, *flags)


def _finding(finding: Finding) -> list[RenderableType]:
    """Its headline numbers and those tables that fit a screen."""
    head = Text(f"\n{finding.title}", style="bold")
    if finding.subject:
        head.append(f"  {finding.subject}", style="dim")
    numbers = RichTable(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in finding.numbers.items():
        numbers.add_row(name.replace("_", " "), number(value))
    tables: list[RenderableType] = []
    for grid in finding.tables:
        if len(grid.rows) <= 12:
            table = RichTable(*grid.columns, title=grid.title, title_justify="left", box=None, pad_edge=False)
            for row in grid.rows:
                table.add_row(*map(number, row))
            tables.append(table)
    return [head, *(Text(note, style="dim") for note in finding.notes), numbers, *tables]


def _shown(table: Table, columns: list[int], only_costly: bool = False) -> RichTable:
    shown = RichTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for i in columns:
        column = table.columns[i]
        shown.add_column(column.head, justify="right" if column.numeric else "left", no_wrap=column.key == "name")
    for entry, cells in table.rows:
        if only_costly and entry.cost is None:
            continue
        name = Text(entry.name, style="bold" if entry.kind != "free" else "")
        shown.add_row(name, *(_text(cells[i], entry.reason) for i in columns[1:]))
    return shown


def _text(cell: Cell, reason: str) -> Text:
    """A cell's text over its note; the reason of a failure stands below the table instead."""
    text = Text(cell.text, style=_STYLES[cell.tone])
    if cell.note and cell.note != reason:
        text.append(f"\n{cell.note}", style="dim")
    return text
