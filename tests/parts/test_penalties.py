"""Penalties towards the start: values, closed-form gradients, nothing saved but what exists already."""

import pytest
import torch

from pegbox.parts.penalties import l1_distance, l2_distance


def test_values_and_gradients():
    w = [torch.tensor([1.0, -2.0, 0.5]).requires_grad_(), torch.ones(2, 2).requires_grad_()]
    start = [torch.tensor([0.0, -2.0, 1.0]), torch.zeros(2, 2)]
    l1 = l1_distance(w, start)
    assert float(l1) == 1.5 + 4
    (3 * l1).backward()
    assert w[0].grad.tolist() == [3.0, 0.0, -3.0]
    assert w[1].grad.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    for t in w:
        t.grad = None
    l2 = l2_distance(w, start)
    assert float(l2) == 1.25 + 4
    l2.backward()
    assert w[0].grad.tolist() == [2.0, 0.0, -1.0]


@pytest.mark.parametrize("distance", [l1_distance, l2_distance])
def test_gradcheck(distance):
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    start = w.detach() + torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: distance([x], [start]), w)


def test_a_sum_over_bfloat16_is_taken_in_float32():
    w = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    total = l1_distance([w], [torch.zeros(1000, dtype=torch.bfloat16)])
    assert total.dtype == torch.float32
    assert float(total) == 1000
    total.backward()
    assert w.grad.dtype == torch.bfloat16
