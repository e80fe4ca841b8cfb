"""A task learnt over several languages at once: their differences act while it trains, and compose with it later."""

import json

import pytest
import torch
from transformers import TrainerCallback

import pegbox
from pegbox.artefact import settle
from pegbox.errors import BadInput, WrongBase
from pegbox.models import load
from pegbox.parts import deltas
from pegbox.parts.differences import read_difference
from pegbox.recipe import load_recipe
from pegbox.testing import tiny_llama, tiny_tokenizer


class Breaks(TrainerCallback):
    """Ends training with an error before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("on purpose")


COMMON = {"batch": 4, "micro_batch": 2, "max_length": 200, "suites": [], "eval_split": 0.25}


@pytest.fixture(scope="module")
def languages(base, rows, tmp_path_factory):
    """Runs that each left a sparse difference, and rows that say which language they are in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEGBOX_CACHE", str(base / "cache"))
        folder = tmp_path_factory.mktemp("languages")
        data = {"en": folder / "en.jsonl", "de": folder / "de.jsonl"}
        for name, path in data.items():
            chat = [
                {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": str(i)}]}
                for i in range(12)
            ]
            path.write_text("".join(json.dumps(r) + "\n" for r in chat))
        runs = {
            name: pegbox.train(
                "lt-sft", model=str(base), data=str(path), out=folder / f"run-{name}", steps=3,
                overrides=["optim.lr=1e-2"], **COMMON,
            )
            for name, path in data.items()
        }  # fmt: skip
        yield runs, data, folder


def multi(languages, **options):
    runs, _, _ = languages
    policy = {"kind": "multi_source", "parts": {name: str(run.path) for name, run in runs.items()}, **options}
    return {**load_recipe("lt-sft").plain(), "data": [policy]}


def sources(languages, tagged=True):
    return [{"path": str(path), **({"task": name} if tagged else {})} for name, path in languages[1].items()]


def test_a_task_over_two_languages_composes_with_each(languages, base, tmp_path):
    """The task's run holds its own difference alone; base + language + task is what `load` of both gives."""
    runs, _, _ = languages
    task = pegbox.train(
        multi(languages, upsampling={"de": 2}), model=str(base), data=sources(languages), out=tmp_path / "task",
        steps=3, overrides=["optim.lr=1e-2", "train.eval_every=1"], **COMMON,
    )  # fmt: skip
    plain = dict(load(str(base))[0].named_parameters())
    model = load(str(base))[0]
    parts = [read_difference(run.path, model) for run in (task, runs["de"])]
    assert parts[0].entries()
    weights = {n: p.detach().clone() for n, p in plain.items()}
    for part in parts:
        deltas.apply(part, weights)
    both = settle(pegbox.load([str(task.path), str(runs["de"].path)])[0])
    for name, p in both.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-6)
    swapped = settle(pegbox.load([str(task.path), str(runs["en"].path)])[0])
    assert any(not torch.equal(p, dict(swapped.named_parameters())[n]) for n, p in both.named_parameters())
    alone = settle(pegbox.load([str(task.path)])[0])
    moved = {n for n, p in alone.named_parameters() if not torch.equal(p, plain[n])}
    assert moved == {n for n, piece in parts[0].items() if bool((piece.values != 0).any())}


def test_a_resumed_run_swaps_on_as_it_would_have(languages, base, tmp_path):
    """Stopped after two of four steps and resumed: the same difference bit for bit."""
    recipe = multi(languages)
    recipe["protocol"] = {"kind": "single"}
    recipe["tuner"] = {"kind": "sparse", "coordinates": "delta"}
    recipe["select"] = {"kind": "random", "budget": {"density": 0.05}}
    options = {
        "model": str(base),
        "data": sources(languages),
        "overrides": ["optim.lr=1e-2", "train.save_every=1"],
        **COMMON,
    }
    whole = pegbox.train(recipe, out=tmp_path / "whole", steps=4, **options)
    with pytest.raises(RuntimeError, match="on purpose"):
        pegbox.train(recipe, out=tmp_path / "part", steps=4, callbacks=[Breaks(2)], **options)
    again = pegbox.train(recipe, out=tmp_path / "part", steps=4, resume=True, **options)
    one, other = (read_difference(run.path, tiny_llama(max_position_embeddings=1024)) for run in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n].values, other[n].values) for n in one)


def test_rows_without_a_language_are_refused(languages, base, tmp_path):
    with pytest.raises(BadInput, match="rows without a source"):
        pegbox.train(
            multi(languages), model=str(base), data=sources(languages, tagged=False), out=tmp_path / "a", steps=2,
            **COMMON,
        )  # fmt: skip


def test_a_language_of_another_base_is_refused_unless_allowed(languages, tmp_path):
    """The fingerprint recorded with the difference is another one's; `other_base` takes it all the same."""
    tiny_llama(seed=5, max_position_embeddings=1024).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    options = {"model": str(tmp_path / "other"), "data": sources(languages), "steps": 2, **COMMON}
    with pytest.raises(WrongBase, match="made on the base"):
        pegbox.train(multi(languages), out=tmp_path / "a", **options)
    pegbox.train(multi(languages, other_base=True), out=tmp_path / "b", **options)


def test_an_artefact_that_is_given_twice_is_refused(languages):
    runs, _, _ = languages
    with pytest.raises(BadInput, match="twice"):
        pegbox.load([str(runs["de"].path), str(runs["de"].path)])
