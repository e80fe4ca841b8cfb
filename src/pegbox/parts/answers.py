"""Answers and how they are compared: normalisation, exact match, token F1, numbers, sets, and checkers.

    F1 = 2 P R / (P + R) over the bags of words of the prediction and the gold answer

Sources: SQuAD (arXiv:1606.05250) for the normalisation and F1; MeZO (arXiv:2305.17333) for the golds that mean "there
is no answer". Definitions that differ in published work stand beside each other under their own names (`exact_match`,
`prefix_match`).

A *checker* decides whether an answer is right for one row, by a rule of that row's task. Rows find theirs through
`checker_for`. What this file does not do: run a model.
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pegbox.errors import BadInput, did_you_mean

__all__ = [
    "CHECKERS",
    "NO_ANSWER",
    "Checker",
    "boxed",
    "check",
    "checker_for",
    "contains",
    "exact_match",
    "final_answer",
    "last_number",
    "normalise",
    "numbers_equal",
    "prefix_match",
    "register_checker",
    "sets_equal",
    "squad_f1",
    "to_number",
]

Checker = Callable[[Any, str], bool | float]  # (row, the model's answer) -> right or wrong, or a share in [0, 1]

NO_ANSWER = frozenset({"no answer", "CANNOTANSWER"})

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?")
_FINAL = re.compile(r"####\s*(.+)")


def normalise(text: str) -> str:
    """SQuAD's form: lower case, no ASCII punctuation, no words a/an/the, single blanks (in this order)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, golds: str | Sequence[str]) -> bool:
    """Whether the normalised prediction equals one of the normalised golds. Accents are not folded."""
    return normalise(prediction) in {normalise(gold) for gold in _listed(golds)}


def prefix_match(prediction: str, golds: str | Sequence[str]) -> bool:
    """The looser form some papers report: the normalised prediction begins with a (non-empty) normalised gold."""
    return any(gold and normalise(prediction).startswith(gold) for gold in map(normalise, _listed(golds)))


def contains(prediction: str, golds: str | Sequence[str]) -> bool:
    """Whether a normalised gold occurs in the normalised prediction as whole words."""
    padded = f" {normalise(prediction)} "
    return any(gold and f" {gold} " in padded for gold in map(normalise, _listed(golds)))


def squad_f1(prediction: str, golds: str | Sequence[str]) -> float:
    """The best token F1 over the golds; a gold in `NO_ANSWER` scores by exact match."""
    return max((_f1(prediction, gold) for gold in _listed(golds)), default=0.0)


def _f1(prediction: str, gold: str) -> float:
    if gold in NO_ANSWER:
        return float(normalise(prediction) == normalise(gold))
    said, meant = normalise(prediction).split(), normalise(gold).split()
    if not said or not meant:
        return float(said == meant)
    shared = sum((Counter(said) & Counter(meant)).values())
    return 2 * shared / (len(said) + len(meant))


def to_number(value: Any) -> float | None:
    """The number a value or a short text stands for: thousands' commas, a currency sign, a per cent sign are read."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    text = str(value).strip().strip("$€£").replace(",", "").rstrip(".")
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def last_number(text: str) -> float | None:
    """The last number in a text."""
    found = _NUMBER.findall(text)
    return to_number(found[-1]) if found else None


def numbers_equal(prediction: Any, gold: Any, *, absolute: float = 1e-6, relative: float = 0.0) -> bool:
    """|prediction - gold| <= max(absolute, relative |gold|); a text counts by its final answer or its last number."""
    meant = to_number(gold)
    if meant is None:
        raise BadInput(f"The expected answer {gold!r} is not a number. Give a number, or use another checker.")
    said = to_number(prediction)
    if said is None:
        final = final_answer(str(prediction))
        said = last_number(final if final is not None else str(prediction))
    return said is not None and abs(said - meant) <= max(absolute, relative * abs(meant))


def sets_equal(prediction: str | Iterable[str], gold: str | Iterable[str]) -> bool:
    """Whether both name the same things, in any order. Texts are split at commas, semicolons, line breaks, 'and'."""
    return _members(prediction) == _members(gold)


def _members(value: str | Iterable[str]) -> set[str]:
    parts = re.split(r"[,;\n]|\band\b", value) if isinstance(value, str) else [str(v) for v in value]
    return {normalise(part) for part in parts} - {""}


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, with nested braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            if depth == 0:
                return text[begin:i].strip()
            depth -= 1
    return None


def final_answer(text: str) -> str | None:
    r"""What a worked solution ends in: the last `#### N`, else the last `\boxed{N}`; None if there is neither."""
    found = _FINAL.findall(text)
    return found[-1].strip() if found else boxed(text)


# --- checkers -------------------------------------------------------------------------------------------------------


def check(answer: str, expected: Any) -> bool:
    """Compare with a row's machine-checkable value.

    `expected` is a text or number, a list of accepted texts, or a block: {"number": 3.5, "tolerance": 0.1, "relative":
    0.01} | {"set": ["a", "b"]} | {"text": "x" or ["x", "y"]} | {"contains": "x"}. A plain number compares as a number.
    """
    if isinstance(expected, Mapping):
        return _check_block(answer, expected)
    if isinstance(expected, bool):
        return exact_match(answer, str(expected))
    if isinstance(expected, int | float):
        return numbers_equal(answer, expected)
    if isinstance(expected, list | tuple | set | frozenset):
        return exact_match(answer, [str(e) for e in expected])
    return exact_match(answer, str(expected))


def _check_block(answer: str, block: Mapping[str, Any]) -> bool:
    match dict(block):
        case {"number": gold, **rest} if rest.keys() <= {"tolerance", "relative"}:
            return numbers_equal(answer, gold, absolute=rest.get("tolerance", 1e-6), relative=rest.get("relative", 0.0))
        case {"set": members, **rest} if not rest:
            return sets_equal(answer, members)
        case {"text": golds, **rest} if not rest:
            return exact_match(answer, golds)
        case {"contains": golds, **rest} if not rest:
            return contains(answer, golds)
    raise BadInput(
        f"A row's 'answer' block {dict(block)!r} can't be checked. Use a text, a number, a list of accepted texts, or "
        "one of {'number': x, 'tolerance': t, 'relative': r}, {'set': [...]}, {'text': ...}, {'contains': ...}."
    )


def _generic(row: Any, answer: str) -> bool:
    if row.answer is None:
        raise BadInput(
            f"Row {row.id}{_where(row)} has no 'answer' to check. Give it one, name a checker, or use exact_match."
        )
    return check(answer, row.answer)


# Checkers by task name: functions, or "module:function" that is imported when first needed.
CHECKERS: dict[str, Checker | str] = {
    "answer": _generic,
    "network": "pegbox.data.network:check",
    "repair": "pegbox.data.repair:check",
}


def register_checker(name: str, checker: Checker | str) -> None:
    """Enter a checker for rows whose `meta["checker"]`, `task` (or its part before '/') or source is `name`."""
    if name in CHECKERS and CHECKERS[name] is not checker:
        raise BadInput(f"A checker named '{name}' is registered already.")
    CHECKERS[name] = checker


def checker_for(row: Any) -> Checker:
    """The row's checker: `meta["checker"]`, else its task's or its source's, else the comparison with `row.answer`."""
    named = (row.meta or {}).get("checker")
    if named is not None and named not in CHECKERS:
        raise BadInput(f"Row {row.id}{_where(row)} asks for the checker '{named}'.{did_you_mean(named, CHECKERS)}")
    for name in (named, row.task, row.task.split("/")[0], row.source.split(":")[0]):
        if name and name in CHECKERS:
            return _resolve(name)
    return _generic


def _resolve(name: str) -> Checker:
    entry = CHECKERS[name]
    if isinstance(entry, str):
        module, _, function = entry.partition(":")
        entry = getattr(importlib.import_module(module), function)
        CHECKERS[name] = entry
    return entry


def _where(row: Any) -> str:
    return f" ({row.source})" if row.source else ""


def _listed(golds: str | Sequence[str]) -> list[str]:
    return [golds] if isinstance(golds, str) else [str(g) for g in golds]
