"""Tasks of one's own: texts whose vital positions are marked, with a counterfactual each.

    "When Mary and [[rival:John]] went out, [[again:John]] gave a drink to"     answer " Mary"

A mark stands around the words of a position, which is their last token; the text is read without marks. The
counterfactual bears the same marks, so that every position has its corresponding one; "last" needs none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pegbox.analyze.circuits.prompts import LAST, Prompts
from pegbox.errors import BadInput

__all__ = ["Marked", "marked_prompts", "unmarked"]

_MARK = re.compile(r"\[\[(\w+):(.*?)\]\]", re.DOTALL)


@dataclass(frozen=True)
class Marked:
    """One item: the text and its counterfactual, both marked, and the answer that follows the text."""

    text: str
    counterfactual: str
    answer: str


def unmarked(text: str) -> tuple[str, dict[str, int]]:
    """(the text without marks, name -> the place of the marked words' last character). Raises `BadInput`."""
    out, places, at = "", {}, 0
    for mark in _MARK.finditer(text):
        out += text[at : mark.start()] + mark.group(2)
        name = mark.group(1)
        if name in places or name == LAST:
            raise BadInput(f"Position '{name}' is marked twice in '{text}', or is the last token's own name.")
        if not mark.group(2):
            raise BadInput(f"Position '{name}' marks no words in '{text}'.")
        places[name] = len(out) - 1
        at = mark.end()
    return out + text[at:], places


def marked_prompts(tokenizer: Any, items: Sequence[Marked], pad: int | None) -> tuple[Prompts, Prompts]:
    """(clean with answers, corrupt). Raises `BadInput` for other marks than the first item's, and answers of several
    tokens."""
    if not items:
        raise BadInput("A task of one's own needs at least one item.")
    names = list(unmarked(items[0].text)[1])
    sides = []
    for texts in ([item.text for item in items], [item.counterfactual for item in items]):
        rows = [_encoded(tokenizer, text, names) for text in texts]
        sides.append(([ids for ids, _ in rows], {name: [places[name] for _, places in rows] for name in names}))
    answers = [_answer(tokenizer, item, ids) for item, ids in zip(items, sides[0][0])]
    return Prompts.of(*sides[0], answers=answers, pad=pad), Prompts.of(*sides[1], pad=pad)


def _encoded(tokenizer: Any, text: str, names: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    plain, places = unmarked(text)
    if sorted(places) != sorted(names):
        raise BadInput(f"'{text}' marks {sorted(places)}, and the first item {sorted(names)}: mark the same positions.")
    coded = tokenizer(plain, return_offsets_mapping=True)
    tokens = {}
    for name, place in places.items():
        tokens[name] = next(i for i, (a, b) in enumerate(coded["offset_mapping"]) if a <= place < b)
    return list(coded["input_ids"]), tokens


def _answer(tokenizer: Any, item: Marked, ids: Sequence[int]) -> int:
    """The one token by which the answer goes on."""
    whole = list(tokenizer(unmarked(item.text)[0] + item.answer)["input_ids"])
    more = whole[len(ids) :] if whole[: len(ids)] == list(ids) else []
    if len(more) != 1:
        raise BadInput(f"The answer '{item.answer}' is not one token behind its text; take answers of one token.")
    return int(more[0])
