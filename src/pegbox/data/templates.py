"""A tokenizer with one chat template: rendering, and the facts about the template that masks and generation need.

The template is the tokenizer's own, a user's jinja file, or a built-in one: `plain` (headed turns, for base models
without a template), `raw` (texts one after the other, for prompt/completion rows), `markers` (role markers). The facts
are found by rendering probes, not by knowing names: what closes an assistant turn, whether system messages and
reasoning are rendered, whether the generation prompt opens a reasoning block that rendered turns leave out.

What a template can't say is said by a prelude in jinja, put in front of it: a system message that the template refuses
or drops goes in front of the first user message; reasoning that it doesn't read goes into the answer as
`<think>...</think>`. Templates that print today's date get a fixed one, so that an encoded set never changes overnight.
`install` writes the result into the tokenizer, so that generation, the saved artefact and any other program speak
exactly as training did.

What this file does not do: tokens and masks (see masks.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pegbox.errors import BadInput

__all__ = ["PLAIN", "RAW", "ChatTemplate", "Messages", "TemplateRefusal", "Traits", "resolve_template"]

Messages = Sequence[dict[str, Any]]

PLAIN = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### User:\\n' + m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '### Assistant:\\n' + m['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ raise_exception('the plain template has no role ' + m['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
# role markers of MFTCoder (arXiv:2311.02303): every content ends with a newline, blanks that are none become blanks
MARKERS = (
    "{% for m in messages %}{% set text = (m['content'] | replace('\\u202f', ' ') | replace('\\u00a0', ' ')) + '\\n' %}"
    "{% if m['role'] == 'system' %}{{ '<s>system\\n' + text }}"
    "{% elif m['role'] == 'user' %}{{ '<s>human\\n' + text }}"
    "{% elif m['role'] == 'assistant' %}{{ '<s>bot\\n' + text + eos_token + ('' if loop.last else '\\n') }}"
    "{% else %}{{ raise_exception('the markers template has no role ' + m['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>bot\\n' }}{% endif %}"
)
RAW = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"

BUILT_IN = {"plain": PLAIN, "raw": RAW, "markers": MARKERS}

_DATE = datetime(2024, 7, 26)  # the date that Llama 3.1's template falls back to
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")  # message keys a template sees
# `messages` with a leading system message put in front of the first user message, two newlines between
_FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set fold = namespace(out=[], due=messages[0]['content']) -%}"
    "{%- for m in messages[1:] -%}"
    "{%- if fold.due is not none and m['role'] == 'user' -%}"
    "{%- set fold.out = fold.out + [dict(m, content=fold.due + '\\n\\n' + m['content'])] -%}"
    "{%- set fold.due = none -%}"
    "{%- else -%}{%- set fold.out = fold.out + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- if fold.due is not none -%}"
    "{%- set fold.out = [{'role': 'user', 'content': fold.due}] + fold.out -%}{%- endif -%}"
    "{%- set messages = fold.out -%}{%- endif -%}"
)
# `messages` with `reasoning_content` moved into the content as a <think> block
_INLINE = (
    "{%- set inline = namespace(out=[]) -%}{%- for m in messages -%}"
    "{%- if m['reasoning_content'] -%}"
    "{%- set block = '<think>\\n' + m['reasoning_content'].strip() + '\\n</think>\\n\\n' -%}"
    "{%- set inline.out = inline.out + [dict(m, content=block + (m['content'] or ''), reasoning_content='')] -%}"
    "{%- else -%}{%- set inline.out = inline.out + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = inline.out -%}"
)
_ANSWER, _SYSTEM, _REASON = "pegboxanswer", "pegboxsystem", "pegboxreason"  # probe words


class TemplateRefusal(BadInput):
    """The template raised, or left out something that the row says."""


@dataclass(frozen=True)
class Traits:
    """What probing found.

    Args:
        closing: text from the end of an answer to the end of its turn marker, e.g. "<|im_end|>"; "" if there is none
            (then the tokenizer's eos is appended to the last answer).
        system: "native", or "folded" into the first user message.
        reasoning: "native" (the template reads `reasoning_content`) or "inline" (`<think>` in the answer).
        opener: what the generation prompt opens and rendered turns leave out, e.g. "<think>\\n"; mostly "".
    """

    closing: str
    system: Literal["native", "folded"]
    reasoning: Literal["native", "inline"]
    opener: str


class ChatTemplate:
    """`tokenizer` speaking through one template. `source` is jinja text, or None for the tokenizer's own."""

    def __init__(self, tokenizer: Any, source: str | None, name: str):
        self.tokenizer, self.source, self.name = tokenizer, source, name

    @cached_property
    def digest(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(repr(self.jinja).encode()).hexdigest()

    @cached_property
    def jinja(self) -> str | dict[str, str]:
        """The template with its prelude, as `tokenizer.chat_template` takes it (a dict where it has several)."""
        traits = self.traits
        prelude = _FOLD * (traits.system == "folded") + _INLINE * (traits.reasoning == "inline")
        own = self.source if self.source is not None else self.tokenizer.chat_template
        if isinstance(own, dict):
            return {name: _preceded(_undated(text), prelude) for name, text in own.items()}
        return _preceded(_undated(own), prelude)

    def install(self) -> None:
        """Make this the tokenizer's own template: what it renders, generates from and saves from now on."""
        self.tokenizer.chat_template = self.jinja
        self.source = None
        self.__dict__.pop("jinja")  # the prelude is now part of it, and found by probing anew
        self.__dict__.pop("traits")

    @cached_property
    def traits(self) -> Traits:
        """Probed once. Raises `TemplateRefusal` for a template that can't render one question and one answer."""
        return Traits(
            closing=self._closing(),
            system="native" if self._shows_system() else "folded",
            reasoning="native" if self._shows_reasoning() else "inline",
            opener=self._opener(),
        )

    def render(self, messages: Messages, tools: Any = None, generation_prompt: bool = False) -> str:
        """The conversation as text."""
        plain = [{"content": ""} | {key: m[key] for key in _KEPT if m.get(key) is not None} for m in messages]
        named = self.jinja
        if isinstance(named, dict):
            named = named["tool_use" if tools and "tool_use" in named else "default"]
        return self._render(plain, named, tools, generation_prompt)

    def prompt_ids(self, messages: Messages, tools: Any = None) -> list[int]:
        """Token ids of the conversation with the assistant's turn opened: what generation starts from."""
        text = self.render(messages, tools, generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(
        self, messages: list[dict[str, Any]], source: str | None, tools: Any = None, generation_prompt: bool = False
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=source, add_generation_prompt=generation_prompt, tokenize=False
            )
        except Exception as error:  # jinja errors of any class, and Python errors inside a template
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise TemplateRefusal(
                f"The chat template ({self.name}) refuses these messages (roles: {roles}): {error}. Change the row, or "
                "give another template with --template FILE.jinja."
            ) from error
        return str(text)

    def _probe(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        """`messages` through the template as it came."""
        return self._render(messages, self.source, None, generation_prompt)

    def _try(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._probe(messages)
        except TemplateRefusal:
            return ""

    def _closing(self) -> str:
        text = self._probe([_user("q"), {"role": "assistant", "content": _ANSWER}])
        if text.count(_ANSWER) != 1:
            raise TemplateRefusal(
                f"The chat template ({self.name}) doesn't render an assistant's answer exactly once. Give another "
                "template with --template FILE.jinja."
            )
        tail = text.partition(_ANSWER)[2]
        marks = [(tail.find(t), len(t)) for t in _markers(self.tokenizer) if t in tail]
        if not marks:
            return tail.rstrip()
        first = min(start for start, _ in marks)
        return tail[: first + max(size for start, size in marks if start == first)]

    def _shows_system(self) -> bool:
        return _SYSTEM in self._try([{"role": "system", "content": _SYSTEM}, _user("q")])

    def _shows_reasoning(self) -> bool:
        answer = {"role": "assistant", "content": _ANSWER, "reasoning_content": _REASON}
        return _REASON in self._try([_user("q"), answer])

    def _opener(self) -> str:
        prompt = self._probe([_user("q")], generation_prompt=True)
        turn = self._probe([_user("q"), {"role": "assistant", "content": _ANSWER}])
        if turn.startswith(prompt):
            return ""
        reasoned = {"role": "assistant", "content": _ANSWER, "reasoning_content": _REASON}
        if self._try([_user("q"), reasoned]).startswith(prompt):
            return ""  # rendered when there is reasoning
        head = turn.partition(_ANSWER)[0].rstrip()
        opener = prompt[len(head) :] if prompt.startswith(head) else ""
        return opener.lstrip() if opener.strip() == "<think>" else ""


def resolve_template(tokenizer: Any, spec: str | Path | None = None, kind: str = "chat") -> ChatTemplate:
    """The template to speak through.

    Args:
        spec: None or "auto" (the tokenizer's own; without one `plain`), "plain", "raw", "markers", a jinja file, or
            jinja text.
        kind: the rows' kind; completion rows are raw text and never pass through a chat template.
    """
    if kind == "completion":
        spec = "raw"
    if spec in (None, "auto"):
        if getattr(tokenizer, "chat_template", None):
            return ChatTemplate(tokenizer, None, "the tokenizer's own")
        spec = "plain"
    if spec in BUILT_IN:
        return ChatTemplate(tokenizer, _with_bos(tokenizer, BUILT_IN[str(spec)]), str(spec))
    if isinstance(spec, str) and ("{%" in spec or "{{" in spec):
        return ChatTemplate(tokenizer, spec, "jinja text")
    path = Path(str(spec))
    if not path.is_file():
        raise BadInput(f"Template file {path} not found. Give a jinja file, 'plain', 'raw', 'markers' or 'auto'.")
    return ChatTemplate(tokenizer, path.read_text(encoding="utf-8"), path.name)


@cache
def _undated(source: str) -> str:
    """The template with every date of today replaced by a fixed one (the renderer takes no other clock)."""
    return _TODAY.sub(lambda call: repr(_DATE.strftime(call[2])), source)


def _preceded(source: str, prelude: str) -> str:
    return source if source.startswith(prelude) else prelude + source


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _markers(tokenizer: Any) -> set[str]:
    """Special and added tokens; runs of blanks, which some tokenizers add as tokens, mark nothing."""
    return {t for t in (*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_encoder", {})) if t.strip()}


def _with_bos(tokenizer: Any, source: str) -> str:
    """The built-in template, begun by the bos token where the tokenizer itself would add one."""
    if tokenizer.eos_token is None:
        raise BadInput("The tokenizer has no end-of-sequence token, so no answer could end. Set `tokenizer.eos_token`.")
    ids = tokenizer("a")["input_ids"]
    adds = tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
    return ("{{ bos_token }}" if adds else "") + source
