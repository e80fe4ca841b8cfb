"""The facade: sources to rows to splits, and the preview."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from pegbox.data import network
from pegbox.data.dataset import Splits, load_rows, load_splits, prepare_splits
from pegbox.data.preview import preview, render, segments
from pegbox.errors import BadInput
from pegbox.testing import tiny_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def qa(n, start=0, **more):
    return [{"question": f"q{i}", "answer": f"a{i}", **more} for i in range(start, start + n)]


def test_rows_report_and_duplicates(tmp_path):
    rows = load_rows(write(tmp_path / "x.jsonl", [*qa(3), *qa(1), *qa(1)]))
    assert (rows.format, rows.kind, len(rows), rows.report.duplicates) == ("qa", "chat", 5, 2)
    assert [r.id.partition("#")[2] for r in rows] == ["", "", "", "2", "3"]
    assert rows[0].source.endswith("x.jsonl, line 1")
    assert len(load_rows(tmp_path / "x.jsonl", deduplicate=True)) == 3


def test_mapping_and_format(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"frage": "2+2?", "antwort": "4"}])
    with pytest.raises(BadInput, match="--map"):
        load_rows(path)
    (row,) = load_rows(path, mapping={"question": "frage", "answer": "antwort"})
    assert row.messages[0]["content"] == "2+2?"
    (row,) = load_rows({"path": str(path), "map": {"prompt": "frage", "completion": "antwort"}})
    assert row.kind == "completion"


def test_several_sources_join_and_weights_cut_without_repeating(tmp_path):
    a, b = write(tmp_path / "a.jsonl", qa(100)), write(tmp_path / "b.jsonl", qa(30, 1000))
    assert len(load_rows([a, b])) == 130
    mixed = load_rows([{"path": str(a), "weight": 1}, {"path": str(b), "weight": 2}])
    assert [s["used"] for s in mixed.report.sources] == [15, 30]
    assert len({r.id for r in mixed}) == 45
    assert mixed.rows == load_rows([{"path": str(a), "weight": 1}, {"path": str(b), "weight": 2}]).rows


def test_kinds_that_do_not_mix(tmp_path):
    a = write(tmp_path / "a.jsonl", qa(1))
    b = write(tmp_path / "b.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(BadInput, match="don't mix: chat, classification"):
        load_rows([a, b])


def test_empty_sources(tmp_path):
    with pytest.raises(BadInput, match="holds no rows"):
        load_rows(write(tmp_path / "x.jsonl", []))
    with pytest.raises(BadInput, match="No data source"):
        load_rows([])


def test_a_mixed_file_names_the_line_that_does_not_fit(tmp_path):
    with pytest.raises(BadInput, match=r"x\.jsonl, line 3, column 'question'"):
        load_rows(write(tmp_path / "x.jsonl", [*qa(2), {"text": "x"}]))


def test_limit_reads_the_beginning(tmp_path):
    assert len(load_rows({"path": str(write(tmp_path / "x.jsonl", qa(9))), "limit": 4})) == 4


def test_splits_by_share_are_deterministic_and_disjoint(tmp_path):
    rows = load_rows(write(tmp_path / "x.jsonl", qa(400)))
    one, two = (prepare_splits(rows, validation=0.1, test=0.2, seed=3) for _ in range(2))
    assert one == two
    ids = [{r.id for r in part} for part in (one.train, one.validation, one.test)]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 400
    assert one.report["rows"] == {"train": len(ids[0]), "validation": len(ids[1]), "test": len(ids[2])}


def test_given_sets_win_over_training(tmp_path):
    train = load_rows(write(tmp_path / "a.jsonl", qa(20)))
    held = load_rows(write(tmp_path / "b.jsonl", qa(5)))
    other = load_rows(write(tmp_path / "c.jsonl", qa(5, 3)))
    splits = prepare_splits(train, validation=held, test=other)
    assert splits.report["removed_from_train"] == 8
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 3, 5)
    with pytest.raises(BadInput, match="No training row is left"):
        prepare_splits(held, test=held)


def test_the_built_in_task_brings_its_own_splits():
    splits = load_splits({"path": "network", "limit": 90, "families": ["intent"]})
    assert isinstance(splits, Splits)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 100, 300)
    assert {r.task for r in splits.test} == {"intent"}
    groups = [{r.group for r in part} for part in (splits.train, splits.validation, splits.test)]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    small = load_splits("network:train:30", test="network:test:12")
    assert len(small.test) == 12
    assert small.test == network.rows("test", 12)


def test_options_that_do_not_apply_to_the_built_in_task_are_refused():
    for option in ({"map": {"group": "x"}}, {"format": "chat"}, {"config": "c"}):
        with pytest.raises(BadInput, match="don't apply"):
            load_rows({"path": "network", **option})


def test_splits_of_files(tmp_path):
    path = write(tmp_path / "x.jsonl", qa(100, group="") + qa(100, 100, group="g"))
    splits = load_splits(path, validation=0.2)
    assert splits.test == []
    assert {len(part) for part in (splits.train, splits.validation)} & set(range(100, 200))


# ---- preview


def test_preview_is_plain_data_and_its_segments_join_to_the_text():
    tokenizer = tiny_tokenizer()
    rows = load_rows("network:train:12")
    shown = preview(rows, tokenizer, n=2, max_length=400)
    json.dumps(shown)
    assert (shown["format"], shown["rows"], len(shown["examples"])) == ("network", 12, 2)
    assert shown["tasks"] == {"intent": 4, "lpm": 4, "subnet": 4}
    assert shown["lengths"]["total"] == shown["encoding"]["tokens"]
    assert shown["lengths"]["trained"]["least"] > 0
    first = shown["examples"][0]
    assert (
        "".join(s["text"] for s in first["segments"] if s["trained"]) == rows[0].messages[-1]["content"] + "<|im_end|>"
    )
    assert sum(s["tokens"] for s in first["segments"]) == first["tokens"]


def test_segments_of_nothing_and_of_alternating_masks():
    tokenizer = tiny_tokenizer()
    assert segments([], [], tokenizer) == []
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    parts = segments(ids, [False, True, True], tokenizer)
    assert [(p["text"], p["trained"]) for p in parts] == [("a", False), ("bc", True)]


def test_render_colours_trained_text():
    console = Console(record=True, width=100, force_terminal=True, color_system="standard")
    console.print(render(preview(load_rows("network:train:3"), tiny_tokenizer(), n=1)))
    text = console.export_text(styles=True)
    assert "\x1b[1;32mip route" in text or "\x1b[1;32minterface" in text or "\x1b[1;32mvlan" in text
    assert "end of turn" in text


def test_preview_without_a_tokenizer_and_of_other_kinds(tmp_path):
    shown = preview(load_rows(write(tmp_path / "q.jsonl", qa(2))), None)
    assert [s["trained"] for s in shown["examples"][0]["segments"]] == [False, True]
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    shown = preview(load_rows(write(tmp_path / "p.jsonl", pairs)), tiny_tokenizer())
    assert [s["text"] for s in shown["examples"][0]["segments"]] == ["user: p\n", "chosen: c\n", "rejected: r\n"]
    classes = [{"text": "[red]x[/red]", "label": "b"}, {"text": "y", "label": "a"}]
    shown = preview(load_rows(write(tmp_path / "c.jsonl", classes)), tiny_tokenizer())
    assert (shown["labels"], shown["examples"][0]["label"]) == (["a", "b"], "b")
    console = Console(record=True, width=80)
    console.print(render(shown))
    assert "[red]x[/red]" in console.export_text()
