"""Asking a run or a model: batches of prompts, and a chat that streams, also side by side with the base."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput
from pegbox.parts.generation import Messages, Sampling, generate, stream
from pegbox.recipe import Recipe, Role
from pegbox.spec import RunSpec
from pegbox.workspace import read_spec

__all__ = ["Chat", "answers", "open_any", "read_prompts"]


def open_any(
    ref: str,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    decode: Any = None,
    roles: Mapping[str, Role] | None = None,
) -> tuple[Any, Any]:
    """A run's or an artefact's tuned model, or a bare model: (model, tokenizer).

    A run whose recipe decodes answers by its decoder. `decode` (what `runner.decoding.read_decoder` takes) and `roles`
    put another, or one on any model.
    """
    from pegbox.artefact import artefact_folder, load_artefact
    from pegbox.models import load

    folder = Path(ref)
    spec = _decoded_spec(folder, ref, decode, roles, device, trust_remote_code)
    if spec is not None:
        return _open_decoded(spec, folder)
    try:
        place = artefact_folder(folder) if folder.is_dir() else None
    except BadInput:
        if (folder / "run.yaml").is_file():
            raise
        place = None
    if place is not None:
        model, tokenizer = load_artefact(place, device=device, trust_remote_code=trust_remote_code)
    else:
        model, tokenizer = load(ref, device=device, trust_remote_code=trust_remote_code)
    return model, tokenizer


def _decoded_spec(
    folder: Path, ref: str, decode: Any, roles: Mapping[str, Role] | None, device: str, trust_remote_code: bool
) -> RunSpec | None:
    """The settings to decode under: the run's own with the given ones laid over; None where nothing decodes."""
    from pegbox.runner.decoding import read_decoder

    own = read_spec(folder) if (folder / "run.yaml").is_file() else None
    if decode is None and (own is None or own.recipe.decode is None):
        if roles:
            raise BadInput(f"Roles ({', '.join(roles)}) are for a decoder; give one with --decode.")
        return None
    decoder, named = read_decoder(decode) if decode is not None else (None, {})
    update: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    if own is None:
        return RunSpec(recipe=Recipe(decode=decoder, models={**named, **(roles or {})}), model=ref, **update)
    models = {**own.recipe.models, **named, **(roles or {})}
    recipe = own.recipe.model_copy(update={"decode": decoder or own.recipe.decode, "models": models})
    return own.model_copy(update={"recipe": recipe, **update})


def _open_decoded(spec: RunSpec, folder: Path) -> tuple[Any, Any]:
    from pegbox.artefact import artefact_folder
    from pegbox.models import resolve
    from pegbox.runner.decoding import bound
    from pegbox.runner.opening import open_artefact, open_base

    try:
        place = artefact_folder(folder) if folder.is_dir() else None
    except BadInput:  # a run that made no weights of its own, or a model's folder
        place = None
    if place is not None:
        opened = open_artefact(spec, place)
    else:
        opened = open_base(spec, spec.recipe, resolve(spec.model), prepared=False)
    decoding = bound(spec, opened)
    return decoding, decoding.tokenizer


def beside_of(run: str, beside: str | None) -> str | None:
    """What `--side-by-side` names: "base" is the run's own base."""
    if beside != "base":
        return beside
    from pegbox.artefact import artefact_folder, read

    try:
        return read(artefact_folder(run), verify=False).root.ref
    except BadInput:
        if (Path(run) / "run.yaml").is_file():  # a run that decodes and made no weights
            return read_spec(Path(run)).model
        raise


def read_prompts(given: Sequence[str], file: Path | None, system: str | None) -> list[Messages]:
    """Prompts as message lists: from arguments, a file (JSONL rows or a prompt a line), or standard input."""
    if given and file is not None:
        raise BadInput("Give prompts or --input, not both.")
    texts: list[Any] = list(given)
    if file is not None:
        if not file.is_file():
            raise BadInput(f"No file '{file}'.")
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [
            _record(line, f"{file}, line {i}") if file.suffix == ".jsonl" else line for i, line in enumerate(lines, 1)
        ]
    elif not texts:
        texts = sys.stdin.read().splitlines()
    lists = [_messages(text, system) for text in texts if text]
    if not lists:
        raise BadInput("No prompt. Give one, or --input FILE, or lines on standard input.")
    return lists


def _record(line: str, where: str) -> Any:
    if not line.strip():
        return ""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}, column {error.colno}: not JSON ({error.msg}). Expected an object a line.") from None


def _messages(item: Any, system: str | None) -> Messages:
    first = [{"role": "system", "content": system}] if system else []
    if isinstance(item, str):
        return [*first, {"role": "user", "content": item}]
    for key in ("messages", "prompt", "instruction", "question"):
        value = item.get(key) if isinstance(item, dict) else None
        if isinstance(value, list):
            asked = value[:-1] if value and value[-1].get("role") == "assistant" else value
            return [*first, *asked]
        if isinstance(value, str):
            return [*first, {"role": "user", "content": value}]
    raise BadInput(f"A prompt needs messages, prompt, instruction or question; got {item!r:.120}.")


def answers(
    run: str,
    messages: Sequence[Messages],
    *,
    beside: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 8,
    decode: Any = None,
    roles: Mapping[str, Role] | None = None,
) -> list[dict[str, str]]:
    """{"prompt", "<run>", "<beside>"} per message list. One side is in memory at a time.

    `decode` and `roles` say how the run's answers are drawn (see `open_any`); what is beside it answers as it is.
    """
    sampling = Sampling(temperature=temperature, seed=seed)
    shown: list[dict[str, str]] = [{"prompt": str(m[-1]["content"])} for m in messages]
    for i, (name, ref) in enumerate(_speakers(run, beside)):
        how: dict[str, Any] = {} if i else {"decode": decode, "roles": roles}
        model, tokenizer = open_any(ref, device=device, **how)
        texts = generate(
            model, tokenizer, messages, max_new_tokens=max_new_tokens, sampling=sampling, batch_size=batch_size
        )
        for entry, text in zip(shown, texts):
            entry[name] = text
        del model
    return shown


def _speakers(run: str, beside: str | None) -> list[tuple[str, str]]:
    other = beside_of(run, beside)
    return [
        (Path(run).name or run, run),
        *([("base" if beside == "base" else Path(other).name, other)] if other else []),
    ]


class Chat:
    """A conversation; with `beside`, each side keeps its own history."""

    def __init__(
        self,
        run: str,
        *,
        beside: str | None = None,
        device: str = "auto",
        system: str | None = None,
        seed: int = 0,
        decode: Any = None,
        roles: Mapping[str, Role] | None = None,
    ):
        self.system, self.seed = system, seed
        (first, ref), *others = _speakers(run, beside)
        self.sides = [(first, *open_any(ref, device=device, decode=decode, roles=roles))]
        self.sides += [(name, *open_any(other, device=device)) for name, other in others]
        self.start_over()

    def start_over(self) -> None:
        """Forget the conversation."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        self.histories: list[Messages] = [list(first) for _ in self.sides]

    def reply(
        self, text: str, *, max_new_tokens: int = 512, temperature: float = 0.0
    ) -> Iterator[tuple[str, Iterator[str]]]:
        """(speaker, pieces of its answer) for each side in turn; consume the pieces before going on."""
        sampling = Sampling(temperature=temperature, seed=self.seed)
        for (name, model, tokenizer), history in zip(self.sides, self.histories):
            history.append({"role": "user", "content": text})
            said: list[str] = []
            yield name, self._pieces(model, tokenizer, history, max_new_tokens, sampling, said)
            history.append({"role": "assistant", "content": "".join(said)})

    @staticmethod
    def _pieces(
        model: Any, tokenizer: Any, history: Messages, limit: int, sampling: Sampling, said: list[str]
    ) -> Iterator[str]:
        for piece in stream(model, tokenizer, history, max_new_tokens=limit, sampling=sampling):
            said.append(piece)
            yield piece
