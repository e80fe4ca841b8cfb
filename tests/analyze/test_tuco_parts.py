"""What surrounds TuCo: telling sets apart, attacks, refusals, the choice of alpha, and the whole analysis as a run."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pegbox
from parts.pair_models import adapted, eager, two_models
from pegbox.analyze.attacks import affixed, broken, is_refusal, label_broken, many_shot, translated
from pegbox.analyze.prompts import in_batches, row_ids
from pegbox.analyze.refusals import PHRASES
from pegbox.analyze.separation import auc, separation, true_positives
from pegbox.analyze.tuning_scale import Question, choose_alpha, chosen_right, questions_of
from pegbox.data.rows import Row
from pegbox.errors import BadInput, Unsupported
from pegbox.parts.mixing import mixed
from pegbox.parts.pairs import ModelPair
from pegbox.recipe import load_recipe
from pegbox.testing import tiny_llama, tiny_tokenizer

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), min_size=1, max_size=12)


# ---- separation


@given(SCORES, SCORES)
def test_auc_is_the_share_of_ordered_pairs(high, low):
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(high, low)]
    assert auc(high, low) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(high, low) + auc(low, high) == pytest.approx(1)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_hits_at_a_rate_of_false_alarms(high, low, at):
    thresholds = [*high, *low, 2.0]
    best = max(
        (np.mean([a >= t for a in high]) for t in thresholds if np.mean([b >= t for b in low]) <= at), default=0.0
    )
    assert true_positives(high, low, at) == pytest.approx(best)


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        ([0.1, 0.2], [1, 1], "Two classes"),
        ([0.1], [1, 0], "1 scores and 2 labels"),
        ([0.1, 0.2], [1, 2], "Labels are 1"),
        ([float("nan"), 0.2], [1, 0], "not a number"),
    ],
)
def test_what_can_not_be_told_apart(scores, labels, words):
    """Fewer than two classes for the AUC, and other labels."""
    with pytest.raises(BadInput, match=words):
        separation(scores, labels)


# ---- attacks

PROMPT = [{"role": "system", "content": "be safe"}, {"role": "user", "content": "how?"}]


def test_attacks_rewrite_prompts():
    shots = [("q1", "a1"), ("q2", "a2")]
    shot = many_shot(PROMPT, shots, 2)
    assert [m["content"] for m in shot] == ["be safe", "q1", "a1", "q2", "a2", "how?"]
    assert many_shot(PROMPT, shots, 0) == PROMPT
    assert affixed(PROMPT, "!!", "after")[-1]["content"] == "how? !!"
    assert affixed(PROMPT, "!!", "before")[-1]["content"] == "!! how?"
    assert translated(PROMPT, {"how?": "hogyan?"})[-1]["content"] == "hogyan?"
    assert PROMPT[-1]["content"] == "how?"


def test_attacks_without_their_data_are_refused():
    with pytest.raises(BadInput, match="3 shots of 2"):
        many_shot(PROMPT, [("q", "a")] * 2, 3)
    with pytest.raises(BadInput, match="no translation"):
        translated(PROMPT, {})
    with pytest.raises(BadInput, match="user message"):
        affixed(PROMPT[:1], "!")


def test_refusals_and_breaking():
    assert len(PHRASES) == len(set(PHRASES)) == 32
    assert is_refusal("I\u2019M SORRY, no")
    assert not is_refusal("Sure, here is how")
    answers = ["Sure", "I cannot do that", "Of course", "I'm sorry"]
    assert broken(answers, 2)
    assert not broken(answers, 3)
    with pytest.raises(BadInput, match="5 answers of 4"):
        broken(answers, 5)
    labels = label_broken([PROMPT, PROMPT], lambda asked, draw: ["Sure", "I cannot" if draw else "Fine"], samples=3)
    assert labels == [True, False]


# ---- prompts


def test_rows_become_prompts_and_windows():
    tokenizer = tiny_tokenizer()
    chat = Row("a", "chat", messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    text = tokenizer.decode(row_ids(tokenizer, chat))
    assert text.endswith("<|im_start|>assistant\n")
    long = Row("b", "text", text="0123456789" * 30)
    cut = row_ids(tokenizer, long, window=20)
    assert len(cut) == 20
    assert cut == row_ids(tokenizer, long, window=20)
    assert cut != row_ids(tokenizer, long, window=20, seed=1)
    with pytest.raises(BadInput, match="more than max_length 5"):
        row_ids(tokenizer, chat, longest=5)
    with pytest.raises(BadInput, match="is empty"):
        row_ids(tokenizer, Row("c", "text", text=""))
    with pytest.raises(BadInput, match="no message before"):
        row_ids(tokenizer, Row("d", "chat", messages=[{"role": "assistant", "content": "x"}]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_batches_hold_every_prompt_once(lengths, size):
    prompts = [[i + 1] * n for i, n in enumerate(lengths)]
    seen = {}
    for positions, batch in in_batches(prompts, size, pad=0):
        for line, i in enumerate(positions):
            seen[i] = batch["input_ids"][line][batch["attention_mask"][line] == 1].tolist()
    assert [seen[i] for i in range(len(prompts))] == prompts


# ---- alpha


def test_alpha_is_chosen_on_the_other_folds():
    rows = 20
    right = {1.0: [i % 2 == 0 for i in range(rows)], 1.1: [i % 4 != 3 for i in range(rows)], 0.9: [False] * rows}
    chosen = choose_alpha(right, folds=5)
    assert chosen.alpha == 1.1
    assert chosen.by_fold == (1.1,) * 5
    assert chosen.accuracy == pytest.approx(0.75)
    assert chosen.delta == pytest.approx(0.25)
    weak = choose_alpha(right, folds=5, attenuate=True)
    assert weak.alpha == 0.9
    assert weak.accuracy == 0.0


def test_of_equal_alphas_the_mildest_is_taken():
    assert choose_alpha({0.5: [True] * 6, 1.0: [True] * 6, 1.25: [True] * 6}, folds=3).alpha == 1.0


def test_the_cross_validated_accuracy_is_not_the_best_in_hindsight():
    """Where folds disagree, a fold is scored with what the others liked."""
    generator = torch.Generator().manual_seed(0)
    right = {a: (torch.rand(30, generator=generator) < 0.5).tolist() for a in (0.75, 0.9, 1.0, 1.1, 1.25)}
    chosen = choose_alpha(right, folds=5)
    assert chosen.accuracy <= max(chosen.by_alpha.values())


@pytest.mark.parametrize(
    ("right", "folds", "words"),
    [
        ({0.9: [True] * 6}, 3, "needs 1.0"),
        ({1.0: [True] * 4, 0.9: [True] * 4}, 5, "5 folds of 4 rows"),
        ({1.0: [True] * 4, 0.9: [True] * 3}, 2, "verdict on every row"),
    ],
)
def test_bad_choices_of_alpha(right, folds, words):
    """An alpha grid without 1.0; folds beyond the rows; other counts."""
    with pytest.raises(BadInput, match=words):
        choose_alpha(right, folds=folds)


@torch.no_grad()
def test_answers_under_alpha():
    """The likeliest choice alone counts; a tie is no choice; batches with padding change nothing."""
    pair = two_models()
    questions = [Question(tuple(range(5, 5 + n)), (1, 2, 3), r) for n, r in ((4, 0), (7, 1), (5, 2), (6, 0))]
    found = chosen_right(pair, 0.7, questions, batch=3)
    with mixed(pair, 0.7) as model:
        for question, verdict in zip(questions, found):
            logits = model(input_ids=torch.tensor([question.prompt])).logits[0, -1][[1, 2, 3]]
            assert verdict == (int(logits.argmax()) == question.right)
    pair.tuned.lm_head.weight.zero_()
    assert chosen_right(pair, 1.0, questions) == [False] * 4


def test_rows_become_questions():
    tokenizer = tiny_tokenizer()
    asked = [{"role": "user", "content": "which?"}]

    def row(answer, choices=("A", "B")):
        return Row("r", "chat", messages=asked, answer=answer, meta={"choices": list(choices)})

    first, second = questions_of([row("B"), row(0)], tokenizer)
    assert (first.right, second.right) == (1, 0)
    assert len(set(first.choices)) == 2
    for bad, words in (
        (row("C"), "none of its choices"),
        (row("A", ["A"]), "two choices"),
        (row("A", ["A", "Ab"]), "same"),
    ):
        with pytest.raises(BadInput, match=words):
            questions_of([bad], tokenizer)


def test_the_grid_needs_one():
    for grid in ([0.5, 0.75], [1.0], [-1.0, 1.0]):
        with pytest.raises(BadInput, match=r"1\.0 among them"):
            load_recipe({"protocol": "posthoc", "analyze": [{"kind": "tuning_scale", "grid": grid}]})


# ---- the whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuco")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))  # noqa: E731
    write(
        "chat.jsonl",
        [
            {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "AB"[i % 2]}],
             "choices": ["A", "B"], "answer": "AB"[i % 2]}
            for i in range(6)
        ],
    )  # fmt: skip
    write("web.jsonl", [{"text": f"words and more words, number {i}, and on"} for i in range(5)])
    tuned = adapted(tiny_llama(), 3.0).merge_and_unload()
    tuned.save_pretrained(folder / "tuned")
    tiny_tokenizer().save_pretrained(folder / "tuned")
    return folder


def run(place, tmp_path, analyses, **settings):
    recipe = {"protocol": {"kind": "posthoc"}, "models": {"tuned": str(place / "tuned")}, "analyze": analyses}
    given = {"model": str(place / "base"), "test_data": str(place / "chat.jsonl"), "suites": [], **settings}
    return pegbox.train(recipe, out=tmp_path / "out", **given)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PEGBOX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_a_run_scores_prompts_and_draws_them(place, tmp_path):
    whole = {
        "kind": "tuco", "against": {"web": str(place / "web.jsonl")}, "affixes": ["!!", "xx"], "shots": [0, 2],
        "shots_from": str(place / "chat.jsonl"), "label_broken": True, "samples": 2, "answer_tokens": 2,
        "output": True, "tokens": True,
    }  # fmt: skip
    done = run(place, tmp_path, [whole, {"kind": "tuning_scale", "grid": [0.5, 1.0], "folds": 2}])
    tuco, scale = done.metrics.extra["findings"]
    assert 0 < tuco["numbers"]["mean_tuco"] < 1
    assert {"auc_target_web", "auc_target_affixed", "broken_share"} <= tuco["numbers"].keys()
    assert [row[:2] for row in tuco["tables"][0]["rows"]] == [["target", 6], ["web", 5], ["affixed", 12]]
    assert {p["key"] for p in tuco["pictures"]} == {"tuco-histogram", "tuco-blocks", "tuco-shots"}
    assert tuco["subject"] == "tuned"
    lines = (tmp_path / "out" / "analysis" / "0-tuco" / "prompts.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 + 5 + 12
    assert {"alpha", "delta"} <= scale["numbers"].keys()
    text = done.report()[0].read_text()
    assert "Tuning contribution" in text
    assert "Accuracy over alpha" in text


def test_prompts_match_the_pairs_own_values(place, tmp_path):
    from pegbox.analyze.contribution import tuning_contribution

    done = run(place, tmp_path, [{"kind": "tuco"}])
    tokenizer, base, tuned = tiny_tokenizer(), tiny_llama().eval(), adapted(tiny_llama(), 3.0).merge_and_unload()
    row = Row("x", "chat", messages=[{"role": "user", "content": "say 0"}])
    value = tuning_contribution(ModelPair(tuned, base), {"input_ids": torch.tensor([row_ids(tokenizer, row)])}).tuco
    table = done.metrics.extra["findings"][0]["tables"][1]["rows"]
    assert any(line[3] == pytest.approx(float(value), abs=1e-5) for line in table)


@pytest.mark.parametrize(
    ("analyses", "settings", "words"),
    [
        ([{"kind": "tuco", "shots": [1]}], {}, "shots_from"),
        ([{"kind": "tuco"}], {"test_data": None}, "No rows. Give --data"),
        ([{"kind": "tuning_scale", "folds": 50}], {}, "50 folds of 6 rows"),
        ([{"kind": "tuko"}], {}, "Did you mean 'tuco'"),
    ],
)
def test_a_run_refuses(place, tmp_path, analyses, settings, words):
    with pytest.raises(BadInput, match=words):
        run(place, tmp_path, analyses, **settings)


def test_compositions_are_refused_with_a_reason(place, tmp_path):
    given = {"model": str(place / "base"), "out": tmp_path / "out", "dry_run": True}
    classes = {"task": "classification", "protocol": "posthoc", "analyze": ["tuco"], "models": {"t": "x"}}
    with pytest.raises(Unsupported, match="causal"):
        pegbox.train(classes, **given)
    staged = {"protocol": {"kind": "staged", "stages": [{"name": "a"}]}, "analyze": ["tuco"]}
    with pytest.raises(Unsupported, match="runs no analyses"):
        pegbox.train(staged, data="network", **given)
    with pytest.raises(BadInput, match="No tuned model"):
        pegbox.train(
            {"protocol": "posthoc", "analyze": ["tuco"]}, model=str(place / "base"),
            test_data=str(place / "chat.jsonl"), out=tmp_path / "out", suites=[],
        )  # fmt: skip


def test_unequal_prompts_of_a_model_with_another_width(place, tmp_path):
    eager(hidden_size=16).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    recipe = {"protocol": "posthoc", "models": {"tuned": str(tmp_path / "other")}, "analyze": ["tuco"]}
    with pytest.raises(BadInput, match="blocks"):
        pegbox.train(
            recipe, model=str(place / "base"), test_data=str(place / "chat.jsonl"), out=tmp_path / "out", suites=[]
        )
