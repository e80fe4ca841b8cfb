"""`pegbox train`: one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pegbox.cli import options as o

__all__ = ["add_to", "run_arguments"]


def add_to(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file, or a run.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, e.g. optim.lr=1e-4")] = None,
    model: o.ModelOption = None,
    data: o.DataOption = None,
    eval_data: o.EvalDataOption = None,
    eval_split: Annotated[float | None, typer.Option("--eval-split", help="Fraction held out for validation.")] = None,
    test_data: o.TestDataOption = None,
    map: o.MapOption = None,
    template: Annotated[str | None, typer.Option("--template", help="A jinja chat template's file.")] = None,
    metric: o.MetricOption = None,
    epochs: Annotated[float | None, typer.Option("--epochs")] = None,
    steps: Annotated[int | None, typer.Option("--steps")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Train on about so many tokens.")] = None,
    batch: o.BatchOption = None,
    micro_batch: Annotated[str | None, typer.Option("--micro-batch", help="auto, or rows per forward.")] = None,
    max_length: o.MaxLengthOption = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Short for optim.lr=X.")] = None,
    train_on: Annotated[str | None, typer.Option("--train-on", help="assistant, last or all.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="auto, fp32, bf16 or nf4.")] = None,
    device: Annotated[str | None, typer.Option("--device")] = None,
    processes: Annotated[int, typer.Option("--processes", help="Processes on this machine (DDP).")] = 1,
    accelerate: Annotated[Path | None, typer.Option("--accelerate", help="An accelerate configuration file.")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    out: o.OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    init_from: Annotated[str | None, typer.Option("--init-from", help="Start from a finished run's artefact.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
    tracker: Annotated[list[str] | None, typer.Option("--tracker", help="tensorboard, wandb, ... Repeatable.")] = None,
    plugin: o.PluginOption = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run a model's own code.")] = False,
    json: o.JsonOption = False,
) -> None:
    """Train RECIPE on your rows: check, train, measure what it gained, forgot and cost."""
    from pegbox.run import train as start

    given = {k: v for k, v in locals().items() if k not in {"recipe", "start", "json", "map", "lr"}}
    given["overrides"] = [*(overrides or []), *([f"optim.lr={lr}"] if lr is not None else [])]
    run = start(recipe, **run_arguments(given), map=o.parse_map(map), progress=not json)
    if json:
        o.emit({"path": str(run.path), "status": run.status, "metrics": run.metrics.model_dump(mode="json")})
    elif dry_run:
        typer.echo("All checks passed; nothing was trained.")
    else:
        from pegbox.report import print_run

        print_run(run.path)


def run_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Drop what was not given, so that run.yaml's and the recipe's own values stay."""
    return {k: v for k, v in given.items() if v is not None}
