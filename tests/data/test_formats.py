"""Formats: each way to write a row, each way to write it wrongly."""

from __future__ import annotations

import json

import pytest

from pegbox.data.formats import FORMATS, convert, detect, rename
from pegbox.data.messages import read_messages
from pegbox.errors import BadInput


def read(record: dict, fmt: str = "auto"):
    return convert(record, detect(set(record), "f", fmt), "f, line 3")


def spoken(row) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in row.messages]


QA = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize("name", FORMATS)
def test_every_example_is_detected_as_its_own_format_and_converts(name):
    example = FORMATS[name].example
    assert detect(set(example), "f").name == name
    row = read(example)
    assert len(row.id) == 16
    assert row.source == "f, line 3"


@pytest.mark.parametrize(
    ("record", "format_name", "kind", "messages"),
    [
        (
            {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
            "chat",
            "chat",
            QA,
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            "sharegpt",
            "chat",
            QA,
        ),
        ({"question": "2+2?", "answer": 4}, "qa", "chat", QA),
        ({"question": "2+2?", "answers": {"text": ["4", "four"], "answer_start": [0, 1]}}, "qa", "chat", QA),
        (
            {"instruction": "Add.", "input": "2+2", "output": "4"},
            "instruction",
            "chat",
            [("user", "Add.\n\n2+2"), ("assistant", "4")],
        ),
        ({"instruction": "Add.", "input": "", "response": "4"}, "instruction", "chat", [("user", "Add."), QA[1]]),
        ({"prompt": "2+2?", "completion": "4"}, "completion", "completion", QA),
        (
            {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
            "completion",
            "chat",
            QA,
        ),
        ({"system": "Count.", "question": "2+2?", "answer": "4"}, "qa", "chat", [("system", "Count."), *QA]),
    ],
)
def test_conversations(record, format_name, kind, messages):
    row = read(record)
    assert detect(set(record), "f").name == format_name
    assert row.kind == kind
    assert spoken(row) == messages


def test_checkable_answers_are_kept():
    assert read({"question": "2+2?", "answer": 4}).answer == 4
    assert read({"messages": FORMATS["chat"].example["messages"], "answer": {"x": 1}}).answer == {"x": 1}
    assert read({"instruction": "Add.", "output": "It is 4.", "answer": "4"}).answer == "4"


def test_text_and_classification():
    assert read({"text": "Hello."}).text == "Hello."
    row = read({"premise": "a", "hypothesis": "b", "label": 2})
    assert (row.kind, row.text, row.text_pair, row.label) == ("classification", "a", "b", 2)
    assert read({"sentence": "fine", "label": True}).label == 1
    assert read({"sentence": "fine", "label": 0.25}).label == 0.25
    assert read({"sentence": "fine", "label": "0.25"}).label == 0.25, "as a CSV file writes it"
    assert read({"sentence": "fine", "label": "1"}).label == "1"


def test_preferences_with_and_without_a_prompt():
    row = read({"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    assert (spoken(row), row.chosen[0]["content"], row.rejected[0]["content"]) == (QA[:1], "4", "5")
    user = {"role": "user", "content": "2+2?"}
    sides = [[user, {"role": "assistant", "content": text}] for text in "45"]
    implicit = read({"chosen": sides[0], "rejected": sides[1]})
    assert implicit.messages == row.messages
    assert implicit.id == row.id
    with pytest.raises(BadInput, match="share no beginning"):
        read({"chosen": "4", "rejected": "5"})
    with pytest.raises(BadInput, match="the same"):
        read({"prompt": "2+2?", "chosen": "4", "rejected": "4"})


def test_common_columns():
    row = read({"text": "x", "task": "t", "group": 7, "weight": "0.5", "extra": [1]})
    assert (row.task, row.group, row.weight, row.meta) == ("t", "7", 0.5, {"extra": [1]})
    for weight in (-1, "nan", "much"):
        with pytest.raises(BadInput, match="column 'weight'"):
            read({"text": "x", "weight": weight})


def test_mapping_renames_and_names_its_mistakes():
    assert rename({"review": "x", "n": 1}, {"text": "review"}, "f") == {"text": "x", "n": 1}
    with pytest.raises(BadInput, match=r"unknown name 'txet'.*'text'"):
        rename({"review": "x"}, {"txet": "review"}, "f")
    with pytest.raises(BadInput, match=r"no such column.*'review'"):
        rename({"review": "x"}, {"text": "reviw"}, "f")


def test_unknown_columns_list_the_formats():
    with pytest.raises(BadInput, match=r"\['a', 'b'\].*--map") as error:
        detect({"a", "b"}, "f.jsonl")
    assert all(name in str(error.value) for name in FORMATS)
    with pytest.raises(BadInput, match=r"Unknown data format 'cat'.*'chat'"):
        detect({"text"}, "f", "cat")
    with pytest.raises(BadInput, match="does not fit"):
        detect({"text"}, "f", "chat")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no assistant turn"),
        ({"messages": []}, "empty"),
        ({"messages": "[{"}, "not a JSON list"),
        ({"messages": ["Hi"]}, "message 1.*must be an object"),
        ({"messages": [{"role": "boss", "content": "Hi"}]}, "message 1.*unknown role 'boss'"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "message 1.*says nothing"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "content is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "parts that are not text"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "weight is 0.5"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            "without a function",
        ),
        ({"messages": FORMATS["chat"].example["messages"], "tools": "nope"}, "column 'tools'.*not valid JSON"),
        ({"messages": FORMATS["chat"].example["messages"], "tools": [{"a": 1}]}, "column 'tools'.*named functions"),
        ({"question": "2+2?", "answer": " "}, "column 'answer'.*empty"),
        ({"question": "2+2?", "answer": []}, "list of answers is empty"),
        ({"question": "2+2?", "answer": None}, "column 'answer'.*missing"),
        ({"prompt": "x", "completion": ""}, "column 'completion'.*empty"),
        ({"text": ["x"]}, "expected text, got list"),
        ({"text": "x", "label": []}, "is no label"),
        ({"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "end with an assistant"),
    ],
)
def test_bad_rows_name_place_and_example(record, said):
    with pytest.raises(BadInput, match=said) as error:
        read(record)
    assert str(error.value).startswith("f, line 3")
    assert "Expected" in str(error.value)
    assert "e.g. " in str(error.value)


def test_a_row_that_is_no_object():
    with pytest.raises(BadInput, match="must be an object, not list"):
        convert([1], FORMATS["text"], "f, line 1")


def test_tool_calls_in_every_spelling():
    arguments = {"host": "r1"}
    wanted = [{"type": "function", "function": {"name": "ping", "arguments": arguments}}]
    call = {"name": "ping", "arguments": json.dumps(arguments)}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "assistant", "tool_calls": json.dumps([call])},
        {"role": "assistant", "function_call": call},
        {"from": "function_call", "value": json.dumps(call)},
    ):
        assert read_messages([message], "f")[0]["tool_calls"] == wanted
    assert read_messages([{"from": "observation", "value": "ok"}], "f") == [{"role": "tool", "content": "ok"}]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_any_name(field):
    (message,) = read_messages([{"role": "assistant", "content": "4", field: "Count."}], "f")
    assert message["reasoning_content"] == "Count."
    row = read({"question": "2+2?", "answer": "4", "reasoning": "Count."})
    assert row.messages[-1]["reasoning_content"] == "Count."


def test_text_parts_are_joined_and_weights_read():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "user", "content": parts}], "f")[0]["content"] == "ab"
    assert read_messages([{"role": "assistant", "content": "x", "weight": 0}], "f")[0]["train"] is False
    assert "train" not in read_messages([{"role": "assistant", "content": "x", "weight": 1}], "f")[0]


def test_ids_depend_on_content_alone():
    one, two = read({"text": "x"}), convert({"text": "x", "task": "t"}, FORMATS["text"], "elsewhere")
    assert one.id == two.id
    assert one.id != read({"text": "y"}).id
