"""Sources: each kind of file, and what is said about a broken one."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from pegbox.data.sources import Source, as_source, read_records
from pegbox.errors import BadInput

ROWS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": 'a "b", c\nd', "completion": "é🙂"}]


def records(path, **options):
    return list(read_records(Source(path=str(path), **options)))


def values(path, **options):
    return [record for record, _ in records(path, **options)]


def write_jsonl(path, rows=ROWS):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n", encoding="utf-8")
    return path


def write_csv(path, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


WRITERS = {
    "jsonl": lambda d: write_jsonl(d / "x.jsonl"),
    "json": lambda d: _text(d / "x.json", json.dumps(ROWS, indent=1)),
    "json-wrapped": lambda d: _text(d / "x.json", json.dumps({"version": 1, "data": ROWS})),
    "json-lines": lambda d: write_jsonl(d / "x.json"),
    "csv": lambda d: write_csv(d / "x.csv"),
    "tsv": lambda d: write_csv(d / "x.tsv", "\t"),
    "parquet": lambda d: write_parquet(d / "x.parquet"),
}


def _text(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_every_kind_of_file_plain_and_gzipped(make, tmp_path):
    path = make(tmp_path)
    assert values(path) == ROWS
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert values(packed) == ROWS


def test_places(tmp_path):
    assert [w.split(", ")[1] for _, w in records(write_jsonl(tmp_path / "a.jsonl"))] == ["line 1", "line 2"]
    assert [w.split(", ")[1] for _, w in records(WRITERS["json"](tmp_path))] == ["line 2 (item 1)", "line 6 (item 2)"]
    assert [w.split(", ")[1] for _, w in records(write_csv(tmp_path / "a.csv"))] == ["line 2", "line 3"]
    assert [w.split(", ")[1] for _, w in records(write_parquet(tmp_path / "a.parquet"))] == ["row 1", "row 2"]


def test_folders_are_read_in_order_and_skip_the_rest(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    (tmp_path / "a").mkdir()
    write_jsonl(tmp_path / "a" / "z.jsonl", ROWS[:1])
    _text(tmp_path / "README.md", "about")
    _text(tmp_path / "picture.png", "no")
    assert values(tmp_path) == ROWS
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match=r"no data files.*\.jsonl"):
        records(empty)


def test_text_files_are_documents(tmp_path):
    assert values(_text(tmp_path / "a.txt", "One.\n\nTwo.")) == [{"text": "One.\n\nTwo."}]
    assert values(_text(tmp_path / "b.txt", " \n")) == []


def test_saved_datasets(tmp_path):
    import datasets

    labels = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    made = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=labels)
    made.save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == [{"text": "x", "label": "good"}, {"text": "y", "label": -1}]
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "two")
    assert len(values(tmp_path / "two")) == 2
    assert len(values(tmp_path / "two", split="test")) == 1
    with pytest.raises(BadInput, match=r"no split 'dev'.*train, test"):
        records(tmp_path / "two", split="dev")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": 1,}\n', r"line 2, column 9: not valid JSON.*e\.g\. \{"),
        ("x.json", '[{"a": 1},\n {"b" 2}]', r"line 2, column 7: not valid JSON.*array"),
        ("x.json", '"text"', "expected a JSON array.*got str"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 cells, but the first line names 2"),
        ("x.csv", 'a,b\n1,"2\n', "not valid CSV"),
        ("x.csv", "", "empty.*column names"),
        ("x.csv", "a,a\n1,2\n", "appears twice"),
        ("x.parquet", "PAR1 no", "not a readable Parquet file"),
        ("x.jsonl.gz", "plain", "broken gzip"),
        ("x.xlsx", "x", r"unknown kind of data file.*\.jsonl"),
    ],
)
def test_broken_files_name_their_place(tmp_path, name, text, said):
    path = _text(tmp_path / name, text)
    with pytest.raises(BadInput, match=said) as error:
        records(path)
    assert str(path) in str(error.value)


def test_not_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n')
    with pytest.raises(BadInput, match="line 2: not UTF-8"):
        records(path)


def test_missing_files_and_hub_names(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"not found.*network"):
        records(tmp_path / "absent.jsonl")
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadInput, match="'org/name' could not be loaded: no route"):
        records("org/name")
    asked = {}

    def load(name, config, split):
        asked.update(name=name, config=config, split=split)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert values("org/name", split="dev", config="c") == ROWS
    assert asked == {"name": "org/name", "config": "c", "split": "dev"}


def test_sources_from_text_and_mappings():
    assert as_source("network").builtin
    made = as_source("network:test:300")
    assert (made.path, made.split, made.limit) == ("network", "test", 300)
    assert as_source({"path": "x.jsonl", "weight": 2}).weight == 2
    assert as_source({"path": "network:test:5", "seed": 3}) == Source(path="network", split="test", limit=5, seed=3)
    for text in ("network:test:many", "network:a:1:2"):
        with pytest.raises(BadInput, match="expected network"):
            as_source(text)
    with pytest.raises(BadInput, match=r"Unknown key 'data.wieght'.*'weight'"):
        as_source({"path": "x", "wieght": 1})
    with pytest.raises(BadInput, match="weight"):
        as_source({"path": "x", "weight": 0})
