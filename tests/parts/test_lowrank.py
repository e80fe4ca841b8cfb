"""Low rank against closed forms: best approximation, modes, randomized accuracy, stable rank, factors in a metric."""

from __future__ import annotations

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.lowrank import approximate, factors, kept_positions, stable_rank, svd


def matrix(m=9, n=6, seed=0, power=1.0):
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64))
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
    return u, s, v, (u * s) @ v.T


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_of_the_best_approximation_is_the_tail(rank):
    _, s, _, w = matrix()
    error = torch.linalg.matrix_norm(w - approximate(w, rank))
    assert error == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-12)


@pytest.mark.parametrize(
    ("which", "kept"), [("largest", [0, 1, 2]), ("smallest", [3, 4, 5]), ("hybrid", [0, 1, 5]), ("random", None)]
)
def test_modes(which, kept):
    u, s, v, w = matrix()
    got = approximate(w, 3, which=which, generator=torch.Generator().manual_seed(1))
    if kept is None:
        kept = kept_positions(6, 3, "random", torch.Generator().manual_seed(1)).tolist()
        assert len(set(kept)) == 3
    torch.testing.assert_close(got, (u[:, kept] * s[kept]) @ v[:, kept].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(80, 50), (50, 80)])
def test_randomized_finds_the_leading_part_of_a_decaying_spectrum(shape):
    _, s, _, w = matrix(*shape, power=2.0)
    found = svd(w, 5, method="randomized", iterations=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.s, s[:5], rtol=1e-8, atol=0)
    torch.testing.assert_close((found.u * found.s) @ found.v.T, approximate(w, 5), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)


def test_half_precision_is_computed_in_float32():
    w = matrix()[3].to(torch.bfloat16)
    assert approximate(w, 2).dtype == torch.float32
    assert torch.equal(approximate(w, 2), approximate(w.float(), 2))
    assert approximate(w, 99).dtype == torch.float32


def test_stable_ranks_with_known_answers():
    assert stable_rank(torch.eye(7)) == 7
    assert stable_rank(torch.outer(torch.ones(4), torch.ones(3))) == 1
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == 1  # 6 / 4
    assert stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0]))) == 2  # 9 / 4
    assert stable_rank(torch.zeros(3, 3)) == 1
    q, _ = torch.linalg.qr(torch.randn(9, 9))
    assert stable_rank(q) == 9


@pytest.mark.parametrize("metric", ["none", "diagonal", "full"])
def test_factors_in_a_metric(metric):
    w = matrix()[3]
    g = torch.Generator().manual_seed(3)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    c = {"none": None, "diagonal": torch.rand(6, generator=g, dtype=torch.float64) + 0.5, "full": root @ root.T}[metric]
    torch.testing.assert_close(factors(w, c, 6).dense(), w, rtol=0, atol=1e-10)
    found = factors(w, c, 2)
    assert found.b.shape == (9, 2)
    assert found.a.shape == (2, 6)
    dense = torch.eye(6, dtype=torch.float64) if c is None else torch.diag(c) if c.ndim == 1 else c
    # the best rank-2 matrix in the norm |(W - X) C|
    error = torch.linalg.matrix_norm((w - found.dense()) @ dense)
    tail = torch.linalg.svdvals(w @ dense)[2:].square().sum().sqrt()
    assert error == pytest.approx(float(tail), abs=1e-10)
    small, rest = factors(w, c, 2, "smallest"), factors(w, c, 4, "largest")
    torch.testing.assert_close(small.dense() + rest.dense(), w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_no_decomposition(bad):
    w = torch.ones(3, 3)
    w[0, 0] = bad
    for rank in (1, 3):
        with pytest.raises(BadInput, match="NaN"):
            approximate(w, rank)
    with pytest.raises(BadInput, match="at least 1"):
        approximate(torch.ones(3, 3), 0)
    with pytest.raises(BadInput, match="needs a matrix"):
        svd(torch.ones(3))
    with pytest.raises(BadInput, match="choose"):
        kept_positions(3, 1, "best")
