"""Rows as prompts that end where an answer would begin, in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.context import seed_of
from pegbox.parts.generation import Messages, encode_prompt

__all__ = ["in_batches", "prompt_of", "row_ids"]


def prompt_of(row: Any) -> Messages:
    """The messages before a chat or completion row's last answer; a completion's prompt is raw text."""
    messages = list(row.messages)
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=len(messages))
    before = messages[:last]
    if not before:
        raise BadInput(f"Row {row.id} has no message before its answer; there is no prompt to look at.")
    return [{"role": "raw", "content": before[-1]["content"]}] if row.kind == "completion" else before


def row_ids(tokenizer: Any, row: Any, *, window: int = 97, longest: int = 1024, seed: int = 0) -> list[int]:
    """Token ids of a row: its prompt, or of a text row a window at a place drawn from (seed, row id).

    Prompts longer than `longest` are refused, since their last token is what is looked at.
    """
    if row.kind == "text":
        ids = list(tokenizer(row.text, add_special_tokens=False)["input_ids"])
        room = max(len(ids) - window, 0)
        begin = int(torch.randint(room + 1, (1,), generator=_generator(seed, row.id))) if room else 0
        ids = ids[begin : begin + window]
    else:
        ids = encode_prompt(tokenizer, prompt_of(row), row.tools)
    if not ids:
        raise BadInput(f"Row {row.id} is empty; there is no token to look at.")
    if len(ids) > longest:
        raise BadInput(f"Row {row.id} has {len(ids)} tokens, more than max_length {longest}. Raise it, or shorten it.")
    return ids


def _generator(seed: int, identity: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, "window", identity))


def in_batches(
    prompts: Sequence[Sequence[int]], size: int, pad: int, device: Any = "cpu"
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(positions, right-padded batch) with prompts of like length together, the longest first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        group = order[start : start + size]
        width = len(prompts[group[0]])
        ids = torch.full((len(group), width), pad)
        mask = torch.zeros((len(group), width), dtype=torch.long)
        for line, i in enumerate(group):
            ids[line, : len(prompts[i])] = torch.tensor(list(prompts[i]))
            mask[line, : len(prompts[i])] = 1
        yield group, {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
