"""Per-token scores: closed-form gradients, bounds, tiles, shifting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pegbox.errors import BadInput
from pegbox.parts.tokens import k3, score, shift, tile_rows, walk


def make(n=5, v=11, seed=0, scale=3.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z, r = (torch.randn(n, v, generator=g, dtype=torch.float64).to(dtype) * scale for _ in range(2))
    return z.requires_grad_(), r, torch.randint(0, v, (n,), generator=g)


def plain_kl(z, r, direction):
    logp, logr = F.log_softmax(z, -1), F.log_softmax(r, -1)
    if direction == "forward":
        return (logr.exp() * (logr - logp)).sum(-1)
    return (logp.exp() * (logp - logr)).sum(-1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_scores_and_gradients_equal_autograd(direction):
    z, r, y = make()
    weights = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    scores = score(z, y, r, direction=direction, mean=True)
    total = weights * (scores.logp + 0.3 * scores.kl - 0.7 * scores.mean_logp)
    (ours,) = torch.autograd.grad(total.sum(), z)
    logp = F.log_softmax(z, -1)
    plain = weights * (logp.gather(-1, y[:, None])[:, 0] + 0.3 * plain_kl(z, r, direction) - 0.7 * logp.mean(-1))
    (theirs,) = torch.autograd.grad(plain.sum(), z)
    assert torch.allclose(total, plain, rtol=0, atol=1e-12)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_gradcheck():
    z, r, y = make(3, 5)
    for direction in ("forward", "reverse"):
        assert torch.autograd.gradcheck(lambda x, d=direction: score(x, y, r, direction=d, mean=True)[:3], z)
    assert torch.autograd.gradcheck(lambda x: score(x, y).logp, z)


def test_closed_forms_of_the_paper():
    z, r, y = make()
    p, one = z.detach().softmax(-1), F.one_hot(y, 11).double()
    scores = score(z, y, r)
    dft = (scores.logp.detach().exp() * -scores.logp).sum()
    (grad,) = torch.autograd.grad(dft, z, retain_graph=True)
    chosen = p.gather(-1, y[:, None])
    assert torch.allclose(grad, chosen * (p - one), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(-z.softmax(-1).gather(-1, y[:, None]).sum(), z)
    assert torch.allclose(grad, chosen * (p - one), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(scores.kl.sum(), z)
    assert torch.allclose(grad, p - r.softmax(-1), rtol=0, atol=1e-12)


@given(st.integers(0, 10**6), st.floats(0.01, 20))
@settings(max_examples=50, deadline=None)
def test_divergences_are_not_negative(seed, scale):
    z, r, y = make(seed=seed, scale=scale)
    for direction in ("forward", "reverse"):
        scores = score(z, y, r, direction=direction)
        assert (scores.kl >= -1e-12).all()
    assert (k3(scores.logp, scores.ref_logp) >= 0).all()


def test_k3_is_the_reverse_divergence_in_expectation():
    z, r, _ = make(1, 7)
    every = torch.arange(7)
    scores = score(z.expand(7, 7), every, r.expand(7, 7), direction="reverse")
    expected = (scores.logp.exp() * k3(scores.logp, scores.ref_logp)).sum()
    assert torch.allclose(expected, scores.kl[0], rtol=0, atol=1e-12)


def test_half_precision_logits_are_scored_in_float32():
    z, _, y = make(dtype=torch.bfloat16)
    scores = score(z, y)
    assert scores.logp.dtype == torch.float32
    assert torch.equal(scores.logp, F.log_softmax(z.float(), -1).gather(-1, y[:, None])[:, 0])
    (grad,) = torch.autograd.grad(scores.logp.sum(), z)
    assert grad.dtype == torch.bfloat16


def test_another_vocabulary_is_refused():
    z, r, y = make()
    with pytest.raises(BadInput, match="11 logits per token, its reference 12"):
        score(z, y, torch.cat([r, r[:, :1]], -1))


# ---- tiles ----


def walked(trains, chunk, n=37, v=19, d=6):
    g = torch.Generator().manual_seed(1)
    h = torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(v, d, generator=g, dtype=torch.float64).requires_grad_(trains)
    y = torch.randint(0, v, (n,), generator=g)
    seen, factors = [], torch.linspace(0, 1, n, dtype=torch.float64)

    def fold(rows, part):
        seen.append(len(rows))
        scores = score(rows @ w.T, y[part])
        return scores.logp**2 * factors[part], scores.logp.detach()

    loss, logp = walk(h, fold, vocabulary=v, parameters=[w], chunk=chunk)
    (3 * loss).backward()
    return loss, logp, h.grad, w.grad, seen


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_tiles_change_nothing(trains, chunk):
    whole = walked(trains, None)
    tiled = walked(trains, chunk)
    assert torch.allclose(whole[0], tiled[0], rtol=0, atol=1e-12)
    assert torch.allclose(whole[1], tiled[1], rtol=0, atol=1e-12)
    assert torch.allclose(whole[2], tiled[2], rtol=0, atol=1e-12)
    assert (whole[3] is None) == (tiled[3] is None) == (not trains)
    if trains:
        assert torch.allclose(whole[3], tiled[3], rtol=0, atol=1e-12)
    assert max(tiled[4]) == min(chunk, 37)


@pytest.mark.parametrize("trains", [False, True])
def test_the_head_is_applied_once_per_tile_and_leaves_nothing_of_width_v(trains):
    saved = []

    def pack(t):
        saved.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        *_, seen = walked(trains, 5)
    assert sum(seen) == 37
    alive = [s for s in saved if len(s) == 2 and s[0] > 6]  # (6, 19) is the head itself
    assert all(s[-1] == 6 for s in alive), saved


def test_without_gradient_nothing_is_saved():
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h, w, y = torch.randn(9, 4), torch.randn(8, 4), torch.zeros(9, dtype=torch.long)
        (logp,) = walk(h, lambda rows, s: (score(rows @ w.T, y[s]).logp,), vocabulary=8, parameters=[w], chunk=2)
    assert not saved
    assert not logp.requires_grad


def test_no_rows_still_connect_to_the_graph():
    for trains in (False, True):
        h, w = torch.zeros(0, 4, requires_grad=True), torch.randn(8, 4, requires_grad=trains)
        y = torch.zeros(0, dtype=torch.long)
        fold = lambda rows, s, w=w, y=y: (score(rows @ w.T, y[s]).logp,)  # noqa: E731
        (logp,) = walk(h, fold, vocabulary=8, parameters=[w], chunk=2)
        logp.sum().backward()
        assert h.grad is not None
        assert not trains or torch.equal(w.grad, torch.zeros_like(w))


def test_tile_sizes():
    assert tile_rows(100) == 1024
    assert tile_rows(49152) == 85
    assert tile_rows(49152, "cuda") == tile_rows(49152, trained=True) == 341
    assert tile_rows(10**6) == 64


# ---- shifting ----


def test_shift_is_the_causal_one():
    labels = torch.tensor([[-100, 5, 6, -100, 7]])
    targets, valid = shift(labels)
    assert valid.tolist() == [[True, True, False, True, False]]
    assert targets.tolist() == [[5, 6, 0, 7, 0]]


def test_nothing_is_predicted_across_packed_sequences():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    by_ids = shift(labels, sequence_ids=torch.tensor([[0, 0, 0, 1, 1, -1]]))[1]
    by_positions = shift(labels, position_ids=torch.tensor([[0, 1, 2, 0, 1, 0]]))[1]
    assert by_ids.tolist() == by_positions.tolist() == [[True, True, False, True, False, False]]


def test_the_first_token_is_not_predicted_from_padding():
    labels = torch.tensor([[-100, -100, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert shift(labels, attention_mask=mask)[1].tolist() == [[False, False, True, True, False]]
    hidden = torch.tensor([[0, 0, 1, 0, 1]])
    assert shift(labels, attention_mask=hidden)[1].tolist() == [[False, False, True, True, False]]
    corrupted = torch.tensor([[False, False, True, False, False]])
    hidden = torch.tensor([[0, 0, 0, 1, 1]])
    assert shift(labels, attention_mask=hidden, corrupted=corrupted)[1].tolist() == [[False, False, True, True, False]]
