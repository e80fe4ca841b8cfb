"""`pegbox data`: the rows as the model will see them."""

from __future__ import annotations

from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("data")(data)


def data(
    source: Annotated[list[str], typer.Argument(help="A file, a folder, a hub id, or 'network'.")],
    model: o.ModelOption = None,
    format: Annotated[str, typer.Option("--format", help="auto, or one of the row formats.")] = "auto",
    map: o.MapOption = None,
    template: Annotated[str | None, typer.Option("--template", help="A jinja chat template's file.")] = None,
    train_on: Annotated[str, typer.Option("--train-on", help="assistant, last or all.")] = "assistant",
    max_length: Annotated[int, typer.Option("--max-length")] = 1024,
    rows: Annotated[int, typer.Option("-n", help="How many rows to show.")] = 3,
    check: Annotated[bool, typer.Option("--check", help="Read and encode every row, show only what is wrong.")] = False,
    json: o.JsonOption = False,
) -> None:
    """Show the first rows with their loss mask, the detected format and length statistics."""
    from pegbox.run import preview

    shown = preview(
        source,
        model=model,
        format=format,
        map=o.parse_map(map),
        template=template,
        train_on=train_on,
        max_length=max_length,
        rows=0 if check else rows,
    )
    if json:
        o.emit(shown)
    else:
        from rich.console import Console

        from pegbox.data.preview import render

        Console().print(render(shown))
