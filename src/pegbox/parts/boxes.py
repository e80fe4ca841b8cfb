"""The box-tracking task: which object is in which box, for a model to remember over a few dozen tokens.

    sentence   "The apple is in Box F, the bell is in Box Q. Box F contains the"  -> " apple"
    compact    F apple Q bell . F                                                  -> apple      (a word a token)

Positions are found in the token ids: `last`; `label`, the query's box label (sentence: last - 2; compact: last itself);
`previous_label`, the one earlier place of that label; `object`, the object of that segment (sentence: previous label
- 4). Everything is a function of (task, tokenizer, seed). Words that are not one token are left out. After Prakash et
al., arXiv:2402.14811; the words are our own list.

What this file does not know: models, circuits, data formats.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pegbox.errors import BadInput
from pegbox.parts.context import seed_of

__all__ = ["OBJECTS", "BoxPrompt", "BoxTask", "Boxes", "Question", "Style", "WordedBoxes"]

_WORDS = (
    "apple bag ball bell block board boat book boot bottle bowl box brain bread brick bridge brush bus cake "
    "camera cap car card chain chair clock coat coin cow cream cross crown cup desk disk dog door dress drink "
    "drum egg engine fan file fish flag flower fork fruit game gift glass guitar gun hat horse ice iron key knife "
    "lamp leaf letter lock machine magazine map meat medicine milk mirror money newspaper note oil paper pen "
    "phone picture pipe plane plant plate pot radio ring rock rope rose salt ship shirt shoe soap stone string "
    "suit table tea ticket tie tool toy train tree truck tube watch wheel wine wire "
)
OBJECTS = tuple(_WORDS.split())
LABELS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True)
class Style:
    """How a sentence is worded; the default is the task's own."""

    link: str = "is in"  # between object and box
    box_first: bool = False  # "Box F contains the apple"
    comma: str = ", "  # between segments
    after_object: str = ""  # a mark right behind the object
    before: str = ""  # a sentence before the first segment
    after: str = ""  # a sentence between the last segment and the query
    bare_boxes: tuple[str, ...] = ()  # boxes named without an object, right before the queried segment


@dataclass(frozen=True)
class Boxes:
    """What lies where: labels and objects, segment by segment."""

    labels: tuple[str, ...]
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A context, and the label that is asked for (`segment`: where it points to, also if the label is another)."""

    boxes: Boxes
    segment: int
    label: str
    style: Style = field(default_factory=Style)

    @property
    def known(self) -> bool:
        """Whether the label is one of the context's."""
        return self.label in self.boxes.labels

    @property
    def answer(self) -> str:
        return self.boxes.objects[self.boxes.labels.index(self.label)]

    def text(self) -> str:
        """The sentence form."""
        style, parts = self.style, []
        for i, (label, thing) in enumerate(zip(self.boxes.labels, self.boxes.objects)):
            if i == self.segment:
                parts += [f"there is Box {other}" for other in style.bare_boxes]
            if style.box_first:
                parts.append(f"Box {label} contains the {thing}{style.after_object}")
            else:
                parts.append(f"the {thing}{style.after_object} {style.link} Box {label}")
        context = style.comma.join(parts)
        lead, tail = (f"{text} " if text else "" for text in (style.before, style.after))
        return f"{lead}{context[0].upper()}{context[1:]}. {tail}Box {self.label} contains the"


@dataclass(frozen=True)
class BoxPrompt:
    """A question as tokens: ids, where its positions are, and the answer's id (None for an unknown label)."""

    ids: tuple[int, ...]
    positions: dict[str, int]
    answer: int | None
    question: Question


class BoxTask(BaseModel):
    """What the task is made of.

    Args:
        boxes: n, segments of a context. form: sentences, or a word a token.
        objects, labels: words to draw from; default the lists of this file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["boxes"] = "boxes"
    boxes: Annotated[int, Field(ge=2, le=26)] = 7
    form: Literal["sentence", "compact"] = "sentence"
    objects: list[str] | None = None
    labels: list[str] | None = None

    def worded(self, tokenizer: Any) -> WordedBoxes:
        """The task in a tokenizer's words."""
        return WordedBoxes(self, tokenizer)


class WordedBoxes:
    """The task with the words that are one token each. Raises `BadInput` where too few are."""

    def __init__(self, task: BoxTask, tokenizer: Any):
        self.task, self.tokenizer = task, tokenizer
        self.ids: dict[str, int] = {}
        self.objects = self._one_token(task.objects or OBJECTS, "the")
        self.labels = self._one_token(task.labels or LABELS, "Box")
        self._check(task)
        self.stop = self._one(".", "") if task.form == "compact" else None
        if task.form == "compact" and self.stop is None:
            raise BadInput("The tokenizer has no token for '.', which ends a compact context.")

    def _check(self, task: BoxTask) -> None:
        for what, found, given, least in (
            ("objects", self.objects, task.objects or OBJECTS, task.boxes + 1),
            ("labels", self.labels, task.labels or LABELS, task.boxes + 1),
        ):
            if len(found) < least:
                raise BadInput(
                    f"{len(found)} of {len(given)} {what} are one token each for this tokenizer, and {task.boxes} "
                    f"boxes need {least}. Give others as `{what}`, or fewer boxes."
                )

    def _one_token(self, words: Sequence[str], before: str) -> tuple[str, ...]:
        kept = []
        for word in dict.fromkeys(words):
            token = self._one(word, before if self.task.form == "sentence" else "")
            if token is not None and token not in self.ids.values():
                self.ids[word] = token
                kept.append(word)
        return tuple(kept)

    def _one(self, word: str, before: str) -> int | None:
        """The word's token behind another word (or alone), if it is one."""
        if before:
            lead, both = self._encoded(before), self._encoded(f"{before} {word}")
            found = both[len(lead) :] if both[: len(lead)] == lead else []
        else:
            found = self._encoded(word)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return found[0] if len(found) == 1 and found[0] != unknown else None

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # ---- drawing

    def questions(self, count: int, seed: int, stream: str = "clean") -> list[Question]:
        """`count` questions: runs of n share a context, and the queried box runs over its n segments."""
        rng = random.Random(seed_of(seed, "boxes", stream))
        found: list[Question] = []
        while len(found) < count:
            boxes = self.context(rng)
            found += [Question(boxes, i, boxes.labels[i]) for i in range(self.task.boxes)]
        return found[:count]

    def context(self, rng: random.Random, avoid: Boxes | None = None, labels_too: bool = False) -> Boxes:
        """A context; with other objects (and labels, where there are enough) than `avoid`'s."""
        n = self.task.boxes
        objects = [o for o in self.objects if avoid is None or o not in avoid.objects]
        labels = [x for x in self.labels if avoid is None or not labels_too or x not in avoid.labels]
        if len(objects) < n:
            raise BadInput(f"Two contexts without a common object need {2 * n} objects; there are {len(self.objects)}.")
        chosen = labels if len(labels) > n else list(self.labels)
        return Boxes(tuple(rng.sample(chosen, n)), tuple(rng.sample(objects, n)))

    def corrupted(self, questions: Sequence[Question], seed: int) -> list[Question]:
        """For each another context, asked at another segment for a label that it has not."""
        rng = random.Random(seed_of(seed, "boxes", "corrupt"))
        found = []
        for question in questions:
            boxes = self.context(rng)
            segment = rng.choice([i for i in range(self.task.boxes) if i != question.segment])
            found.append(Question(boxes, segment, rng.choice([x for x in self.labels if x not in boxes.labels])))
        return found

    def averaged(self, count: int, seed: int) -> list[Question]:
        """Questions for mean activations: a context each, asked for any letter."""
        rng = random.Random(seed_of(seed, "boxes", "means"))
        found = []
        for _ in range(count):
            boxes = self.context(rng)
            found.append(Question(boxes, rng.randrange(self.task.boxes), rng.choice(self.labels)))
        return found

    # ---- tokens

    def prompt(self, question: Question, rng: random.Random | None = None) -> BoxPrompt:
        """A question as tokens.

        For an unknown label `previous_label` and `object` are those of a random segment (drawn from `rng`), or of the
        one that is pointed to.

        Raises `BadInput` where the label does not stand in the query and exactly once before it.
        """
        if self.task.form == "compact":
            return self._compact(question, rng)
        ids = tuple(self.tokenizer(question.text())["input_ids"])
        last = len(ids) - 1
        label = last - 2
        if ids[label] != self.ids[question.label]:
            raise BadInput(f"The query's box label is not two tokens before the end of '{question.text()}'.")
        positions = {"last": last, "label": label}
        shown = question.label if question.known else question.boxes.labels[self._any_segment(question, rng)]
        positions["previous_label"] = _once(ids[:label], self.ids[shown], f"label '{shown}'")
        thing = question.boxes.objects[question.boxes.labels.index(shown)]
        positions["object"] = _once(ids[:label], self.ids[thing], f"object '{thing}'")
        return BoxPrompt(ids, positions, self.ids[question.answer] if question.known else None, question)

    def _compact(self, question: Question, rng: random.Random | None) -> BoxPrompt:
        if question.style != Style():
            raise BadInput("A compact context is a word a token; it has no other wording. Take form='sentence'.")
        assert self.stop is not None
        pairs = zip(question.boxes.labels, question.boxes.objects)
        ids = [*(self.ids[word] for pair in pairs for word in pair), self.stop, self.ids[question.label]]
        shown = question.boxes.labels.index(question.label) if question.known else self._any_segment(question, rng)
        positions = {"last": len(ids) - 1, "previous_label": 2 * shown, "object": 2 * shown + 1}
        return BoxPrompt(tuple(ids), positions, self.ids[question.answer] if question.known else None, question)

    def _any_segment(self, question: Question, rng: random.Random | None) -> int:
        return question.segment if rng is None else rng.randrange(len(question.boxes.labels))

    def prompts(self, questions: Sequence[Question], seed: int = 0) -> list[BoxPrompt]:
        rng = random.Random(seed_of(seed, "boxes", "segments"))
        return [self.prompt(question, rng) for question in questions]

    def rows(self, count: int, seed: int) -> Iterator[dict[str, str]]:
        """Rows to train on: {"prompt", "completion"}, in sentences."""
        for question in self.questions(count, seed, "train"):
            yield {"prompt": replace(question, style=Style()).text(), "completion": f" {question.answer}"}


def _once(ids: Sequence[int], wanted: int, what: str) -> int:
    places = [i for i, token in enumerate(ids) if token == wanted]
    if len(places) != 1:
        raise BadInput(f"The {what} stands {len(places)} times before the query; exactly one place is needed.")
    return places[0]
