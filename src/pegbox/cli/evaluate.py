"""`pegbox evaluate`: score a run or a bare model on a suite."""

from __future__ import annotations

from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    target: Annotated[str, typer.Argument(help="A run's folder, or a model.")],
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="target, retention, retention-real, lm-eval:TASK. Repeatable.")
    ] = None,
    data: o.DataOption = None,
    map: o.MapOption = None,
    metric: o.MetricOption = None,
    vs: Annotated[str | None, typer.Option("--vs", help="A run or model to compare with, row by row.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 128,
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many rows.")] = None,
    device: o.DeviceOption = "auto",
    decode: o.DecodeOption = None,
    role: o.RoleOption = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    json: o.JsonOption = False,
) -> None:
    """Score a run or model; with --vs, the paired difference to another with its interval."""
    from pegbox.runner.decoding import roles_from
    from pegbox.scoring import evaluate as score

    found = score(
        target,
        suites=suite,
        data=data,
        map=o.parse_map(map),
        metric=metric,
        vs=vs,
        max_new_tokens=max_new_tokens,
        limit=limit,
        device=device,
        trust_remote_code=trust_remote_code,
        decode=decode,
        roles=roles_from(role),
    )
    if json:
        o.emit(found.plain())
    else:
        from rich.console import Console

        Console().print(found)
