"""`pegbox runs`: list, show, compare and verify run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pegbox.cli.options import JsonOption, emit

__all__ = ["add_to"]

runs = typer.Typer(name="runs", help="List, show, compare and verify run folders.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(runs)


@runs.command()
def ls(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"), json: JsonOption = False) -> None:
    """List the runs below a folder."""
    from pegbox.workspace import list_runs

    found = list_runs(folder)
    if json:
        emit(found)
        return
    for run in found:
        typer.echo(f"{run['path']}  {run['status']}  {run['recipe']}  {run['model']}")


@runs.command()
def show(run: Annotated[Path, typer.Argument()], json: JsonOption = False) -> None:
    """Show one run: settings, state, results."""
    from pegbox.workspace import describe_run

    found = describe_run(run)
    if json:
        emit(found)
    else:
        from pegbox.recipe import dump_yaml

        typer.echo(dump_yaml(found), nl=False)


@runs.command()
def diff(left: Annotated[Path, typer.Argument()], right: Annotated[Path, typer.Argument()]) -> None:
    """Name every setting in which two runs differ."""
    from pegbox.workspace import read_spec

    for line in read_spec(left).changed(read_spec(right)) or ["no difference"]:
        typer.echo(line)


@runs.command()
def verify(run: Annotated[Path, typer.Argument()]) -> None:
    """Check every file of the artefact and the checkpoints against its checksum."""
    from pegbox.workspace import verify_run

    for line in verify_run(run):
        typer.echo(line)
