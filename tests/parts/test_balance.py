"""Loss balancing: closed forms of FAMO, focal losses, CoBa's invariants, and the min-norm point."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.balance import (
    Convergence,
    famo_slope,
    famo_value,
    famo_weights,
    focal,
    min_norm_simplex,
    slope,
    sums_by,
    task_mean,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_an_absent_task_is_not_read():
    losses, weights = f64(1.0, float("nan"), 3.0), f64(1, 5, 3)
    assert float(task_mean(losses, weights, torch.tensor([True, False, True]))) == pytest.approx(10 / 4)
    assert float(task_mean(losses, weights, torch.zeros(3, dtype=torch.bool))) == 0


def test_sums_by_index():
    assert sums_by(f64(1, 2, 3), torch.tensor([2, 0, 2]), 4).tolist() == [2, 0, 4, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradient_against_finite_differences(gamma):
    """Gradient check of the focal form in float64, with the gradient through the factor."""
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal(x.sigmoid(), torch.nn.functional.logsigmoid(x), gamma, 1.5), x)
    p = x.sigmoid()
    held = torch.autograd.grad(focal(p, p.log(), gamma, detach_focus=True).sum(), x)[0]
    factor = ((1 - p) ** gamma).detach()
    assert torch.allclose(held, -factor * (1 - p))


# ---- FAMO ----

LOSS = st.lists(st.floats(0.01, 50), min_size=2, max_size=6)


@given(LOSS, st.integers(0, 1000))
def test_famo_weights_are_convex_and_the_values_gradient(losses, seed):
    """The gradient on shared parameters is the convex combination (z / D) / c of the task gradients."""
    before = f64(*losses).requires_grad_()
    logits = torch.randn(len(losses), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = famo_weights(logits, before.detach())
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((weights > 0).all())
    assert torch.allclose(torch.autograd.grad(famo_value(logits, before), before)[0], weights, atol=1e-12)


@given(LOSS, LOSS)
def test_famo_moves_along_the_softmaxs_jacobian(first, second):
    """d equals z (delta - <z, delta>), the transpose of the softmax's Jacobian times delta."""
    n = min(len(first), len(second))
    before, after = f64(*first[:n]), f64(*second[:n])
    logits = torch.linspace(-1, 1, n, dtype=torch.float64).requires_grad_()
    found = famo_slope(logits.detach(), before, after)
    delta = (before + 1e-8).log() - (after + 1e-8).log()
    (expected,) = torch.autograd.grad(logits.softmax(0), logits, delta)
    assert torch.allclose(found, expected, atol=1e-12)
    assert float(found.sum()) == pytest.approx(0, abs=1e-9)


def test_equal_losses_give_the_plain_mean_and_a_constant_factor_drops_out():
    """First step at equal losses: the mean gradient. L_k -> a L_k leaves z_k grad log L_k as it is."""
    assert famo_weights(torch.zeros(3), torch.full((3,), 2.0)).tolist() == pytest.approx([1 / 3] * 3)
    logits, losses = f64(0.3, -0.2, 0.1), f64(1.0, 2.0, 3.0)
    scaled = losses * f64(1, 10, 1)
    pulls = [famo_weights(logits, v) * v for v in (losses, scaled)]  # z_k, up to one common factor
    assert torch.allclose(pulls[0] / pulls[0].sum(), pulls[1] / pulls[1].sum(), atol=1e-7)


def test_famo_refuses_a_loss_at_its_minimum():
    with pytest.raises(BadInput, match="above their minima"):
        famo_weights(torch.zeros(2), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]))


# ---- CoBa ----


def curves(steps=30, rates=(0.02, 0.05, 0.1), turn=None, seed=0):
    """(steps, K) ratios: exponential falls; task `turn` rises after half of the steps."""
    t = torch.arange(steps, dtype=torch.float64)[:, None]
    out = torch.exp(-f64(*rates) * t) * 0.8 + 0.2
    if turn is not None:
        rise = (t[:, 0] - steps / 2).clamp(min=0) * 0.05
        out[:, turn] += rise
    return out


def replay(history, **options):
    balancer = Convergence(history.shape[1], **{"warmup": 5, "history_length": 12, **options})
    return balancer, [balancer.measure(row) for row in history]


@pytest.mark.parametrize("final", ["softmax", "mixture"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("turn", [None, 0, 2])
def test_coba_weights_sum_to_one_above_the_floor(final, strict, turn):
    balancer, weights = replay(curves(turn=turn), final=final, strict_window=strict, clamp_df=final == "mixture")
    for w in weights:
        assert float(w.sum()) == pytest.approx(1, abs=1e-12)
        assert bool((w >= balancer.least - 1e-12).all())


def test_equal_histories_give_uniform_weights_and_so_do_constant_ones():
    """Slopes that are all zero would divide 0 by 0."""
    for history in (curves(rates=(0.05,) * 4), torch.ones(30, 4, dtype=torch.float64)):
        _, weights = replay(history)
        assert all(torch.allclose(w, torch.full_like(w, 1 / 4), atol=1e-12) for w in weights)


def test_fast_tasks_count_less_and_a_diverging_one_least():
    """While all converge the weights have the order of the slopes; a rising task falls behind once the worst curve
    rises."""
    balancer, weights = replay(curves())
    assert weights[10].argsort().tolist() == torch.tensor(balancer.slopes[6]).argsort().tolist() == [2, 1, 0]
    balancer, weights = replay(curves(turn=0, steps=40))
    assert balancer.slopes[-1][0] > 0
    assert int(weights[-1].argmin()) == 0


def test_a_measurement_that_is_not_finite_keeps_the_last_one():
    history = curves()
    spoiled = history.clone()
    spoiled[10, 1] = float("nan")
    history[10, 1] = history[9, 1]
    assert torch.equal(replay(spoiled)[1][-1], replay(history)[1][-1])


def test_strict_windows_keep_as_many_slopes_as_asked():
    history = curves(steps=40)
    strict, official = (replay(history, strict_window=s)[1][-1] for s in (True, False))
    assert not torch.equal(strict, official)


def test_the_balancer_goes_on_from_its_state():
    history = curves(turn=1)
    whole, first = replay(history), replay(history[:17])[0]
    again = Convergence(3, 5, 12)
    again.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip([again.measure(r) for r in history[17:]], whole[1][17:]))


def test_coba_refuses():
    with pytest.raises(BadInput, match="exceeds its history_length"):
        Convergence(2, warmup=20, history_length=10)
    with pytest.raises(BadInput, match="leaves nothing"):
        Convergence(2, warmup=1, floor=0.5)


def test_slope_is_least_squares_with_what_was_measured():
    y = f64(1.0, 0.0, 5.0, 7.0)  # 0 was not measured: x = 0, 2, 3 on the line 1 + 2 x
    assert float(slope(y, first=10)) == pytest.approx(2)
    assert float(slope(f64(0.0, 3.0))) == 0


# ---- min-norm ----


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 10_000))
def test_the_min_norm_point_meets_the_optimality_conditions(k, d, seed):
    g = torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gram = g @ g.T
    a = min_norm_simplex(gram)
    assert float(a.sum()) == pytest.approx(1, abs=1e-9)
    assert bool((a >= 0).all())
    products, least = gram @ a, float(a @ gram @ a)
    scale = float(gram.diagonal().max())
    assert float(products.min()) >= least - 1e-6 * scale  # nobody's gradient would lower it
    assert products[a > 1e-6].tolist() == pytest.approx([least] * int((a > 1e-6).sum()), abs=1e-6 * scale)


def test_min_norm_of_known_pairs():
    assert min_norm_simplex(torch.eye(3)).tolist() == pytest.approx([1 / 3] * 3)
    assert min_norm_simplex(torch.tensor([[4.0, 2.0], [2.0, 1.0]])).tolist() == pytest.approx([0, 1])  # same direction
    assert min_norm_simplex(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).tolist() == pytest.approx([0.5, 0.5])
    assert min_norm_simplex(torch.zeros(2, 2)).tolist() == [0.5, 0.5]
    for bad in (torch.ones(2, 3), torch.tensor([[float("nan")]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]])):
        with pytest.raises(BadInput):
            min_norm_simplex(bad)
