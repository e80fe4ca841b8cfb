"""`pegbox sweep`: one recipe over ranges of its own fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    fields: Annotated[list[str], typer.Argument(help="key=low:high, key=low:high:log, or key=a,b,c; key=value fixes.")],
    model: Annotated[str, typer.Option("--model")],
    data: Annotated[list[str], typer.Option("--data")],
    out: Annotated[Path, typer.Option("--out")],
    trials: Annotated[int, typer.Option("--trials", min=1)] = 8,
    eval_data: o.EvalDataOption = None,
    map: o.MapOption = None,
    metric: o.MetricOption = None,
    epochs: Annotated[float | None, typer.Option("--epochs")] = None,
    steps: Annotated[int | None, typer.Option("--steps")] = None,
    batch: o.BatchOption = None,
    max_length: o.MaxLengthOption = None,
    seed: o.SeedOption = 0,
    device: Annotated[str | None, typer.Option("--device")] = None,
    plugin: o.PluginOption = None,
    json: o.JsonOption = False,
) -> None:
    """Try values of a recipe's fields, score each on validation, name the best. Interrupted sweeps go on."""
    from pegbox.cli.train import run_arguments
    from pegbox.compare.sweep import sweep as search

    shared = run_arguments(
        {
            "eval_data": eval_data,
            "metric": metric,
            "epochs": epochs,
            "steps": steps,
            "batch": batch,
            "max_length": max_length,
            "device": device,
            "plugin": plugin,
        }
    )
    found = search(
        recipe, fields, model=model, data=data, out=out, trials=trials, seed=seed, map=o.parse_map(map), **shared
    )
    if json:
        o.emit(found.plain())
    else:
        from rich.console import Console

        Console().print(found)
