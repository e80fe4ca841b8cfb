"""Desiderata of the box task: triples (base prompt, source prompt, target) that tell one quantity from the others.

    positional  target = the BASE's object in the segment that the source's query points to
    object      target = the object that the source asks for
    label       the source's query label stands in the base too; target = the base's object with that label

The other eleven are the positional one with the source worded otherwise, to see what "position" means. Base and source
have no object in common and point to different segments, so that no target is the base's own answer. `legacy` draws as
the official code does, which only avoids segment 0 (and takes the label's target without its leading space).
Prakash et al., arXiv:2402.14811, section 4.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pegbox.analyze.circuits.masks import Triples
from pegbox.analyze.circuits.prompts import Prompts
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.boxes import Boxes, BoxPrompt, Question, Style, WordedBoxes
from pegbox.parts.context import seed_of

__all__ = ["DESIDERATA", "STYLES", "as_prompts", "desideratum", "pairs"]

STYLES: dict[str, Style] = {
    "text_before": Style(before="Some things were put away."),
    "text_after": Style(after="Nothing was moved since."),
    "segment_before": Style(),
    "segment_after": Style(),
    "filler": Style(link="is contained in the"),
    "altered_order": Style(box_first=True),
    "not_in": Style(link="is not in"),
    "no_comma": Style(comma=" "),
    "extra_comma": Style(after_object=","),
    "extra_boxes": Style(),
    "wrong_neighbour": Style(),
}
DESIDERATA = ("positional", "object", "label", *STYLES)

Pair = tuple[Question, Question, str]  # base, source, target word


def as_prompts(found: Sequence[BoxPrompt], pad: int | None, answers: Sequence[int] | None = None) -> Prompts:
    """Box prompts as a set; answers where all have one, or as given."""
    names = list(found[0].positions)
    places = {name: [prompt.positions[name] for prompt in found] for name in names}
    own = [prompt.answer for prompt in found]
    given = list(answers) if answers is not None else [a for a in own if a is not None]
    return Prompts.of([p.ids for p in found], places, given if len(given) == len(found) else None, pad)


def pairs(boxes: WordedBoxes, name: str, count: int, seed: int, legacy: bool = False) -> list[Pair]:
    """`count` pairs of questions with their target words. Raises `BadInput` for another name, and too few boxes."""
    if name not in DESIDERATA:
        raise BadInput(f"Unknown desideratum '{name}'.{did_you_mean(name, DESIDERATA)}")
    if boxes.task.boxes < 3 and name in ("label", "segment_before", "wrong_neighbour"):
        raise BadInput(f"Desideratum '{name}' needs three boxes or more; the task has {boxes.task.boxes}.")
    rng = random.Random(seed_of(seed, "desideratum", name))
    return [_pair(boxes, name, base, rng, legacy) for base in boxes.questions(count, seed, f"base {name}")]


def _pair(boxes: WordedBoxes, name: str, base: Question, rng: random.Random, legacy: bool) -> Pair:
    n = boxes.task.boxes
    other = boxes.context(rng, avoid=base.boxes, labels_too=name != "label")
    free = [i for i in range(n) if (i != 0 if legacy else i != base.segment)]
    shift = 1 if name in ("segment_before", "wrong_neighbour") else 0
    free = [i for i in free if not shift or (i + 1 < n and i + 1 != base.segment)] if not legacy else free
    if not free:  # the last two segments leave no room behind: ask the base elsewhere
        base = replace(base, segment=n - 1, label=base.boxes.labels[n - 1])
        free = list(range(n - 2))
    segment = rng.choice(free)
    if name == "label":
        return _label_pair(base, other, segment, rng)
    other = _unlike(boxes, base.boxes, other, segment, rng)
    source = Question(other, segment, other.labels[segment])
    if name == "object":
        return base, source, source.answer
    return base, _worded(boxes, name, base.boxes, source, rng), base.boxes.objects[(segment + shift) % n]


def _label_pair(base: Question, other: Boxes, segment: int, rng: random.Random) -> Pair:
    """The source's query label stands in the base, in a segment that neither query points to."""
    shared = rng.choice([i for i in range(len(base.boxes.labels)) if i not in (base.segment, segment)])
    label = base.boxes.labels[shared]
    labels = list(other.labels)
    if label in labels:
        labels[labels.index(label)] = labels[segment]
    labels[segment] = label
    return base, Question(Boxes(tuple(labels), other.objects), segment, label), base.boxes.objects[shared]


def _unlike(boxes: WordedBoxes, base: Boxes, other: Boxes, segment: int, rng: random.Random) -> Boxes:
    """The source's label at `segment` does not stand in that segment of the base, where labels are scarce."""
    if other.labels[segment] not in base.labels or base.labels.index(other.labels[segment]) != segment:
        return other
    labels = list(other.labels)
    swap = rng.choice([i for i in range(len(labels)) if i != segment])
    labels[segment], labels[swap] = labels[swap], labels[segment]
    return Boxes(tuple(labels), other.objects)


def _worded(boxes: WordedBoxes, name: str, base: Boxes, source: Question, rng: random.Random) -> Question:
    if name in ("positional", "wrong_neighbour"):
        return source
    context, segment = source.boxes, source.segment
    letters = [x for x in boxes.labels if x not in context.labels and x not in base.labels]
    letters = letters or [x for x in boxes.labels if x not in context.labels]
    things = [x for x in boxes.objects if x not in context.objects and x not in base.objects]
    if name in ("segment_before", "segment_after") and not things:
        raise BadInput(
            f"Desideratum '{name}' needs an object in neither context; there are {len(boxes.objects)} objects."
        )
    if name == "segment_before":
        label, thing = rng.choice(letters), rng.choice(things)
        context = Boxes((label, *context.labels), (thing, *context.objects))
        segment += 1
    if name == "segment_after":
        label, thing = rng.choice(letters), rng.choice(things)
        context = Boxes((*context.labels, label), (*context.objects, thing))
    style = STYLES[name]
    if name == "extra_boxes":
        style = replace(style, bare_boxes=tuple(rng.sample(letters, min(2, len(letters)))))
    return Question(context, segment, source.label, style)


def desideratum(
    boxes: WordedBoxes, name: str, count: int, seed: int, pad: int | None = None, legacy: bool = False
) -> Triples:
    """A desideratum as tokens; the base prompts' answers are the targets."""
    found = pairs(boxes, name, count, seed, legacy)
    bases = boxes.prompts([base for base, _, _ in found], seed)
    sources = boxes.prompts([source for _, source, _ in found], seed)
    targets = [boxes.ids[word] for _, _, word in found]
    if legacy and name == "label":
        targets = [int(boxes.tokenizer(word, add_special_tokens=False)["input_ids"][0]) for _, _, word in found]
    return Triples(as_prompts(bases, pad, targets), as_prompts(sources, pad))
