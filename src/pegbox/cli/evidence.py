"""`pegbox evidence`: what was measured of each system's claim, failures included."""

from __future__ import annotations

from typing import Annotated

import typer

from pegbox.cli.options import JsonOption, emit

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("evidence")(evidence)


def evidence(
    slug: Annotated[str | None, typer.Argument(help="A recipe's name; default: all.")] = None, json: JsonOption = False
) -> None:
    """Show the measured claims of one system, or of all."""
    from pegbox.evidence import records, records_of

    chosen = {slug: records_of(slug)} if slug is not None else records()
    if json:
        emit(chosen)
        return
    for name, found in chosen.items():
        for record in found:
            typer.secho(f"{name}: {record['verdict']}", bold=True)
            typer.echo(f"  claim: {record['claim']}\n  measured: {record['summary']}\n  run it: {record['command']}")
