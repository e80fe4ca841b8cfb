"""Metrics and suites on tiny models and scripts: every number against one worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pegbox.errors import BadInput, Corrupt, RunFailed
from pegbox.evaluate.base import METRIC, Item, expected_of, prompt_of
from pegbox.evaluate.encoding import encoder_from, scoring_encoder, windows
from pegbox.evaluate.likelihood import row_log_likelihoods
from pegbox.evaluate.metrics import metric_from
from pegbox.evaluate.run import difference, measure, read_examples, write_examples
from pegbox.evaluate.suites import Part, Suite, retention, retention_real, suite_named, target
from pegbox.parts.generation import Scripted


class View:
    """The few answers of a `ModelView` for a causal model, by the plain forward."""

    def __init__(self, model):
        self.model = model

    def hidden(self, batch):
        keys = ("input_ids", "attention_mask")
        return self.model.model(**{k: batch[k] for k in keys}).last_hidden_state

    def head(self, hidden):
        return self.model.lm_head(hidden)

    def targets(self, batch):
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return labels.clamp(min=0), labels != -100


@pytest.fixture
def view(llama):
    return View(llama.eval())


def chat(row_id, question, reply, **fields):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return Item(row_id, "chat", messages, **fields)


def by_hand(model, ids, start):
    """Sum of log p of ids[start:] from one plain forward."""
    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))


# --- rows ---


def test_prompt_and_expected_of_chat_and_completion():
    row = chat("a", "Q", "A")
    assert prompt_of(row) == [{"role": "user", "content": "Q"}]
    assert expected_of(row) == "A"
    raw = Item("b", "completion", row.messages)
    assert prompt_of(raw) == [{"role": "raw", "content": "Q"}]
    assert expected_of(Item("c", "chat", row.messages[:1], answer=7)) == "7"
    with pytest.raises(BadInput, match="text row"):
        prompt_of(Item("d", "text", text="x"))


# --- encoding and likelihood ---


@pytest.mark.parametrize(("length", "max_length", "stride"), [(10, 4, 2), (9, 4, 4), (3, 8, 4), (17, 5, 1), (5, 4, 2)])
def test_windows_count_every_token_once_with_context(length, max_length, stride):
    pieces = list(windows(list(range(length)), 0, max_length, stride))
    counted = [i for p in pieces for i in p.ids[len(p.ids) - p.counted :]]
    assert counted == list(range(1, length))
    assert all(len(p.ids) <= max_length for p in pieces)
    assert all(len(p.ids) - p.counted >= max_length - stride for p in pieces[1:])


def test_scored_tokens_are_those_of_the_answer(view, tokenizer):
    rows = [chat("a", "hello", "yes"), chat("b", "a much longer question than that", "no, never")]
    encode = scoring_encoder(tokenizer, max_length=128)
    sums, counts = row_log_likelihoods(view, rows, encode)
    for row, total, n in zip(rows, sums, counts):
        text = tokenizer.apply_chat_template(prompt_of(row), add_generation_prompt=True, tokenize=False)
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer(expected_of(row))["input_ids"]
        assert n == len(after)
        assert total == pytest.approx(by_hand(view.model, before + after, len(before)), abs=1e-4)


def test_trailing_blanks_of_a_raw_prompt_belong_to_the_answer(view, tokenizer):
    messages = [{"role": "user", "content": "ab "}, {"role": "assistant", "content": "cd"}]
    _, counts = row_log_likelihoods(
        view, [Item("a", "completion", messages)], scoring_encoder(tokenizer, max_length=64)
    )
    assert counts.tolist() == [3]


def test_batching_changes_no_likelihood(view, tokenizer):
    rows = [Item(str(i), "text", text="word " * (i + 1)) for i in range(7)]
    one, _ = row_log_likelihoods(view, rows, scoring_encoder(tokenizer, max_length=20, batch_tokens=1))
    many, _ = row_log_likelihoods(view, rows, scoring_encoder(tokenizer, max_length=20, batch_tokens=400))
    assert one == pytest.approx(many, abs=1e-4)


def test_an_answer_longer_than_the_context_is_refused(tokenizer):
    with pytest.raises(BadInput, match=r"row-9.*max_length 8"):
        list(scoring_encoder(tokenizer, max_length=8)([chat("row-9", "q", "x" * 20)]))


# --- metrics ---


def test_perplexity_is_per_token_and_rows_keep_their_own(view, tokenizer):
    rows = [Item("a", "text", text="abc"), Item("b", "text", text="a longer text")]
    m = measure(view, tokenizer, Suite("s", [Part(METRIC.validate("perplexity"), rows)]))
    sums = [by_hand(view.model, [256, *tokenizer(r.text)["input_ids"]], 1) for r in rows]
    assert m.scores["perplexity"].value == pytest.approx(math.exp(-sum(sums) / (3 + 13)), rel=1e-4)
    assert m.examples[0].values == {"perplexity": pytest.approx(-sums[0] / 3, rel=1e-4), "tokens": 3.0}
    assert not m.scores["perplexity"].higher_is_better


def test_multiple_choice_takes_the_likeliest_per_character(view, tokenizer):
    options = [" x", " a rather long option", " yy"]
    row = Item("q", "completion", [{"role": "user", "content": "Q:"}], answer=" yy", meta={"choices": options})
    m = measure(view, tokenizer, target([row], METRIC.validate("multiple_choice")))
    sums = [by_hand(view.model, tokenizer("Q:" + o)["input_ids"], 2) / len(o) for o in options]
    best = options[sums.index(max(sums))]
    assert m.examples[0].answer == best.strip()
    assert m.examples[0].values["multiple_choice"] == float(best == " yy")
    assert 1 / 3 <= m.examples[0].values["confidence"] <= 1
    assert "multiple_choice.ece" in m.scores


@pytest.mark.parametrize("answer", [3, -1, True, "none of them", None])
def test_a_choice_that_is_none_is_refused(view, tokenizer, answer):
    row = Item("q", "completion", [{"role": "user", "content": "Q"}], answer=answer, meta={"choices": ["a", "b", "c"]})
    with pytest.raises(BadInput, match=r"Row q.*'answer'"):
        measure(view, tokenizer, target([row], METRIC.validate("multiple_choice")))


def test_generated_metrics_share_answers_and_merge_examples(view, tokenizer):
    rows = [chat("1", "one", "The Cat."), chat("2", "two", "dog sits", task="t")]
    script = Scripted({"one": "cat", "two": "a dog runs"})
    m = measure(view, tokenizer, target(rows, [METRIC.validate("exact_match"), METRIC.validate("f1")]), generate=script)
    assert m.scores["exact_match"].value == 0.5
    assert m.examples[1].values == {"exact_match": 0.0, "f1": 0.5}
    assert len(script.asked) == 2
    assert {"exact_match/t", "exact_match/other"} <= set(m.scores)
    assert m.examples[1].expected == "dog sits"


def test_exact_match_without_normalisation_and_with_prefix(view, tokenizer):
    rows = [chat("1", "q", "Yes")]
    said = {"yes": (0, 0), " Yes ": (1, 1), "Yes, it is": (0, 1)}
    for answer, wanted in said.items():
        for prefix, value in zip((False, True), wanted):
            metric = METRIC.validate({"kind": "exact_match", "normalise": False, "prefix": prefix})
            m = measure(view, tokenizer, target(rows, metric), generate=Scripted({"q": answer}))
            assert m.scores["exact_match"].value == value


def test_number_and_verified_read_the_rows_answer(view, tokenizer):
    rows = [chat("1", "q", "so it is #### 1,200"), chat("2", "p", "", answer={"number": 2.5, "tolerance": 0.1})]
    script = Scripted({"q": "we get 600 + 600 = 1200.", "p": "about 2.55 mm"})
    m = measure(view, tokenizer, target(rows[:1], METRIC.validate("number")), generate=script)
    assert m.scores["number"].value == 1.0
    m = measure(view, tokenizer, target(rows[1:], METRIC.validate("verified")), generate=script)
    assert m.scores["verified"].value == 1.0


def test_loss_needs_and_uses_the_tasks_own_mask(view, tokenizer):
    rows = [chat("1", "q", "abc")]
    suite = target(rows, METRIC.validate("loss"))
    with pytest.raises(BadInput, match="encode"):
        measure(view, tokenizer, suite)

    def collate(examples):
        return {k: torch.tensor([e[k] for e in examples]) for k in examples[0]}

    ids = list(b"xabc")
    encoded = {"input_ids": ids, "attention_mask": [1] * 4, "labels": [-100, -100, *ids[2:]]}
    m = measure(view, tokenizer, suite, encode=encoder_from(lambda row: encoded, collate))
    assert m.scores["loss"].value == pytest.approx(-by_hand(view.model, ids, 2) / 2, rel=1e-4)


def test_accuracy_of_a_classifier(tokenizer):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.eye(3))

    class ClassView:
        model = Classifier()

        def logits(self, batch):
            return batch["features"] @ self.model.w

    rows = [Item(str(i), "classification", text=f"t{i}", label=i % 3) for i in range(3)]
    data = {"0": ([5.0, 0, 0], 0), "1": ([0, 0, 5.0], 1), "2": ([0, 0, 5.0], 2)}

    def encode(rows):
        for i in (2, 0, 1):
            x, y = data[rows[i].id]
            yield [i], {"features": torch.tensor([x]), "labels": torch.tensor([y])}

    m = measure(ClassView(), tokenizer, target(rows, METRIC.validate("accuracy")), encode=encode)
    assert [e.values["accuracy"] for e in m.examples] == [1.0, 0.0, 1.0]
    assert m.scores["accuracy"].value == pytest.approx(2 / 3)


def test_a_users_function(view, tokenizer, tmp_path):
    file = tmp_path / "f.py"
    file.write_text("def short(answer, row):\n    return {'short': len(answer) < 4, 'length': len(answer)}\n")
    rows = [chat("1", "q", "x"), chat("2", "p", "y")]
    script = Scripted({"q": "abc", "p": "abcdef"})
    m = measure(view, tokenizer, target(rows, metric_from(f"{file}:short")), generate=script)
    assert m.scores["short"].value == 0.5
    assert m.examples[1].values == {"short": 0.0, "length": 6.0}
    with pytest.raises(BadInput, match="no function 'other'"):
        metric_from(f"{file}:other")
    with pytest.raises(BadInput, match="does not exist"):
        metric_from("missing.py:fn")
    with pytest.raises(BadInput, match="Did you mean 'exact_match'"):
        metric_from("exact_mach")


@pytest.mark.parametrize(
    "body", ["return 'good'", "return float('nan')", "raise KeyError('x')", "return {'a': 1, 'b': 2}"]
)
def test_a_users_function_that_fails_names_the_row(view, tokenizer, tmp_path, body):
    file = tmp_path / "f.py"
    file.write_text(f"def fn(answer, row):\n    {body}\n")
    with pytest.raises(RunFailed, match="row row-7"):
        measure(
            view, tokenizer, target([chat("row-7", "q", "x")], metric_from(f"{file}:fn")), generate=Scripted({}, "a")
        )


# --- suites ---


def test_retention_needs_nothing_and_repeats_itself(view, tokenizer):
    suite = retention(limit=4)
    first = measure(view, tokenizer, suite)
    assert set(first.scores) >= {"knowledge", "arithmetic", "perplexity"}
    assert measure(view, tokenizer, suite) == first
    assert not suite.needs_generation


def test_retention_assets_are_well_formed():
    suite = retention()
    by_name = {part.score: part.rows for part in suite.parts}
    assert len(by_name["knowledge"]) >= 60
    assert len(by_name["perplexity"]) >= 40
    for rows in (by_name["knowledge"], by_name["arithmetic"]):
        positions = [row.answer for row in rows]
        assert max(positions.count(p) for p in range(4)) < len(rows) / 2
        assert len({row.messages[0]["content"] for row in rows}) == len(rows)
        assert all(len(set(row.meta["choices"])) == 4 for row in rows)
    for row in by_name["arithmetic"]:
        a, word, b = row.messages[0]["content"].removeprefix("Question: What is ").partition("?")[0].split()
        value = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[word]
        assert row.meta["choices"][row.answer] == f" {value}"


def test_retention_real_reads_the_layout(tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "test.txt").write_text(
        " \n = First = \n \n body one \n = = Part = = \n more \n = Second = \n x\n"
    )
    record = {
        "instruction": "Choose the answer to the question: Why?\n\nAnswer1: a Answer2: b c\n\nAnswer format: x",
        "answer": "answer2",
    }
    for name in ("ARC-Easy", "ARC-Challenge"):
        folder = tmp_path / "commonsense" / name
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps([record]))
    easy, challenge, text = retention_real(tmp_path).parts
    assert easy.rows[0].meta["choices"] == [" a", " b c"]
    assert easy.rows[0].answer == 1
    assert challenge.score == "arc-challenge"
    assert [len(r.text.splitlines()) for r in text.rows] == [4, 2]


def test_suites_by_name(monkeypatch):
    monkeypatch.delenv("PEGBOX_DATA", raising=False)
    assert suite_named("default").name == "retention"
    with pytest.raises(BadInput, match="set PEGBOX_DATA"):
        suite_named("retention-real")
    with pytest.raises(BadInput, match="Did you mean 'retention'"):
        suite_named("retentoin")


def test_empty_and_double_parts_are_refused():
    metric = METRIC.validate("f1")
    with pytest.raises(BadInput, match="no rows"):
        target([], metric)
    with pytest.raises(BadInput, match="different names"):
        target([chat("1", "q", "a")], [metric, metric])


# --- pairing and files ---


def measured(view, tokenizer, right):
    rows = [chat(str(i), f"q{i}", "yes", task="ab"[i % 2]) for i in range(20)]
    script = Scripted(lambda m: "yes" if int(m[-1]["content"][1:]) < right else "no")
    return measure(view, tokenizer, target(rows, METRIC.validate("exact_match")), generate=script)


def test_difference_pairs_rows_and_groups(view, tokenizer):
    ours, theirs = measured(view, tokenizer, 16), measured(view, tokenizer, 10)
    d = difference("exact_match", [ours], [theirs])
    assert d.value == pytest.approx(0.3)
    assert d.low > 0
    assert difference("exact_match/a", [ours], [theirs]).rows == 10


def test_difference_of_perplexity_is_on_its_logarithm_and_lower_is_better(view, tokenizer):
    rows = [Item(str(i), "text", text="text " * (i + 1)) for i in range(5)]
    m = measure(view, tokenizer, Suite("s", [Part(METRIC.validate("perplexity"), rows)]))
    worse = m.model_copy(
        update={
            "examples": [
                e.model_copy(update={"values": {**e.values, "perplexity": e.values["perplexity"] + 0.2}})
                for e in m.examples
            ]
        }
    )
    assert difference("perplexity", [worse, worse], [m, m]).value == pytest.approx(-0.2)


def test_difference_refuses_other_rows(view, tokenizer):
    m = measured(view, tokenizer, 10)
    fewer = m.model_copy(update={"examples": m.examples[1:]})
    with pytest.raises(BadInput, match="different rows"):
        difference("exact_match", [m], [fewer])


def test_examples_round_trip_and_truncation_is_found(view, tokenizer, tmp_path):
    m = measured(view, tokenizer, 3)
    write_examples(m, tmp_path / "e.jsonl")
    assert read_examples(tmp_path / "e.jsonl") == m.examples
    (tmp_path / "e.jsonl").write_text('{"row_id": "1", "val')
    with pytest.raises(Corrupt):
        read_examples(tmp_path / "e.jsonl")


def test_measuring_leaves_the_modes(view, tokenizer):
    view.model.train()
    view.model.model.layers[0].eval()
    modes = [m.training for m in view.model.modules()]
    measure(view, tokenizer, retention(limit=1))
    assert [m.training for m in view.model.modules()] == modes
