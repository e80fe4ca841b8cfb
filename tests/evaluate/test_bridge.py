"""The bridge to lm-evaluation-harness: its result dictionary as a measurement; its absence as an error."""

from __future__ import annotations

import sys

import pytest

from pegbox.errors import BadInput, MissingExtra
from pegbox.evaluate.bridge import lm_eval, measurement_of
from pegbox.testing import tiny_llama, tiny_tokenizer

RESULTS = {
    "results": {"t": {"alias": "t", "acc,none": 0.75, "acc_stderr,none": 0.1, "bleu,none": 12.5, "acc,strict": 0.1}},
    "versions": {"t": 2.0},
    "higher_is_better": {"t": {"acc": True, "bleu": True}},
    "samples": {
        "t": [
            {"doc_id": i, "acc": float(i > 0), "target": "y", "arguments": [("Q?", " y")], "filtered_resps": ["y"]}
            for i in range(4)
        ]
    },
}


def test_results_become_scores_and_rows():
    m = measurement_of("t", RESULTS)
    assert (m.suite, m.version) == ("lm-eval:t", "t.2.0")
    assert m.scores["acc"].value == 0.75
    assert m.scores["acc"].low < 0.75 < m.scores["acc"].high
    assert m.scores["bleu"].low is None  # no rows behind it
    assert m.examples[0].values == {"acc": 0.0}
    assert (m.examples[1].row_id, m.examples[1].prompt, m.examples[1].expected) == ("t/1", "Q?", "y")


def test_groups_name_their_tasks():
    results = {
        "results": {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.0}},
        "samples": {"a": [{"doc_id": 0, "acc": 1.0}], "b": [{"doc_id": 0, "acc": 0.0}]},
    }
    m = measurement_of("both", results)
    assert {n: s.value for n, s in m.scores.items()} == {"acc.a": 1.0, "acc.b": 0.0}
    assert [e.row_id for e in m.examples] == ["a/0", "b/0"]


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pegbox\[eval\]"):
        lm_eval(tiny_llama(), tiny_tokenizer(), "arc_easy")


@pytest.mark.slow
def test_the_harness_itself(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    (tmp_path / "rows.jsonl").write_text('{"q": "1 + 1", "choices": ["2", "3"], "answer": 0}\n' * 3)
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}} ='\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    model = tiny_llama().train()
    m = lm_eval(model, tiny_tokenizer(), "tiny_choice", include=tmp_path)
    assert m.scores["acc"].value in (0.0, 1.0)
    assert m.examples[0].prompt == "1 + 1 ="
    assert model.training
    with pytest.raises(BadInput, match="no task 'nope'"):
        lm_eval(model, tiny_tokenizer(), "nope")
