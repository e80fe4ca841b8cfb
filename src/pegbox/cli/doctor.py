"""`pegbox doctor`: is everything here that pegbox needs?"""

from __future__ import annotations

import typer

from pegbox.cli.options import JsonOption, emit

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(json: JsonOption = False) -> None:
    """Check Python, libraries, devices, memory, disk, optional extras and the registration with PEFT."""
    from pegbox.doctor import examine

    findings = examine()
    if json:
        emit([finding._asdict() for finding in findings])
    else:
        marks = {"ok": ("ok", "green"), "missing": ("--", "yellow"), "broken": ("!!", "red")}
        for finding in findings:
            mark, colour = marks[finding.state]
            typer.secho(f"{mark}  ", nl=False, fg=colour)
            typer.echo(f"{finding.name}: {finding.detail}")
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
