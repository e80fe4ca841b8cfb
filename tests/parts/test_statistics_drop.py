"""Trial steps: closed forms, and that nothing at all is left of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.cost_energy import Energy
from pegbox.parts.cost_trace import CostTable
from pegbox.parts.statistics_drop import tensor_importance
from pegbox.parts.statistics_step import StepSpec, reachable


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


X, Y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)


def loss_of(model):
    return lambda: (model(X) - Y).square().mean()


def test_plain_sgd_on_a_quadratic_has_the_closed_form():
    """I_k = lr * g0.g1 per tensor."""
    model, lr = nn.Linear(3, 2).double(), 0.05
    loss = lambda: (model(X) - Y).square().mean()  # noqa: E731
    g0 = torch.autograd.grad(loss(), list(model.parameters()))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), g0):
            p -= lr * g
    g1 = torch.autograd.grad((moved(X) - Y).square().mean(), list(moved.parameters()))
    closed = [lr * float((a * b).sum()) for a, b in zip(g0, g1)]
    found = tensor_importance(model, [loss], torch.optim.SGD(model.parameters(), lr=lr))
    largest = max(map(abs, closed))
    assert list(found.values()) == pytest.approx([c / largest for c in closed], rel=1e-9)


def test_gradient_importance_has_closed_forms():
    model = nn.Linear(3, 2).double()
    loss = lambda: (model(X) - Y).square().mean()  # noqa: E731
    grads = torch.autograd.grad(loss(), list(model.parameters()))
    weights = list(model.parameters())
    forms = {
        "weight_gradient": [float((w * g).abs().sum()) for w, g in zip(weights, grads)],
        "gradient_norm": [float(g.norm()) for g in grads],
        "fisher": [float(g.square().sum()) for g in grads],
    }
    for kind, values in forms.items():
        found = list(tensor_importance(model, [loss], kind=kind).values())
        assert found == pytest.approx([v / max(values) for v in values]), kind


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)]
)
def test_a_trial_leaves_no_trace(make, fails):
    """Weights, optimizer state, random states, gradients, flags, running statistics and modes are bit-identical."""
    model = small()
    optimizer = make(model.parameters())
    loss_of(model)().backward()
    optimizer.step()
    model[0].bias.requires_grad_(False)
    model[2].eval()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    kept = [g.clone() for g in gradients.values()]
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    numbers, calls = torch.get_rng_state(), []

    def loss():
        calls.append(1)
        if fails and len(calls) == 2:
            raise RuntimeError("in the middle")
        return loss_of(model)()

    if fails:
        with pytest.raises(RuntimeError, match="middle"):
            tensor_importance(model, [loss], optimizer)
    else:
        assert any(tensor_importance(model, [loss], optimizer).values())
        assert len(calls) == 2  # two passes, one step
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert same(optimizer.state_dict(), state)
    assert all(p.grad is gradients[n] for n, p in model.named_parameters())
    assert all(torch.equal(g, k) for g, k in zip(gradients.values(), kept))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_batches_are_averaged_and_tensors_left_out_are_zero():
    model = nn.Linear(3, 2).double()
    both = tensor_importance(
        model, [lambda: model(X[:3]).square().mean(), lambda: model(X[3:]).square().mean()], kind="fisher"
    )
    assert set(both) == {"weight", "bias"}
    alone = tensor_importance(model, [lambda: model(X).square().mean()], kind="fisher", names=["bias"])
    assert alone == {"weight": 0.0, "bias": 1.0}


def test_a_rate_of_zero_tries_the_peak_rate():
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert any(tensor_importance(model, [lambda: model(X).square().mean()], optimizer).values())
    assert optimizer.param_groups[0]["lr"] == 0
    assert schedule.get_last_lr() == [0.0]


def test_what_is_refused():
    model = nn.Linear(3, 2).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BadInput, match="Did you mean 'loss_drop'"):
        tensor_importance(model, [loss_of(model)], sgd, kind="loss_drp")
    with pytest.raises(BadInput, match="at least one batch"):
        tensor_importance(model, [], sgd)
    with pytest.raises(BadInput, match="needs the optimizer"):
        tensor_importance(model, [loss_of(model)])
    with pytest.raises(BadInput, match=r"not\s+finite"):
        tensor_importance(model, [lambda: (model(X) * float("nan")).sum()], sgd)
    with pytest.raises(BadInput, match="no tensor that could train"):
        tensor_importance(nn.ReLU(), [loss_of(model)], sgd)
    model.weight.full_tensor = lambda: None  # as a sharded parameter has it
    with pytest.raises(Unsupported, match="sharded"):
        tensor_importance(model, [loss_of(model)], sgd)


def test_only_what_a_budget_reaches_takes_part():
    table = CostTable(("deep", "middle", "last"), 10.0, (4.0, 3.0, 2.0), (1.0, 1.0, 1.0))
    assert reachable(table, 5.0) == ["middle", "last"]
    assert reachable(table, 1.0) == []
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), []

    def loss(_, batch):
        seen.append([n for n, p in model.named_parameters() if p.requires_grad])
        return (model(batch["x"]) - Y).square().mean()

    def make():
        return torch.optim.SGD(model.parameters(), lr=0.1)

    found = StepSpec(rho=0.45).gather(model, [{"x": X}], loss, make)
    assert seen[-1] == ["1.weight", "1.bias"]
    assert found["importance"]["0.weight"] == 0
    assert found["importance"]["1.weight"] != 0
    with pytest.raises(BadInput, match="at least one batch"):
        StepSpec().gather(model, [], loss, make)
    with pytest.raises(BadInput, match="input_ids"):
        StepSpec(cost="official").gather(model, [{"x": X}], loss, make)


def test_energy_is_flops_over_speed_times_power():
    device = Energy(flops_per_second=1e12, utilisation=0.5, watts=360, carbon=500)
    assert device.kwh(5e15) == pytest.approx(1.0)  # 10,000 s at 360 W
    assert device.grams(5e15) == pytest.approx(500)
