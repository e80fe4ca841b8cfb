"""Repair rows, bugs by mutation, the built-in set, views from templates, MORepair's one-text form, rationales."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.data import PackingCollator, PaddingCollator, encode_rows, load_rows, load_splits
from pegbox.data.base import DATA
from pegbox.data.policies.views import filled
from pegbox.data.repair import OPERATORS, check, mutants, problem, problems, rows
from pegbox.data.separated import collate_separated, split_ids, split_text
from pegbox.data.viewed import joined
from pegbox.errors import BadInput
from pegbox.parts.context import Context
from pegbox.parts.generation import Scripted
from pegbox.parts.rationales import Pair, explain, request, usable

EOS = 2


def collate(features, **options):
    return collate_separated(features, **{"eos_id": EOS, "max_length": 32, "loss_on": "all", **options})


# ---- the one-text form


@pytest.mark.parametrize(
    ("ids", "options", "pred", "expl"),
    [
        ([5, 6, 2, 7, 2, 7, 8, 2], {}, [5, 6, 7, 2], [5, 6, 7, 8, 2, 2]),
        ([5, 6, 2, 7, 2, 7, 8], {}, [5, 6, 7, 2], [5, 6, 7, 8, 2]),  # no end of its own
        ([5, 2, 7, 2, 2], {}, [5, 7, 2], [5, 2, 2]),  # empty rationale
        ([5, 6, 2, 7, 8, 2, 9, 2], {"max_length": 5}, [5, 6, 7, 8, 2], [5, 6, 9, 2, 2]),  # exactly as long
        ([5, 6, 2, 7, 8, 2, 9, 9, 2], {"max_length": 4}, [5, 6, 7, 2], [5, 6, 9, 2]),  # cut behind
        ([5, 3, 4, 7, 3, 4, 8], {"separator": [3, 4]}, [5, 7, 2], [5, 8, 2]),  # separator of several tokens
        ([5, 3, 3, 4, 7, 3, 4, 8, 3, 4], {"separator": [3, 4]}, [5, 3, 7, 2], [5, 3, 8, 3, 4, 2]),
    ],
)
def test_token_lists(ids, options, pred, expl):
    """Exact token lists: ends, empty rationale, the very length, separators of several tokens."""
    found = collate([ids], **options)
    assert found["pred"]["input_ids"].tolist() == [pred]
    assert found["expl"]["input_ids"].tolist() == [expl]


def test_a_code_fence_in_the_target_is_kept(tokenizer):
    """The fence is text as any other."""
    eos = tokenizer.eos_token_id
    parts = ["Fix it:", "```python\nx = 1\n```", "```python\nx = 1\n```\nIt was 0."]
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in parts]
    found = collate_separated([[*ids[0], eos, *ids[1], eos, *ids[2], eos]], eos_id=eos, max_length=200)
    assert tokenizer.decode(found["pred"]["input_ids"][0]) == parts[0] + parts[1] + tokenizer.eos_token
    assert split_text("</s>".join(parts) + "</s>", "</s>") == tuple(parts)


def test_labels_of_the_target_alone():
    """loss_on target: no label on prompt or padding, the end is one. loss_on all, eos_as_pad: the published form."""
    features = [[5, 6, 7, 2, 8, 2, 9, 9, 2], [5, 2, 8, 8, 8, 8, 2, 9, 2]]
    ours = collate(features, loss_on="target")["pred"]
    assert ours["labels"].tolist() == [[-100, -100, -100, 8, 2, -100], [-100, 8, 8, 8, 8, 2]]
    theirs = collate(features, eos_as_pad=True)["pred"]
    assert theirs["labels"].tolist() == [[5, 6, 7, 8, -100, -100], [5, 8, 8, 8, 8, -100]]


@pytest.mark.parametrize("ids", [[5, 6], [5, 2, 6], []])
def test_fewer_than_two_separators_are_refused(ids):
    with pytest.raises(BadInput, match="needs two"):
        collate([ids])


@pytest.mark.parametrize("ids", [[5, 2, 6, 2, 7, 2, 8], [5, 2, 6, 2, 7, 2, 8, 2]])
def test_an_end_inside_the_input_is_refused(ids):
    """It can't be told where the parts begin."""
    with pytest.raises(BadInput, match="can't be told apart"):
        collate([ids])
    with pytest.raises(BadInput, match="can't be told apart"):
        split_text("a</s>b</s>c</s>d", "</s>")


def test_other_bad_samples_are_refused():
    """Empty OBJ1; a tokenizer without EOS; max_length too small for one token of the target."""
    with pytest.raises(BadInput, match="empty first target"):
        collate([[5, 2, 2, 6]])
    with pytest.raises(BadInput, match="empty first target"):
        split_text("a</s> </s>c", "</s>")
    with pytest.raises(BadInput, match="no end-of-sequence"):
        collate([[5, 2, 6, 2, 7]], eos_id=None)
    with pytest.raises(BadInput, match="separator is empty"):
        split_ids([1], [])
    with pytest.raises(BadInput, match="no token of the target"):
        collate([[5, 5, 5, 5, 2, 6, 2, 7]], max_length=5, loss_on="target")
    assert collate([[5, 5, 5, 2, 6, 2, 7]], max_length=5, loss_on="target")["pred"]["labels"][0, 3] == 6


@given(st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=5), min_size=3, max_size=3), st.integers(1, 2))
def test_parts_come_back(parts, size):
    mark = [2] * size
    ids = [*parts[0], *mark, *parts[1], *mark, *parts[2]]
    assert list(split_ids(ids, mark)) == parts


# ---- bugs


def test_every_operator_makes_bugs_and_says_what_they_are():
    """The reason names the line, what stands there and what should: exact, as it is written by who made the bug."""
    code = "def f(a, b):\n    n = 0\n    for i in range(a):\n        n += max(i, b)\n    return n"
    found = mutants(code)
    assert {m.operator for m in found} == set(OPERATORS)
    right = code.splitlines()
    for mutant in found:
        wrong = mutant.code.splitlines()
        changed = [i for i, (a, b) in enumerate(zip(right, wrong, strict=True), start=1) if a != b]
        assert changed == [mutant.line]
        assert f"`{wrong[mutant.line - 1].strip()}`" in mutant.rationale
        assert f"should be `{right[mutant.line - 1].strip()}`" in mutant.rationale
        ast.parse(mutant.code)
    assert len({m.code for m in found}) == len(found)


def test_code_that_does_not_parse_is_refused():
    with pytest.raises(BadInput, match="does not parse"):
        mutants("def f(:")


def test_a_problem_keeps_the_bugs_that_its_tests_find():
    entry = problem("inc", "One more.", "def inc(x):\n    return x + 1", "assert inc(1) == 2")
    assert len(entry["bugs"]) == len(mutants(entry["code"]))
    with pytest.raises(BadInput, match="fails its own tests"):
        problem("inc", "", "def inc(x):\n    return x", "assert inc(1) == 2")
    with pytest.raises(BadInput, match="sharper"):
        problem("inc", "", "def inc(x):\n    return x + 1", "assert True")


def test_the_built_in_set():
    """At least 30 bugs to test on; no function in two splits; prompts hold the bug, answers the repair."""
    made = {split: rows(split, 1000) for split in ("train", "validation", "test")}
    assert len(made["test"]) >= 30
    assert len(made["train"]) >= 150
    groups = [{row.group for row in found} for found in made.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert {row.task for row in made["test"]} == set(OPERATORS)
    for row in (r for found in made.values() for r in found):
        assert row.meta["buggy"] in row.messages[0]["content"]
        assert row.meta["fixed"] in row.messages[1]["content"]
        assert row.meta["rationale"]
    assert len({row.id for row in made["train"]}) == len(made["train"])


def test_bugs_fail_and_repairs_pass():
    """Three rows of the test split, run; the whole set was run when it was made."""
    for row in rows("test", 3, seed=1):
        assert check(row, row.messages[1]["content"])
        assert not check(row, f"```python\n{row.meta['buggy']}\n```")


@pytest.mark.slow
def test_every_bug_of_the_set_fails_and_every_function_passes():
    from pegbox.parts.languages import Job, check_all

    for entry in problems():
        made = mutants(entry["code"])
        jobs = [Job("python", c, entry["tests"]) for c in (entry["code"], *(made[i].code for i in entry["bugs"]))]
        assert [o.passed for o in check_all(jobs)] == [True] + [False] * len(entry["bugs"])


def test_rows_of_a_seed_begin_alike_and_families_choose():
    assert [r.id for r in rows("train", 5)] == [r.id for r in rows("train", 20)[:5]]
    assert [r.id for r in rows("train", 5)] != [r.id for r in rows("train", 5, seed=1)]
    assert {r.task for r in rows("train", 9, families=("wrong_init",))} == {"wrong_init"}
    for bad in ({"split": "all", "n": 1}, {"split": "test", "n": 0}, {"split": "test", "n": 1, "families": ("x",)}):
        with pytest.raises(BadInput, match="repair:"):
            rows(**bad)


def test_the_set_is_a_source_with_splits_of_its_own():
    splits = load_splits("repair")
    assert {len(splits.train), len(splits.test)} == {len(rows("train", 999)), len(rows("test", 999))}
    assert len(load_rows("repair:test:7").rows) == 7


# ---- formats


def read(tmp_path, *records, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return load_rows(path, **options).rows


REPAIR = {"buggy": "x = 1", "fixed": "x = 2", "rationale": "One too few.", "tests": "assert x == 2", "problem": "Two."}


def test_columns_become_a_prompt_an_answer_and_what_judges_it(tmp_path):
    (row,) = read(tmp_path, REPAIR)
    assert row.messages[0]["content"].startswith("Two.\n\n")
    assert row.messages[1]["content"] == "```python\nx = 2\n```"
    assert check(row, row.messages[1]["content"])
    assert not check(row, "```python\nx = 1\n```")
    (mapped,) = read(tmp_path, {"a": "x", "fixed": "y", "why": "z"}, mapping={"buggy": "a", "rationale": "why"})
    assert mapped.meta["rationale"] == "z"
    assert mapped.answer is None


def test_humaneval_columns(tmp_path):
    record = {
        "task_id": "Python/0",
        "declaration": "def inc(x):\n",
        "buggy_solution": "    return x\n",
        "canonical_solution": "    return x + 1\n",
        "test": "def check(f):\n    assert f(1) == 2\n",
        "entry_point": "inc",
    }
    (row,) = read(tmp_path, record)
    assert check(row, row.messages[1]["content"])
    assert not check(row, row.meta["buggy"])


def test_the_published_form_is_read(tmp_path):
    (row,) = read(tmp_path, {"separated": "Fix: a</s>b</s>b because c</s>"})
    assert row.kind == "completion"
    policy = DATA.validate({"kind": "views", "templates": {"explain": "{second}"}})
    assert policy.views([row], ["explain"])["explain"][0].messages[1]["content"] == "b because c"
    (other,) = read(tmp_path, {"separated": "a<eot>b<eot>c", "eos": "<eot>"})
    assert other.messages[1]["content"] == "b"


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({**REPAIR, "fixed": " "}, "missing or empty"),
        ({**REPAIR, "language": "cobol"}, "Unknown language"),
        ({"separated": "a</s>b"}, "needs two"),
        ({"separated": 3}, "expected text"),
        ({"buggy_solution": "a", "canonical_solution": "b", "test": " "}, "missing or empty"),
    ],
)
def test_bad_rows_are_refused(tmp_path, record, word):
    with pytest.raises(BadInput, match=word):
        read(tmp_path, record)


# ---- views


def repair_row(**changes):
    base = rows("train", 1)[0]
    return replace(base, meta={**base.meta, **changes})


def test_a_view_is_the_answer_and_then_the_reason():
    row = repair_row()
    policy = DATA.validate("views")
    (view,) = policy.views([row], ["explain"])["explain"]
    assert view.messages[1]["content"] == f"{row.messages[1]['content']}\n\n{row.meta['rationale']}"
    assert view.messages[0] == row.messages[0]
    assert view.id == row.id
    assert policy.views([row], []) == {}
    assert policy.rewrite([row])[0] is row


def test_reasons_first_and_prompts_of_their_own():
    """Fine-tune-CoT is one view with the reason in front; a view may have another prompt."""
    row = repair_row()
    policy = DATA.validate(
        {
            "kind": "views",
            "answer": "{rationale}\n\n{answer}",
            "templates": {"why": "{rationale}"},
            "prompts": {"why": "{prompt}\nExplain."},
        }
    )
    assert policy.rewrite([row])[0].messages[1]["content"].startswith(row.meta["rationale"])
    (view,) = policy.views([row], ["why"])["why"]
    assert view.messages[0]["content"].endswith("\nExplain.")
    assert view.messages[1]["content"] == row.meta["rationale"]


def test_a_missing_rationale_is_refused_or_left_out():
    """The rationale column is missing and the view's weight is above 0."""
    good, bad = repair_row(), repair_row(rationale="")
    with pytest.raises(BadInput, match="1 of 2 rows lack"):
        DATA.validate("views").views([good, bad], ["explain"])
    lenient = DATA.validate({"kind": "views", "missing": "leave_out"})
    assert len(lenient.views([good, bad], ["explain"])["explain"]) == 1
    with pytest.raises(BadInput, match="1 of 1 rows lack"):
        lenient.views([bad], ["explain"])
    only_code = repair_row(rationale=good.messages[1]["content"])
    with pytest.raises(BadInput, match="rows lack"):
        DATA.validate("views").views([only_code], ["explain"])
    with pytest.raises(BadInput, match="rows lack"):
        DATA.validate({"kind": "views", "longest": 3}).views([good], ["explain"])


@pytest.mark.parametrize(
    ("block", "word"),
    [
        ({"templates": {"a b": "x"}}, "no name for a view"),
        ({"templates": {"a": " "}}, "is empty"),
        ({"prompts": {"b": "x"}}, "no template of that name"),
    ],
)
def test_bad_templates_are_refused(block, word):
    with pytest.raises(BadInput, match=word):
        DATA.validate({"kind": "views", **block})


def test_braces_that_are_no_column_stay():
    assert filled("{a} {} { x }", {"a": "1"}) == "1 {} { x }"
    assert filled("{a}{b}", {"a": "1"}) is None


def viewed(tokenizer, found, **options):
    policy = DATA.validate({"kind": "views", **options})
    others = {n: encode_rows(v, tokenizer) for n, v in policy.views(found, ["explain"]).items()}
    return joined(encode_rows(found, tokenizer), others, ["explain"])


def test_batches_hold_a_batch_per_view(tokenizer):
    """Own padding, own sample ids; labels on the target and its end alone."""
    found = rows("train", 3)
    examples = viewed(tokenizer, found)
    batch = PaddingCollator(258)(list(examples))
    view = batch["views"]["explain"]
    assert view["input_ids"].shape[1] > batch["input_ids"].shape[1]
    assert not set(view["sample_ids"].tolist()) & set(batch["sample_ids"].tolist())
    for one, row in zip(range(3), found):
        for side, text in ((batch, row.messages[1]["content"]), (view, row.meta["rationale"])):
            labels = side["labels"][one]
            said = tokenizer.decode(labels[labels >= 0])
            assert said.endswith(tokenizer.eos_token)
            assert text in said
            assert row.messages[0]["content"] not in said
    assert sum(examples.lengths) == int(batch["attention_mask"].sum() + view["attention_mask"].sum())
    packed = PackingCollator(258, capacity=4096)(list(examples))
    assert packed["views"]["explain"]["sequence_ids"].max() == 2


def test_a_row_without_a_view_is_in_the_batch_all_the_same(tokenizer):
    found = [rows("train", 2)[0], replace(rows("train", 2)[1], meta={})]
    batch = PaddingCollator(258)(list(viewed(tokenizer, found, missing="leave_out")))
    assert batch["input_ids"].shape[0] == 2
    assert batch["views"]["explain"]["input_ids"].shape[0] == 1


def test_ends_are_no_labels_where_padding_is_known_by_its_id(tokenizer, llama):
    policy = DATA.validate({"kind": "views", "eos_as_pad": True})
    labels = torch.tensor([[-100, 5, tokenizer.eos_token_id]])
    batch = policy.on_batch(None, {"labels": labels}, Context(llama, tokenizer=tokenizer))
    assert batch["labels"].tolist() == [[-100, 5, -100]]
    with pytest.raises(BadInput, match="no end-of-sequence"):
        policy.setup(Context(llama))


def test_corruption_reaches_every_view(llama, tokenizer):
    """A policy that acts on tokens acts on each view, with draws of its own."""
    from types import SimpleNamespace

    from pegbox.engine.seams import Seams

    batch = PaddingCollator(258)(list(viewed(tokenizer, rows("train", 3))))
    schedule = {"kind": "constant"}
    policy = DATA.validate({"kind": "corruption", "rate": 0.5, "form": "existing", "token": 3, "schedule": schedule})
    ctx = Context(llama, tokenizer=tokenizer, total_steps=10)
    trainer = SimpleNamespace(policies=[policy], states={"data.0": policy.setup(ctx)}, ctx=ctx)
    found = Seams.through_policies(trainer, batch)
    for before, after in ((batch, found), (batch["views"]["explain"], found["views"]["explain"])):
        hit = before["input_ids"] != after["input_ids"]
        assert 0.3 < float(hit.sum() / (before["labels"] >= 0).sum()) < 0.7
        assert not hit[before["labels"] < 0].any()


def test_views_of_other_rows_are_refused(tokenizer):
    one, two = rows("train", 2)
    with pytest.raises(BadInput, match="that the training set has not"):
        joined(encode_rows([one], tokenizer), {"explain": encode_rows([two], tokenizer)}, ["explain"])
    with pytest.raises(BadInput, match="No data policy made"):
        joined(encode_rows([one], tokenizer), {}, ["explain"])


# ---- rationales


def test_rationales_are_asked_once_and_kept(tmp_path: Path):
    """Any responder writes them; a cache on disk holds what was asked; useless ones come back empty."""
    pairs = [Pair("a - b", "a + b", "Add."), Pair("x", "y")]
    asked = Scripted(lambda m: "The sign was wrong." if "Add." in m[-1]["content"] else "```\ny\n```")
    cache = tmp_path / "why.jsonl"
    assert explain(pairs, asked, cache=cache) == ["The sign was wrong.", ""]
    assert explain(pairs, asked, cache=cache) == ["The sign was wrong.", ""]
    assert len(asked.asked) == 2
    assert "a - b" in request(pairs[0])[0]["content"]
    cache.write_text("broken\n")
    with pytest.raises(BadInput, match="line 1"):
        explain(pairs, asked, cache=cache)
    with pytest.raises(BadInput, match="lacks its buggy"):
        explain([Pair(" ", "y")], asked)


def test_what_a_usable_rationale_is():
    assert usable("Off by one.", "x = 1")
    assert not usable("  ")
    assert not usable("x = 1", "x = 1")
    assert not usable("long " * 10, longest=20)
