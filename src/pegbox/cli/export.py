"""`pegbox export`: hand a tuned model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or an artefact.")],
    to: Annotated[str, typer.Option("--to", help="merged, gguf, lora or hub.")],
    out: Annotated[str, typer.Option("--out", help="A new folder or file; for hub: the repository's name.")],
    base: Annotated[str | None, typer.Option("--base", help="The base, if it lies elsewhere than recorded.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    rank: Annotated[int, typer.Option("--rank", help="For lora: the rank of the approximation.", min=1)] = 64,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare the outputs afterwards.")] = False,
    json: o.JsonOption = False,
) -> None:
    """Write a merged model, a LoRA by SVD, a GGUF file, or push to the hub; says how far outputs moved."""
    from pegbox.export import export as write

    done = write(run, to=to, out=out, base=base, dtype=dtype, rank=rank, check=not no_check)
    if json:
        o.emit(done)
    else:
        for key, value in done.items():
            typer.echo(f"{key}: {value}")
