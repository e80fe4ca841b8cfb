"""SpIEL against vectors from its official code: the layer, both optimizers, whole trainings with drop and grow."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from conftest import GOLDEN, golden_cases
from pegbox.optim.aged_adamw import AgedAdamW
from pegbox.optim.sparse_sm3 import SparseSM3
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.optimstate import seed
from pegbox.parts.parameterinfo import ParameterInfo, attach_info
from pegbox.select import SELECT
from pegbox.select.regrow import RegrowSchedule, events
from pegbox.tuners.sparse import MaskRefresh, SparseConfig, sparse_layers
from pegbox.tuners.sparse.refresh import start_watching

ROOT = GOLDEN / "spiel"
CASES = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}
LOOPS = sorted(p.stem for p in golden_cases("spiel", "loop_*.npz") if p.stem in CASES)

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden vectors in {ROOT}")


def groups(pattern):
    """(file's stem, group) of every case file whose arrays are named group/array."""
    found = []
    for path in golden_cases("spiel", pattern):
        found += [(path.stem, g) for g in dict.fromkeys(k.split("/")[0] for k in np.load(path).files if "/" in k)]
    return found


def arrays(stem, group=""):
    data = np.load(ROOT / f"{stem}.npz")
    start = f"{group}/" if group else ""
    return {k.removeprefix(start): torch.from_numpy(np.array(data[k])) for k in data.files if k.startswith(start)}


def sparse(weight, bias, index, execution, **options):
    """(model, layer, values) of one linear layer with these entries; the index may be in any order."""
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype))
    net[0].weight.data.copy_(weight)
    if bias is not None:
        net[0].bias.data.copy_(bias)
    given = Allocation({"0.weight": Entries(index.sort().values)})
    model = get_peft_model(net, SparseConfig(execution=execution, **options).with_allocation(given))
    layer = sparse_layers(model)["0"]
    return model, layer, layer.sparse_values("weight", "default")


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize("execution", ["in_place", "scatter", "bypass"])
@pytest.mark.parametrize(("stem", "group"), groups("linear_op*.npz"))
def test_the_layer(stem, group, execution, gradient):
    case = arrays(stem, group)
    order = case["indices"].argsort()
    model, layer, values = sparse(case["W"], case.get("b"), case["indices"], execution, gradient=gradient)
    with torch.no_grad():
        values.copy_(case["phi"][order])
    start_watching(model)
    seen = []
    layer.watches[("default", "weight")].see = seen.append
    layer.watches[("default", "weight")].see_product = lambda a, b: seen.append(a @ b)
    x = case["x"].requires_grad_()
    y = model(x)
    y.backward(case["g"])
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(y.detach(), case["y"], **close)
    torch.testing.assert_close(x.grad, case["dx"], **close)
    torch.testing.assert_close(values.grad, case["dphi"][order], **close)
    torch.testing.assert_close(seen[0], case["dense_grad"], **close)


@pytest.mark.parametrize(("stem", "group"), groups("aged_adamw*.npz"))
def test_adam_with_ages(stem, group):
    case, settings = arrays(stem, group), CASES[stem][group]
    phi = nn.Parameter(case["phi0"].clone())
    optimizer = AgedAdamW([phi], lr=settings["lr"], betas=tuple(settings["betas"]), weight_decay=settings["wd"])
    for step, grad in enumerate(case["grads"]):
        if settings["ages"] and step == 2:
            at = torch.tensor([0, 1])
            with torch.no_grad():
                phi[at] = 0
            given = {"exp_avg": [0.1, -0.2], "exp_avg_sq": [0.03, 0.05], "age": [3, 5]}
            seed(optimizer, phi, at, {k: torch.tensor(v, dtype=torch.float32) for k, v in given.items()})
        phi.grad = grad.clone()
        optimizer.step()
        state = optimizer.state[phi]
        for name, ours in (("phi", phi.detach()), ("m", state["exp_avg"]), ("v", state["exp_avg_sq"])):
            torch.testing.assert_close(ours, case[name][step], rtol=1e-6, atol=1e-8)
        assert torch.equal(state["age"], case["age"][step])


@pytest.mark.parametrize(("stem", "group"), groups("sm3*.npz"))
def test_sm3(stem, group):
    case, settings = arrays(stem, group), CASES[stem][group]
    order = case["indices"].argsort()
    index = case["indices"][order]
    phi = nn.Parameter(case["phi0"][order].clone())
    shape = tuple(case["shape"].tolist())
    attach_info(phi, ParameterInfo("w", shape, lambda: index, lambda: torch.zeros(index.numel()), "delta"))
    optimizer = SparseSM3([phi], lr=settings["lr"], momentum=settings["mom"], weight_decay=settings["wd"])
    for step, grad in enumerate(case["grads"]):
        phi.grad = grad[order].clone()
        optimizer.step()
        state = optimizer.state[phi]
        close = {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(phi.detach(), case["phi"][step][order], **close)
        torch.testing.assert_close(state["row"], case["row"][step], **close)
        torch.testing.assert_close(state["column"], case["col"][step], **close)


class Loop(nn.Module):
    def __init__(self, data):
        super().__init__()
        self.l1, self.l2 = (nn.Linear(*reversed(data[f"{n}/W"].shape), bias=n == "l1") for n in ("l1", "l2"))
        self.l1.weight.data.copy_(data["l1/W"])
        self.l1.bias.data.copy_(data["l1/b"])
        self.l2.weight.data.copy_(data["l2/W"])

    def forward(self, x):
        return self.l2(torch.tanh(self.l1(x)))


@pytest.mark.parametrize("execution", ["in_place", "scatter", "bypass"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_training_with_drop_and_grow(name, execution):
    case, data = CASES[name], arrays(name)
    given = {f"{n}.weight": Entries(data[f"{n}/indices0"].sort().values) for n in ("l1", "l2")}
    model = get_peft_model(Loop(data), SparseConfig(execution=execution).with_allocation(Allocation(given)))
    layers = sparse_layers(model)
    values = [layers[n].sparse_values("weight", "default") for n in ("l1", "l2")]
    momentum = case["growth"] == "sm3"
    make = SparseSM3 if momentum else AgedAdamW
    optimizer = make(values, lr=case["lr"], weight_decay=case["weight_decay"])
    schedule = {"every": case["S"], "accumulate": case["a"], "rate": case["r0"], "policy": case["policy"]}
    growth = "momentum" if momentum else "accumulated_gradient"
    select = SELECT.validate({"kind": "regrow", "growth": growth, "schedule": schedule})
    work = MaskRefresh(select, total=lambda: case["T"], model=model)
    work.begin(0, model)
    slots = {n: data[f"{n}/indices0"].tolist() for n in ("l1", "l2")}
    for step in range(case["T"]):
        loss = (model(data["x"][step]) - data["target"][step]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(data["losses"][step]), rel=1e-5)
        before = {n: set(layers[n].slot("default", "weight").index.tolist()) for n in slots}
        optimizer.step()
        work.after_step(step + 1, model)
        work.refresh(step + 1, model, optimizer)
        for n in slots:
            now = layers[n].slot("default", "weight")
            want, phi = data[f"{n}/indices"][step], data[f"{n}/phi"][step]
            order = want.argsort()
            assert torch.equal(now.index, want[order].to(now.index.dtype)), (n, step)
            torch.testing.assert_close(now.values.detach(), phi[order], rtol=0, atol=2e-5)
            if not momentum:  # the official slots: those replaced are exactly the ones whose place moved
                moved = [i for i, (a, b) in enumerate(zip(slots[n], want.tolist())) if a != b]
                assert {slots[n][i] for i in moved} == before[n] - set(now.index.tolist())
            slots[n] = want.tolist()
    assert [e for e in case["events"] if e[0] == "select" or not momentum] == [
        list(e) if e[0] == "start" else [e[0], e[1], pytest.approx(e[2])]
        for e in events(case["T"], select.schedule)
        if e[0] == "select" or not momentum
    ]
    ends = {"exp_avg": "m_end", "exp_avg_sq": "v_end", "age": "age_end", "row": "row_end", "column": "col_end"}
    for n, value in zip(slots, values):
        order = data[f"{n}/indices"][-1].argsort()
        for key, tensor in optimizer.state[value].items():
            want = data[f"{n}/{ends[key]}"]
            want = want[order] if key in ("exp_avg", "exp_avg_sq", "age") else want
            torch.testing.assert_close(tensor, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES.get("schedule", []))
def test_events(case):
    """5. The sequence of starts and events."""
    schedule = RegrowSchedule(every=case["S"], accumulate=case["a"], rate=case["r0"], policy=case["policy"])
    ours = [[e[0], e[1], *map(pytest.approx, e[2:])] for e in events(case["T"], schedule)]
    assert case["events"] == ours
