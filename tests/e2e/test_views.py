"""Runs over several views of a row: what is trained, how backward is run, what is kept and measured."""

import pytest
import torch

import pegbox
from pegbox.objectives.views import MultiView
from pegbox.recipe import parse_yaml

REPAIR = {"path": "repair", "limit": 6}
COMMON = {"steps": 2, "batch": 2, "micro_batch": 1, "max_length": 900, "suites": [], "eval_split": 0.0}


def train(base, out, **changes):
    overrides = ["prepare=[]", "tuner.r=4", *changes.pop("overrides", [])]
    return pegbox.train("morepair", model=str(base), data=REPAIR, out=out, overrides=overrides, **(COMMON | changes))


def state(run):
    return run.model()[0].state_dict()


def test_backward_per_view_ends_in_the_same_weights(base, tmp_path, monkeypatch):
    """One graph at a time, or one backward over the sum: the same update."""
    quiet = ["objective.neftune=0", "tuner.lora_dropout=0.0"]
    apart = state(train(base, tmp_path / "apart", overrides=quiet))
    monkeypatch.setattr(MultiView, "separable", False)
    summed = state(train(base, tmp_path / "summed", overrides=quiet))
    assert all(torch.allclose(apart[k], summed[k], atol=1e-7) for k in apart)


def test_a_run_keeps_its_templates_and_logs_each_view(base, tmp_path):
    """The artefact's recipe holds templates and weights; the log has a loss per view."""
    run = train(base, tmp_path / "run", overrides=["objective.views.explain=2.0"])
    kept = parse_yaml((tmp_path / "run" / "recipe.yaml").read_text(), "recipe")["recipe"]
    assert kept["data"][0]["templates"] == {"explain": "{answer}\n\n{rationale}"}
    assert kept["objective"]["views"] == {"explain": 2.0}
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "explain/tokens" in log
    assert "first/tokens" in log
    assert run.metrics.cost.training_tokens > 0


def test_merging_costs_nothing_at_inference(base, tmp_path):
    """The merged model has the base's parameters, and answers as the adapter does."""
    from pegbox.artefact import settle
    from pegbox.models import load

    run = train(base, tmp_path / "run")
    tuned, bare = run.model()[0].eval(), load(str(base))[0]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        said = tuned(input_ids=ids).logits
    merged = settle(tuned)
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in bare.named_parameters()}
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, said, atol=1e-5)


def test_too_short_a_length_is_refused_by_row(base, tmp_path):
    """max_length leaves no token of the target."""
    with pytest.raises(pegbox.errors.BadInput, match="no trained token within max_length"):
        train(base, tmp_path / "run", max_length=16)


def test_a_base_can_not_be_packed_without_its_package(base, tmp_path, monkeypatch):
    """A quantized base without bitsandbytes."""
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(pegbox.errors.MissingExtra, match="bitsandbytes"):
        pegbox.train("morepair", model=str(base), data=REPAIR, out=tmp_path / "run", **COMMON)
