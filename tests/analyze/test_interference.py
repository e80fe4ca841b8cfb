"""Overlap, sign conflicts and what composing costs: against closed forms, on a model, and as an analysis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.analyze import ANALYZE
from pegbox.errors import BadInput, WrongBase
from pegbox.parts import deltas
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.overlap import overlap_of
from pegbox.testing import AnalysisBattery
from pegbox.testing.subject import TinySubject

NAME = "model.layers.0.mlp.up_proj.weight"


def piece(entries, shape=(4, 5)):
    index = torch.tensor(sorted(entries), dtype=torch.int32)
    return Piece(shape, torch.tensor([entries[int(i)] for i in index]), index)


def test_by_hand():
    a = Delta({"x": piece({0: 1.0, 3: 2.0, 7: -1.0}), "y": piece({1: 1.0})})
    b = Delta({"x": piece({3: 3.0, 7: 4.0, 8: 1.0, 9: 1.0}), "z": piece({1: 1.0})})
    whole, by_tensor = overlap_of(a, b)
    assert whole.entries == (4, 5)
    assert whole.common == 2
    assert whole.share == 0.5
    assert whole.conflict == 0.5
    assert whole.chance == pytest.approx(3 * 4 / 20)
    assert whole.cosine == pytest.approx((2 * 3 - 1 * 4) / math.sqrt(7 * 28))
    assert list(by_tensor) == ["x"]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40))
def test_against_dense_vectors(seed, first, second):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (first, second):
        index = torch.randperm(40, generator=generator)[:count].sort().values.int()
        parts.append(Delta({"x": Piece((8, 5), torch.randn(count, generator=generator), index)}))
    one, two = (deltas.dense(p["x"]) for p in parts)
    whole, _ = overlap_of(*parts)
    both = (one != 0) & (two != 0)
    assert whole.common == int(both.sum())
    assert whole.conflict == pytest.approx(float((one * two < 0).sum()) / max(1, int(both.sum())))
    assert whole.cosine == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)), abs=1e-6)
    back, _ = overlap_of(*reversed(parts))
    assert (back.common, back.conflict) == (whole.common, whole.conflict)


def test_dense_ones_and_shapes():
    dense = Delta({"x": Piece((4, 5), torch.ones(4, 5))})
    whole, _ = overlap_of(dense, Delta({"x": piece({2: -1.0})}))
    assert (whole.common, whole.conflict, whole.share) == (1, 1.0, 1.0)
    with pytest.raises(BadInput, match="shape"):
        overlap_of(dense, Delta({"x": piece({0: 1.0}, (2, 5))}))
    with pytest.raises(BadInput, match="stored as values"):
        overlap_of(dense, Delta({"x": Piece((4, 5), torch.ones(4, 5), None, "set")}))


def saved(folder, values=0.2, name=NAME, shape=(64, 32)):
    folder.mkdir(exist_ok=True)
    index = torch.arange(0, 600, 3, dtype=torch.int32)
    deltas.save(Delta({name: Piece(shape, torch.full((200,), values), index)}), folder / "other.safetensors")
    return str(folder / "other.safetensors")


@pytest.fixture
def made(tmp_path):
    others = {"language": saved(tmp_path / "parts")}
    return ANALYZE.validate({"kind": "interference", "others": others, "rows": {"language": "any"}})


class TestInterference(AnalysisBattery):
    """The battery of all analyses."""

    @pytest.fixture(autouse=True)
    def _component(self, made):
        type(self).component = made


def test_scores_are_those_of_models_composed_by_hand(made, tmp_path):
    """Base, each alone and all together, and the gain by composing with the sign that says better."""
    subject = TinySubject(tmp_path)
    found = made.run(subject)
    other = deltas.load(tmp_path / "parts" / "other.safetensors")
    _, base, tuned = subject.weights()
    sums = {"base": base, "tuned": tuned}
    for label, state in (("language", base), ("all", tuned)):
        sums[label] = {n: t.clone() for n, t in state.items()}
        deltas.apply(other, sums[label])
    scores = {row[0]: row[1] for row in found.tables[1].rows}
    for label, state in sums.items():
        model, _, _ = subject.weights()
        model.load_state_dict(state)
        expected = subject.measure(model, "target").scores["loss"].value
        assert scores[label] == pytest.approx(expected, abs=1e-5)
    assert found.numbers["target_gain_by_composing"] == pytest.approx(scores["tuned"] - scores["all"], abs=1e-5)
    assert found.numbers["language_gain_by_composing"] == pytest.approx(scores["language"] - scores["all"], abs=1e-5)


def test_weights_scale_the_composition(made, tmp_path):
    none = made.model_copy(update={"weights": {"language": 0.0}}).run(TinySubject(tmp_path))
    rows = {row[0]: row[1] for row in none.tables[1].rows}
    assert rows["all"] == pytest.approx(rows["tuned"], abs=1e-6)


def test_without_measuring_no_rows_are_asked_for(made, tmp_path):
    class Bare(TinySubject):
        def rows(self, source=None):
            raise AssertionError

        measure = None

    found = made.model_copy(update={"measure": False}).run(Bare(tmp_path))
    assert len(found.tables) == 1
    assert 0 < found.numbers["largest_conflict"] < 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"others": {}}, "others"),
        ({"others": {"tuned": "x"}}, "choose another name"),
        ({"rows": {"langage": "x"}}, "Did you mean 'language'"),
        ({"weights": {"x": 1.0}}, "no part 'x'"),
        ({"threshold": -1}, "threshold"),
        ({"others": {"a": "nowhere"}, "rows": {}}, "no finished run"),
    ],
)
def test_bad_options_are_refused(options, says, made, tmp_path):
    block = {**made.model_dump(mode="json"), **options}
    with pytest.raises(BadInput, match=says):
        ANALYZE.validate(block).run(TinySubject(tmp_path))


def test_a_part_of_another_model_is_refused(tmp_path):
    """The tensor and both shapes are named."""
    place = saved(tmp_path / "parts", shape=(32, 64))
    analysis = ANALYZE.validate({"kind": "interference", "others": {"a": place}})
    with pytest.raises(WrongBase, match=r"up_proj.*\(32, 64\).*\(64, 32\)"):
        analysis.run(TinySubject(tmp_path))
