"""Protocols tell their stories to a scripted runner."""

import json

import pytest

from conftest import GOLDEN
from pegbox.errors import BadInput
from pegbox.parts.protocol import BASE, PROTOCOL, ModelRef, StageResult
from pegbox.parts.results import Cost, Measurement, Score
from pegbox.protocols.sequence import forgetting


class ScriptedRunner:
    """Records stages; a model's score is the number of stages behind it."""

    suites = ("target", "retention")
    has_operations = False
    has_decoder = has_analyses = False

    def __init__(self):
        self.calls = []

    def stage(self, patch, *, start=BASE, name):
        self.calls.append((name, start, patch))
        cost = Cost(steps=2, seconds=1.0, peak_saved_bytes=10 * len(self.calls), trainable_parameters=5)
        return StageResult(name, None, start, ModelRef(name), cost=cost)

    def define(self, suite, rows):
        self.calls_defined = [*getattr(self, "calls_defined", []), suite]

    def evaluate(self, ref, suite):
        value = 0.0 if ref.stage is None else float([c[0] for c in self.calls].index(ref.stage) + 1)
        return Measurement(suite=suite, scores={"m": Score(name="m", value=value, n=1)})


def test_single_measures_the_bare_base_first():
    runner = ScriptedRunner()
    report = PROTOCOL.validate("single").run(runner)
    assert report.final == ModelRef("train")
    assert report.metrics.before["target"].scores["m"].value == 0
    assert report.metrics.after["retention"].scores["m"].value == 1


def test_single_applies_weight_operations_after_training():
    runner = ScriptedRunner()
    runner.has_operations = True
    report = PROTOCOL.validate("single").run(runner)
    assert [(c[0], c[1]) for c in runner.calls] == [("train", BASE), ("apply", ModelRef("train"))]
    assert report.final == ModelRef("apply")
    assert report.metrics.cost.seconds == 2.0
    assert report.metrics.cost.trainable_parameters == 5


def test_staged_rewinds_and_hands_the_selection_on():
    protocol = PROTOCOL.validate(
        {
            "kind": "staged",
            "stages": [
                {"name": "probe", "tuner": {"kind": "full"}},
                {"name": "pick", "do": "select", "select": {"kind": "change", "of": "probe"}},
                {"name": "train", "start": "probe.start", "use": {"selection": "pick"}},
            ],
        }
    )
    runner = ScriptedRunner()
    report = protocol.run(runner)
    names, starts, patches = zip(*runner.calls)
    assert names == ("probe", "pick", "train")
    assert starts[2] == ModelRef("probe", "start")
    assert patches[0]["tuner"] == {"kind": "full"}
    assert patches[2]["use"] == {"selection": "pick"}
    assert report.final == ModelRef("train")
    assert report.metrics.cost.steps == 6
    assert report.metrics.cost.peak_saved_bytes == 30


@pytest.mark.parametrize(
    ("stages", "word"),
    [
        ([{"name": "a", "start": "b.end"}], "not an earlier stage"),
        ([{"name": "a"}, {"name": "a"}], "two stages"),
        ([{"name": "a"}, {"name": "b", "start": "a.middle"}], "start is base"),
        ([{"name": "a", "do": "select"}], "no stage trains"),
        ([], "at least 1"),
    ],
)
def test_staged_refuses(stages, word):
    with pytest.raises(BadInput, match=word):
        PROTOCOL.validate({"kind": "staged", "stages": stages})


def test_sequence_chains_and_fills_the_matrix():
    protocol = PROTOCOL.validate(
        {"kind": "sequence", "tasks": [{"name": "x", "rows": "x"}, {"name": "y", "rows": "y"}]}
    )
    runner = ScriptedRunner()
    report = protocol.run(runner)
    assert [c[1] for c in runner.calls] == [BASE, ModelRef("x")]
    assert [c[2]["round"] for c in runner.calls] == [0, 1]
    found = report.metrics.extra["sequence"]
    assert runner.calls_defined == ["task:x", "task:y"]
    assert found["matrix"] == [[1.0, 1.0], [2.0, 2.0]]
    assert found["overall_performance"] == 2.0
    assert found["backward_transfer"] == 1.0


def test_forgetting_by_hand():
    matrix = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.3], [0.5, 0.6, 0.7]]
    found = forgetting(matrix, [0.0, 0.05, 0.1])
    assert found["overall_performance"] == pytest.approx(0.6)
    assert found["backward_transfer"] == pytest.approx((0.5 - 0.9 + 0.6 - 0.8) / 2)
    assert found["forgetting"] == pytest.approx((0.4 + 0.2) / 2)
    assert found["forward_transfer"] == pytest.approx((0.05 + 0.2) / 2)


def test_forgetting_matches_the_reference_values():
    path = GOLDEN / "hft" / "cases.json"
    if not path.is_file():
        pytest.skip(f"no reference values at {path}")
    for case in json.loads(path.read_text())["continual"]:
        size = len(case["R"])
        padded = [row + [0.0] * (size - len(row)) for row in case["R"]]
        found = forgetting(padded, [0.0] * size)
        assert found["overall_performance"] == pytest.approx(case["OP"])
        assert found["backward_transfer"] == pytest.approx(case["BWT"])


def test_sequence_refuses_equal_names():
    with pytest.raises(BadInput, match="must differ"):
        PROTOCOL.validate({"kind": "sequence", "tasks": [{"name": "x", "rows": "x"}, {"name": "x", "rows": "y"}]})
