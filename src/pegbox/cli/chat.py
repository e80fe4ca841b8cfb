"""`pegbox chat` and `pegbox generate`: ask a tuned model, side by side with its base if wished."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pegbox.cli import options as o

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    app.command("chat")(chat)
    app.command("generate")(generate)


SideBySide = Annotated[
    str | None, typer.Option("--side-by-side", help="'base', or another run: answer with both.", metavar="base|RUN")
]
Temperature = Annotated[float, typer.Option("--temperature", help="0: greedy.", min=0.0)]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1)]


def generate(
    run: Annotated[str, typer.Argument(help="A run's folder, or a model.")],
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; default: --input, or lines from stdin.")] = None,
    input: Annotated[Path | None, typer.Option("--input", help="JSONL rows, or a text file, a prompt a line.")] = None,
    side_by_side: SideBySide = None,
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    system: Annotated[str | None, typer.Option("--system")] = None,
    seed: o.SeedOption = 0,
    device: o.DeviceOption = "auto",
    decode: o.DecodeOption = None,
    role: o.RoleOption = None,
    json: o.JsonOption = False,
) -> None:
    """Answer prompts, one after another."""
    from pegbox.ask import answers, read_prompts
    from pegbox.runner.decoding import roles_from

    messages = read_prompts(prompt or [], input, system)
    for item in answers(
        run,
        messages,
        beside=side_by_side,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        decode=decode,
        roles=roles_from(role),
    ):
        if json:
            import json as json_

            typer.echo(json_.dumps(item, ensure_ascii=False))
        else:
            _show(item)


def chat(
    run: Annotated[str, typer.Argument(help="A run's folder, or a model.")],
    side_by_side: SideBySide = None,
    max_new_tokens: Length = 512,
    temperature: Temperature = 0.0,
    system: Annotated[str | None, typer.Option("--system")] = None,
    seed: o.SeedOption = 0,
    device: o.DeviceOption = "auto",
    decode: o.DecodeOption = None,
    role: o.RoleOption = None,
) -> None:
    """Talk to a tuned model; answers stream. An empty line or Ctrl-D ends, /new starts over."""
    from pegbox.ask import Chat
    from pegbox.runner.decoding import roles_from

    roles = roles_from(role)
    session = Chat(run, beside=side_by_side, device=device, system=system, seed=seed, decode=decode, roles=roles)
    typer.echo("An empty line ends; /new starts over.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            session.start_over()
            continue
        for speaker, pieces in session.reply(text, max_new_tokens=max_new_tokens, temperature=temperature):
            if side_by_side is not None:
                typer.secho(f"[{speaker}] ", nl=False, bold=True)
            for piece in pieces:
                typer.echo(piece, nl=False)
            typer.echo()


def _show(item: dict[str, str]) -> None:
    typer.secho(item["prompt"], dim=True)
    for name, text in item.items():
        if name != "prompt":
            typer.secho(f"[{name}] ", nl=False, bold=True)
            typer.echo(text)
    typer.echo()
