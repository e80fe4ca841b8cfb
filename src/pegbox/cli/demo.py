"""`pegbox demo`: three ways to fine-tune a real model, in some minutes on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pegbox.cli.options import JsonOption, emit

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the comparison and its page go.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Few steps and rows: a look at the machinery.")] = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune SmolLM2-135M with LoRA, LIFT and in full on the built-in network task, and write the page."""
    from pegbox.demo import demo as run

    found = run(out, quick=quick, say=lambda text: typer.echo(text, err=True), progress=not json)
    if json:
        emit(found.plain())
        return
    from rich.console import Console

    Console().print(found)
    typer.echo(f"The page: {out / 'report.html'}")
