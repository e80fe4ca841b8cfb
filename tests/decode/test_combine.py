"""The combination and its filter against their formulas and closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.decode.combine import combine, residual, top_p_set, verify
from pegbox.errors import BadInput

V = 11


def logits(seed, rows=3, spread=3.0):
    return spread * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10_000), weight=st.floats(-2, 2))
def test_it_is_the_formula(seed, weight):
    """In float64 on random logits the probabilities are the formula's to 1e-12, and rows sum to 1."""
    anchor, tuned, reference = (logits(seed + i) for i in range(3))
    got = combine(anchor, [tuned], [reference], [weight]).exp()
    wanted = (anchor + weight * (tuned - reference)).softmax(-1)
    assert (got - wanted).abs().max() <= 1e-12
    assert (got.sum(-1) - 1).abs().max() <= 1e-12


def test_anchor_is_reference_gives_the_tuned_model():
    """With the reference as anchor and weight 1 the combination is the tuned model."""
    tuned, reference = logits(1).float(), logits(2).float()
    got = combine(reference, [tuned], [reference], [1.0])
    assert (got.exp() - tuned.softmax(-1)).abs().max() <= 1e-6
    assert torch.equal(got.argmax(-1), tuned.argmax(-1))


def test_two_deltas_interpolate():
    """Weights (1, 0) are the first alone, (0, 1) the second; log-odds of any two tokens are affine in lambda."""
    anchor, one, two, ref_one, ref_two = (logits(i) for i in range(5))

    def at(x):
        return combine(anchor, [one, two], [ref_one, ref_two], [x, 1 - x])

    torch.testing.assert_close(at(1.0), combine(anchor, [one], [ref_one], [1.0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(at(0.0), combine(anchor, [two], [ref_two], [1.0]), atol=1e-12, rtol=0)
    odds = [at(x)[:, :, None] - at(x)[:, None, :] for x in (0.0, 0.3, 1.0)]
    torch.testing.assert_close(odds[1], 0.7 * odds[0] + 0.3 * odds[2], atol=1e-11, rtol=0)


def test_weight_zero_is_the_anchor():
    anchor = logits(0)
    got = combine(anchor, [logits(1)], [logits(2)], [0.0], 0.5)
    torch.testing.assert_close(got, anchor.log_softmax(-1), atol=0, rtol=0)


@given(seed=st.integers(0, 10_000), p=st.floats(0.05, 1.0))
def test_the_filter(seed, p):
    """Outside the set ratios are the tuned model's; nothing is exactly zero; the set is smallest with mass p."""
    anchor, tuned, reference = (logits(seed + i) for i in range(3))
    got = combine(anchor, [tuned], [reference], [1.0], p)
    inside = top_p_set(tuned, p) if p < 1 else torch.ones_like(tuned, dtype=torch.bool)
    assert torch.isfinite(got).all()
    for row in range(len(got)):
        out = (~inside[row]).nonzero().flatten()
        if len(out) > 1:
            ours, theirs = got[row, out], tuned[row, out]
            assert ((ours - ours[0]) - (theirs - theirs[0])).abs().max() <= 1e-6
        mass = tuned[row].softmax(-1)[inside[row]]
        assert mass.sum() >= p - 1e-9
        assert mass.sum() - mass.min() < p + 1e-9


def test_the_filter_at_one_is_none():
    anchor, tuned, reference = (logits(i) for i in range(3))
    full = combine(anchor, [tuned], [reference], [1.0])
    assert (combine(anchor, [tuned], [reference], [1.0], 1.0) - full).abs().max() <= 1e-6


@pytest.mark.parametrize("which", range(3))
def test_a_constant_on_any_members_logits_changes_nothing(which):
    """Which plain logit arithmetic would get wrong where the filter acts."""
    given_ = [logits(i) for i in range(3)]
    before = combine(given_[0], [given_[1]], [given_[2]], [1.0], 0.6)
    given_[which] = given_[which] + torch.tensor([[5.0], [-40.0], [0.25]], dtype=torch.float64)
    after = combine(given_[0], [given_[1]], [given_[2]], [1.0], 0.6)
    torch.testing.assert_close(after, before, atol=1e-10, rtol=0)


def test_ties_go_by_token_id():
    assert top_p_set(torch.zeros(1, 4), 0.5).tolist() == [[True, True, False, False]]


def test_excluded_tokens():
    """A ban of the anchor or the tuned model stays; where only the reference bans a token there is no delta."""
    anchor, tuned, reference = torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 4)
    anchor[0, 0] = tuned[0, 1] = reference[0, 2] = -torch.inf
    reference[0, 0] = tuned[0, 0] = -torch.inf
    for weight in (1.0, -1.0):
        got = combine(anchor, [tuned], [reference], [weight]).exp()[0]
        assert got[:2].tolist() == [0.0, 0.0]
        assert torch.isfinite(got).all()
        assert got[2] > 0


def test_half_precision_members_are_subtracted_in_float32():
    anchor, tuned, reference = (logits(i).bfloat16() for i in range(3))
    got = combine(anchor, [tuned], [reference], [1.0])
    assert got.dtype == torch.float32
    wanted = combine(anchor.double(), [tuned.double()], [reference.double()], [1.0])
    assert (got.double() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("weights", "top_p", "words"),
    [
        ([1.0, 1.0], None, "one weight per delta"),
        ([float("nan")], None, "finite"),
        ([float("inf")], None, "finite"),
        ([1.0], 0.0, "top_p"),
        ([1.0], 1.5, "top_p"),
    ],
)
def test_bad_weights_and_filters(weights, top_p, words):
    with pytest.raises(BadInput, match=words):
        combine(logits(0), [logits(1)], [logits(2)], weights, top_p)


def test_a_filter_needs_weights_with_a_sum():
    with pytest.raises(BadInput, match="sum to 0"):
        combine(logits(0), [logits(1)] * 2, [logits(2)] * 2, [1.0, -1.0], 0.5)


@given(seed=st.integers(0, 10_000))
def test_one_round_draws_from_the_target(seed):
    """Acceptance and residual together: q min(1, p/q) + P(reject) residual = p, exactly."""
    p, q = logits(seed).softmax(-1), logits(seed + 1).softmax(-1)
    accepted = torch.minimum(p, q)
    rejected = 1 - accepted.sum(-1, keepdim=True)
    torch.testing.assert_close(accepted + rejected * residual(p, q), p, atol=1e-12, rtol=0)


def test_a_token_the_target_excludes_is_never_accepted():
    p, q = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.5, 0.5]]])
    assert not verify(p, q, torch.tensor([[0]]), torch.zeros(1, 1)).any()
