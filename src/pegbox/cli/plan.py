"""`pegbox plan`: what each recipe would train and need, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    recipes: Annotated[list[str], typer.Argument(help="Recipes, then overrides (key=value) that all of them take.")],
    model: Annotated[str, typer.Option("--model", help="A hub id, a folder, a GGUF file, or an alias.")],
    data: o.DataOption = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows per optimizer step.")] = 8,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", help="Rows per forward; default: --batch.")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens per row, if no --data is given.")] = 512,
    precision: Annotated[str, typer.Option("--precision", help="fp32, bf16 or nf4.")] = "fp32",
    memory: Annotated[str | None, typer.Option("--memory", help="What there is, e.g. 24GiB.")] = None,
    plugin: o.PluginOption = None,
    json: o.JsonOption = False,
) -> None:
    """Count trainable parameters, bytes and FLOPs per step from shapes alone; with --memory, say what fits."""
    from pegbox.plan import plan_all, table

    overrides = [text for text in recipes if "=" in text]
    rows = plan_all(
        [text for text in recipes if "=" not in text],
        model=model,
        data=data,
        batch=batch,
        micro_batch=micro_batch,
        max_length=max_length,
        precision=precision,
        memory=memory,
        plugins=plugin or (),
        overrides=overrides,
    )
    if json:
        o.emit([row.model_dump(mode="json") for row in rows])
    else:
        from rich.console import Console

        Console().print(table(rows))
    if rows and all(row.fits is False for row in rows):
        from pegbox.errors import DoesNotFit

        raise DoesNotFit(
            f"None of these fits {memory}. Try a smaller --micro-batch, --precision nf4, or another recipe."
        )
