"""The report on a terminal (rich)."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from pegbox.report.model import Comparison
from pegbox.report.table import Cell, main_table

__all__ = ["terminal"]

_STYLES = {"good": "green", "bad": "red", "quiet": "dim", "": ""}


def terminal(c: Comparison) -> RenderableType:
    """Title, notes, the main table with intervals under the values, and what failed or was flagged."""
    table = main_table(c)
    shown = RichTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns:
        first = column.key == "name"
        shown.add_column(column.head, justify="right" if column.numeric else "left", no_wrap=first)
    for entry, cells in table.rows:
        name = Text(entry.name, style="bold" if entry.kind != "free" else "")
        shown.add_row(name, *map(_text, cells[1:]), style="dim" if entry.status == "failed" else "")
    about = Text("  ".join(part for part in (c.model, c.data) if part), style="dim")
    notes = [Text(f"! {note}", style="yellow") for note in c.notes]
    flags = [Text(f"{e.name}: {flag}", style="dim") for e in c.entries for flag in e.flags]
    failed = [Text(f"{e.name}: {e.status}, {e.reason}", style="red") for e in c.entries if e.reason]
    return Group(Text(c.title, style="bold"), about, *notes, shown, *failed, *flags)


def _text(cell: Cell) -> Text:
    text = Text(cell.text, style=_STYLES[cell.tone])
    if cell.note:
        text.append(f"\n{cell.note}", style="dim")
    return text
