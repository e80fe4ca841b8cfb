"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "BatchOption",
    "DataOption",
    "DecodeOption",
    "DeviceOption",
    "EvalDataOption",
    "JsonOption",
    "MapOption",
    "MaxLengthOption",
    "MetricOption",
    "ModelOption",
    "OutOption",
    "PluginOption",
    "RoleOption",
    "SeedOption",
    "TestDataOption",
    "emit",
    "parse_map",
]

DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="Rows: a file, a folder, a hub id, or the built-in 'network'. Repeat to mix."),
]
DecodeOption = Annotated[
    str | None,
    typer.Option(
        "--decode",
        help="How answers are drawn: a recipe with a decode block, a block in YAML ({kind: emulated}), or a kind.",
    ),
]
RoleOption = Annotated[
    list[str] | None,
    typer.Option("--role", help="A model that the decoder joins: tuned=runs/a, reward=classifier:REF. Repeatable."),
]
EvalDataOption = Annotated[list[str] | None, typer.Option("--eval-data", help="Validation rows.")]
TestDataOption = Annotated[list[str] | None, typer.Option("--test-data", help="Test rows, read once at the end.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A hub id, a local folder, a GGUF file, or an alias (smollm2-135m-q4).")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="The run's folder.")]
MapOption = Annotated[list[str] | None, typer.Option("--map", help="Rename a column: messages=dialogue. Repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PluginOption = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file with components of your own. Repeatable.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
BatchOption = Annotated[int | None, typer.Option("--batch", help="Rows per optimizer step, over all processes.")]
MaxLengthOption = Annotated[int | None, typer.Option("--max-length", help="Tokens per row; longer ones are cut.")]
MetricOption = Annotated[
    str | None, typer.Option("--metric", help="A metric's kind, or file.py:function; default: what suits the rows.")
]


def emit(value: Any) -> None:
    """Print plain values as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def parse_map(pairs: Iterable[str] | None) -> dict[str, str]:
    """["messages=dialogue"] -> {"messages": "dialogue"}."""
    from pegbox.errors import BadInput

    mapping = {}
    for pair in pairs or ():
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise BadInput(
                f"--map {pair}: write the field on the left and your column on the right: messages=dialogue."
            )
        mapping[ours] = theirs
    return mapping
