"""MORepair's published form of a sample: three parts in one sequence, separated by the end-of-sequence token.

    INPUT <eos> OBJ1 <eos> OBJ2 <eos>
    first view    (INPUT + OBJ1)[: max_length - 1] + [eos]
    second view   (INPUT + OBJ2)[: max_length - 1] + [eos]        OBJ2 keeps an <eos> of its own

OBJ1 is the repaired code, OBJ2 the code with the reason (arXiv:2404.12636). `collate_separated` gives the batches that
the published collator gives with `loss_on="all", eos_as_pad=True`: it learns the prompt too, and never an end of
sequence. A separator may be several tokens. Data in this form becomes rows by the format "separated" (formats.py);
everything else in pegbox builds views from rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.tokens import IGNORE

__all__ = ["Parts", "collate_separated", "split_ids", "split_text"]


class Parts(NamedTuple):
    """INPUT, OBJ1 and OBJ2: token ids, or texts."""

    prompt: Any
    first: Any
    second: Any


def split_ids(ids: Sequence[int], separator: Sequence[int], where: str = "The sample") -> Parts:
    """The three parts of a token list; the last one keeps what stands behind it, its own separator included.

    Raises `BadInput` for fewer than two separators, for more (beside one at the very end), and for an empty OBJ1.
    """
    mark, size = list(separator), len(separator)
    if not mark:
        raise BadInput("The separator is empty: the tokenizer has no end-of-sequence token. Name one.")
    places, at = [], 0
    while at + size <= len(ids):
        found = list(ids[at : at + size]) == mark
        places += [at] if found else []
        at += size if found else 1
    _check(len(places), bool(places) and places[-1] == len(ids) - size, where)
    first, second = places[:2]
    parts = Parts(list(ids[:first]), list(ids[first + size : second]), list(ids[second + size :]))
    if not parts.first:
        raise BadInput(f"{where} has an empty first target (nothing between its two first separators).")
    return parts


def split_text(text: str, separator: str, where: str = "The sample") -> Parts:
    """The same for a text; the separator at its end is left out. Raises `BadInput` alike."""
    if not separator:
        raise BadInput("The separator is empty: name the end-of-sequence token's text.")
    pieces = text.split(separator)
    _check(len(pieces) - 1, len(pieces) > 1 and not pieces[-1].strip(), where)
    if not pieces[1].strip():
        raise BadInput(f"{where} has an empty first target (nothing between its two first separators).")
    return Parts(*pieces[:3])


def _check(count: int, closed: bool, where: str) -> None:
    if count < 2:
        raise BadInput(
            f"{where} has {count} separator{'' if count == 1 else 's'}, and needs two: INPUT <eos> OBJ1 <eos> OBJ2."
        )
    if count > 3 or (count == 3 and not closed):
        raise BadInput(
            f"{where} has {count} separators, so its parts can't be told apart. Take the separator out of the texts."
        )


def collate_separated(
    features: Sequence[Sequence[int]],
    *,
    eos_id: int | None,
    pad_id: int | None = None,
    max_length: int = 2048,
    separator: Sequence[int] | None = None,
    loss_on: Literal["all", "target"] = "target",
    eos_as_pad: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Token lists to two right-padded batches, "pred" and "expl": input_ids, attention_mask, labels (B, T) int64.

    Args:
        eos_id: ends every sequence. pad_id: fills; eos_id if None. separator: token ids; [eos_id] if None.
        max_length: tokens per sequence; what is longer loses its end.
        loss_on: labels on everything, or on the target and the end alone.
        eos_as_pad: no label where an id equals `pad_id`, as where padding is known by its id.

    Raises:
        BadInput: see `split_ids`; no eos; a target that is cut away whole.
    """
    if eos_id is None:
        raise BadInput("The tokenizer has no end-of-sequence token. Add one, or name it.")
    fill = eos_id if pad_id is None else pad_id
    mark = [eos_id] if separator is None else list(separator)
    parts = [split_ids(ids, mark, f"Sample {i}") for i, ids in enumerate(features)]
    out = {}
    for name in ("pred", "expl"):
        targets = [p.first if name == "pred" else p.second for p in parts]
        lines = []
        for i, (part, target) in enumerate(zip(parts, targets)):
            if loss_on == "target" and len(part.prompt) >= max_length - 1:
                raise BadInput(
                    f"Sample {i}: max_length {max_length} leaves no token of the target behind {len(part.prompt)} of "
                    "the input. Raise it, or shorten the input."
                )
            lines.append(([*[*part.prompt, *target][: max_length - 1], eos_id], len(part.prompt)))
        out[name] = _padded(lines, fill, loss_on, eos_as_pad)
    return out


def _padded(lines: Sequence[tuple[list[int], int]], pad: int, loss_on: str, eos_as_pad: bool) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in lines)
    ids = torch.full((len(lines), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for i, (line, prompt) in enumerate(lines):
        ids[i, : len(line)] = torch.tensor(line)
        mask[i, : len(line)] = 1
        start = prompt if loss_on == "target" else 0
        labels[i, start : len(line)] = ids[i, start : len(line)]
    if eos_as_pad:
        labels = labels.masked_fill(labels == pad, IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
