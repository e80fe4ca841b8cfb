"""Encoding: examples, truncation, refusals, classes, and a cache that survives what happens to files."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pegbox.data.dataset import load_rows
from pegbox.data.encode import encode_rows, pad_id_of
from pegbox.data.encoded import EncodedSet, cache_folder
from pegbox.data.rows import Row, sample_id
from pegbox.errors import BadInput, Corrupt
from pegbox.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


def chat(i: int, answer: str = "Ho", question: str = "Hi", **fields) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(f"id{i}", "chat", messages, source=f"f, line {i}", **fields)


def test_examples(tok):
    encoded = encode_rows([chat(1, task="b"), chat(2, "Hello", task="a", weight=0.5)], tok)
    first, second = encoded
    assert tok.decode([i for i in first["labels"] if i >= 0]) == "Ho<|im_end|>"
    assert first["labels"][0] == -100
    assert (first["sample_id"], first["row_id"], first["task"], first["task_id"]) == (sample_id("id1"), "id1", "b", 1)
    assert (second["weight"], second["task_id"]) == (0.5, 0)
    assert 0 <= first["sample_id"] < 2**63
    assert encoded[-1] == second
    assert encoded[:1] == [first]
    assert encoded.report.examples == len(encoded) == 2
    assert encoded.report.trained_tokens == 3 + 6
    assert encoded.report.tokens == encoded.lengths.sum()
    with pytest.raises(IndexError):
        encoded[2]


def test_truncation_is_counted_and_keeps_a_side(tok):
    rows = [chat(1, "a" * 50), chat(2, "b")]
    whole = encode_rows(rows, tok)
    n = len(whole[0]["input_ids"])
    right = encode_rows(rows, tok, max_length=n - 10)
    assert right.report.cut == 1
    assert right[0]["input_ids"] == whole[0]["input_ids"][: n - 10]
    left = encode_rows(rows, tok, max_length=40, side="left")
    assert left[0]["input_ids"] == whole[0]["input_ids"][-40:]
    assert left[0]["labels"][0] == -100


def test_a_row_whose_answer_is_cut_away_is_refused_or_dropped(tok):
    rows = [chat(1), chat(7, question="q" * 200)]
    with pytest.raises(BadInput, match=r"1 rows have no trained token within max_length 64: f, line 7\."):
        encode_rows(rows, tok, max_length=64)
    kept = encode_rows(rows, tok, max_length=64, overlong="drop")
    assert (len(kept), kept.report.dropped, kept.row_ids) == (1, 1, ["id1"])
    with pytest.raises(BadInput, match="No row is left"):
        encode_rows(rows[1:], tok, max_length=64, overlong="drop")


def test_bad_calls(tok):
    with pytest.raises(BadInput, match="no rows to encode"):
        encode_rows([], tok)
    with pytest.raises(BadInput, match="classification, text"):
        encode_rows([Row("a", "text", text="x"), Row("b", "classification", text="x", label=1)], tok)
    with pytest.raises(BadInput, match=r"train_on: 'every' is unknown. Known: assistant, last, all"):
        encode_rows([chat(1)], tok, train_on="every")
    with pytest.raises(BadInput, match="max_length must be at least 2"):
        encode_rows([chat(1)], tok, max_length=1)
    with pytest.raises(BadInput, match="1 rows have no trained token: f, line 3"):
        encode_rows([Row("a", "text", text="", source="f, line 3")], tok)


def test_long_texts_become_several_examples(tok):
    encoded = encode_rows([Row("a", "text", text="x" * 25)], tok, max_length=10)
    assert encoded.lengths.tolist() == [10, 10, 6]
    assert len(set(encoded.sample_ids.tolist())) == 3
    assert encoded.row_ids == ["a"] * 3
    assert encoded.report.unrolled == 1


def test_mixed_text_and_chat_share_a_set(tok):
    assert len(encode_rows([Row("a", "text", text="abc"), chat(1)], tok)) == 2


def test_classes_numbers_and_pairs(tok):
    rows = [Row(str(i), "classification", text="t" * 30, text_pair="u", label=v) for i, v in enumerate(("b", "a", "b"))]
    encoded = encode_rows(rows, tok, max_length=12)
    assert encoded.label_names == ["a", "b"]
    assert [e["labels"] for e in encoded] == [1, 0, 1]
    assert encoded.report.cut == 3
    ordered = encode_rows([Row(str(i), "classification", text="t", label=v) for i, v in enumerate((10, 9, 2))], tok)
    assert ordered.label_names == ["2", "9", "10"]
    numbers = encode_rows([Row("a", "classification", text="t", label=0.25)], tok)
    assert (numbers[0]["labels"], numbers.label_names) == (0.25, [])
    mixed = encode_rows([Row(str(v), "classification", text="t", label=v) for v in (0, 0.5, 1)], tok)
    assert [e["labels"] for e in mixed] == [0.0, 0.5, 1.0]
    with pytest.raises(BadInput, match=r"'b' does not occur in training. Known: a, c"):
        encode_rows(rows[:1], tok, label_names=["a", "c"])


def test_notes_say_what_the_template_made_of_the_rows(tok):
    row = chat(1)
    row.messages[1]["reasoning_content"] = "Think."
    (note,) = encode_rows([row], tok).report.notes
    assert "<think>" in note


def test_pad_id(tok):
    assert pad_id_of(tok) == tok.pad_token_id


# ---- cache


def test_cache_hits_only_for_equal_inputs(tok, tmp_path):
    rows = [chat(i) for i in range(3)]
    made = encode_rows(rows, tok, cache=tmp_path)
    assert encode_rows(rows, tok, cache=tmp_path).digest() == made.digest()
    assert len(list((tmp_path / "encoded").iterdir())) == 1
    different = [
        encode_rows(rows[:2], tok, cache=tmp_path),
        encode_rows([*rows[:2], chat(2, "Hu")], tok, cache=tmp_path),  # same ids, other words
        encode_rows(rows, tok, train_on="all", cache=tmp_path),
        encode_rows(rows, tok, template="plain", cache=tmp_path),
        encode_rows([chat(i, weight=2.0) for i in range(3)], tok, cache=tmp_path),
    ]
    assert len({e.digest() for e in [made, *different]}) == 6
    assert len(list((tmp_path / "encoded").iterdir())) == 6
    other = tiny_tokenizer()
    other.add_tokens(["Ho"])
    assert encode_rows(rows, other, cache=tmp_path).digest() != made.digest()


def test_a_cached_set_is_the_set(tok, tmp_path):
    rows = [Row(str(i), "classification", text="t", label=v) for i, v in enumerate("ba")]
    made, read = encode_rows(rows, tok, cache=tmp_path), encode_rows(rows, tok, cache=tmp_path)
    assert read.examples == made.examples
    assert read.label_names == made.label_names
    assert read.report == made.report


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_cache_file_is_made_again(tok, tmp_path, damage):
    rows = [chat(1)]
    made = encode_rows(rows, tok, cache=tmp_path)
    (file,) = (tmp_path / "encoded").iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    file.write_bytes({"truncate": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    with pytest.raises(Corrupt, match=file.name):
        EncodedSet.load(file)
    assert encode_rows(rows, tok, cache=tmp_path).digest() == made.digest()
    assert EncodedSet.load(file).digest() == made.digest()


def test_concurrent_writers_leave_one_whole_file(tok, tmp_path):
    rows, results = [chat(i) for i in range(20)], []
    threads = [
        threading.Thread(target=lambda: results.append(encode_rows(rows, tiny_tokenizer(), cache=tmp_path).digest()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert len(set(results)) == 1
    (file,) = (tmp_path / "encoded").iterdir()
    assert EncodedSet.load(file).digest() == results[0]


def test_the_default_cache_is_the_environments(tok, tmp_path, monkeypatch):
    monkeypatch.setenv("PEGBOX_CACHE", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c"
    encode_rows([chat(1)], tok, cache=True)
    assert list((tmp_path / "c" / "encoded").glob("*.safetensors"))


def test_memory_is_flat_arrays(tok):
    encoded = encode_rows(load_rows("network:train:60").rows, tok)
    assert encoded.ids.dtype == np.int32
    assert encoded.starts[-1] == len(encoded.ids) == len(encoded.trained)
