"""The decomposition against closed forms: exactness, optimality, the identity, damping, balance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.prepare.oriented import balanced, damped, decompose, factors_of


def case(m=12, n=16, seed=0, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, n)
    return weight, x.T @ x / tokens


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(2, 20), st.sampled_from([1.0, 0.5, 0.25]), st.integers(0, 999))
def test_all_components_give_the_weight_back(m, n, power, seed):
    weight, covariance = case(m, n, seed)
    parts = decompose(weight, covariance, power=power)
    torch.testing.assert_close(parts.part(slice(None)), weight, rtol=1e-9, atol=1e-9)
    assert bool((parts.s.diff() <= 1e-9).all())


def test_float32_reconstructs_to_1e_4():
    weight, covariance = case(48, 64)
    parts = decompose(weight.float(), covariance.float())
    assert (parts.part(slice(None)) - weight.float()).norm() < 1e-4 * weight.norm()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_identity_is_the_plain_decomposition(scale):
    weight, _ = case()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    parts = decompose(weight, scale * torch.eye(16, dtype=torch.float64))
    for mode, at in (("ipm", slice(0, 4)), ("kpm", slice(8, 12))):
        a, b = factors_of(parts, 4, mode)
        torch.testing.assert_close(b @ a, (u[:, at] * s[at]) @ vt[at])
    plain = decompose(weight, None)
    torch.testing.assert_close(plain.s, s)


def test_the_scale_of_the_covariance_moves_the_balance_and_not_the_product():
    weight, covariance = case()
    (a, b), (a9, b9) = (factors_of(decompose(weight, k * covariance), 4, "ipm") for k in (1.0, 9.0))
    torch.testing.assert_close(b9 @ a9, b @ a)
    torch.testing.assert_close(b9.norm() / b.norm(), torch.tensor(3.0, dtype=torch.float64))
    even, even9 = balanced(a, b), balanced(a9, b9)
    torch.testing.assert_close(even[1].norm(), even9[1].norm())
    torch.testing.assert_close(even[0].norm(), even[1].norm())
    torch.testing.assert_close(even[1] @ even[0], b @ a)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_kept_part_is_optimal_in_its_own_norm(power):
    weight, covariance = case()
    trial, _, _ = damped(covariance)
    values, basis = torch.linalg.eigh(trial)
    norms = {p: (basis * values**p) @ basis.T for p in (1.0, 0.5)}
    kept = decompose(weight, covariance, power=power).part(slice(0, 5))
    error = ((weight - kept) @ norms[power]).norm()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :5] * s[:5]) @ vt[:5]
    assert error <= ((weight - plain) @ norms[power]).norm()
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        noise = 0.1 * torch.randn(12, 5, generator=generator, dtype=torch.float64)
        random = (u[:, :5] * s[:5] + noise) @ vt[:5]
        assert error <= ((weight - random) @ norms[power]).norm()
    other = decompose(weight, covariance, power=1.5 - power).part(slice(0, 5))
    assert error <= ((weight - other) @ norms[power]).norm() + 1e-9


def test_damping():
    _, good = case()
    trial, _, used = damped(good)
    assert used == 0.01
    torch.testing.assert_close(trial, good + 0.01 * good.diagonal().mean() * torch.eye(16, dtype=torch.float64))
    x = torch.randn(2, 16)
    trial, factor, used = damped(x.T @ x)
    assert torch.isfinite(torch.cholesky_inverse(factor)).all()
    for dtype in (torch.float32, torch.float64):
        huge = torch.diag(torch.tensor([1e9, *[0.0] * 15], dtype=dtype))
        trial, factor, used = damped(huge, damping=1e-9)
        inverse = torch.cholesky_inverse(factor)
        assert torch.isfinite(inverse).all()
        assert torch.linalg.matrix_norm(trial @ inverse - torch.eye(16, dtype=dtype)) < 0.05
    with pytest.raises(BadInput, match="all zero"):
        damped(torch.zeros(3, 3))
    with pytest.raises(BadInput, match="not finite"):
        damped(torch.full((3, 3), float("nan")))


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_ranks_that_do_not_exist_are_refused(rank):
    with pytest.raises(BadInput, match=r"outside 1\.\.12"):
        factors_of(decompose(*case()), rank, "kpm")
