"""Suites: what is measured together. A suite is parts, a part is rows and the metric they are scored by.

    target          the test data and the recipe's or the user's metric
    retention       what a base could do before: general knowledge and arithmetic by log-likelihood, perplexity of plain
                    English. Comes with pegbox, original text, no download
    retention-real  the same from public sets in files: WikiText-2, ARC-Easy, ARC-Challenge

The layout of the files of `retention-real`: `wikitext-2/test.txt`; `commonsense/ARC-Easy/test.json` and
`commonsense/ARC-Challenge/test.json`, lists of {"instruction": "... Answer1: x Answer2: y ...", "answer": "answer2"}.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput, did_you_mean
from pegbox.evaluate.base import METRIC, Item, Metric

__all__ = ["SUITES", "Part", "Suite", "retention", "retention_real", "suite_named", "target"]


@dataclass(frozen=True)
class Part:
    """Rows and their metric; `name` is the score's name (the metric's key, if empty)."""

    metric: Metric
    rows: Sequence[Any]
    name: str = ""

    @property
    def score(self) -> str:
        return self.name or self.metric.key


@dataclass(frozen=True)
class Suite:
    """Parts under one name. `version` is raised whenever its rows or metrics change."""

    name: str
    parts: Sequence[Part]
    version: str = "1"

    def __post_init__(self) -> None:
        names = [part.score for part in self.parts]
        if not names or len(names) != len(set(names)):
            raise BadInput(f"Suite {self.name} needs at least one part, and parts of different names; it has {names}.")
        for part in self.parts:
            if not part.rows:
                raise BadInput(f"Suite {self.name}: there are no rows for '{part.score}'.")

    @property
    def needs_generation(self) -> bool:
        return any(part.metric.needs_generation for part in self.parts)

    def without_generation(self) -> Suite:
        """The parts that need no answers drawn; itself where all do."""
        quick = [part for part in self.parts if not part.metric.needs_generation]
        return self if not quick or len(quick) == len(self.parts) else Suite(self.name, quick, self.version)


def target(rows: Sequence[Any], metrics: Metric | Sequence[Metric], *, name: str = "target") -> Suite:
    """The test rows under one metric or several; the first one is the one that counts."""
    listed = [metrics] if isinstance(metrics, Metric) else list(metrics)
    version = "+".join(f"{m.kind}.{type(m).version}" for m in listed)
    return Suite(name, [Part(m, rows) for m in listed], version)


def retention(limit: int | None = None) -> Suite:
    """The built-in suite; `limit` keeps the first rows of each part."""
    choice, perplexity = METRIC.validate("multiple_choice"), METRIC.validate("perplexity")
    parts = [
        Part(choice, _asset("knowledge")[:limit], "knowledge"),
        Part(choice, _asset("arithmetic")[:limit], "arithmetic"),
        Part(perplexity, _asset("english")[:limit], "perplexity"),
    ]
    return Suite("retention", parts)


def _asset(name: str) -> list[Item]:
    lines = files("pegbox.evaluate").joinpath("assets", f"{name}.jsonl").read_text("utf-8").splitlines()
    return [_item(name, i, json.loads(line)) for i, line in enumerate(lines)]


def _item(name: str, i: int, record: dict[str, Any]) -> Item:
    row_id = f"{name}-{i:03d}"
    if "text" in record:
        return Item(row_id, "text", text=record["text"], task=name)
    return _question(row_id, record["question"], record["choices"], record["answer"], name)


def _question(row_id: str, question: str, choices: list[str], answer: int, task: str) -> Item:
    return Item(
        row_id,
        "completion",
        [{"role": "user", "content": f"Question: {question}\nAnswer:"}],
        answer=answer,
        task=task,
        meta={"choices": [f" {choice}" for choice in choices]},
    )


# --- from files -----------------------------------------------------------------------------------------------------

_OPTION = re.compile(r"\s*Answer(\d+):\s*")


def retention_real(folder: str | Path | None = None, limit: int | None = 200, text_rows: int | None = 60) -> Suite:
    """WikiText-2 perplexity and ARC by log-likelihood, from `folder` or PEGBOX_DATA.

    Args:
        limit: questions of each ARC set, from its beginning (None: all).
        text_rows: articles of WikiText-2, from its beginning (None: all).
    """
    root = Path(folder or os.environ.get("PEGBOX_DATA") or "")
    if not str(folder or os.environ.get("PEGBOX_DATA") or "") or not root.is_dir():
        raise BadInput(
            f"The suite retention-real needs a folder with its files, not '{root}'. Give its path or set PEGBOX_DATA."
        )
    choice = METRIC.validate("multiple_choice")
    parts = [
        Part(choice, _arc(root / "commonsense" / name / "test.json", name.lower())[:limit], name.lower())
        for name in ("ARC-Easy", "ARC-Challenge")
    ]
    articles = _wikitext(root / "wikitext-2" / "test.txt")[:text_rows]
    return Suite("retention-real", [*parts, Part(METRIC.validate("perplexity"), articles, "perplexity")])


def _arc(path: Path, task: str) -> list[Item]:
    rows = []
    for i, record in enumerate(json.loads(_read(path))):
        body = str(record["instruction"]).partition("question:")[2].partition("Answer format:")[0]
        question, *options = _OPTION.split(body)
        choices, right = options[1::2], int(str(record["answer"]).removeprefix("answer")) - 1
        if len(choices) < 2 or not 0 <= right < len(choices):
            raise BadInput(f"{path}: record {i} does not read 'question: ... Answer1: ... Answer2: ...'.")
        rows.append(_question(f"{task}-{i:04d}", question.strip(), [c.strip() for c in choices], right, task))
    return rows


def _wikitext(path: Path) -> list[Item]:
    """One row per article: a new one begins at a line ' = Title = '."""
    articles: list[list[str]] = []
    for line in _read(path).splitlines():
        if re.fullmatch(r"\s*= [^=].*[^=] =\s*", line):
            articles.append([])
        if articles and line.strip():
            articles[-1].append(line)
    if not articles:
        raise BadInput(f"{path} holds no article: no line ' = Title = '.")
    return [Item(f"wikitext-{i:04d}", "text", text="\n".join(a), task="wikitext-2") for i, a in enumerate(articles)]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"The suite retention-real can't read {path} ({error}).") from None


SUITES = {"retention": retention, "retention-real": retention_real}


def suite_named(name: str, *, folder: str | Path | None = None, limit: int | None = None) -> Suite:
    """A suite by name ("default" is the built-in retention suite); `folder` holds the files of `retention-real`."""
    if name in ("default", "retention"):
        return retention(limit)
    if name == "retention-real":
        return retention_real(folder) if limit is None else retention_real(folder, limit, limit)
    raise BadInput(f"Unknown suite '{name}'.{did_you_mean(name, ['default', 'lm-eval:TASK', *SUITES])}")
