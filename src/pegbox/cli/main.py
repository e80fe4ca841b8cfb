"""The command line: one file per command, heavy imports inside the functions, errors as exit codes."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from pegbox.errors import PegboxError

__all__ = ["app", "main"]

app = typer.Typer(
    name="pegbox",
    help="Every published way to fine-tune a pre-trained model, behind one interface.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = (
    "demo",
    "recipes",
    "data",
    "plan",
    "select",
    "train",
    "compare",
    "sweep",
    "evaluate",
    "report",
    "chat",
    "export",
    "merge",
    "analyze",
    "runs",
    "doctor",
    "schema",
    "evidence",
)

for _name in COMMANDS:
    import_module(f"pegbox.cli.{_name}").add_to(app)


def main() -> None:
    """The console script. Exit: 0 ok, 1 run failed, 2 bad input, 3 does not fit, 4 stopped, 5 wrong base or corrupt."""
    try:
        app()
    except PegboxError as error:
        typer.secho(f"error: {error}", err=True, fg="red" if sys.stderr.isatty() else None)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
