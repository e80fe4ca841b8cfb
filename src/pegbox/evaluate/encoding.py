"""Rows to batches for scoring by log-likelihood: a prompt, then a continuation whose tokens count.

    text rows      windows of `max_length` tokens; each token counts once, with at least `max_length - stride` before it
    other rows     ids of the prompt, then those of the last assistant turn; no end of turn is added

The border is found on the tokens of prompt + continuation together, so a tokenizer may not merge across it unseen.
What this file does not do: the training mask (that is the task's own encoding; metrics say which one they need).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pegbox.errors import BadInput
from pegbox.evaluate.base import Encode, expected_of, prompt_of
from pegbox.parts.generation import encode_prompt
from pegbox.parts.view import Batch

__all__ = ["IGNORED", "Piece", "encoder_from", "scoring_encoder"]

IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """One sequence: ids (T), and how many of its last tokens count."""

    position: int
    ids: list[int]
    counted: int


def scoring_encoder(
    tokenizer: Any, *, max_length: int, batch_tokens: int = 4096, stride: int | None = None, device: Any = "cpu"
) -> Encode:
    """An `Encode` for scoring. `batch_tokens` bounds B x T; `stride` (default: half of `max_length`) moves windows."""
    step = stride if stride is not None else max(1, max_length // 2)
    if not 0 < step <= max_length:
        raise BadInput(f"The stride of the windows must be between 1 and max_length ({max_length}), got {step}.")

    def encode(rows: Sequence[Any]) -> Iterator[tuple[list[int], Batch]]:
        pieces = [p for i, row in enumerate(rows) for p in _pieces(tokenizer, row, i, max_length, step)]
        pieces.sort(key=lambda p: (-len(p.ids), p.position))
        for group in _grouped(pieces, batch_tokens):
            yield [p.position for p in group], _collate(group, tokenizer, device)

    return encode


def encoder_from(
    encode_row: Callable[[Any], Iterable[dict[str, Any]] | dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], Batch],
    *,
    batch_size: int = 8,
    device: Any = "cpu",
) -> Encode:
    """An `Encode` from a task's own functions: a row's encoded example (or examples), and their collator."""

    def encode(rows: Sequence[Any]) -> Iterator[tuple[list[int], Batch]]:
        pieces = [(i, e) for i, row in enumerate(rows) for e in _as_list(encode_row(row))]
        pieces.sort(key=lambda p: -len(p[1].get("input_ids", ())))
        for start in range(0, len(pieces), batch_size):
            group = pieces[start : start + batch_size]
            batch = collate([e for _, e in group])
            yield [i for i, _ in group], {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}

    return encode


def _as_list(value: Iterable[dict[str, Any]] | dict[str, Any]) -> list[dict[str, Any]]:
    return [value] if isinstance(value, dict) else list(value)


def _pieces(tokenizer: Any, row: Any, position: int, max_length: int, stride: int) -> Iterator[Piece]:
    if row.kind == "text":
        yield from windows(_text_ids(tokenizer, row), position, max_length, stride)
        return
    prompt, continuation = prompt_of(row), expected_of(row)
    if not continuation:
        raise BadInput(f"Row {row.id} has an empty continuation, which can't be scored.")
    ids, counted = _joined(tokenizer, prompt, continuation, row.tools)
    if counted >= max_length:
        raise BadInput(f"Row {row.id}: its answer of {counted} tokens does not fit max_length {max_length}.")
    yield Piece(position, ids[-max_length:], counted)


def _text_ids(tokenizer: Any, row: Any) -> list[int]:
    """Ids of a text, behind a beginning-of-text token where the tokenizer has one, so that every word counts."""
    ids = list(tokenizer(row.text, add_special_tokens=False)["input_ids"])
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is not None:
        ids = [begin, *ids]
    if len(ids) < 2:
        raise BadInput(f"Row {row.id} has too little text to score.")
    return ids


def windows(ids: list[int], position: int, max_length: int, stride: int) -> Iterator[Piece]:
    """Overlapping windows over `ids`; every token but the first counts exactly once."""
    done = 1  # tokens that have counted, or can't
    begin = 0
    while done < len(ids):
        end = min(begin + max_length, len(ids))
        yield Piece(position, ids[begin:end], end - done)
        done, begin = end, max(begin + stride, end + stride - max_length)


def _joined(
    tokenizer: Any, prompt: list[dict[str, Any]], continuation: str, tools: list[dict[str, Any]] | None
) -> tuple[list[int], int]:
    """Ids of prompt + continuation and how many belong to the continuation.

    A raw prompt's trailing blanks belong to the continuation. Where the tokens of the whole do not begin with those of
    the prompt (a merge across the border), counting starts at the first that differs.
    """
    if prompt[0]["role"] == "raw":
        text = prompt[0]["content"]
        bare = text.rstrip()
        before = list(tokenizer(bare)["input_ids"]) if bare else [tokenizer.bos_token_id or tokenizer.eos_token_id]
        whole = (
            list(tokenizer(text + continuation)["input_ids"])
            if bare
            else before + list(tokenizer(text + continuation, add_special_tokens=False)["input_ids"])
        )
        while whole and whole[-1] in (tokenizer.eos_token_id,) and not continuation.endswith(tokenizer.eos_token):
            whole.pop()  # a tokenizer that closes every text
    else:
        before = encode_prompt(tokenizer, prompt, tools)
        whole = before + list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    same = 0
    while same < min(len(before), len(whole) - 1) and before[same] == whole[same]:
        same += 1
    return whole, len(whole) - max(same, 1)


def _grouped(pieces: list[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Groups of similar length whose padded size stays within `batch_tokens`; `pieces` come longest first."""
    group: list[Piece] = []
    for piece in pieces:
        if group and (len(group) + 1) * len(group[0].ids) > batch_tokens:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _collate(group: list[Piece], tokenizer: Any, device: Any) -> Batch:
    """Right-padded input_ids, attention_mask and labels, each (B, T); padding is masked by position."""
    width = max(len(p.ids) for p in group)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(group), width), pad)
    labels = torch.full((len(group), width), IGNORED)
    mask = torch.zeros((len(group), width), dtype=torch.long)
    for i, piece in enumerate(group):
        n = len(piece.ids)
        ids[i, :n] = torch.tensor(piece.ids)
        labels[i, n - piece.counted : n] = ids[i, n - piece.counted : n]
        mask[i, :n] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
