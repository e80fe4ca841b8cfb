"""`pegbox select`: where a selection's budget goes, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("select")(select)


def select(
    recipe: Annotated[str, typer.Argument(help="A recipe with a `select:` block, by name or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
    model: o.ModelOption = None,
    data: o.DataOption = None,
    plugin: o.PluginOption = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw operations by blocks into this file (png, svg, pdf).")
    ] = None,
    json: o.JsonOption = False,
) -> None:
    """Make a recipe's selection on a model and show it by depth and by operation."""
    from pegbox.selection import draw, show_selection, table

    found = show_selection(recipe, model=model, data=data, overrides=overrides or (), plugins=plugin or ())
    if picture is not None:
        draw(found, picture)
    if json:
        o.emit(found)
    else:
        from rich.console import Console

        Console().print(table(found))
