"""Sharpness: closed forms, what it leaves alone, how it orders, what it costs, and what it refuses."""

import gc
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analyze.nets import Relu, Vision, loss, pictures, rows, same, snapshot
from pegbox.analyze.apgd import Ball, checkpoints, climb, project, random_move
from pegbox.analyze.groups import layers_of
from pegbox.analyze.sharpness import layerwise_sharpness, normalized, sharpness, tensors_of
from pegbox.errors import BadInput
from pegbox.testing import tiny_llama

BALLS = [Ball(0.05, norm, adaptive) for norm in ("linf", "l2") for adaptive in (True, False)]


# ---- closed forms


@settings(max_examples=12)
@given(st.integers(0, 1000), st.floats(0.01, 0.5), st.sampled_from([("linf", True), ("linf", False), ("l2", False)]))
def test_a_linear_model_has_a_closed_form(seed, rho, kind):
    """l(m - rho |x * c|_dual) - l(m) for the logistic loss, where m is the margin: within 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    net = nn.Linear(4, 1, bias=False).double()
    net.weight.data.copy_(w[None])

    def logistic(model, batch):
        return nn.functional.softplus(-model(batch)).mean()

    norm, adaptive = kind
    found = sharpness(net, logistic, [x[None]], ball=Ball(rho, norm, adaptive), steps=50)
    scaled = x * w.abs() if adaptive else x
    reach = rho * float(scaled.abs().sum() if norm == "linf" else scaled.norm())
    margin = float(w @ x)
    exact = math.log1p(math.exp(-(margin - reach))) - math.log1p(math.exp(-margin))
    assert found.sharpness == pytest.approx(exact, abs=1e-6)


def test_checkpoints_of_twenty_steps():
    assert checkpoints(20)[:4] == [5, 9, 12, 15]  # 0.22, 0.41, 0.57, 0.70 of the whole, rounded up
    assert all(a < b < 20 for a, b in pairwise(checkpoints(20)))
    assert checkpoints(1) == []


@given(st.integers(0, 500), st.floats(0.01, 3))
def test_projections_land_in_the_ball(seed, rho):
    generator = torch.Generator().manual_seed(seed)
    moves = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    scales = [torch.rand(3, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    scales[0][0, 0] = 0.0
    plain = project(moves, rho)
    assert float(torch.cat([m.flatten() for m in plain]).norm()) <= rho * (1 + 1e-9)
    held = project(moves, rho, scales)
    assert float(held[0][0, 0]) == 0.0
    inside = torch.cat([(h / c.clamp(min=1e-300)).flatten() for h, c in zip(held, scales)])
    assert float(inside.norm()) <= rho + 2e-5
    again = project(held, rho + 1e-4, scales)
    assert all(torch.equal(a, b) for a, b in zip(again, held))


def test_the_projection_is_the_nearest_point():
    """No other point of the ellipsoid is nearer."""
    generator = torch.Generator().manual_seed(3)
    move, scale = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = scale.abs() + 0.1
    (held,) = project([move], 0.5, [scale])
    away = float((held - move).norm())
    for _ in range(200):
        other = torch.randn(4, generator=generator, dtype=torch.float64)
        other = other / (other / scale).norm() * 0.5
        assert float((other - move).norm()) >= away - 1e-4


def test_weights_that_are_zero_stay_where_adaptive():
    net = Relu()
    with torch.no_grad():
        net.first.weight[0] = 0.0
    seen = []

    def watching(model, batch):
        seen.append(float(model.first.weight[0].abs().sum()))
        return loss(model, batch)

    for norm in ("linf", "l2"):
        found = sharpness(net, watching, [rows()], ball=Ball(0.1, norm))
        assert math.isfinite(found.sharpness)
    assert set(seen) == {0.0}


# ---- what it leaves alone


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(ball, fails):
    """Parameters, buffers, modes and gradient flags bit-exactly, also when the loss raises; dropout and batch norm at
    rest although the model was in training mode."""
    net = Vision().train()
    net.stem.weight.requires_grad_(False)
    net.head.eval()
    before, calls = snapshot(net), []

    def noisy(model, batch):
        calls.append(model.training)
        if fails and len(calls) == 5:
            raise RuntimeError("on purpose")
        model.seen += 1
        return loss(model, batch)

    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            sharpness(net, noisy, [pictures()], ball=ball, steps=6)
    else:
        first = sharpness(net, noisy, [pictures()], ball=ball, steps=6)
        assert first == sharpness(net, noisy, [pictures()], ball=ball, steps=6)
    assert not any(calls)
    assert same(before, snapshot(net))
    assert all(p.grad is None for p in net.parameters())


# ---- how it orders


@settings(max_examples=15)
@given(st.integers(0, 100), st.sampled_from(BALLS))
def test_it_is_never_negative_and_grows_with_the_radius(seed, ball):
    """S >= 0, and non-decreasing in rho from the same start."""
    net, data = Relu(seed), [rows(seed=seed)]
    values = [
        sharpness(net, loss, data, ball=Ball(r, ball.norm, ball.adaptive)).sharpness for r in (0.0, 0.01, 0.05, 0.2)
    ]
    assert values[0] == 0.0
    assert min(values) >= 0.0
    assert all(b >= a - 1e-9 for a, b in pairwise(values))


@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_a_layer_is_no_sharper_than_the_whole(ball):
    """S_l <= S_all + tolerance."""
    net, data = Relu(), [rows(), rows(seed=1)]
    whole = sharpness(net, loss, data, ball=ball, steps=40)
    each = layerwise_sharpness(net, loss, data, layers_of(net), ball=ball, steps=40)
    assert set(each) == {"first", "second"}
    for found in each.values():
        assert 0 < found.sharpness <= whole.sharpness + 1e-6
        assert found.base_loss == whole.base_loss


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adaptive_sharpness_is_blind_to_rescaling(norm):
    """(k W1, W2 / k) is the same function: adaptive S is the same, plain S is not."""
    net, scaled, data = Relu(), Relu(), [rows()]
    with torch.no_grad():
        scaled.first.weight.mul_(4.0)
        scaled.second.weight.div_(4.0)
    tolerance = 1e-8 if norm == "linf" else 1e-4
    adaptive = [sharpness(n, loss, data, ball=Ball(0.02, norm)).sharpness for n in (net, scaled)]
    if norm == "linf":
        assert adaptive[0] == pytest.approx(adaptive[1], abs=tolerance)
    plain = [sharpness(n, loss, data, ball=Ball(0.02, norm, False)).sharpness for n in (net, scaled)]
    assert abs(plain[0] - plain[1]) > 1e-3


def test_normalised_logits_are_blind_to_shift_and_scale():
    """The loss is invariant to scale and shift of the logits, to 1e-12."""
    logits, targets = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = nn.functional.cross_entropy(normalized(logits), targets)
    for scale, shift in ((3.0, 2.0), (1e-2, -7.0)):
        other = nn.functional.cross_entropy(normalized(scale * logits + shift), targets)
        assert float(other) == pytest.approx(float(expected), abs=1e-12)
    assert torch.isfinite(normalized(torch.ones(2, 3))).all()


def test_average_sharpness_is_below_the_worst():
    net, data = Relu(), [rows()]
    for ball in BALLS:
        worst = sharpness(net, loss, data, ball=ball, steps=40).sharpness
        mean = sharpness(net, loss, data, ball=ball, mode="average", draws=20)
        if ball.norm == "linf":
            assert mean.sharpness <= worst + 1e-9
        assert mean == sharpness(net, loss, data, ball=ball, mode="average", draws=20)
        assert mean != sharpness(net, loss, data, ball=ball, mode="average", draws=20, seed=1)


def test_random_moves_have_their_spread():
    weights = [torch.full((2000,), -2.0)]
    uniform = random_move(weights, Ball(0.1, "linf"), torch.Generator().manual_seed(0))[0]
    assert float(uniform.abs().max()) <= 0.2
    assert float(uniform.std()) == pytest.approx(0.2 / math.sqrt(3), rel=0.05)
    normal = random_move(weights, Ball(0.1, "l2", False), torch.Generator().manual_seed(0))[0]
    assert float(normal.std()) == pytest.approx(0.1, rel=0.05)


def test_restarts_never_make_it_lower():
    net, data = Relu(), [rows()]
    for ball in BALLS:
        one = sharpness(net, loss, data, ball=ball, steps=5).sharpness
        assert sharpness(net, loss, data, ball=ball, steps=5, restarts=3).sharpness >= one
        random = sharpness(net, loss, data, ball=ball, steps=5, random_start=True)
        assert random.sharpness >= 0


def test_synchronised_cuts_and_the_rise_of_errors():
    net, data = Relu(), [rows()]
    found = sharpness(net, loss, data, ball=Ball(0.3), sync=True)
    assert found.sharpness > 0
    assert found.error is not None
    logits, targets = loss(net, data[0])
    base = float((logits.argmax(-1) != targets).double().mean())
    assert 0 <= base + found.error <= 1


# ---- what it costs


@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_passes_are_counted(ball):
    """20 backward passes, at most 21 + 20 forward passes (fused: 21, and one more after each cut)."""
    net, calls = Relu(), []

    def counted(model, batch):
        calls.append(torch.is_grad_enabled())
        return loss(model, batch)

    found = sharpness(net, counted, [rows()], ball=ball, steps=20)
    assert found.backwards == 20
    assert found.forwards == len(calls)
    assert 21 <= found.forwards <= 21 + len(checkpoints(20))


def test_only_what_moves_is_copied():
    """Layer-wise the extra memory is a few copies of the layer, whatever the model's size."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1000), nn.Linear(1000, 3)).double()
    x, y = rows(width=4)
    small = sum(p.nbytes for p in net[0].parameters())
    net.eval()
    for p in net.parameters():
        p.requires_grad_(False)
    moving = list(net[0].parameters())
    for p in moving:
        p.requires_grad_(True)
    shapes, held = {p.shape for p in moving}, []

    def alive():
        found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape in shapes]
        return {t.data_ptr(): t.nbytes for t in found}

    before = alive()

    def probe():
        held.append(sum(size for place, size in alive().items() if place not in before))
        return nn.functional.cross_entropy(net(x), y)

    climb(moving, probe, Ball(0.1), steps=3)
    assert 0 < max(held) <= 4 * small


# ---- what it refuses


@pytest.mark.parametrize(
    ("rho", "norm", "words"),
    [(-1, "linf", "rho"), (math.nan, "l2", "rho"), (math.inf, "l2", "rho"), (0.1, "l1", "l1")],
)
def test_bad_balls(rho, norm, words):
    """rho below 0 or not finite, an unknown norm."""
    with pytest.raises(BadInput, match=words):
        Ball(rho, norm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": ["firsst"]}, "Did you mean 'first.weight'"),
        ({"params": []}, "no parameter to move"),
        ({"batches": []}, "at least one batch"),
        ({"loss": lambda m, b: m(b[0]).sum(0)}, "one finite number"),
        ({"loss": lambda m, b: m(b[0]).sum() * math.nan}, "one finite number"),
        ({"loss": lambda m, b: m(b[0]).sum(), "normalize": True}, "logits, targets"),
        ({"steps": 0}, "at least one step|At least one step"),
        ({"restarts": 0}, "At least one start"),
    ],
)
def test_bad_calls(change, words):
    """Layers that match nothing; no batches; a loss that is no scalar, or not finite at the weights."""
    given = {"loss": loss, "batches": [rows()], "ball": Ball(0.1), **change}
    net = Relu()
    before = snapshot(net)
    with pytest.raises(BadInput, match=words):
        sharpness(net, given.pop("loss"), given.pop("batches"), **given)
    assert same(before, snapshot(net))


def test_half_precision_is_refused():
    with pytest.raises(BadInput, match="float32"):
        sharpness(Relu(dtype=torch.bfloat16), loss, [rows(dtype=torch.bfloat16)], ball=Ball(0.1))


# ---- layers


def test_layers_of_any_model():
    llama = tiny_llama()
    blocks = layers_of(llama)
    assert list(blocks) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    parts = layers_of(llama, "part")
    assert "model.layers.0 attention" in parts
    assert "model.layers.1 mlp" in parts
    names = [n for n, _ in llama.named_parameters()]
    for grain in ("block", "part", "tensor"):
        assert sorted(n for group in layers_of(llama, grain).values() for n in group) == sorted(names)
    assert list(layers_of(Vision())) == ["stem", "norm", "body", "head"]
    own = layers_of(llama, given={"low": ["block 0"], "top": ["lm_head"]})
    assert all(".layers.0." in n for n in own["low"])
    assert own["top"] == ["lm_head.weight"]
    with pytest.raises(BadInput, match="matches no parameter"):
        layers_of(Vision(), given={"x": ["nothing"]})


def test_tied_tensors_move_once():
    tied = tiny_llama(tie_word_embeddings=True)
    assert sum(t is tied.lm_head.weight for t in tensors_of(tied).values()) == 1
