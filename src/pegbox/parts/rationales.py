"""Rationales: why a fix is right, asked of any generator, filtered, and kept on disk so that nothing is asked twice.

    explain(pairs, responder, cache=...) -> list[str]          responder: any `parts.generation.Responder`

The generator is asked for the cause of the bug and the logic of the repair (arXiv:2404.12636 asks GPT-4; a person's
notes do as well). What this file does not do: run the generator (`generation.py`), or build training targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pegbox.errors import BadInput
from pegbox.parts.generation import Messages, Responder

__all__ = ["Pair", "explain", "request", "usable"]


@dataclass(frozen=True)
class Pair:
    """What a rationale is asked for: buggy and fixed code, and the problem they solve, if known."""

    buggy: str
    fixed: str
    problem: str = ""


def request(pair: Pair) -> Messages:
    """The messages that ask for one rationale."""
    problem = f"Task:\n{pair.problem.strip()}\n\n" if pair.problem.strip() else ""
    text = (
        f"{problem}Wrong code:\n```\n{pair.buggy.strip()}\n```\n\nCorrected code:\n```\n{pair.fixed.strip()}\n```\n\n"
        "In a few sentences and without repeating the code, say what causes the error and how the correction works."
    )
    return [{"role": "user", "content": text}]


def usable(rationale: str, fixed: str = "", *, longest: int | None = None) -> bool:
    """Whether it says anything: not empty, no longer than `longest` characters, and more than the fixed code again."""
    bare = rationale.strip()
    if not bare or (longest is not None and len(bare) > longest):
        return False
    code = _squeezed(fixed)
    return not code or _squeezed(bare).replace(code, "").strip("`") != ""


def explain(
    pairs: Sequence[Pair],
    responder: Responder,
    *,
    cache: Path | None = None,
    longest: int | None = None,
    max_new_tokens: int = 256,
    batch: int = 32,
) -> list[str]:
    """One rationale per pair, in order; "" where the answer is not `usable`. Only unknown pairs are asked.

    Args:
        cache: JSON lines {"key", "rationale"}, appended after each batch, so that a broken-off run goes on.

    Raises:
        BadInput: a pair without buggy or fixed code.
    """
    for i, pair in enumerate(pairs):
        if not pair.buggy.strip() or not pair.fixed.strip():
            raise BadInput(f"Pair {i} lacks its {'buggy' if not pair.buggy.strip() else 'fixed'} code.")
    keys = [_key(pair, max_new_tokens) for pair in pairs]
    known = _read(cache)
    missing = {key: pair for key, pair in zip(keys, pairs) if key not in known}
    todo = list(missing.items())
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        answers = responder([request(pair) for _, pair in part], max_new_tokens)
        fresh = {key: answer.strip() for (key, _), answer in zip(part, answers, strict=True)}
        known |= fresh
        _append(cache, fresh)
    found = (known[key] for key in keys)
    return [text if usable(text, pair.fixed, longest=longest) else "" for text, pair in zip(found, pairs)]


def _key(pair: Pair, tokens: int) -> str:
    return hashlib.sha256(json.dumps([request(pair), tokens]).encode()).hexdigest()[:24]


def _read(cache: Path | None) -> dict[str, str]:
    if cache is None or not cache.is_file():
        return {}
    found = {}
    for number, line in enumerate(cache.read_text("utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            found[entry["key"]] = str(entry["rationale"])
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{cache}, line {number}: no cached rationale. Delete the line or the file.") from None
    return found


def _append(cache: Path | None, fresh: dict[str, str]) -> None:
    if cache is None:
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"key": key, "rationale": text}) + "\n" for key, text in fresh.items())


def _squeezed(text: str) -> str:
    return "".join(text.split())
