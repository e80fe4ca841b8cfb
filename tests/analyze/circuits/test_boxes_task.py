"""The box task, its desiderata, tasks of one's own, and the analysis as a whole."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyze.circuits.casts import llama
from pegbox.analyze.base import ANALYZE
from pegbox.analyze.circuits import DESIDERATA, HeadView, Marked, desideratum, marked_prompts, path_patching
from pegbox.analyze.circuits.desiderata import as_prompts, pairs
from pegbox.analyze.circuits.material import box_material, row_material
from pegbox.analyze.circuits.templates import unmarked
from pegbox.data.rows import Row
from pegbox.errors import BadInput
from pegbox.parts.boxes import LABELS, OBJECTS, Boxes, BoxTask, Question, Style
from pegbox.testing import tiny_tokenizer


def words(objects=OBJECTS, labels=LABELS, lacking=()):
    """A tokenizer with a token for each word behind a space, and one byte a token for everything else."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    others = "The the is in not contained contains Box there Some things were put away Nothing was moved since"
    others = tuple(others.split())
    spaced = [f"Ġ{w}" for w in (*objects, *labels, *others) if w not in lacking]
    pieces = [*spaced, *(w for w in (*objects, *others)), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"{w[0].upper()}{w[1:]}" for w in objects]
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(["<unk>", *pieces]))}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer():
    return words()


COMPACT = {"form": "compact", "objects": list("abcdefghijklmno"), "labels": list("ABCDEFGH")}


def tasks():
    return [BoxTask(boxes=n) for n in (2, 3, 7)], [BoxTask(boxes=n, **COMPACT) for n in (2, 3, 7)]


@pytest.mark.parametrize("task", [*tasks()[0], *tasks()[1]], ids=lambda t: f"{t.form}{t.boxes}")
@pytest.mark.parametrize("seed", [0, 1])
def test_every_prompt_is_as_it_should_be(task, seed, tokenizer):
    """Labels distinct, the answer one token, the previous label unique; runs of n share a context and ask each box."""
    tok = tokenizer if task.form == "sentence" else tiny_tokenizer()
    worded = task.worded(tok)
    questions = worded.questions(3 * task.boxes, seed)
    for i, (question, prompt) in enumerate(zip(questions, worded.prompts(questions))):
        assert question.segment == i % task.boxes
        assert question.boxes == questions[i - i % task.boxes].boxes
        assert len(set(question.boxes.labels)) == len(set(question.boxes.objects)) == task.boxes
        asked = worded.ids[question.label]
        assert prompt.ids[prompt.positions["previous_label"]] == asked
        assert prompt.ids[prompt.positions["object"]] == prompt.answer == worded.ids[question.answer]
        before = prompt.ids[: prompt.positions.get("label", prompt.positions["last"])]
        assert before.count(asked) == 1
        if task.form == "sentence":
            assert prompt.positions["last"] == len(prompt.ids) - 1
            assert prompt.positions["label"] == len(prompt.ids) - 3
            assert prompt.positions["object"] == prompt.positions["previous_label"] - 4
        else:
            assert prompt.positions["object"] == prompt.positions["previous_label"] + 1
            assert prompt.ids[prompt.positions["last"]] == asked
    assert worded.questions(5, seed) == questions[:5]
    assert worded.questions(5, seed + 1) != questions[:5]


def test_the_text_is_the_papers(tokenizer):
    boxes = Boxes(("F", "Q"), ("apple", "bell"))
    text = Question(boxes, 0, "F").text()
    assert text == "The apple is in Box F, the bell is in Box Q. Box F contains the"
    row = next(BoxTask(boxes=2).worded(tokenizer).rows(1, 0))
    assert row["prompt"].endswith("contains the")
    assert row["completion"].removeprefix(" ") in OBJECTS


def test_corrupted_questions(tokenizer):
    """Another context, another segment, a label that it has not; the previous label is a random box label."""
    worded = BoxTask().worded(tokenizer)
    questions = worded.questions(70, 0)
    corrupted = worded.corrupted(questions, 0)
    for question, other in zip(questions, corrupted):
        assert other.segment != question.segment
        assert not other.known
        assert other.boxes != question.boxes
        prompt = worded.prompt(other, random.Random(0))
        assert prompt.answer is None
        assert prompt.ids[prompt.positions["previous_label"]] in [worded.ids[x] for x in other.boxes.labels]
    places = [prompt.positions["previous_label"] for prompt in worded.prompts(corrupted, 0)]
    assert len(set(places)) == 7


@pytest.mark.parametrize("name", DESIDERATA)
@pytest.mark.parametrize("boxes", [3, 7])
def test_targets_tell_quantities_apart(name, boxes, tokenizer):
    """Targets differ from the base's own answer in every row; positional, object and label targets from each other."""
    worded = BoxTask(boxes=boxes).worded(tokenizer)
    for base, source, target in pairs(worded, name, 60, 0):
        assert target != base.answer
        assert not set(base.boxes.objects) & set(source.boxes.objects)
        routes = {"object": source.answer}
        index = source.segment
        if index < boxes:
            routes["positional"] = base.boxes.objects[index]
        if source.label in base.boxes.labels:
            routes["label"] = base.boxes.objects[base.boxes.labels.index(source.label)]
        assert len(set(routes.values())) == len(routes)
        assert base.answer not in routes.values() or name in ("segment_before", "wrong_neighbour")
        if name in routes:
            assert target == routes[name]
        elif name not in ("wrong_neighbour",):
            assert target == base.boxes.objects[source.segment]
    triples = desideratum(worded, name, 20, 0, pad=0)
    assert len(triples) == 20
    for side, found in ((0, triples.base), (1, triples.source)):
        for i, pair in enumerate(pairs(worded, name, 20, 0)):
            at = found.at("label")[i]
            assert int(found.ids[i, at]) == worded.ids[pair[side].label]


@given(st.sampled_from(["positional", "object", "label"]), st.integers(0, 50), st.integers(3, 7))
def test_scarce_labels(name, seed, boxes):
    """With 8 labels for 7 boxes contexts share labels, and targets still differ."""
    worded = BoxTask(boxes=boxes, **COMPACT).worded(tiny_tokenizer())
    for base, source, target in pairs(worded, name, 8, seed):
        assert target != base.answer
        if name != "object":
            others = {base.boxes.objects[source.segment]}
            if source.label in base.boxes.labels:
                others.add(base.boxes.objects[base.boxes.labels.index(source.label)])
                assert len(others) == 2
            assert target in others


def test_legacy_is_the_official_draw(tokenizer):
    """The official code only keeps sources from segment 0, so that some point to the base's own segment; its label's
    target is a token without the leading space."""
    worded = BoxTask(boxes=7).worded(tokenizer)
    drawn = pairs(worded, "positional", 300, 0, legacy=True)
    assert all(source.segment != 0 for _, source, _ in drawn)
    same = sum(base.segment == source.segment for base, source, _ in drawn) / 300
    assert 0.08 < same < 0.22
    old, new = (desideratum(worded, "label", 10, 0, legacy=flag).base.right() for flag in (True, False))
    assert not set(old.tolist()) & {worded.ids[x] for x in worded.objects}
    assert set(new.tolist()) <= {worded.ids[x] for x in worded.objects}


# ---- bad input


def test_words_of_several_tokens(tokenizer):
    """Objects that are not one token are left out, and too few left is an error; a byte tokenizer has none."""
    worded = BoxTask(objects=["apple", "bell", "zeppelin", "coin"], boxes=2).worded(tokenizer)
    assert worded.objects == ("apple", "bell", "coin")
    with pytest.raises(BadInput, match="0 of 111 objects are one token each"):
        BoxTask().worded(tiny_tokenizer())
    with pytest.raises(BadInput, match=r"2 of 3 objects.*3 boxes need 4"):
        BoxTask(objects=["apple", "bell", "zeppelin"], boxes=3).worded(tokenizer)
    with pytest.raises(BadInput, match="labels are one token"):
        BoxTask(labels=["A", "B"], boxes=2).worded(tokenizer)


def test_a_previous_label_that_is_missing_or_repeated(tokenizer):
    worded = BoxTask(boxes=2).worded(tokenizer)
    twice = Question(Boxes(("F", "F"), ("apple", "bell")), 0, "F")
    with pytest.raises(BadInput, match="'F' stands 2 times"):
        worded.prompt(twice)
    hidden = Question(Boxes(("F", "Q"), ("apple", "bell")), 0, "F", Style(before="Box F is red."))
    with pytest.raises(BadInput, match="'F' stands 2 times"):
        worded.prompt(hidden)
    lost = Question(Boxes(("Ω", "Q"), ("apple", "bell")), 0, "F")
    worded.ids["Ω"] = 10**6
    with pytest.raises(BadInput, match="stands 0 times"):
        worded.prompt(lost)


def test_desiderata_that_can_not_be_drawn(tokenizer):
    worded = BoxTask(boxes=2).worded(tokenizer)
    with pytest.raises(BadInput, match="Did you mean 'positional'"):
        pairs(worded, "position", 2, 0)
    with pytest.raises(BadInput, match="three boxes"):
        pairs(worded, "label", 2, 0)
    few = BoxTask(boxes=2, objects=["apple", "bell", "coin"]).worded(tokenizer)
    with pytest.raises(BadInput, match="need 4 objects"):
        pairs(few, "positional", 2, 0)
    compact = BoxTask(boxes=3, **COMPACT).worded(tiny_tokenizer())
    with pytest.raises(BadInput, match="form='sentence'"):
        desideratum(compact, "filler", 2, 0)


# ---- tasks of one's own

ITEMS = [
    Marked("apple is in [[box:Box]] the [[thing:bell]] is", "coin is in [[box:Box]] the [[thing:fish]] is", " in"),
    Marked("the [[thing:coin]] is [[box:in]] the", "the [[thing:bell]] is [[box:in]] the", " fish"),
]  # fmt: skip


def test_marked_texts(tokenizer):
    assert unmarked("a [[x:bc]] d [[y:e]]") == ("a bc d e", {"x": 3, "y": 7})
    clean, corrupt = marked_prompts(tokenizer, ITEMS, pad=0)
    for prompts_, texts in ((clean, ["bell", "coin"]), (corrupt, ["fish", "bell"])):
        for i, word in enumerate(texts):
            token = int(prompts_.ids[i, prompts_.at("thing")[i]])
            assert tokenizer.convert_ids_to_tokens(token) == f"Ġ{word}"
    assert tokenizer.convert_ids_to_tokens(clean.right().tolist()) == ["Ġin", "Ġfish"]
    view = HeadView(llama(vocab_size=len(tokenizer)))
    assert path_patching(view, clean, corrupt).scores.shape == (3, 4)


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([], "at least one item"),
        ([Marked("the [[a:coin]] is", "the bell is", " in")], "mark the same positions"),
        ([Marked("the coin is", "the bell is", " in the")], "not one token"),
        ([Marked("the [[a:coin]] is [[a:in]]", "x", " in")], "marked twice"),
        ([Marked("the [[last:coin]] is", "x", " in")], "marked twice"),
        ([Marked("the [[a:]] is", "x", " in")], "marks no words"),
    ],
)
def test_marked_texts_that_are_refused(items, reason, tokenizer):
    """Multi-token answers, and positions without their counterpart."""
    with pytest.raises(BadInput, match=reason):
        marked_prompts(tokenizer, items, 0)


def test_rows_need_their_counterfactual(tokenizer):
    row = Row("r", "completion", messages=[{"role": "user", "content": "the coin is"},
                                           {"role": "assistant", "content": " in"}])  # fmt: skip
    with pytest.raises(BadInput, match="counterfactual"):
        row_material(tokenizer, [row], 0)


# ---- the analysis

SMALL = {"samples": 4, "evaluation": 6, "means": 6, "minimal_samples": 4, "draws": 2, "halves": 2}


class Bench:
    """A subject over the word tokenizer, whose base is told to know some answers."""

    def __init__(self, folder, tokenizer, rows=()):
        from pegbox.parts.pairs import ModelPair
        from pegbox.parts.task import TASK

        self.name, self.seed, self.folder, self.tokenizer = "tuned", 0, folder, tokenizer
        self.task, self._rows = TASK.validate("text"), list(rows)
        base = llama(vocab_size=len(tokenizer), dtype=torch.float32, num_hidden_layers=2)
        tuned = llama(seed=1, vocab_size=len(tokenizer), dtype=torch.float32, num_hidden_layers=2)
        tuned.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
        self._pair = ModelPair(tuned, base)

    def pair(self):
        return self._pair

    def rows(self, source=None):
        return self._rows


def test_the_whole_story(tokenizer, tmp_path):
    """A cascade in both models, judged, masked and carried over: files, tables and pictures."""
    sizes = {"value fetcher": 4, "position transmitter": 2, "position detector": 2, "structure reader": 2}
    analysis = ANALYZE.validate({
        "kind": "circuits", "task": {"boxes": 3}, "sizes": sizes, **SMALL, "masks": {"samples": 8, "epochs": 1},
        "cross": ["output", "q"], "knockout": True, "estimate": True,
    })  # fmt: skip
    found = analysis.run(Bench(tmp_path, tokenizer))
    assert {"base_accuracy", "tuned_accuracy", "circuit_heads", "random_circuit", "patched_accuracy",
            "attribution_rank_correlation"} <= found.numbers.keys()  # fmt: skip
    forms = {p.form for p in found.pictures}
    assert forms == {"points", "heat", "bars", "lines"}
    circuit = json.loads((tmp_path / "circuit-base.json").read_text())
    assert set(circuit) == set(sizes)
    assert (tmp_path / "scores-base.csv").read_text().startswith("group,layer,head,score\nvalue fetcher,0,0,")
    assert json.loads((tmp_path / "masks.json").read_text())
    titles = [t.title for t in found.tables]
    assert {"What each group carries", "The tuned model's activations in the base", "The base's circuit"} <= set(titles)


def test_a_task_of_ones_own(tokenizer, tmp_path):
    rows = [
        Row(f"r{i}", "completion", messages=[{"role": "user", "content": item.text},
                                             {"role": "assistant", "content": item.answer}],
            meta={"counterfactual": item.counterfactual})
        for i, item in enumerate(ITEMS)
    ]  # fmt: skip
    analysis = ANALYZE.validate({"kind": "circuits", "task": "rows", "find": "prune", **SMALL})
    found = analysis.run(Bench(tmp_path, tokenizer, rows))
    assert found.numbers["circuit_heads"] == 3 * 8  # box, thing, last; nothing is known, so nothing can be pruned
    assert any("answers nothing right" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"masks": {"desiderata": ["shape"]}}, "unknown desideratum 'shape'"),
        ({"cross": ["outputs"]}, "Did you mean 'output'"),
        ({"task": {"form": "compact"}}, "find='prune'"),
        ({"task": "rows"}, "find='prune'"),
        ({"find": "prune", "sizes": {"value fetcher": 2}}, "`stop`"),
        ({"task": "rows", "find": "prune", "masks": {"desiderata": ["object"]}}, "rows have none"),
        ({"stop": 0}, "stop"),
        ({"masks": {"lam": -1}}, "lam"),
        ({"task": {"boxes": 1}}, "boxes"),
    ],
)
def test_options_that_are_refused(options, reason):
    with pytest.raises(BadInput, match=reason):
        ANALYZE.validate({"kind": "circuits", **options})


def test_sizes_beyond_the_model(tokenizer, tmp_path):
    """More heads than there are, before anything is patched."""
    analysis = ANALYZE.validate({"kind": "circuits", "task": {"boxes": 3}, **SMALL})
    with pytest.raises(BadInput, match="20 heads: the model has 8"):
        analysis.run(Bench(tmp_path, tokenizer))


def test_material_is_drawn_apart(tokenizer):
    worded = BoxTask(boxes=3).worded(tokenizer)
    material = box_material(worded, 0, 0, samples=9, evaluation=9, means=9)
    assert not torch.equal(material.clean.ids, material.evaluation.ids)
    assert material.means.answers is None
    assert material.corrupt.answers is None
    again = as_prompts(worded.prompts(worded.questions(9, 0), 0), 0)
    assert torch.equal(material.clean.ids, again.ids)
