"""A row: one example as the user gave it, in the one form that everything downstream reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pegbox.errors import BadInput

__all__ = ["Kind", "Row", "bad_row", "base_id", "content_of", "row_id", "sample_id"]

Kind = Literal["chat", "completion", "text", "classification", "preference"]


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        id: stable: a hash of the content, with "#n" behind it for the n-th exact duplicate (n counts from 2).
        kind: chat (messages, any number of turns) | completion (one raw prompt and answer) | text |
            classification (text or text pair and label) | preference (a prompt, a chosen and a rejected answer).
        messages: chat messages {"role", "content", maybe "tool_calls", "reasoning_content", ...}; for completion rows
            one user and one assistant message; for preference rows the prompt. `"train": False` on an assistant
            message leaves it out of the loss.
        text, text_pair, label: for text and classification rows.
        chosen, rejected: answers as message lists, for preference rows.
        tools: tool schemas for the template.
        answer: a machine-checkable value, for verified metrics.
        group: rows of one group never straddle a split. task: a name to report by (e.g. a family).
        weight: factor on the row's loss. source: "file:line" for errors.
    """

    id: str
    kind: Kind
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    text_pair: str | None = None
    label: int | float | str | None = None
    chosen: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    answer: Any = None
    group: str = ""
    task: str = ""
    weight: float = 1.0
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


def row_id(content: Any) -> str:
    """16 hex digits over the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_of(row: Row) -> dict[str, Any]:
    """What makes two rows exact duplicates: everything the model sees or is trained on, and nothing else."""
    return {
        "kind": row.kind,
        "messages": row.messages,
        "text": row.text,
        "text_pair": row.text_pair,
        "label": row.label,
        "chosen": row.chosen,
        "rejected": row.rejected,
        "tools": row.tools,
    }


def base_id(identity: str) -> str:
    """A row id without its duplicate number: equal for exact duplicates."""
    return identity.partition("#")[0]


def sample_id(identity: str) -> int:
    """A 63-bit integer that stands for an id in tensors."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") >> 1


def bad_row(where: str, column: str, problem: str, expected: str, example: Any) -> BadInput:
    """The error for a row that can't be used: place, column, what is wrong, what was expected, and an example."""
    place = f"{where}, column '{column}'" if column else where
    shown = example if isinstance(example, str) else json.dumps(example, ensure_ascii=False)
    return BadInput(f"{place}: {problem}. Expected {expected}, e.g. {shown}")
