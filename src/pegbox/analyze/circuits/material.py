"""What an analysis of a circuit works on: prompts to find it on, to measure it on, and to take means over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pegbox.analyze.circuits.desiderata import as_prompts
from pegbox.analyze.circuits.prompts import LAST, Prompts
from pegbox.analyze.circuits.templates import Marked, marked_prompts
from pegbox.errors import BadInput
from pegbox.parts.boxes import WordedBoxes

__all__ = ["Material", "box_material", "row_material"]


@dataclass(frozen=True)
class Material:
    """Prompts of a task.

    Args:
        clean, corrupt: pairs for path patching; the clean ones with answers.
        evaluation: with answers. means: for mean activations. vital: positions worth pruning at.
        boxes: the box task in the tokenizer's words, or None for another task.
    """

    clean: Prompts
    corrupt: Prompts
    evaluation: Prompts
    means: Prompts
    vital: list[str]
    boxes: WordedBoxes | None = None


def box_material(boxes: WordedBoxes, pad: int, seed: int, *, samples: int, evaluation: int, means: int) -> Material:
    """Drawn apart for each purpose. Means are taken over other contexts, asked for any letter."""
    questions = boxes.questions(samples, seed)
    asked = boxes.questions(evaluation, seed, "evaluation")
    vital = [LAST, "label", "previous_label"] if boxes.task.form == "sentence" else [LAST, "object"]
    return Material(
        clean=as_prompts(boxes.prompts(questions, seed), pad),
        corrupt=as_prompts(boxes.prompts(boxes.corrupted(questions, seed), seed), pad),
        evaluation=as_prompts(boxes.prompts(asked, seed), pad),
        means=as_prompts(boxes.prompts(boxes.averaged(means, seed), seed), pad),
        vital=vital,
        boxes=boxes,
    )


def row_material(tokenizer: Any, rows: Sequence[Any], pad: int) -> Material:
    """Rows with marked prompts, `counterfactual`s and answers; all serve every purpose, the counterfactuals the means.

    Raises `BadInput` for rows without them.
    """
    items = []
    for row in rows:
        other = row.meta.get("counterfactual")
        texts = [str(m["content"]) for m in row.messages]
        if row.kind != "completion" or len(texts) != 2 or not isinstance(other, str):
            raise BadInput(
                f"Row {row.id}: a task of one's own has rows of {{prompt, completion, counterfactual}}, with positions "
                "marked as [[name:words]]."
            )
        items.append(Marked(texts[0], other, texts[1]))
    clean, corrupt = marked_prompts(tokenizer, items, pad)
    return Material(clean, corrupt, clean, corrupt, list(clean.positions))
