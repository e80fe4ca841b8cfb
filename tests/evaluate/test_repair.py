"""Repair evaluation: what is drawn, cut out, judged and counted, by hand and through a suite."""

import pytest

from pegbox.data.repair import rows
from pegbox.errors import BadInput
from pegbox.evaluate import repair
from pegbox.evaluate.base import METRIC, Item
from pegbox.evaluate.repair import Repair, evaluate_repair, same_code, with_counts
from pegbox.evaluate.run import measure
from pegbox.evaluate.suites import target
from pegbox.tasks.views import CausalView


def item(name, language="python", tests="assert x == 1"):
    messages = [{"role": "user", "content": name}, {"role": "assistant", "content": "```python\nx = 1\n```"}]
    return Item(name, "chat", messages, meta={"language": language, "tests": tests, "fixed": "x = 1"})


ANSWERS = {
    "a": ["x = 0", "```python\nx = 1\n```", "x = 1"],
    "b": ["```\nx = 1\n```", "x = 0", "x = 0"],
    "c": ["x = 0"] * 3,
}


def draw(messages, tokens, number):
    return [ANSWERS[m[-1]["content"]][number] for m in messages]


def test_candidates_are_counted_by_hand():
    """Top-k looks at the first k, pass@k at all; the first sample may be the reference itself."""
    found = evaluate_repair([item(n) for n in "abc"], draw, samples=3)
    assert [bug.passed for bug in found.bugs] == [(False, True, True), (True, False, False), (False, False, False)]
    assert [found.top_k(k) for k in (1, 2, 3)] == [1 / 3, 2 / 3, 2 / 3]
    assert found.pass_at_k(1) == pytest.approx((2 / 3 + 1 / 3) / 3)
    assert found.exact == 1 / 3
    assert found.notice == ""
    with pytest.raises(BadInput, match="Top-5 needs 5"):
        found.top_k(5)


def test_an_answer_without_code_is_drawn_again_with_more_room():
    asked = []

    def growing(messages, tokens, number):
        asked.append(tokens)
        return ["x = 1" if tokens > 1000 else "```python\n```"] * len(messages)

    found = evaluate_repair([item("a")], growing, samples=1, max_new_tokens=300, more_tokens=500, most_tokens=1200)
    assert asked == [300, 800, 1200]
    assert found.top_k(1) == 1
    asked.clear()
    evaluate_repair([item("a")], growing, samples=1, max_new_tokens=300, more_tokens=500, most_tokens=800)
    assert asked == [300, 800]


def test_rows_without_their_tool_chain_are_left_out_with_a_notice(monkeypatch):
    monkeypatch.setattr(repair, "available", lambda: ["python"])
    found = evaluate_repair([item("a"), item("b", "c++")], draw, samples=1)
    assert found.skipped == {"cpp": 1}
    assert "1 cpp rows" in found.notice
    with pytest.raises(BadInput, match="No row can be judged"):
        evaluate_repair([item("b", "java")], draw)


def test_rows_without_tests_are_refused():
    with pytest.raises(BadInput, match="no `tests`"):
        evaluate_repair([item("a", tests="")], draw, samples=1)
    with pytest.raises(BadInput, match="at least 1"):
        evaluate_repair([item("a")], draw, samples=0)


def test_white_space_makes_no_other_code():
    assert same_code("x = 1  \n\n", "x = 1")
    assert not same_code("x = 1", " x = 1")


def test_metrics_of_one_suite_share_their_draws(llama, tokenizer, monkeypatch):
    """Top-1, Top-2, pass@1, pass@2 and exact matches from the same two samples; each sample is drawn once."""
    from pegbox.parts import generation

    drawn = []

    def answers(model, tokenizer, messages, **options):
        drawn.append(options["sampling"].seed)
        number = options["sampling"].seed
        return [row.messages[1]["content"] if number == 1 else "x" for row in found]

    found = rows("test", 2)
    monkeypatch.setattr(generation, "generate", answers)
    metrics = with_counts(Repair(samples=2, more_tokens=0), (1, 2))
    result = measure(CausalView(llama), tokenizer, target(found, metrics))
    values = {name: score.value for name, score in result.scores.items() if "/" not in name}
    assert values == {"top_1": 0.0, "top_2": 1.0, "pass_at_1": 0.5, "pass_at_2": 1.0, "exact_repair": 0.0}
    assert drawn == [0, 1]


def test_sampling_needs_a_generator_that_can(llama, tokenizer):
    def greedy(messages, tokens):
        return ["x = 1"] * len(messages)

    rows_ = [item("a")]
    view = CausalView(llama)
    with pytest.raises(BadInput, match="can't be asked to sample"):
        measure(view, tokenizer, target(rows_, Repair()), generate=greedy)
    one = measure(view, tokenizer, target(rows_, Repair(temperature=0, samples=1)), generate=greedy)
    assert one.scores["top_1"].value == 1.0


@pytest.mark.parametrize("block", [{"k": 11}, {"k": 2, "samples": 1}, {"temperature": 0}])
def test_counts_that_can_not_be_are_refused(block):
    """n < k in Top-k; several samples at temperature 0."""
    with pytest.raises(BadInput, match="repair:"):
        METRIC.validate({"kind": "repair", **block})


def test_a_row_finds_its_checker():
    from pegbox.parts.answers import checker_for

    row = rows("test", 1)[0]
    assert checker_for(row)(row, row.messages[1]["content"])
