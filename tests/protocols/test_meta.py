"""Meta-training and few-shot prediction as whole runs on a tiny model, and which compositions are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import pegbox
from pegbox.analyze.base import ANALYZE
from pegbox.analyze.few_shot import FewShot, option_probabilities
from pegbox.capabilities import Facts, refusals
from pegbox.errors import BadInput, Unsupported
from pegbox.recipe import Recipe, load_recipe
from pegbox.testing import tiny_llama, tiny_tokenizer

COMMON = {"steps": 2, "max_length": 64, "suites": [], "eval_split": 0.0}
SMALL = ["tuner.r=4", "protocol.tasks=2", "protocol.support=2", "protocol.query=2", "optim.inner.steps=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for use, names in (("train", "abc"), ("test", "xy")):
        with (folder / f"{use}.jsonl").open("w") as out:
            for name in names:
                for i in range(7):
                    answer = ("up", "down")[(i + ord(name)) % 2]
                    out.write(json.dumps({"prompt": f"{name} {i}:", "completion": f" {answer}", "task": name}) + "\n")
    return folder


def train(place, out, recipe="abmll", overrides=(), analyses=None, **changes):
    block = load_recipe(recipe, [*SMALL, *overrides]).plain() if isinstance(recipe, str) else recipe
    block["analyze"] = analyses or []
    given = {**COMMON, **changes}
    return pegbox.train(
        block,
        model=str(place / "base"),
        data=str(place / "train.jsonl"),
        test_data=str(place / "test.jsonl"),
        out=out,
        **given,
    )


def test_a_run_measures_unseen_tasks(place, tmp_path):
    look = {"kind": "few_shot", "shots": 4, "samples": 2, "bins": 5}
    run = train(place, tmp_path / "run", analyses=[look])
    assert run.metrics.extra["episodes"] == {"tasks": 2, "support": 2, "query": 2}
    finding = run.metrics.extra["findings"][0]
    assert {"accuracy", "ECE", "Brier", "NLL", "accuracy before", "ECE after temperature"} <= finding["numbers"].keys()
    assert [row[:2] for row in finding["tables"][0]["rows"]] == [["x", 3], ["y", 3]]
    assert finding["pictures"][0]["key"] == "reliability"
    assert len(finding["details"]["probabilities"]) == 6
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    readings = next(r["readings"] for r in log if r.get("readings"))
    assert {"episode/tokens", "episode/kl_to_prior", "episode/prior", "episode/moved"} <= readings.keys()
    assert run.metrics.cost.steps == 2


def test_reptile_and_maml_are_configurations(place, tmp_path):
    """The baselines: the same protocol over plain LoRA."""
    for name, options in {"fomaml": {}, "reptile": {"data_grad": "difference"}, "maml": {"order": 2}}.items():
        recipe = {
            "title": name,
            "tuner": {"kind": "lora", "r": 2, "target_modules": ["q_proj"]},
            "optim": {"kind": "episodic", "inner": {"steps": 1}, **options},
            "protocol": {"kind": "meta", "tasks": 2, "support": 2, "query": 2},
        }
        run = train(place, tmp_path / name, recipe, analyses=[{"kind": "few_shot", "shots": 4}])
        assert run.status == "finished"
        assert 0 <= run.metrics.extra["findings"][0]["numbers"]["accuracy"] <= 1


def test_the_same_seed_gives_the_same_weights(place, tmp_path):
    """Tasks, rows and noise follow from the seed."""
    whole = train(place, tmp_path / "whole").model()[0].state_dict()
    again = train(place, tmp_path / "again").model()[0].state_dict()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_tasks_without_enough_rows(place, tmp_path):
    with pytest.raises(BadInput, match="leave none to predict"):
        train(place, tmp_path / "run", analyses=[{"kind": "few_shot", "shots": 7}], steps=1)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"bins": 0}, {"shots": 0}, {"inner": {"steps": -1}}])
def test_options(wrong):
    with pytest.raises(BadInput):
        ANALYZE.validate({"kind": "few_shot", **wrong})


def test_probabilities_of_options():
    """Length-normalised: an option twice as long with the same log-likelihood per token is as likely."""
    np.testing.assert_allclose(option_probabilities([-2.0, -4.0], [1, 2]), [0.5, 0.5])
    p = option_probabilities([-1.0, -2.0, -3.0], [1, 1, 1])
    np.testing.assert_allclose(p, np.exp([-1.0, -2.0, -3.0]) / np.exp([-1.0, -2.0, -3.0]).sum())
    for scores, lengths in (([], []), ([-1.0], [0])):
        with pytest.raises(BadInput, match="at least one option"):
            option_probabilities(scores, lengths)


def test_rows_without_options():
    from pegbox.data.rows import Row

    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "same"}]
    rows = [Row(str(i), "chat", turn) for i in range(20)]
    tasks = FewShot()._tasks(rows, 0)
    from pegbox.analyze.few_shot import _options

    with pytest.raises(BadInput, match="at least two options"):
        _options(rows[0], tasks[0].options)
    with pytest.raises(BadInput, match="chat or completion"):
        FewShot()._tasks([Row("t", "text", text="hello")], 0)


EPISODIC = {"optim": {"kind": "episodic"}, "protocol": {"kind": "meta"}}
TERMS = {"objective": {"terms": [{"kind": "kl_to_prior"}]}}
GAUSS = {"tuner": {"kind": "bayesian_lora"}}


@pytest.mark.parametrize(
    ("recipe", "facts", "words"),
    [
        ({"optim": {"kind": "episodic"}}, Facts(), "nothing makes any"),
        ({**EPISODIC, "tuner": {"kind": "sparse"}, "select": {"kind": "random"}}, Facts(), "parameters' places"),
        ({**EPISODIC, **TERMS, "tuner": {"kind": "lora"}}, Facts(), "has none"),
        ({**TERMS, **GAUSS}, Facts(), "holds none"),
        ({**EPISODIC, "optim": {"kind": "episodic", "order": 2}, **GAUSS}, Facts(quantized=True), "order 2"),
    ],
)
def test_refusals(recipe, facts, words):
    assert any(words in reason for reason in refusals(Recipe.of(recipe), facts))


def test_what_is_allowed():
    assert not refusals(load_recipe("abmll"))
    assert not refusals(load_recipe("abmll"), Facts(quantized=True))
    assert not refusals(Recipe.of({"optim": {"kind": "episodic"}, "data": [{"kind": "episodes"}], **GAUSS}))
    assert not refusals(Recipe.of(GAUSS))
    assert issubclass(Unsupported, BadInput)
