"""HFT against hand-derived vectors: frozen matrices, the soft pull, half-reset, exact counts, FLOPs, forgetting."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import GOLDEN
from pegbox.parts.allocation import Allocation, Whole
from pegbox.parts.context import Context
from pegbox.parts.draws import balanced_counts
from pegbox.parts.penalties import l2_distance
from pegbox.protocols.sequence import forgetting
from pegbox.tuners.full import Full
from pegbox.weights.half_reset import reset

ROOT = GOLDEN / "hft"
CASES = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors in {ROOT}")


def tensors(path, group):
    data = np.load(path)
    return {k.removeprefix(group): torch.from_numpy(data[k]) for k in data.files if k.startswith(group)}


class Net(nn.Module):
    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def forward(self, x):
        return torch.tanh(torch.tanh(x @ self.W1.T) @ self.W2.T) @ self.W3.T


def loss_of(net, data):
    return (net(data["X"]) - data["Y"]).square().mean()


@pytest.mark.parametrize("name", list(CASES.get("train", {})))
def test_training_the_selected_matrices(name):
    case = CASES["train"][name]
    data = tensors(ROOT / "train.npz", f"{name}/")
    part = {
        g: {k.removeprefix(g): v for k, v in data.items() if k.startswith(g)}
        for g in ("init/", "final/", "first_grad/")
    }
    net = Net(part["init/"])
    loss_of(net, data).backward()
    for key, grad in part["first_grad/"].items():
        torch.testing.assert_close(net.get_parameter(key).grad, grad, rtol=0, atol=1e-12)
    net = Net(part["init/"])
    Full().attach(net, Allocation({key: Whole() for key in case["train"]}), Context(net))
    stepper = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=case["lr"], momentum=case["mu"], weight_decay=case["wd"]
    )
    losses = []
    for _ in range(case["steps"]):
        stepper.zero_grad()
        loss = loss_of(net, data)
        loss.backward()
        losses.append(loss.detach())
        stepper.step()
    torch.testing.assert_close(torch.stack(losses), data["losses"], rtol=0, atol=1e-12)
    for key, final in part["final/"].items():
        torch.testing.assert_close(net.get_parameter(key).detach(), final, rtol=0, atol=1e-12)
        if key not in case["train"]:
            assert torch.equal(net.get_parameter(key), part["init/"][key])


@pytest.mark.parametrize("path", sorted(ROOT.glob("soft_pull*.npz")), ids=lambda p: p.stem)
def test_the_soft_pull_tends_to_freezing(path):
    data = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}
    h, a, start, mask = (data[k] for k in _names(data, "H", "a", "theta0", "M"))
    frozen = ~mask.bool()
    distance = []
    for lam, solution in zip(data["lambdas"], data["solutions"]):
        t = solution.clone().requires_grad_(True)
        value = 0.5 * (t - a) @ h @ (t - a) + lam * l2_distance([t[frozen]], [start[frozen]])
        (slope,) = torch.autograd.grad(value, t)
        torch.testing.assert_close(slope, torch.zeros_like(t), rtol=0, atol=1e-9 * float(lam + 1))
        distance.append(float((solution - start)[frozen].norm()))
    assert distance == sorted(distance, reverse=True)
    limit = data["hard_limit"]
    assert torch.equal(limit[frozen], start[frozen])
    gaps = [float((s - limit).norm()) for s in data["solutions"]]
    assert gaps[-1] == min(gaps)


def _names(data, *wanted):
    lower = {k.lower(): k for k in data}
    return [lower[name.lower()] for name in wanted]


@pytest.mark.parametrize("path", sorted(ROOT.glob("half_reset*.npz")), ids=lambda p: p.stem)
def test_half_reset(path):
    groups = [tensors(path, f"{group}/") for group in ("base", "tuned", "result")]
    base, tuned, expected = groups
    chosen = Allocation({name: Whole() for name in CASES["half_reset_selected"]})
    result = dict(reset(base, tuned, chosen))
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", CASES.get("counts", []))
def test_counts(case):
    total, low, more = balanced_counts(case["per_block"], case["blocks"], case["ratio"])
    assert total == case["total_updated"]
    assert (low, low + bool(more), more) == (case["low"], case["high"], case["blocks_with_high"])


@pytest.mark.parametrize("case", CASES.get("continual", []))
def test_forgetting(case):
    measured = forgetting(case["R"], [0.0] * len(case["R"]))
    assert measured["overall_performance"] == pytest.approx(case["OP"])
    assert measured["backward_transfer"] == pytest.approx(case["BWT"])


@pytest.mark.parametrize("case", CASES.get("flops", []))
def test_products_of_frozen_matrices_do_not_happen(case):
    """Multiply-adds that a real backward does, counted."""
    net = nn.Sequential(*[nn.Linear(into, out, bias=False) for out, into, _ in case["layers"]])
    chosen = Allocation({f"{i}.weight": Whole() for i, (_, _, trained) in enumerate(case["layers"]) if trained})
    Full().attach(net, chosen, Context(net))
    counter = FlopCounterMode(display=False)
    with counter:
        out = net(torch.randn(case["tokens"], case["layers"][0][1]))
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * case["forward"]
    assert counter.get_total_flops() - forward == 2 * (case["weight_grad"] + case["input_grad"])
