"""From a record as it was written to a `Row`: which format the columns speak, and how each is read.

A format is a set of columns. Detection looks at the column names of the whole source and takes the first format of
`FORMATS` that they satisfy; `--map canonical=column` renames columns before that. Every way in which a record can be
wrong is a `BadInput` with its place, what was expected, and an example.

What this file does not do: reading files (sources.py), templates (templates.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pegbox.data.messages import read_messages
from pegbox.data.repair.rows import EXAMPLE, KEPT, read_humanevalpack, read_repair, read_separated
from pegbox.data.rows import Row, bad_row, content_of, row_id
from pegbox.errors import BadInput, did_you_mean

__all__ = ["FORMATS", "Format", "convert", "detect", "rename"]

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One way to write rows.

    Args:
        needs: each entry is a set of alternative columns, of which a record has exactly one.
        extras: columns it may have beside those and the common ones. kept: such that stay in the row's `meta`.
        read: record, its columns by role, place -> fields of a Row.
        example: a minimal record.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Values, str], dict[str, Any]]
    example: dict[str, Any]
    extras: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def fits(self, columns: set[str]) -> bool:
        return all(any(c in columns for c in alternatives) for alternatives in self.needs)


COMMON = ("task", "group", "weight", "id")  # understood with every format
_SPOKEN = ("tools", "system")  # understood with formats that become conversations


def detect(columns: set[str], where: str, name: str = "auto") -> Format:
    """The format that `columns` speak, or the one called `name` if the columns allow it. Raises `BadInput`."""
    if name != "auto":
        if name not in FORMATS:
            raise BadInput(f"Unknown data format '{name}'.{did_you_mean(name, FORMATS)}")
        if not FORMATS[name].fits(columns):
            raise bad_row(
                where,
                "",
                f"format '{name}' does not fit the columns {sorted(columns)}",
                _needs(FORMATS[name]),
                FORMATS[name].example,
            )
        return FORMATS[name]
    for fmt in FORMATS.values():
        if fmt.fits(columns):
            return fmt
    lines = "\n".join(f"  {f.name}: {json.dumps(f.example, ensure_ascii=False)}" for f in FORMATS.values())
    raise BadInput(
        f"{where}: the columns {sorted(columns)} match no known format. Rename columns with --map, e.g. "
        f"--map messages=COLUMN, or write rows like one of these:\n{lines}"
    )


def rename(record: Values, mapping: Mapping[str, str], where: str) -> dict[str, Any]:
    """`record` with `mapping` (canonical name -> column) applied. Raises `BadInput` for a column that is absent."""
    known = {c for f in FORMATS.values() for group in f.needs for c in group} | set(COMMON) | _EXTRAS
    out = dict(record)
    for canonical, column in mapping.items():
        if canonical not in known:
            raise BadInput(f"--map {canonical}={column}: unknown name '{canonical}'.{did_you_mean(canonical, known)}")
        if column not in record:
            raise BadInput(f"{where}: --map {canonical}={column}: no such column.{did_you_mean(column, record)}")
    for column in mapping.values():
        out.pop(column, None)
    return out | {canonical: record[column] for canonical, column in mapping.items()}


def convert(record: Values, fmt: Format, where: str) -> Row:
    """A `Row` from one record. Raises `BadInput` with the place, what was expected and an example."""
    if not isinstance(record, Mapping):
        raise bad_row(where, "", f"a row must be an object, not {type(record).__name__}", fmt.name, fmt.example)
    for alternatives in fmt.needs:
        present = [c for c in alternatives if record.get(c) is not None]
        if not present:
            raise bad_row(where, alternatives[0], "the column is missing or empty", _needs(fmt), fmt.example)
    fields = fmt.read(record, where)
    used = {c for group in fmt.needs for c in group} | set(fmt.extras) | set(COMMON)
    meta = {key: value for key, value in record.items() if key not in used} | fields.pop("meta", {})
    row = Row(
        id="",
        tools=_tools(record.get("tools"), where) if "tools" in fmt.extras else None,
        task=_word(record, "task", where),
        group=_word(record, "group", where),
        weight=_weight(record.get("weight"), where),
        source=where,
        meta=meta,
        **fields,
    )
    return replace(row, id=row_id(content_of(row)))


# ---- one reader per format: record, place -> fields of a Row


def _read_chat(record: Values, where: str) -> dict[str, Any]:
    column = _first(record, ("messages", "conversations", "conversation"))
    messages = read_messages(record[column], f"{where}, column '{column}'")
    system = record.get("system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": str(system)}, *messages]
    if not any(m["role"] == "assistant" for m in messages):
        raise bad_row(where, column, "no assistant turn", "at least one assistant message", _CHAT)
    return {"kind": "chat", "messages": messages, "answer": record.get("answer")}


def _read_rounds(record: Values, where: str) -> dict[str, Any]:
    """Rounds in which user and assistant take turns, after a system message or without one."""
    read = _read_chat({**record, "messages": record["chat_rounds"]}, where)
    turns = [m["role"] for m in read["messages"] if m["role"] != "system"]
    expected = ["user", "assistant"] * len(turns)
    if turns != expected[: len(turns)] or "system" in [m["role"] for m in read["messages"][1:]]:
        example = FORMATS["rounds"].example
        raise bad_row(
            where, "chat_rounds", f"the roles {turns} do not alternate", "user, assistant, user, ...", example
        )
    return read


def _read_pair(record: Values, where: str) -> dict[str, Any]:
    """A question and its answer under other names than `qa`'s."""
    question, answer = _first(record, ("input", "query", "prompt")), _first(record, ("output", "answer"))
    fmt = FORMATS["pair"]
    return _question(record, _text(record, question, where, fmt), _text(record, answer, where, fmt))


def _read_completion(record: Values, where: str) -> dict[str, Any]:
    column = _first(record, ("completion", "response"))
    prompt, completion = record["prompt"], record[column]
    if isinstance(prompt, list) or isinstance(completion, list):
        head = read_messages(_as_messages(prompt, "user"), f"{where}, column 'prompt'")
        tail = read_messages(_as_messages(completion, "assistant"), f"{where}, column '{column}'")
        return _read_chat({**record, "messages": head + tail}, where)
    messages = [
        {"role": "user", "content": _text(record, "prompt", where, FORMATS["completion"], empty=True)},
        {"role": "assistant", "content": _text(record, column, where, FORMATS["completion"])},
    ]
    return {"kind": "completion", "messages": messages, "answer": record.get("answer")}


def _read_instruction(record: Values, where: str) -> dict[str, Any]:
    fmt = FORMATS["instruction"]
    column = _first(record, ("output", "response"))
    question = _text(record, "instruction", where, fmt)
    extra = record.get("input") or record.get("context") or ""
    if str(extra).strip():
        question = f"{question}\n\n{str(extra).strip()}"
    return _question(record, question, _text(record, column, where, fmt)) | {"answer": record.get("answer")}


def _read_qa(record: Values, where: str) -> dict[str, Any]:
    fmt = FORMATS["qa"]
    column = _first(record, ("answer", "answers", "response"))
    answer = record[column]
    if isinstance(answer, Mapping):  # SQuAD: {"text": [...], "answer_start": [...]}
        answer = answer.get("text")
    if isinstance(answer, list | tuple):
        if not answer:
            raise bad_row(where, column, "the list of answers is empty", "at least one answer", fmt.example)
        answer = answer[0]
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        raise bad_row(where, column, "the answer is empty or not text", "a text or number", fmt.example)
    question = _text(record, "question", where, fmt)
    if record.get("context"):
        question = f"{str(record['context']).strip()}\n\n{question}"
    return _question(record, question, str(answer)) | {"answer": answer}


def _question(record: Values, question: str, answer: str) -> dict[str, Any]:
    reply: dict[str, Any] = {"role": "assistant", "content": answer}
    if record.get("reasoning"):
        reply["reasoning_content"] = str(record["reasoning"])
    system = [{"role": "system", "content": str(record["system"])}] if record.get("system") else []
    return {"kind": "chat", "messages": [*system, {"role": "user", "content": question}, reply]}


def _read_text(record: Values, where: str) -> dict[str, Any]:
    return {"kind": "text", "text": _text(record, _first(record, ("text", "content")), where, FORMATS["text"])}


def _read_classification(record: Values, where: str) -> dict[str, Any]:
    label = record["label"]
    if isinstance(label, bool):
        label = int(label)
    if isinstance(label, str) and _DECIMAL.fullmatch(label.strip()):
        label = float(label)  # a number to regress, as CSV writes it
    if not isinstance(label, int | float | str) or (isinstance(label, float) and not math.isfinite(label)):
        raise bad_row(
            where, "label", f"{label!r} is no label", "a class name or number", FORMATS["classification"].example
        )
    return {"kind": "classification", "label": label, **_classified_text(record, where)}


def _classified_text(record: Values, where: str) -> dict[str, Any]:
    fmt = FORMATS["classification"]
    for first, second in _PAIRS:
        if first in record and second in record:
            return {"text": _text(record, first, where, fmt), "text_pair": _text(record, second, where, fmt)}
    return {"text": _text(record, _first(record, ("text", "sentence", "content")), where, fmt)}


def _read_preference(record: Values, where: str) -> dict[str, Any]:
    chosen = _side(record, "chosen", where)
    rejected = _side(record, "rejected", where)
    if record.get("prompt") is not None:
        prompt = read_messages(_as_messages(record["prompt"], "user"), f"{where}, column 'prompt'")
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if record.get("system") and (not prompt or prompt[0]["role"] != "system"):
        prompt = [{"role": "system", "content": str(record["system"])}, *prompt]
    if not prompt:
        raise bad_row(
            where,
            "prompt",
            "no prompt: the column is absent and the two answers share no beginning",
            "a prompt",
            FORMATS["preference"].example,
        )
    if chosen == rejected:
        raise bad_row(where, "rejected", "the two answers are the same", "two answers", FORMATS["preference"].example)
    return {"kind": "preference", "messages": prompt, "chosen": chosen, "rejected": rejected}


def _side(record: Values, column: str, where: str) -> list[dict[str, Any]]:
    messages = read_messages(_as_messages(record[column], "assistant"), f"{where}, column '{column}'")
    if messages[-1]["role"] != "assistant":
        raise bad_row(
            where, column, "does not end with an assistant message", "an answer", FORMATS["preference"].example
        )
    return messages


# ---- small readers


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _first(record: Values, columns: tuple[str, ...]) -> str:
    return next((c for c in columns if record.get(c) is not None), columns[0])


def _text(record: Values, column: str, where: str, fmt: Format, empty: bool = False) -> str:
    value = record.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise bad_row(where, column, f"expected text, got {type(value).__name__}", "text", fmt.example)
    if not empty and not value.strip():
        raise bad_row(where, column, "the text is empty", "text", fmt.example)
    return value


def _word(record: Values, column: str, where: str) -> str:
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise bad_row(
            where, column, f"expected a name, got {type(value).__name__}", "a text or whole number", {column: "a"}
        )
    return str(value)


def _weight(value: Any, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        raise bad_row(where, "weight", f"{value!r} is no weight", "a number >= 0", {"weight": 1.0})
    return weight


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise bad_row(where, "tools", f"not valid JSON ({error})", "a list of tool schemas", _TOOLS) from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(t, dict) and t.get("function", t).get("name") for t in value):
        raise bad_row(where, "tools", "not a list of named functions", "a list of tool schemas", _TOOLS)
    return [t if "function" in t else {"type": "function", "function": t} for t in value]


def _needs(fmt: Format) -> str:
    return "the columns " + ", ".join(" or ".join(repr(c) for c in group) for group in fmt.needs)


_DECIMAL = re.compile(r"[+-]?\d*\.\d+")
_TOOLS = {"tools": [{"type": "function", "function": {"name": "ping", "parameters": {"type": "object"}}}]}
_CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text", "text_pair"), ("question", "sentence"))
_PAIR_COLUMNS = tuple(dict.fromkeys(c for pair in _PAIRS for c in pair))

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("repair", (("buggy",), ("fixed",)), read_repair, EXAMPLE, kept=KEPT),
        Format(
            "humanevalpack",
            (("buggy_solution",), ("canonical_solution",), ("test",)),
            read_humanevalpack,
            {
                "declaration": "def f(x):\n",
                "buggy_solution": "    return 0",
                "canonical_solution": "    return x",
                "test": "assert f(1) == 1",
            },
            kept=("declaration", "prompt", "instruction", "entry_point", "language", "rationale"),
        ),
        Format("separated", (("separated",),), read_separated, {"separated": "INPUT</s>OBJ1</s>OBJ2</s>"}, ("eos",)),
        Format(
            "preference",
            (("chosen",), ("rejected",)),
            _read_preference,
            {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
            ("prompt", *_SPOKEN),
        ),
        Format("chat", (("messages",),), _read_chat, _CHAT, ("answer", *_SPOKEN)),
        Format(
            "sharegpt",
            (("conversations", "conversation"),),
            _read_chat,
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            ("answer", *_SPOKEN),
        ),
        Format(
            "rounds",
            (("chat_rounds",),),
            _read_rounds,
            {"chat_rounds": [{"role": "human", "content": "2+2?"}, {"role": "bot", "content": "4"}]},
            ("answer", *_SPOKEN),
        ),
        Format(
            "instruction",
            (("instruction",), ("output", "response")),
            _read_instruction,
            {"instruction": "Add.", "input": "2+2", "output": "4"},
            ("input", "context", "answer", "reasoning", *_SPOKEN),
        ),
        Format(
            "completion",
            (("prompt",), ("completion", "response")),
            _read_completion,
            {"prompt": "2+2=", "completion": "4"},
            ("answer",),
        ),
        Format(
            "qa",
            (("question",), ("answer", "answers", "response")),
            _read_qa,
            {"question": "2+2?", "answer": "4"},
            ("context", "reasoning", *_SPOKEN),
        ),
        Format(
            "pair",
            (("input", "query", "prompt"), ("output", "answer")),
            _read_pair,
            {"input": "2+2?", "output": "4"},
            ("reasoning", *_SPOKEN),
        ),
        Format(
            "classification",
            (("label",), ("text", "sentence", "content", *_PAIR_COLUMNS)),
            _read_classification,
            {"text": "A fine film.", "label": "positive"},
        ),
        Format("text", (("text", "content"),), _read_text, {"text": "Any text."}),
    )
}
_EXTRAS = {c for f in FORMATS.values() for c in (*f.extras, *f.kept)}
