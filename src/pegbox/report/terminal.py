"""The report on a terminal (rich)."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

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
    return Group(Text(c.title, style="bold"), about, *notes, Text(), results, Text(), costs, *failed, *flags)


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
