"""Sharpness and interpolation against reference values of the two code bases they come from."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from conftest import GOLDEN
from pegbox.analyze.apgd import Ball
from pegbox.analyze.sharpness import sharpness
from pegbox.weights.interpolate import fisher_mix, mix

ROOT = GOLDEN / "clip-sharpness"
FILES = [(p, json.loads(p.read_text())) for p in sorted(ROOT.glob("*.json"))] if ROOT.is_dir() else []
ATTACKS = [(p.stem, c, r) for p, c in FILES if "results" in c and "batches" in c for r in c["results"]]
CLOSED = [(p.stem, c, r) for p, c in FILES if "cases" in c for r in c["cases"]]
MIXES = [(p.stem, c, r) for p, c in FILES if "theta0" in c for r in c["out"]]

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors in {ROOT}")


def name_of(value):
    if not isinstance(value, dict):
        return value if isinstance(value, str) else None
    plain = {k: v for k, v in value.items() if isinstance(v, str | int | float | bool)}
    return "-".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in plain.values())


def double(value):
    return torch.tensor(value, dtype=torch.float64)


class Net(nn.Module):
    """o = tanh(X W1^T + b1) W2^T + b2"""

    def __init__(self, case):
        super().__init__()
        for name in ("W1", "b1", "W2", "b2"):
            setattr(self, name, nn.Parameter(double(case[name])))

    def forward(self, x):
        return torch.tanh(x @ self.W1.T + self.b1) @ self.W2.T + self.b2


LAYERS = {"all": ["W1", "b1", "W2", "b2"], "layer1": ["W1", "b1"], "layer2": ["W2", "b2"]}


@pytest.mark.parametrize(("file", "case", "result"), ATTACKS, ids=name_of)
def test_worst_case(file, case, result):
    net = Net(case)
    x, y = double(case["X"]), torch.tensor(case["Y"])
    batches = [(x[a:b], y[a:b]) for a, b in case["batches"]]
    found = sharpness(
        net, lambda model, batch: (model(batch[0]), batch[1]), batches,
        ball=Ball(result["rho"], result["norm"], result["adaptive"]), steps=result["n_iters"],
        params=LAYERS[result["perturbed"]], normalize=result["normalize_logits"],
    )  # fmt: skip
    tolerance = 1e-10 if not (result["norm"] == "l2" and result["adaptive"]) else 1e-4
    assert found.base_loss == pytest.approx(result["base_loss"], abs=1e-10)
    assert found.sharpness == pytest.approx(result["sharpness"], abs=tolerance)
    assert found.moved == pytest.approx(result["delta_l2"], abs=tolerance)


@pytest.mark.parametrize(("file", "case", "result"), CLOSED, ids=name_of)
@pytest.mark.parametrize(
    ("key", "norm", "adaptive"), [("adaptive_linf", "linf", True), ("linf", "linf", False), ("l2", "l2", False)]
)
def test_closed_form(file, case, result, key, norm, adaptive):
    net = nn.Linear(len(case["w"]), 1, bias=False).double()
    net.weight.data.copy_(double(case["w"])[None])
    x, y = double(case["x"])[None], case["y"]

    def loss(model, batch):
        return torch.nn.functional.softplus(-y * model(batch)).mean()

    found = sharpness(net, loss, [x], ball=Ball(result["rho"], norm, adaptive), steps=60)
    assert found.base_loss == pytest.approx(result["base_loss"], abs=1e-12)
    assert found.sharpness == pytest.approx(result[key], abs=1e-6)


@pytest.mark.parametrize(("file", "case", "result"), MIXES, ids=name_of)
def test_mixes(file, case, result):
    theta0, theta1, fisher0, fisher1 = (
        {k: double(v) for k, v in case[key].items()} for key in ("theta0", "theta1", "fisher0", "fisher1")
    )
    alpha = result["alpha"]
    for name, base in theta0.items():
        linear = mix(base, theta1[name], alpha)
        torch.testing.assert_close(linear, double(result["linear"][name]), rtol=0, atol=1e-12)
        weighted = fisher_mix(base, theta1[name], alpha, fisher0[name], fisher1[name], case["fisher_floor"])
        torch.testing.assert_close(weighted, double(result["fisher"][name]), rtol=0, atol=1e-12)
