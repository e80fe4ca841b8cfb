"""`pegbox schema`: JSON schemas of what pegbox reads and writes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pegbox.cli.options import emit

__all__ = ["add_to"]


class Subject(StrEnum):
    run = "run"
    recipe = "recipe"
    log = "log"
    metrics = "metrics"


def add_to(app: typer.Typer) -> None:
    app.command("schema")(schema)


def schema(subject: Annotated[Subject, typer.Argument(help="run, recipe, log or metrics.")]) -> None:
    """Print the JSON schema of run.yaml, a recipe, a line of log.jsonl, or metrics.json."""
    from pegbox.run import schema_of

    emit(schema_of(subject.value))
