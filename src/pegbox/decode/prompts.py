"""Prompts of members that read another form than the host: the same messages, framed for each. Pure functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.generation import Messages, encode_prompt

__all__ = ["frame", "padded"]


def frame(tokenizer: Any, messages: Messages, form: str) -> list[int]:
    """Token ids of a message list in a form: "template", "raw", or a text in which {prompt} stands for the messages."""
    if form == "template":
        return encode_prompt(tokenizer, messages)
    text = "\n\n".join(str(m.get("content") or "") for m in messages)
    if form == "raw":
        return list(tokenizer(text)["input_ids"])
    if "{prompt}" not in form:
        raise BadInput(f"A prompt's form is 'template', 'raw', or a text with {{prompt}} in it; got {form!r}.")
    return list(tokenizer(form.replace("{prompt}", text))["input_ids"])


def padded(rows: list[list[int]], device: Any = None, pad: int = 0) -> tuple[Tensor, Tensor]:
    """((B, P) ids, mask), padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask
