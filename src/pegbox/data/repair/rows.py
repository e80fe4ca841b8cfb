"""Rows for program repair: buggy and fixed code, a reason if there is one, and tests that judge a candidate.

    format "repair"       columns buggy, fixed; maybe rationale, problem, language, tests, name, header
    format "humanevalpack"   HumanEval's columns with a buggy_solution (arXiv:2308.07124)
    format "separated"    MORepair's one text per sample (separated.py)

The prompt is made here, once, and is the same in training, evaluation and chat. `check` judges an answer: its first
fenced block against the row's tests, in the sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pegbox.data.rows import bad_row
from pegbox.data.separated import split_text
from pegbox.errors import BadInput
from pegbox.parts.languages import check as check_job
from pegbox.parts.languages import job_of, language_named

__all__ = ["EXAMPLE", "KEPT", "check", "read_humanevalpack", "read_repair", "read_separated", "repair_prompt"]

EXAMPLE = {
    "buggy": "def inc(x):\n    return x - 1",
    "fixed": "def inc(x):\n    return x + 1",
    "rationale": "It subtracts where it should add.",
    "tests": "assert inc(1) == 2",
}
KEPT = ("rationale", "problem", "language", "tests", "name", "header")  # columns that stay with the row
_FENCES = {"python": "python", "cpp": "c++", "java": "java"}


def repair_prompt(buggy: str, language: str = "python", problem: str = "", name: str = "", header: str = "") -> str:
    """What is asked: the problem, the buggy code, the request; `header` is what the repaired code has to begin with."""
    task = f"{problem.strip()}\n\n" if problem.strip() else ""
    called = f" ({name})" if name else ""
    begin = f" It begins with:\n{_block(header, language)}" if header.strip() else ""
    return f"{task}This code is wrong{called}:\n{_block(buggy, language)}\nGive the repaired code.{begin}"


def read_repair(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a chat row from buggy and fixed code."""
    texts = {name: record.get(name) for name in ("buggy", "fixed")}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise bad_row(where, name, "the code is missing or empty", "code as text", EXAMPLE)
    language = _language(record.get("language"), where)
    extra = {name: str(record.get(name) or "") for name in ("problem", "name", "header")}
    return _fields(texts["buggy"] or "", texts["fixed"] or "", language, extra, str(record.get("tests") or ""))


def read_humanevalpack(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields from HumanEvalPack's columns: bodies behind a declaration (or prompt), and tests that call them."""
    names = ("buggy_solution", "canonical_solution", "test")
    for name in names:
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise bad_row(where, name, "the column is missing or empty", "text", dict.fromkeys(names, "..."))
    language = _language(record.get("language") or str(record.get("task_id", "python")).split("/")[0], where)
    head = str(record.get("declaration") or record.get("prompt") or "")
    tests, entry = str(record["test"]), str(record.get("entry_point") or "")
    if language == "python" and entry and "def check(" in tests and f"check({entry})" not in tests:
        tests = f"{tests}\ncheck({entry})\n"
    extra = {"problem": str(record.get("instruction") or ""), "name": entry, "header": ""}
    buggy, fixed = (head + str(record[name]) for name in names[:2])
    return _fields(buggy, fixed, language, extra, tests)


def read_separated(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a completion row: INPUT is the prompt as it stands, OBJ1 the answer, OBJ2 the column `second`."""
    text = record.get("separated")
    if not isinstance(text, str):
        raise bad_row(where, "separated", "expected text", "INPUT</s>OBJ1</s>OBJ2", {"separated": "a</s>b</s>c"})
    parts = split_text(text, str(record.get("eos") or "</s>"), where)
    messages = [{"role": "user", "content": parts.prompt}, {"role": "assistant", "content": parts.first}]
    return {"kind": "completion", "messages": messages, "meta": {"second": parts.second}}


def check(row: Any, answer: str) -> bool:
    """Whether the answer's code passes the row's tests."""
    return check_job(job_of(row, answer)).passed


def _fields(buggy: str, fixed: str, language: str, extra: Mapping[str, str], tests: str) -> dict[str, Any]:
    prompt = repair_prompt(buggy, language, **extra)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _block(fixed, language)}]
    meta = {"buggy": buggy, "fixed": fixed, "language": language}
    judged = {"tests": tests, "checker": "repair"} if tests.strip() else {}
    return {"kind": "chat", "messages": messages, "answer": fixed if judged else None, "meta": {**meta, **judged}}


def _block(code: str, language: str) -> str:
    body = code.strip("\n")
    return f"```{_FENCES[language]}\n{body}\n```"


def _language(value: Any, where: str) -> str:
    try:
        return language_named(str(value or "python"))
    except BadInput as error:
        raise BadInput(f"{where}, column 'language': {error}") from None
