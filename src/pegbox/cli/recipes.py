"""`pegbox recipes`: the catalogue, one recipe, or the start of a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pegbox.cli.options import JsonOption, emit

__all__ = ["add_to"]

AXES = ("prepare", "select", "tuner", "objective", "optim", "data", "protocol", "weights")

TEMPLATE = """\
title: {name}
paper: ""
summary: What it does, in one line.
tuner: {{kind: lora, r: 16, target_modules: all-linear}}
objective: {{token: {{kind: sft}}}}
optim: {{kind: adamw, lr: 1.0e-4}}
"""


def add_to(app: typer.Typer) -> None:
    app.command("recipes")(recipes)


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe to show, or 'new'.")] = None,
    new: Annotated[str | None, typer.Argument(help="With 'new': the name of the recipe to start.")] = None,
    axis: Annotated[str | None, typer.Option("--axis", help="Only recipes that choose on this axis.")] = None,
    json: JsonOption = False,
) -> None:
    """List the catalogue, show one recipe, or start a new one (`pegbox recipes new NAME`)."""
    from pegbox.errors import BadInput, did_you_mean
    from pegbox.recipe import catalogue, dump_yaml, read_recipe

    if name == "new":
        _start(new)
    elif name is not None:
        block = read_recipe(name)
        emit(block) if json else typer.echo(dump_yaml(block), nl=False)
    else:
        if axis is not None and axis not in AXES:
            raise BadInput(f"Unknown axis '{axis}'.{did_you_mean(axis, AXES)}")
        rows = [_row(slug, block) for slug, block in catalogue().items() if axis is None or axis in block]
        emit(rows) if json else _table(rows)


def _row(slug: str, block: dict[str, Any]) -> dict[str, Any]:
    from pegbox.evidence import verdict_of

    return {
        "name": slug,
        "title": block.get("title", slug),
        "axes": [axis for axis in AXES if axis in block],
        "paper": block.get("paper", ""),
        "evidence": verdict_of(slug),
    }


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows)} recipes", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "what it is", "chooses on", "paper", "evidence"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["name"], row["title"], ", ".join(row["axes"]), row["paper"], row["evidence"])
    Console().print(table)


def _start(name: str | None) -> None:
    from pegbox.errors import BadInput

    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise BadInput("Give the new recipe a name of letters, digits, '-' and '_': pegbox recipes new my-method.")
    path = Path(f"{name}.yaml")
    if path.exists():
        raise BadInput(f"{path} is there already; choose another name, or edit that file.")
    path.write_text(TEMPLATE.format(name=name), encoding="utf-8")
    typer.echo(f"{path}: edit it, then pegbox train {path} --model ... --data ...")
