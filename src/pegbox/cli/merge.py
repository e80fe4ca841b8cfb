"""`pegbox merge`: combine tuned models by weight operations, without training."""

from __future__ import annotations

from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("merge")(merge)


def merge(
    recipe: Annotated[str, typer.Argument(help="A recipe with `weights:` and `models:`, by name or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. models.tuned=runs/a")] = None,
    model: o.ModelOption = None,
    out: o.OutOption = None,
    data: o.DataOption = None,
    metric: o.MetricOption = None,
    device: Annotated[str | None, typer.Option("--device")] = None,
    json: o.JsonOption = False,
) -> None:
    """Apply a recipe's weight operations to finished runs and measure the result."""
    from pegbox.cli.train import run_arguments
    from pegbox.run import train

    given = run_arguments({"model": model, "out": out, "test_data": data, "metric": metric, "device": device})
    if data is None:
        given["suites"] = ["retention"]
    run = train(recipe, overrides=overrides or [], **given)
    if json:
        o.emit({"path": str(run.path), "metrics": run.metrics.model_dump(mode="json")})
    else:
        from pegbox.report import print_run

        print_run(run.path)
