"""Which tokens are trained: the assistant's words and the end of its turn, found by rendering turn by turn.

    trained span of turn i  =  [ len(render(messages[:i], generation prompt)), end of turn i's closing marker )

so that what is trained begins exactly where generation would begin, and ends with the token that stops it. Three checks
stand behind every span: the prompt's text is a prefix of the turn's text, its token ids are a prefix of the sequence's
ids, and the row's own words lie inside the span. A template that rewrites earlier turns (dropping their reasoning, say)
fails the first check for the whole conversation; then each trained turn becomes a sequence of its own, in the very
context it would be generated in. Composes with any template (templates.py); the first token of a sequence is never
trained, as nothing predicts it.

What this file does not do: truncation, batching (encode.py, collate.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from pegbox.data.rows import Row, bad_row
from pegbox.data.templates import ChatTemplate, Messages, TemplateRefusal
from pegbox.errors import BadInput

__all__ = ["Masked", "TrainOn", "mask_chat", "mask_text", "tokenise"]

TrainOn = Literal["assistant", "last", "all"]

_EXAMPLE = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


@dataclass
class Masked:
    """One sequence of T tokens.

    Args:
        ids: token ids. trained: whether each token is predicted in the loss.
        part: which piece of the row this is: "" for the whole row, else "/turn" or "/chunk".
        recut: a token straddled a prompt's end, so the text was tokenised in pieces, as generation would see it.
    """

    ids: list[int]
    trained: list[bool]
    part: str = ""
    recut: bool = False


@dataclass(frozen=True)
class _Span:
    start: int  # characters
    end: int


def mask_chat(row: Row, template: ChatTemplate, train_on: TrainOn = "assistant") -> list[Masked]:
    """One sequence per row, or one per trained turn where the template rewrites earlier turns.

    Raises:
        BadInput: no assistant turn, or a template that refuses or drops what the row says; names the row.
    """
    messages = _until_last_answer(row)
    turns = _trained_turns(messages, train_on, row)
    try:
        texts = [_turn(template, messages, i, row.tools) for i in turns]
        whole, _ = texts[-1]
        if row.tools:
            _check_tools(row.tools, whole, template)
        _check_context(messages, whole, template)
        if train_on == "all":
            return [_cut(template, whole, [_Span(0, len(whole))])]
        if all(whole.startswith(text) for text, _ in texts):
            return [_cut(template, whole, [span for _, span in texts])]
        return [_cut(template, text, [span], f"/{i}") for i, (text, span) in zip(turns, texts)]
    except TemplateRefusal as error:
        raise BadInput(f"{row.source or row.id}: {error}") from error


def mask_text(text: str, tokenizer: Any, max_length: int | None) -> list[Masked]:
    """Plain text, every token trained but the first, ended by eos, in windows of at most `max_length` tokens."""
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    size = max_length or len(ids)
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:  # a lone last token has nothing to be predicted from
        pieces.pop()
    return [
        Masked(piece, [False] + [True] * (len(piece) - 1), f"/{i}" if len(pieces) > 1 else "")
        for i, piece in enumerate(pieces)
    ]


def tokenise(tokenizer: Any, text: str, starts: Sequence[int] = ()) -> tuple[list[int], list[tuple[int, int]], bool]:
    """Ids and character ranges of `text`, such that the text before each of `starts` has the ids it has alone.

    Ranges are (start, end) per token; the pieces of one character share a range. The third value says whether the text
    had to be tokenised in pieces.
    """
    ids, ranges = _with_offsets(tokenizer, text)
    bad = [start for start in starts if start and not _clean_cut(tokenizer, text, start, ids, ranges)]
    if not bad:
        return ids, ranges, False
    pieced, where = _in_pieces(tokenizer, text, bad)
    if _decode(tokenizer, pieced) == _decode(tokenizer, ids):
        return pieced, where, True
    return ids, ranges, False  # this tokenizer can't start in mid-text; the straddling token counts as the answer's


def _until_last_answer(row: Row) -> list[dict[str, Any]]:
    last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=-1)
    if last < 0:
        raise bad_row(
            row.source or row.id, "messages", "the conversation has no assistant turn", "at least one", _EXAMPLE
        )
    return row.messages[: last + 1]


def _trained_turns(messages: Messages, train_on: TrainOn, row: Row) -> list[int]:
    """Positions of the assistant messages in the loss; a message with `"train": False` is left out."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if train_on == "all":
        return turns[-1:]
    chosen = [i for i in turns if messages[i].get("train", True)]
    if not chosen:
        raise bad_row(row.source or row.id, "messages", "no assistant turn is left to train on", "one", _EXAMPLE)
    return chosen[-1:] if train_on == "last" else chosen


def _turn(template: ChatTemplate, messages: Messages, i: int, tools: Any) -> tuple[str, _Span]:
    """The conversation up to the end of turn i, and the characters that the model would have to write."""
    prompt = template.render(messages[:i], tools, generation_prompt=True) if i else ""
    text = template.render(messages[: i + 1], tools)
    opener, closing = template.traits.opener, template.traits.closing
    if opener and prompt.endswith(opener) and not text.startswith(prompt):
        text = prompt + _assembled(messages[i], closing)
    start = len(prompt) if text.startswith(prompt) else None
    if start is None:
        raise TemplateRefusal(
            f"the chat template ({template.name}) renders an answer differently from the prompt that asks for it, so "
            "what is trained would not be what is generated. Give another template with --template FILE.jinja."
        )
    end = text.rfind(closing, start) + len(closing) if closing else len(text.rstrip())
    if end < start + len(closing):
        raise TemplateRefusal(f"the chat template ({template.name}) does not close turn {i} with {closing!r}.")
    _check_answer(messages[i], text[start:end], template)
    return text[:end], _Span(start, end)


def _assembled(message: dict[str, Any], closing: str) -> str:
    """An answer behind a prompt that has opened a reasoning block."""
    if message.get("tool_calls"):
        raise TemplateRefusal("the chat template can't render a tool call behind its reasoning prompt.")
    return f"{_reasoning(message)}\n</think>\n\n{_words(message)}{closing}"


def _check_answer(message: dict[str, Any], span: str, template: ChatTemplate) -> None:
    wanted = [_words(message), _reasoning(message)]
    wanted += [call["function"]["name"] for call in message.get("tool_calls") or []]
    for text in wanted:
        if text.strip() not in span:
            raise TemplateRefusal(
                f"the chat template ({template.name}) drops or changes a part of the answer: {text.strip()[:80]!r}. "
                "Give a template that renders it with --template FILE.jinja."
            )


def _words(message: dict[str, Any]) -> str:
    """The answer proper: the content behind any reasoning block."""
    return str(message.get("content") or "").rpartition("</think>")[2].strip()


def _reasoning(message: dict[str, Any]) -> str:
    """The message's reasoning, from its own field or from a block in the content."""
    own = message.get("reasoning_content") or str(message.get("content") or "").rpartition("</think>")[0]
    return str(own).strip().removeprefix("<think>").strip()


def _check_tools(tools: Any, text: str, template: ChatTemplate) -> None:
    for tool in tools:
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise TemplateRefusal(
                f"the chat template ({template.name}) does not render tools, and the row has the tool {name!r}. Remove "
                "`tools`, or give a template that renders them with --template FILE.jinja."
            )


def _check_context(messages: Messages, text: str, template: ChatTemplate) -> None:
    for message in messages:
        if message["role"] == "assistant":
            continue
        content = str(message.get("content") or "").strip()
        if content not in text and json.dumps(content)[1:-1] not in text:
            raise TemplateRefusal(
                f"the chat template ({template.name}) drops or changes a {message['role']} message: {content[:80]!r}."
            )


def _cut(template: ChatTemplate, text: str, spans: list[_Span], part: str = "") -> Masked:
    """Tokenise and mark the tokens of the spans; append eos where the template has no end of turn."""
    tokenizer = template.tokenizer
    ids, ranges, recut = tokenise(tokenizer, text, [span.start for span in spans])
    trained = [any(s.start < end <= s.end for s in spans) for _, end in ranges]
    if template.traits.closing == "":
        if tokenizer.eos_token_id is None:
            raise TemplateRefusal("neither the template nor the tokenizer has an end-of-turn token.")
        ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
    if trained:
        trained[0] = False
    return Masked(ids, trained, part, recut)


def _with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        return _without_offsets(tokenizer, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), _partition(encoded["offset_mapping"])


def _partition(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets as ranges without gaps: some tokenizers leave the white space around a token out of its offsets."""
    ranges: list[tuple[int, int]] = []
    last: tuple[int, int] = (0, 0)
    for start, end in offsets:
        if end > last[1]:
            last = (min(start, last[1]), end)
        elif start == end or end < last[1]:
            pass  # a token without characters of its own, or a further piece of the same character
        ranges.append(last)
    return ranges


def _without_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ranges from the lengths of decoded prefixes, for tokenizers that give no offsets."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ends = [min(len(_decode(tokenizer, ids[: n + 1])), len(text)) for n in range(len(ids))]
    if ends:
        ends[-1] = len(text)
    starts = [0, *ends[:-1]]
    return ids, list(zip(starts, ends))


def _clean_cut(tokenizer: Any, text: str, start: int, ids: list[int], ranges: list[tuple[int, int]]) -> bool:
    """Whether the text before `start` alone has the ids that it has inside the whole text."""
    before = sum(1 for _, end in ranges if end <= start)
    alone = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
    return list(alone) == ids[:before]


def _in_pieces(tokenizer: Any, text: str, cuts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    edges = [0, *sorted(set(cuts)), len(text)]
    ids: list[int] = []
    ranges: list[tuple[int, int]] = []
    for begin, finish in pairwise(edges):
        piece, where = _with_offsets(tokenizer, text[begin:finish])
        ids += piece
        ranges += [(s + begin, e + begin) for s, e in where]
    return ids, ranges


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
