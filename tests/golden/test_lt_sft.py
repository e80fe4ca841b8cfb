"""LT-SFT against the official code: masks, rewinds, losses, the L1 term, differences, file format, composition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from conftest import GOLDEN
from pegbox.parts import deltas
from pegbox.parts.allocation import Allocation, Entries, Whole
from pegbox.parts.composable_sft import decode
from pegbox.parts.context import Context
from pegbox.parts.indexsets import from_mask, to_mask, union
from pegbox.parts.penalties import l1_distance
from pegbox.select.change import largest_changes
from pegbox.tuners.full import Full

ROOT = GOLDEN / "lt-sft"
CASES = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}
RUNS = sorted(name for name in CASES if (ROOT / f"{name}.npz").is_file())
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
EPSILON = 1e-7  # below which a difference isn't stored

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors in {ROOT}")


class Net(nn.Module):
    def __init__(self, case, weights):
        super().__init__()
        d, h, c = case["d"], case["h"], case["c"]
        self.enc = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, h, bias=False), nn.Tanh())
        self.head = nn.Linear(h, c)
        self.double()
        with torch.no_grad():
            for name, value in weights.items():
                self.get_parameter(name).copy_(value)

    def forward(self, x):
        return self.head(self.enc(x))


def group(data, prefix):
    return {k.removeprefix(prefix): torch.from_numpy(data[k]) for k in data.files if k.startswith(prefix)}


def now(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def phase(net, case, data, steps, l1, start):
    """Full-batch training with a fresh optimizer; the squared error before each step."""
    trained = [p for p in net.parameters() if p.requires_grad]
    stepper = OPTIMIZERS[case["optimizer"]](trained, lr=case["lr"])
    covered = [n for n in start if "enc" in n or not case["reg_only_maskable"]]
    count = sum(p.numel() for p in net.parameters())
    losses = []
    for _ in range(steps):
        stepper.zero_grad()
        loss = (net(data["x"]) - data["y"]).square().mean()
        losses.append(loss.detach())
        if l1:
            loss = loss + l1 / count * l1_distance([net.get_parameter(n) for n in covered], [start[n] for n in covered])
        loss.backward()
        stepper.step()
    return torch.stack(losses)


@pytest.mark.parametrize("name", RUNS)
def test_probe_pick_rewind_train(name):
    case, file = CASES[name], np.load(ROOT / f"{name}.npz")
    data = {k: torch.from_numpy(file[k]) for k in ("x", "y")}
    net = Net(case, group(file, "init/"))
    start = now(net)
    maskable = [n for n in start if n.startswith("enc")]
    taken: dict[str, torch.Tensor] = {}
    for i in range(case["n_iterations"]):
        before = now(net)
        Full().attach(net, None, Context(net))
        losses = phase(net, case, data, case["full_steps"], case["full_l1"], start)
        check_phase(file, 2 * i, net, losses)
        end = now(net)
        found = largest_changes(
            {n: start[n] for n in maskable}, {n: end[n] for n in maskable}, case["K"] // case["n_iterations"], taken
        )
        taken = {n: union(taken[n], index) if n in taken else index for n, index in found.items()}
        with torch.no_grad():
            for n, value in before.items():
                net.get_parameter(n).copy_(value)
        assert all(torch.equal(net.get_parameter(n), v) for n, v in before.items())
        chosen = Allocation({n: Entries(index) for n, index in taken.items() if index.numel()})
        heads = {n: Whole() for n in start if n.startswith("head")}
        Full().attach(net, Allocation({**chosen, **heads}), Context(net))
        losses = phase(net, case, data, case["sparse_steps"], case["sparse_l1"], start)
        check_phase(file, 2 * i + 1, net, losses, taken)
    assert sum(index.numel() for index in taken.values()) == case["n_iterations"] * (case["K"] // case["n_iterations"])
    for n, mask in group(file, "final_mask/").items():
        assert torch.equal(to_mask(taken[n], tuple(mask.shape)), mask.bool())
        outside = ~mask.bool()
        assert torch.equal(net.get_parameter(n)[outside], start[n][outside])
    check_difference(file, case, net, start)


def check_phase(file, number, net, losses, taken=None):
    torch.testing.assert_close(losses, torch.from_numpy(file[f"phase{number}/losses"]), rtol=0, atol=1e-10)
    for n, value in group(file, f"phase{number}/params/").items():
        torch.testing.assert_close(net.get_parameter(n).detach(), value, rtol=0, atol=1e-10)
    for n, mask in group(file, f"phase{number}/mask/").items():
        if taken is not None:
            assert torch.equal(taken[n].long(), from_mask(mask.bool()).long()), n


def check_difference(file, case, net, start):
    """The difference is the official one, and so is what the official encoding says."""
    dense = group(file, "sft/diff_dense/")
    ours = deltas.difference(start, now(net), mode="add", threshold=EPSILON, names=list(dense))
    for n, expected in dense.items():
        official = decode(case["official_encoding"][n])
        held = torch.zeros(expected.numel(), dtype=torch.float64)
        if n in ours:
            held[ours[n].index.long()] = ours[n].values
        torch.testing.assert_close(held.view_as(expected), expected, rtol=0, atol=1e-10)
        flat = torch.zeros(expected.numel(), dtype=torch.float64)
        flat[official.index.long()] = official.values.double()
        torch.testing.assert_close(flat.view_as(expected), expected, rtol=0, atol=1e-12)
    for n, value in group(file, "sft/abs/").items():
        torch.testing.assert_close(net.get_parameter(n).detach(), value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", sorted(ROOT.glob("compose*.npz")), ids=lambda p: p.stem)
def test_composition(path):
    file = np.load(path)
    init, task, lang = (group(file, f"{g}/") for g in ("init", "task/diff", "lang/diff"))
    task, lang = ({n.removeprefix("/"): t for n, t in g.items()} for g in (task, lang))
    heads = {n.removeprefix("/"): t for n, t in group(file, "task/abs/").items()}
    composed = group(file, "composed/")

    def piece(t):
        index = from_mask(t != 0)
        return deltas.Piece(tuple(t.shape), t.flatten()[index.long()], index)

    parts = [deltas.Delta({n: piece(t) for n, t in d.items() if bool((t != 0).any())}) for d in (task, lang)]
    results = []
    for order in (parts, parts[::-1]):
        weights = {n: t.clone() for n, t in init.items()}
        undo = [deltas.apply(part, weights) for part in order]
        results.append({n: t.clone() for n, t in weights.items()} | heads)
        for step in reversed(undo):
            deltas.revert(step)
        assert all(torch.equal(weights[n], init[n]) for n in init)
    merged = {n: t.clone() for n, t in init.items()}
    deltas.apply(deltas.compose(parts), merged)
    results.append(merged | heads)
    for result in results:
        for n, expected in composed.items():
            torch.testing.assert_close(result[n], expected, rtol=0, atol=1e-6)
