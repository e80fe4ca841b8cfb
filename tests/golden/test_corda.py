"""CorDA against the official functions: covariances through hooks, components, residuals, reconstruction."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from conftest import GOLDEN
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.statistics import StatSpec, collect
from pegbox.prepare.corda import take_out
from pegbox.prepare.oriented import decompose, factors_of

ROOT = GOLDEN / "corda"
CASES = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}
FILES = sorted(ROOT.glob("tensors*.npz"))

pytestmark = pytest.mark.skipif(not CASES or not FILES, reason=f"no golden vectors in {ROOT}")


class Net(nn.Module):
    def __init__(self, data):
        super().__init__()
        for name in CASES["layers"]:
            out, into = data[f"{name}_weight"].shape
            layer = nn.Linear(into, out, bias=f"{name}_bias" in data)
            layer.load_state_dict({k: data[f"{name}_{k}"] for k in ("weight", "bias") if f"{name}_{k}" in data})
            setattr(self, name, layer)

    def forward(self, x):
        return self.l2(torch.tanh(self.l1(x)))


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def data(request):
    return {k: torch.from_numpy(v) for k, v in np.load(request.param).items()}


@pytest.fixture
def covariances(data):
    spec = StatSpec(
        ("input_covariance",), ("all-linear",), batches=10**6, weigh="sequence", normalize="signed_max", dtype="float64"
    )
    return collect(Net(data), spec, [{"x": x[None]} for x in data["X"]])["input_covariance"]


@pytest.mark.parametrize("batch", [1, 3])
def test_covariances(data, batch):
    spec = StatSpec(("input_covariance",), ("all-linear",), batches=10**6, weigh="sequence", normalize="signed_max")
    stats = collect(Net(data), spec, [{"x": x} for x in data["X"].split(batch)])
    assert stats.sequences == CASES["N"]
    for name in CASES["layers"]:
        ours = stats["input_covariance"][name]
        torch.testing.assert_close(ours, data[f"{name}_C_mean"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours * CASES["N"] / 256, data[f"{name}_C_over_256"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("name", list(CASES.get("layers", {})))
def test_components(data, covariances, name, mode):
    weight, rank = data[f"{name}_weight"], CASES["layers"][name]["r"]
    parts = decompose(weight, covariances[name])
    assert parts.damping == CASES["layers"][name]["damping_tried"][-1]
    a, b = factors_of(parts, rank, mode)
    product = (b @ a).float()
    torch.testing.assert_close(product, data[f"{name}_{mode}_BA"], rtol=0, atol=1e-4)
    torch.testing.assert_close(weight - product, data[f"{name}_{mode}_W_res"], rtol=0, atol=1e-4)
    at = slice(-rank, None) if mode == "kpm" else slice(0, rank)
    expected = data[f"{name}_{mode}_S"] * 256 / CASES["N"]  # the vectors' S belongs to the sum over 256
    torch.testing.assert_close(parts.s[at].float(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(b.square().sum(0).float(), expected, rtol=1e-4, atol=0)
    assert float(product.norm()) == pytest.approx(CASES["layers"][name][mode]["fro_BA"], rel=1e-4)


def test_the_identity_gives_the_plain_decomposition(data):
    for key, expected in data.items():
        if key.endswith("_plainsvd_top_BA"):
            name = key.removesuffix("_plainsvd_top_BA")
            weight = data[f"{name}_weight"]
            eye = torch.eye(weight.shape[1], dtype=torch.float64)
            a, b = factors_of(decompose(weight, eye), CASES["layers"][name]["r"], "ipm")
            torch.testing.assert_close((b @ a).float(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_the_network_is_unchanged(data, covariances, mode):
    net = Net(data)
    factors = {}
    for name, layer in CASES["layers"].items():
        a, b = factors_of(decompose(data[f"{name}_weight"], covariances[name]), layer["r"], mode)
        factors[name] = (a.float(), b.float())
    take_out(net, Anatomy.of(net), factors)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            weight = net.get_submodule(name).weight
            torch.testing.assert_close(weight + b @ a, data[f"{name}_weight"], rtol=0, atol=1e-6)
            weight += b @ a
        torch.testing.assert_close(net(data["X"]), data["y_original"], rtol=0, atol=1e-5)
