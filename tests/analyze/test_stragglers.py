"""Paths and straggler layers: pure numbers, a picture classifier, and whole runs on text."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pegbox
from analyze.nets import Vision, loss, pictures, same, snapshot
from parts.pair_models import adapted
from pegbox.analyze.groups import layers_of
from pegbox.analyze.path import barrier, gain, interpolation_curve, kendall, spearman, summarise, walking
from pegbox.analyze.stragglers import LayerScore, excess, lag, layer_profile, pick_stragglers
from pegbox.errors import BadInput
from pegbox.testing import tiny_llama, tiny_tokenizer
from pegbox.weights.sparsify import sparsify_update

GRID = [0.0, 0.25, 0.5, 0.75, 1.0]


# ---- numbers


def test_barrier_gain_and_failure():
    hump = [1.0, 1.5, 2.0, 1.5, 1.0]
    assert barrier(GRID, hump) == pytest.approx(1.0)
    assert barrier(GRID, [1.0, 0.75, 0.5, 0.25, 0.0]) == 0.0
    told = summarise(GRID, [0.5, 0.6, 0.7, 0.6, 0.4])
    assert (told.gain, told.interior, told.best, told.failure) == (pytest.approx(0.2), pytest.approx(0.2), 0.5, False)
    failing = summarise(GRID, [0.5, 0.4, 0.3, 0.45, 0.6])
    assert failing.failure
    assert failing.gain == pytest.approx(0.1)
    assert failing.interior == pytest.approx(-0.05)
    assert summarise(GRID, [0.5] * 5).failure  # not better is no gain
    assert gain(GRID, [0.5] * 5) == 0.0


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=5))
def test_the_barrier_is_never_below_the_ends(values):
    assert barrier(GRID, values) >= 0.0
    assert excess(GRID, values) == pytest.approx(barrier(GRID, values))


def test_lag_is_where_most_of_the_drop_is_reached():
    assert lag(GRID, [1.0, 0.05, 0.02, 0.01, 0.0]) == 0.25
    assert lag(GRID, [1.0, 0.9, 0.8, 0.7, 0.0]) == 1.0
    assert lag(GRID, [1.0, 1.1, 1.2, 1.1, 1.0]) == 0.0


def test_stragglers_by_rule():
    scores = {f"l{i}": LayerScore(barrier=0.0, sharpness=float(i), lag=0.25) for i in range(10)}
    assert pick_stragglers(scores) == ["l9"]  # ties in barrier are broken by sharpness
    scores["l3"] = LayerScore(barrier=2.0)
    assert pick_stragglers(scores) == ["l3"]
    assert pick_stragglers(scores, share=0.2) == ["l3", "l9"]
    assert pick_stragglers(scores, rule="outliers") == ["l3"]
    assert pick_stragglers(scores, by="sharpness", share=0.1) == ["l9"]
    assert pick_stragglers({"only": LayerScore()}) == ["only"]
    with pytest.raises(BadInput, match="no layer"):
        pick_stragglers({})
    with pytest.raises(BadInput, match="share"):
        pick_stragglers(scores, share=0.0)


def test_rank_correlations():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert math.isnan(spearman([1, 1], [1, 2]))
    with pytest.raises(BadInput, match="at least two runs"):
        spearman([1], [1])


def test_correlations_agree_with_scipy():
    scipy = pytest.importorskip("scipy.stats")
    x, y = [1.0, 2.0, 2.0, 5.0, 0.5, 3.0], [2.0, 1.0, 4.0, 4.0, 0.0, 3.0]
    assert spearman(x, y) == pytest.approx(scipy.spearmanr(x, y).statistic)
    assert kendall(x, y) == pytest.approx(scipy.kendalltau(x, y).statistic)


# ---- a picture classifier


def two_classifiers():
    base = Vision()
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p += (0.5 if name.startswith("body") else 0.02) * torch.randn(p.shape, generator=generator)
        tuned.seen += 7
        tuned.norm.running_mean += 0.1
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (base, tuned)]
    return base.eval(), tuned.eval(), *states


@torch.no_grad()
def test_the_path_of_any_torch_model():
    """Ends are the two models (norm statistics and integers too); the model is at the base afterwards."""
    base, tuned, start, end = two_classifiers()
    batch, kept = pictures(), snapshot(base)

    def logits(model):
        return model(batch[0]), int(model.seen)

    expected = [logits(base), logits(tuned)]
    curve = interpolation_curve(base, start, end, logits, GRID)
    assert torch.equal(curve[0][0], expected[0][0])
    assert torch.equal(curve[-1][0], expected[1][0])
    assert [c[1] for c in curve] == [0, 7, 7, 7, 7]
    assert same(kept, snapshot(base))


@torch.no_grad()
def test_profiles_move_one_layer_at_a_time():
    base, tuned, start, end = two_classifiers()
    batch, layers = pictures(), layers_of(base)

    def mean_loss():
        return float(nn.functional.cross_entropy(*loss(base, batch)))

    with walking(base, start, end) as put:
        found = layer_profile(put, mean_loss, layers, 0.0, GRID)
        put(dict.fromkeys(layers["body"], 1.0))
        assert found["body"][-1] == pytest.approx(mean_loss())
    assert {curve[0] for curve in found.values()} == {found["body"][0]}
    spread = {name: max(curve) - min(curve) for name, curve in found.items()}
    assert max(spread, key=spread.get) == "body"
    assert pick_stragglers({n: LayerScore(barrier=s) for n, s in spread.items()}) == ["body"]
    assert tuned is not None


@torch.no_grad()
def test_the_repair_puts_a_layer_nearer_to_the_base():
    base, _, start, end = two_classifiers()
    layers = layers_of(base)
    found = dict(sparsify_update(start, end, {"body": layers["body"]}, 0.9))
    moved = [(found[n] - start[n]).norm() for n in ("body.weight", "head.weight")]
    assert float(moved[0]) < float((end["body.weight"] - start["body.weight"]).norm())
    assert torch.equal(found["head.weight"], end["head.weight"])
    assert int(found["seen"]) == 7


def test_states_of_other_models_are_refused():
    base, _, start, end = two_classifiers()
    end.pop("head.bias")
    with pytest.raises(BadInput, match=r"head\.bias"):
        interpolation_curve(base, start, end, lambda m: 0.0)


# ---- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharp")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    adapted(tiny_llama(), 3.0).merge_and_unload().save_pretrained(folder / "tuned")
    tiny_tokenizer().save_pretrained(folder / "tuned")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    write("web.jsonl", [{"text": f"words and more words, number {i}, and on"} for i in range(5)])
    write("noisy.jsonl", [{"text": f"wrds adn mroe wrods, nmuber {i}, adn on"} for i in range(5)])
    write("labels.jsonl", [{"text": f"a {'good' if i % 2 else 'bad'} day {i}", "label": i % 2} for i in range(12)])
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PEGBOX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


SMALL = {"kind": "sharpness", "steps": 3, "profile": [0, 0.5, 1], "grid": [0, 0.5, 1], "batch": 3}


def run(place, tmp_path, analyses, **settings):
    recipe = {"protocol": {"kind": "posthoc"}, "models": {"tuned": str(place / "tuned")}, "analyze": analyses}
    given = {"model": str(place / "base"), "test_data": str(place / "web.jsonl"), "suites": [], **settings}
    return pegbox.train(recipe, out=tmp_path / "out", **given)


def test_a_language_models_path_and_stragglers(place, tmp_path):
    shifted = {"noisy": str(place / "noisy.jsonl")}
    done = run(place, tmp_path, [{**SMALL, "shifted": shifted}, {"kind": "path", "grid": [0, 0.5, 1], "suites": []}])
    found, path = done.metrics.extra["findings"]
    assert found["numbers"]["sharpness"] >= 0
    assert {"target_gain", "noisy_gain", "noisy_barrier", "noisy_gain_repaired"} <= found["numbers"].keys()
    layers = next(t for t in found["tables"] if t["title"] == "Layers")
    assert [r[0] for r in layers["rows"]][:2] == ["model.embed_tokens", "model.layers.0"]
    assert sum(r[4] == "straggler" for r in layers["rows"]) == 1
    assert len(found["details"]["stragglers"]) == 1
    curve = found["details"]["target"]["perplexity"]
    assert path["details"]["target"]["perplexity"] == pytest.approx(curve)
    text = done.report()[0].read_text()
    assert "Sharpness of each layer" in text
    assert "perplexity along the path repaired" in text


def test_the_ends_of_the_path_are_the_two_models(place, tmp_path):
    """Measured on their own, base and tuned model have the scores at the path's ends."""
    from pegbox.scoring import evaluate

    done = run(place, tmp_path, [{"kind": "path", "grid": [0, 0.5, 1]}])
    curve = done.metrics.extra["findings"][0]["details"]["target"]["perplexity"]
    for name, value in (("base", curve[0]), ("tuned", curve[-1])):
        own = evaluate(str(place / name), suites=["target"], data=str(place / "web.jsonl"))
        assert own.measured["target"].scores["perplexity"].value == pytest.approx(value, rel=1e-4)


def test_a_trained_run_is_analysed_at_its_end(place, tmp_path):
    """`analyze:` in a recipe that trains: a classifier, whose logits are normalised."""
    recipe = {
        "task": {"kind": "classification"}, "tuner": {"kind": "full"}, "objective": {"kind": "classification"},
        "optim": {"kind": "adamw", "lr": 1e-2}, "analyze": [{**SMALL, "remedy": None}],
    }  # fmt: skip
    done = pegbox.train(
        recipe, model=str(place / "base"), data=str(place / "labels.jsonl"), out=tmp_path / "out",
        suites=["target"], eval_split=0.25, steps=4, batch=4, micro_batch=4,
    )  # fmt: skip
    found = done.metrics.extra["findings"][0]
    assert found["details"]["target"]["grid"] == [0, 0.5, 1]
    assert found["numbers"]["loss"] > 0
    assert "error_rise" in found["numbers"]
    assert done.metrics.after["target"].scores["accuracy"].value == pytest.approx(
        found["details"]["target"]["accuracy"][-1]
    )


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"grid": [0.0, 1.0]}, "point between"),
        ({"grid": [0.0, 0.5, 1.5]}, "between 0"),
        ({"rho": -0.1}, "greater than or equal to 0"),
        ({"norm": "l1"}, "linf"),
        ({"remedy": {"sparsity": [1.5]}}, "less than or equal to 1"),
        ({"remedy_on": "else"}, "none of the suites"),
        ({"shifted": {"target": "network"}}, "names a suite already"),
        ({"at": 2.0}, "less than or equal to 1"),
    ],
)
def test_bad_options(place, tmp_path, block, words):
    with pytest.raises(BadInput, match=words):
        run(place, tmp_path, [{**SMALL, **block}])
