"""`pegbox analyze`: what changed inside a tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("analyze")(analyze)


def analyze(
    recipe: Annotated[str, typer.Argument(help="A recipe with `analyze:`, by name or file, e.g. tuco.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. analyze.0.tokens=true")] = None,
    tuned: Annotated[
        list[str] | None, typer.Option("--tuned", help="A run, or any tuned model. Repeatable; or models.NAME=REF.")
    ] = None,
    model: o.ModelOption = None,
    data: o.DataOption = None,
    map: o.MapOption = None,
    metric: o.MetricOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Look at no more than so many rows.")] = None,
    max_length: o.MaxLengthOption = None,
    device: Annotated[str | None, typer.Option("--device")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    out: o.OutOption = None,
    plugin: o.PluginOption = None,
    json: o.JsonOption = False,
) -> None:
    """Run a recipe's analyses on tuned models and write a report. Base and rows default to those of the tuned run."""
    from pegbox.cli.train import run_arguments
    from pegbox.run import train

    given: dict[str, Any] = {
        "model": model,
        "test_data": data,
        "metric": metric,
        "limit": limit,
        "max_length": max_length,
    }
    given |= {"device": device, "seed": seed, "plugin": plugin}
    block, given = _with_run(recipe, tuned or [], given)
    place = out or Path("runs") / "-".join([Path(recipe).stem, *(Path(t).name for t in tuned or [])])
    run = train(block, overrides=overrides or [], out=place, map=o.parse_map(map), suites=[], **run_arguments(given))
    if json:
        o.emit({"path": str(run.path), "findings": run.metrics.extra.get("findings", [])})
    else:
        from pegbox.report import print_run

        print_run(run.path)
        typer.echo(f"\n{run.report()[0]}")


def _with_run(recipe: str, tuned: list[str], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a run's block with the roles entered, what is given beside it): base and rows of the first tuned run."""
    from pegbox.run import load_spec, open_run

    inner = load_spec(recipe).plain()
    roles = {Path(ref).name or f"tuned{i}": {"of": ref} for i, ref in enumerate(tuned)}
    inner["models"] = {**inner["models"], **roles}
    block: dict[str, Any] = {"recipe": inner}
    first = next((ref for ref in tuned if (Path(ref) / "run.yaml").is_file()), None)
    if first is not None:
        spec = open_run(first).spec
        block |= {"model": spec.model, "precision": spec.precision}
        if given["test_data"] is None:
            block["rows"] = spec.rows.model_dump(mode="json")
    return block, given
