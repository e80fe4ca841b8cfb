"""Roles share what can be shared: each base is loaded once, views are exact and undone."""

from __future__ import annotations

import pytest
import torch

from pegbox.artefact import ArtefactWriter, Pool, load_artefact
from pegbox.artefact import pool as pools
from pegbox.errors import BadInput, Unsupported
from pegbox.models import load
from pegbox.recipe import Role
from pegbox.testing import tiny_llama

from .helpers import LORA, tuned_model

IDS = torch.arange(14)[None]


@pytest.fixture
def runs(source, tmp_path):
    """Two LoRA runs and a full one on the same base."""
    for number, (name, block) in enumerate({"a": LORA, "b": LORA, "full": {"kind": "full"}}.items()):
        tuner, model = tuned_model(source, block, seed=number)
        with ArtefactWriter(tmp_path / name / "artefact", source) as writer:
            writer.add_tuner(tuner, model)
    return tmp_path


@pytest.fixture
def loads(monkeypatch):
    """How often a base was loaded."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(pools, "load", counted)
    monkeypatch.setattr("pegbox.artefact.load.load", counted)
    return calls


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_adapters_of_several_runs_share_one_base_and_answer_as_themselves(source, runs, loads):
    expected = {name: logits(load_artefact(runs / name).model) for name in ("a", "b", "full")}
    loads.clear()
    roles = {name: Role(of=str(runs / name)) for name in expected}
    pool = Pool({**roles, "bare": Role(of=str(source.path))}, source)
    for _ in range(2):
        for name in ("a", "b", "full", "a"):
            assert torch.equal(logits(pool[name]), expected[name])
        assert torch.equal(logits(pool["bare"]), logits(tiny_llama().eval()))
    assert len(loads) == 2  # a and b and bare together, full alone
    assert pool["a"].model is pool["b"].model is pool["bare"].model
    assert not any(p.requires_grad for p in pool["a"].model.parameters())


def test_the_runs_own_base_is_a_view_of_the_policy(source, loads):
    tuner, policy = tuned_model(source, LORA)
    loads.clear()
    roles = {"teacher": Role(of="base", adapter=False), "me": Role(of="base"), "same": Role(of=str(source.path))}
    pool = Pool(roles, source, policy=policy, reference=lambda: tuner.reference(policy))
    tuned = logits(policy)
    assert torch.equal(logits(pool["teacher"]), logits(tiny_llama().eval()))
    assert torch.equal(logits(pool["same"]), logits(tiny_llama().eval()))
    assert torch.equal(logits(pool["me"]), tuned)
    assert torch.equal(logits(policy), tuned)
    assert not loads
    assert not list(pool["teacher"].parameters())
    with pool["teacher"].active() as model:
        assert torch.equal(logits(model), logits(tiny_llama().eval()))


def test_without_a_reference_view_a_frozen_copy_is_loaded_once(source, loads):
    roles = {"teacher": Role(of="base", adapter=False), "again": Role(of=str(source.path))}
    pool = Pool(roles, source, policy=tuned_model(source, {"kind": "full"})[1])
    assert torch.equal(logits(pool["teacher"]), logits(tiny_llama().eval()))
    assert pool["again"].model is pool["teacher"].model
    assert len(loads) == 1


def test_a_runs_bare_base_by_adapter_off(source, runs, loads):
    pool = Pool({"x": Role(of=str(runs / "a"), adapter=False)}, source)
    assert torch.equal(logits(pool["x"]), logits(tiny_llama().eval()))


def test_an_error_inside_a_view_still_ends_it(source, runs):
    pool = Pool({name: Role(of=str(runs / name)) for name in "ab"}, source)
    expected = logits(pool["a"])
    with pytest.raises(ZeroDivisionError), pool["b"].active():
        _ = 1 / 0
    assert torch.equal(logits(pool["a"]), expected)
    generated = pool["b"].generate(IDS, max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 16)


def test_roles_that_do_not_exist_are_named(source):
    pool = Pool({"teacher": Role(of="base")}, source)
    with pytest.raises(BadInput, match="Did you mean 'teacher'"):
        pool["teecher"]
    with pytest.raises(Unsupported, match="none trains"):
        pool["teacher"]
    assert list(pool) == ["teacher"]
    assert len(pool) == 1


def test_what_a_run_was_tuned_from_has_a_name_of_its_own(source, runs, loads):
    """ "<role>.base" is the run's model with its adapter off, held once; a plain model doesn't know its own."""
    pool = Pool(
        {"a": Role(of=str(runs / "a")), "full": Role(of=str(runs / "full")), "x": Role(of=str(source.path))}, source
    )
    for name in ("a.base", "full.base"):
        assert torch.equal(logits(pool[name]), logits(tiny_llama().eval()))
    assert pool["a.base"].model is pool["a"].model
    assert not torch.equal(logits(pool["a"]), logits(pool["a.base"]))
    with pytest.raises(KeyError):
        pool["x.base"]
    assert list(pool) == ["a", "full", "x"]


def test_a_reward_model_is_loaded_as_what_it_is(tmp_path, source):
    from transformers import LlamaForSequenceClassification

    from pegbox.testing import tiny_tokenizer

    config = tiny_llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    tiny_tokenizer().save_pretrained(tmp_path / "scorer")
    pool = Pool({"reward": Role(of=str(tmp_path / "scorer"), task="sequence-classification")}, source)
    assert logits(pool["reward"]).shape == (1, 1)
