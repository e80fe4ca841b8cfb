"""SaRA against vectors from its official dense optimizer: masks, sparse AdamW, the stage change, the nuclear norm."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import GOLDEN, golden_cases
from pegbox.optim.sparse_leaves import SparseAdamW, default_rate, sara_adamw
from pegbox.parts.indexsets import from_mask, to_mask
from pegbox.parts.penalties import nuclear_norm
from pegbox.parts.thresholds import below
from pegbox.select import SELECT

ROOT = GOLDEN / "sara"
RATES = [c for p in golden_cases("sara", "golden_lr*.json") for c in json.loads(p.read_text())]
CLOSE = {"rtol": 0, "atol": 1e-10}

pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no golden vectors in {ROOT}")


def arrays(path):
    data = np.load(path)
    return {k: data[k].tolist() if data[k].dtype.kind == "U" else torch.from_numpy(data[k]) for k in data.files}


class Net(nn.Module):
    """l2(tanh(l1(x))), with a convolution before it where the case has one ("c")."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.clone()))

    def named(self):
        return [(n.replace("_", "."), p) for n, p in self.named_parameters()]

    def forward(self, x):
        p = dict(self.named())
        if "c.weight" in p:
            x = torch.tanh(F.conv2d(x, p["c.weight"], p.get("c.bias"), padding=self.padding(x, p))).flatten(1)
        return F.linear(torch.tanh(F.linear(x, p["l1.weight"], p.get("l1.bias"))), p["l2.weight"], p.get("l2.bias"))

    @staticmethod
    def padding(x, p):
        """The padding under which the convolution's output has as many numbers as l1 takes."""
        c = p["c.weight"]
        sizes = {
            k: c.shape[0] * (x.shape[2] + 2 * k - c.shape[2] + 1) * (x.shape[3] + 2 * k - c.shape[3] + 1)
            for k in (0, 1, 2)
        }
        return next(k for k, size in sizes.items() if size == p["l1.weight"].shape[1])


def options(hyper):
    theta, lr, decay, first, second, eps = hyper[:6].tolist()
    return {"threshold": theta, "lr": lr, "weight_decay": decay, "betas": (first, second), "eps": eps}


@pytest.mark.parametrize(
    "path", golden_cases("sara", "golden_mlp*.npz") + golden_cases("sara", "golden_conv*.npz"), ids=lambda p: p.stem
)
def test_a_training_with_two_stages(path):
    data = arrays(path)
    names = data["names"]
    base = {n: data[f"base/{n}"] for n in names}
    net = Net(base)
    steps, stage = data["steps_prog"].tolist()
    selector = SELECT.validate({"kind": "smallest", "theta": float(data["hyper"][0])})
    chosen = selector.select(None, base, None, torch.Generator())
    optimizer = sara_adamw(net.named(), lambda_rank=0.0, progressive_iter=stage, **options(data["hyper"]))
    for n in names:
        mask = data[f"mask/{n}"]
        index = optimizer.leaves[n].index if n in optimizer.leaves else torch.empty(0, dtype=torch.int32)
        assert torch.equal(index, from_mask(mask))
        assert torch.equal(to_mask(chosen[n].index, tuple(mask.shape)) if n in chosen else torch.zeros_like(mask), mask)
    for step in range(1, steps + 1):
        loss = (net(data["x"]) - data["y"]).square().mean()
        loss.backward()
        torch.testing.assert_close(loss.detach(), data["losses"][step - 1], **CLOSE)
        for n, leaf in optimizer.leaves.items():
            if step == 1:
                want = data[f"grad0/{n}"].flatten()[leaf.index.long()]
                torch.testing.assert_close(leaf.values.grad, want, **CLOSE)
        optimizer.step()
        for n, p in net.named():
            torch.testing.assert_close(p.detach(), data[f"step{step}/{n}"], **CLOSE)
            frozen = ~data[f"mask/{n}"]
            assert torch.equal(p.detach()[frozen], base[n][frozen])
        if step == stage + 1:
            for n, leaf in optimizer.leaves.items():
                assert torch.equal(to_mask(leaf.index, leaf.parameter.shape), data[f"mask2/{n}"])


@pytest.mark.parametrize("path", golden_cases("sara", "golden_rank*.npz"), ids=lambda p: p.stem)
def test_the_low_rank_loss(path):
    data = arrays(path)
    base, mask, lam = data["base"], data["mask"], float(data["hyper"][6])
    index = below(base, float(data["hyper"][0]))
    assert torch.equal(index, from_mask(mask))
    close = {"rtol": 0, "atol": 1e-8}
    norm, slope = nuclear_norm(torch.where(mask, base, 0.0))
    torch.testing.assert_close(norm, data["nuclear_norm"], **close)
    torch.testing.assert_close(torch.where(mask, slope, 0.0), data["nuclear_grad"], **close)
    w = nn.Parameter(base.clone())
    given = options(data["hyper"])
    theta = given.pop("threshold")
    optimizer = SparseAdamW([("w", w)], {"w": index}, theta=theta, lambda_rank=lam, **given)
    for step in sorted(int(k[4:]) for k in data if k.startswith("step")):
        (data["x"] @ w.T - data["y"]).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(w.detach(), data[f"step{step}"], **close)


@pytest.mark.parametrize("case", RATES)
def test_the_automatic_rate(case):
    """8. The learning rate that goes with a threshold."""
    assert default_rate(case["threshold"]) == pytest.approx(case["lr"], rel=1e-12)
