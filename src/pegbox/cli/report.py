"""`pegbox report`: tables, plots and the page of a run or a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pegbox.cli.options import JsonOption, emit

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    folder: Annotated[Path, typer.Argument(help="A run's or a comparison's folder.")],
    format: Annotated[
        str, typer.Option("--format", help="Comma-separated: html, csv, latex, json, png, svg, terminal.")
    ] = "terminal,html",
    out: Annotated[Path | None, typer.Option("--out", help="Where files go; default: the folder itself.")] = None,
    json: JsonOption = False,
) -> None:
    """Write a run's or a comparison's report in the formats asked for."""
    from pegbox.report import write_report

    formats = [name.strip() for name in format.split(",") if name.strip()]
    written = write_report(folder, formats=[f for f in formats if not (json and f == "terminal")], out=out)
    if json:
        emit([str(path) for path in written])
    else:
        for path in written:
            typer.echo(str(path))
