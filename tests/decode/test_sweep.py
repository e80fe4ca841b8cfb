"""The dial and its frontier; forms of prompts; a decoder seen as evaluation sees a model."""

import pytest
import torch

from decode.casts import cast, emulated, prompts, tokenizer
from pegbox.decode.prompts import frame, padded
from pegbox.decode.sweep import Point, behaviour_sweep, draw_frontier, pareto
from pegbox.decode.view import DecodedView
from pegbox.errors import BadInput

JUDGES = {"long": lambda p, a: float(len(a)), "short": lambda p, a: -float(len(a))}


def test_a_point_per_value(tmp_path):
    """Means and standard errors by hand; the picture is written."""
    asked = ["p", "q", "r"]
    points = behaviour_sweep(lambda x: ["a" * int(4 * x + i) for i in range(3)], asked, JUDGES, (0.0, 0.5, 1.0))
    assert [p.value for p in points] == [0.0, 0.5, 1.0]
    assert [p.scores["long"] for p in points] == [1.0, 3.0, 5.0]
    assert points[0].errors["long"] == pytest.approx((1.0 / 3) ** 0.5)
    assert draw_frontier(points, tmp_path / "f.png").stat().st_size > 1000
    assert pareto(points) == points


def test_beaten_points_are_no_frontier():
    points = [Point(0.0, {"a": 1.0, "b": 1.0}, {}), Point(1.0, {"a": 1.0, "b": 2.0}, {})]
    assert pareto(points) == points[1:]


def test_what_a_sweep_refuses(tmp_path):
    with pytest.raises(BadInput, match="at least one"):
        behaviour_sweep(lambda x: [], [], JUDGES)
    with pytest.raises(BadInput, match="1 answers to 2 prompts"):
        behaviour_sweep(lambda x: ["a"], ["p", "q"], JUDGES)
    with pytest.raises(BadInput, match="'bad' gave nan for row 0"):
        behaviour_sweep(lambda x: ["a"], ["p"], {"bad": lambda p, a: float("nan")})
    with pytest.raises(BadInput, match="two judges"):
        draw_frontier([Point(0.0, {"a": 1.0}, {"a": 0.0})], tmp_path / "f.png")


def test_the_weights_of_a_decoder_are_a_dial():
    models = cast()
    decoder = emulated(models).decoder
    assert decoder.at(0.25).weights == [0.25]
    with pytest.raises(BadInput, match="one weight per delta"):
        decoder.at(0.5, 0.5)


def test_forms_of_prompts():
    speaker = tokenizer()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert speaker.decode(frame(speaker, messages, "raw")) == "be brief\n\nhi"
    assert speaker.decode(frame(speaker, messages, "Q {prompt} A")) == "Q be brief\n\nhi A"
    assert "<|im_start|>" in speaker.decode(frame(speaker, messages, "template"))
    with pytest.raises(BadInput, match="prompt"):
        frame(speaker, messages, "nothing")
    ids, mask = padded([[1, 2, 3], [4]], pad=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_view_of_a_decoder():
    """`head(hidden(b))` equals `logits(b)`, and targets are those of any causal model."""
    from pegbox.tasks.views import CausalView

    models = cast()
    ids, mask, _ = prompts()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    view = DecodedView(emulated(models))
    assert torch.equal(view.head(view.hidden(batch)), view.logits(batch))
    for ours, theirs in zip(view.targets(batch), CausalView(models["anchor"]).targets(batch)):
        assert torch.equal(ours, theirs)
