"""`pegbox compare`: several recipes on your rows, fairly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes; key=value is laid over all of them.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The comparison's folder.")] = None,
    model: o.ModelOption = None,
    data: o.DataOption = None,
    eval_data: o.EvalDataOption = None,
    test_data: o.TestDataOption = None,
    eval_split: Annotated[float | None, typer.Option("--eval-split")] = None,
    test_split: Annotated[float | None, typer.Option("--test-split")] = None,
    group: Annotated[str | None, typer.Option("--group", help="A column whose rows stay in one split.")] = None,
    map: o.MapOption = None,
    template: Annotated[str | None, typer.Option("--template")] = None,
    metric: o.MetricOption = None,
    epochs: Annotated[float | None, typer.Option("--epochs")] = None,
    steps: Annotated[int | None, typer.Option("--steps")] = None,
    batch: o.BatchOption = None,
    max_length: o.MaxLengthOption = None,
    precision: Annotated[str | None, typer.Option("--precision")] = None,
    device: Annotated[str | None, typer.Option("--device")] = None,
    add: Annotated[list[str] | None, typer.Option("--add", help="Add a recipe to the comparison in --out.")] = None,
    import_run: Annotated[list[Path] | None, typer.Option("--import", help="Show a finished run as a row.")] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="The row others are told apart from.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1)] = 3,
    trials: Annotated[int, typer.Option("--trials", min=0, help="Rates tried per row; 0: published rates.")] = 5,
    budget: Annotated[str, typer.Option("--budget", help="tokens, tokens=V, flops=V or seconds=V.")] = "tokens",
    match: Annotated[str, typer.Option("--match", help="none, params, or memory=V.")] = "none",
    select: Annotated[str, typer.Option("--select", help="Checkpoint: best (on validation) or last.")] = "best",
    margin: Annotated[float, typer.Option("--margin", help="Differences below it count as equal.", min=0.0)] = 0.02,
    suite: Annotated[list[str] | None, typer.Option("--suite", help="Default: target and retention.")] = None,
    list_cells: Annotated[
        bool, typer.Option("--list-cells", help="Print the cells and their state; run nothing.")
    ] = False,
    cell: Annotated[str | None, typer.Option("--cell", help="Run one cell only, e.g. lift/seed-1.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Cells at once; seconds are then not comparable.")] = 1,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a long comparison.")] = False,
    plugin: o.PluginOption = None,
    json: o.JsonOption = False,
) -> None:
    """Train several recipes under one lock and say which differences this test set can tell apart."""
    from pegbox.cli.train import run_arguments
    from pegbox.compare import compare as run_compare

    given: dict[str, Any] = {k: v for k, v in locals().items() if k not in {"run_compare", "run_arguments", "json"}}
    given["map"] = o.parse_map(map)
    given["recipes"] = [text for text in recipes or [] if "=" not in text]
    given["overrides"] = [text for text in recipes or [] if "=" in text]
    given["confirm"] = None if yes else (lambda text: typer.confirm(text, default=True))
    given.pop("yes")
    found = run_compare(**run_arguments(given))
    if json:
        o.emit(found if isinstance(found, list) else found.plain())
        return
    from rich.console import Console

    Console().print(_cells(found) if isinstance(found, list) else found)


def _cells(cells: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for heading in ("cell", "status", "reason", "folder"):
        table.add_column(heading)
    for cell in cells:
        table.add_row(*(str(cell[key]) for key in ("cell", "status", "reason", "folder")))
    return table
