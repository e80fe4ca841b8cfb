"""Recipes that train nothing: analyses of a finished run from the command line, and its weights worked on."""

import json

import pytest
import torch
from typer.testing import CliRunner

import pegbox
from pegbox.ask import answers
from pegbox.cli.main import app

NETWORK = {"path": "network", "limit": 8, "families": ["subnet"]}
COMMON = {"steps": 2, "batch": 2, "micro_batch": 2, "max_length": 400, "suites": [], "eval_split": 0.25}
QUICK = ["analyze.0.steps=2", "analyze.0.profile=[0,0.5,1]", "analyze.0.grid=[0,0.5,1]", "analyze.0.batch=2"]


@pytest.fixture(scope="module", params=["lora", "full"])
def tuned(request, base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEGBOX_CACHE", str(base / "cache"))
        out = tmp_path_factory.mktemp(request.param) / "tuned"
        small = ["tuner.r=4", "optim.lr=1e-2"] if request.param == "lora" else ["optim.lr=1e-3"]
        return pegbox.train(request.param, model=str(base), data=NETWORK, out=out, overrides=small, **COMMON)


def analyzed(recipe, run, out, *more):
    done = CliRunner().invoke(
        app,
        ["analyze", recipe, *more, "--limit", "4", "--tuned", str(run.path), "--out", str(out), "--json"],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.output[done.output.index("{") :])


BOXES = {"boxes": 3, "form": "compact", "objects": list("abcdefghijk"), "labels": list("ABCDEFGH")}
FEW = {"samples": 4, "evaluation": 6, "means": 6, "minimal_samples": 4, "draws": 2, "halves": 2}
CIRCUITS = [f"analyze.0.{k}={json.dumps(v)}" for k, v in ({"find": "prune", "task": BOXES, **FEW}).items()]
CIRCUITS += ["analyze.0.masks.samples=8", "analyze.0.masks.epochs=1"]


@pytest.mark.parametrize(("recipe", "more"), [("tuco", []), ("clip-sharpness", QUICK), ("entity-tracking", CIRCUITS)])
def test_a_run_is_analysed_with_its_own_rows(recipe, more, tuned, tmp_path):
    """Base and rows come from the run; numbers and pictures are in the report."""
    found = analyzed(recipe, tuned, tmp_path / "out", *more)
    (finding,) = found["findings"]
    assert finding["subject"] == "tuned"
    assert finding["numbers"]
    assert finding["pictures"]
    page = pegbox.open_run(tmp_path / "out").report()[0].read_text()
    assert finding["title"] in page
    assert "<svg" in page


def test_wise_ft_of_a_run(tuned, base, tmp_path):
    from pegbox.artefact import settle
    from pegbox.models import load

    half = pegbox.train(
        "wise-ft", model=str(base), out=tmp_path / "half", suites=[], test_data=NETWORK,
        overrides=[f"models.tuned={tuned.path}", "weights.0.amount=0.25"],
    )  # fmt: skip
    ends = [dict(settle(m).named_parameters()) for m in (load(str(base))[0], tuned.model()[0])]
    for name, weight in half.model()[0].named_parameters():
        assert torch.allclose(weight, torch.lerp(ends[0][name], ends[1][name], 0.25), atol=1e-6), name


def test_tuning_is_scaled_while_a_run_answers(tuned):
    """`pegbox generate RUN --decode scaled`: alpha 1 is the run's own answer."""
    ask = [[{"role": "user", "content": "hello"}]]
    own = answers(str(tuned.path), ask, max_new_tokens=6)[0]
    texts = {
        a: answers(str(tuned.path), ask, max_new_tokens=6, decode={"kind": "scaled", "alpha": a}) for a in (1.0, 0.3)
    }
    assert list(texts[1.0][0].values())[1] == list(own.values())[1]
    assert len(texts[0.3]) == 1
