"""A row: one example as the user gave it, in the one form that everything downstream reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Kind", "Row", "row_id"]

Kind = Literal["chat", "completion", "text", "classification", "preference"]


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        id: stable: a hash of the content, with "#n" behind it for the n-th exact duplicate.
        kind: chat (messages, any number of turns) | completion (one raw prompt and answer) | text |
            classification (text or text pair and label) | preference (a prompt, a chosen and a rejected answer).
        messages: chat messages {"role", "content", maybe "tool_calls", "reasoning_content", ...}; for completion rows
            one user and one assistant message; for preference rows the prompt.
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
