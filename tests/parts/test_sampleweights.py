"""Weights, their energy, Langevin dynamics: closed forms, signs, moments."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.langevin import Langevin
from pegbox.parts.sampleweights import auroc, count_prior, effective_samples, energy, softmax_gradient, weights_of


def draw(n, seed=0):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 20), st.integers(0, 999))
def test_softmax_weights_and_their_gradient(n, seed):
    """w >= 0, mean 1; the gradient is the closed form, and autograd's."""
    logits = draw(n, seed).requires_grad_()
    weights = weights_of(logits)
    assert bool((weights >= 0).all())
    assert float(weights.mean()) == pytest.approx(1, abs=1e-12)
    batch = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, n // 2)]
    losses = draw(n, seed + 1).abs()[batch]
    (grad,) = torch.autograd.grad(energy(weights[batch], losses), logits)
    assert torch.allclose(grad, softmax_gradient(logits.detach(), batch, losses), rtol=0, atol=1e-12)


def test_constant_losses():
    """Full batch: gradient 0. Mini-batch at uniform weights: (l_j - (B/N) mean) / B inside, all others rise."""
    n, b = 12, 4
    logits = draw(n)
    full = softmax_gradient(logits, torch.arange(n), torch.full((n,), 2.0, dtype=torch.float64))
    assert torch.allclose(full, torch.zeros(n, dtype=torch.float64), atol=1e-15)
    uniform, batch = torch.zeros(n, dtype=torch.float64), torch.arange(b)
    losses = torch.tensor([0.1, 2.0, 3.0, 4.0], dtype=torch.float64)
    grad = softmax_gradient(uniform, batch, losses)
    assert torch.allclose(grad[:b], (losses - b / n * losses.mean()) / b, atol=1e-15)
    assert bool((grad[b:] < 0).all())  # descent raises them
    assert float(grad[0]) < 0 < float(grad[1])
    parts = [softmax_gradient(uniform, batch, torch.ones(1, dtype=torch.float64)) for batch in torch.arange(n)[:, None]]
    assert torch.allclose(torch.stack(parts).mean(0), torch.zeros(n, dtype=torch.float64), atol=1e-15)


def test_an_epoch_of_small_steps_keeps_the_order_and_moves_by_the_weighted_mean():
    """Constant losses leave the order of weights; samples above the global weighted mean fall, those below rise."""
    n = 12
    for losses in (torch.ones(n, dtype=torch.float64), draw(n, 3).abs()):
        logits, start = draw(n).mul(0.1), draw(n).mul(0.1)
        for batch in torch.arange(n).view(3, 4):
            logits -= 1e-3 * softmax_gradient(logits, batch, losses[batch])
        moved = weights_of(logits) - weights_of(start)
        if len(losses.unique()) == 1:
            assert torch.equal(logits.argsort(), start.argsort())
            continue
        weights = weights_of(start)
        above = losses > (weights * losses).mean()
        clear = (losses - (weights * losses).mean()).abs() > 0.1
        assert bool((moved[above & clear] < 0).all())
        assert bool((moved[~above & clear] > 0).all())


def test_readings():
    assert effective_samples(torch.ones(7)) == pytest.approx(7)
    assert effective_samples(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert auroc(scores, torch.tensor([1, 0, 1, 0])) == 1
    assert auroc(torch.zeros(4), torch.tensor([1, 0, 1, 0])) == 0.5
    assert auroc(scores, torch.tensor([1, 1, 0, 0])) == pytest.approx(0.625)
    assert auroc(scores, torch.ones(4)) != auroc(scores, torch.ones(4))  # NaN
    assert float(count_prior(torch.ones(10), 0.9, 1.0)) == pytest.approx(0.5)
    with pytest.raises(BadInput, match="\\(0, 1\\]"):
        count_prior(torch.ones(3), 1.5)


# ---- Langevin ----


def sampled(steps=1500, eta=0.02, chains=1000, **options):
    """Moments of chains on a normal target of mean 2 and variance 0.5, their first 300 steps left out."""
    x = torch.nn.Parameter(torch.zeros(chains))
    optimizer = Langevin([x], eta, generator=torch.Generator().manual_seed(0), **options)
    kept = []
    for step in range(steps):
        x.grad = (x.detach() - 2) / 0.5
        optimizer.step()
        if step >= 300 and step % 10 == 0:
            kept.append(x.detach().clone())
    values = torch.stack(kept)
    return float(values.mean()), float(values.var())


def test_langevin_has_the_targets_moments():
    mean, variance = sampled()
    assert mean == pytest.approx(2, rel=0.05)
    assert variance == pytest.approx(0.5, rel=0.05)


def test_without_temperature_it_is_gradient_descent_and_a_state_goes_on_exactly():
    """T = 0 equals SGD at eta / 2 bit for bit; the same for a seed; resumed exactly."""
    a, b = (torch.nn.Parameter(draw(9).float()) for _ in range(2))
    ours, theirs = Langevin([a], 0.2, 0.0), torch.optim.SGD([b], 0.1)
    for _ in range(5):
        for p, optimizer in ((a, ours), (b, theirs)):
            p.grad = p.detach() * 3
            optimizer.step()
    assert torch.equal(a, b)
    for preconditioned in (False, True):
        ends = []
        for cut in (False, True, False):
            p = torch.nn.Parameter(draw(9).float())
            optimizer = Langevin(
                [p], 0.1, 0.5, preconditioned=preconditioned, generator=torch.Generator().manual_seed(1)
            )
            for step in range(6):
                if cut and step == 3:
                    kept = optimizer.state_dict()
                    optimizer = Langevin(
                        [p], 0.1, 0.5, preconditioned=preconditioned, generator=torch.Generator().manual_seed(99)
                    )
                    optimizer.load_state_dict(kept)
                p.grad = p.detach() * 3
                optimizer.step()
            ends.append(p.detach().clone())
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(("lr", "temperature"), [(0.0, 1.0), (-1.0, 1.0), (0.1, -0.5), (float("nan"), 1.0)])
def test_negative_steps_and_temperatures_are_refused(lr, temperature):
    with pytest.raises(BadInput, match="must be"):
        Langevin([torch.nn.Parameter(torch.zeros(1))], lr, temperature)
