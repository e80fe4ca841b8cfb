"""A comparison from end to end on a tiny model: lock, trials, cells, verdicts, page; an added row; a changed lock."""

import pytest

from pegbox.compare import compare
from pegbox.errors import BadInput
from pegbox.report import Comparison


def settings(base, rows):
    return {
        "model": str(base),
        "data": [str(rows / "chat.jsonl")],
        "eval_split": 0.2,
        "test_split": 0.25,
        "steps": 3,
        "batch": 2,
        "micro_batch": 2,
        "max_length": 200,
        "max_new_tokens": 4,
        "suite": ["target"],
        "estimate": False,
    }


@pytest.fixture(scope="module")
def made(base, rows, tmp_path_factory):
    import os

    os.environ["PEGBOX_CACHE"] = str(base / "cache")
    out = tmp_path_factory.mktemp("compare") / "cmp"
    said = []
    found = compare(["lora"], out=out, seeds=2, trials=1, select="last", say=said.append, **settings(base, rows))
    return out, found, said


def test_rows_seeds_and_free_rows(made):
    out, found, said = made
    assert [e.name for e in found.entries] == ["base", "base + 4 shots", "lora"]
    lora = found.entry("lora")
    assert lora.status == "finished"
    assert lora.seeds == [1, 2]
    assert lora.rate.trials
    assert any("lora/trial-0" in line for line in said)
    assert Comparison.load(out / "comparison.json").plain() == found.plain()
    assert (out / "report.html").stat().st_size > 1000
    assert (out / "compare.yaml").is_file()


def test_a_second_call_trains_nothing(made, base, rows):
    out, found, _ = made
    said = []
    again = compare(["lora"], out=out, seeds=2, trials=1, select="last", say=said.append, **settings(base, rows))
    assert said == []
    assert again.plain()["entries"] == found.plain()["entries"]


def test_a_changed_lock_names_what_differs(made, base, rows):
    out, _, _ = made
    with pytest.raises(BadInput, match="batch"):
        compare(["lora"], out=out, seeds=2, trials=1, select="last", **{**settings(base, rows), "batch": 4})


def test_cells_are_listed(made, base, rows):
    out, _, _ = made
    cells = compare(out=out, list_cells=True)
    assert {c["cell"] for c in cells} == {"lora/trial-0", "lora/seed-1", "lora/seed-2"}
    assert {c["status"] for c in cells} == {"finished"}


def test_a_row_is_added(made):
    out, _, _ = made
    found = compare(out=out, add=["full"], estimate=False)
    assert [e.name for e in found.entries][-2:] == ["lora", "full"]
    assert found.entry("full").verdicts["target"]
