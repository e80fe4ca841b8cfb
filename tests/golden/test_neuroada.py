"""NeuroAda against vectors from its official functions: chosen positions, outputs, gradients, trained and merged."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

import pegbox
from conftest import GOLDEN, golden_cases
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.indexsets import row_top
from pegbox.parts.rowsets import columns_of, frequent_columns
from pegbox.select import SELECT
from pegbox.tuners.sparse import SparseConfig, sparse_layers

ROOT = GOLDEN / "neuroada"
SETTINGS = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}
FILES = [path for path in golden_cases("neuroada", "*.npz") if path.stem in SETTINGS]
CLOSE = {"rtol": 0, "atol": 1e-10}
CRITERIA = {"mag_add_reverse": "reverse", "gra_add": "gradient", "mag_add": "magnitude", "mag_add_appr": "magnitude"}

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden vectors in {ROOT}")


class Net(nn.Module):
    """up_proj, tanh, down_proj, lm_head, as the README of the vectors says."""

    def __init__(self, base):
        super().__init__()
        for name in ("up_proj", "down_proj", "lm_head"):
            weight = base[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in base, dtype=weight.dtype)
            layer.load_state_dict({k.rsplit(".", 1)[1]: v for k, v in base.items() if k.startswith(name + ".")})
            setattr(self, name, layer)

    def forward(self, x):
        return self.lm_head(self.down_proj(torch.tanh(self.up_proj(x))))


class Case:
    def __init__(self, path):
        data = np.load(path)
        self.settings = SETTINGS[path.stem]
        self.held = {key: torch.from_numpy(np.asarray(data[key])) for key in data.files if data[key].dtype.kind != "U"}
        self.trainable = [str(name) for name in data["trainable"]]
        self.targets = sorted({key.removeprefix("positions/") for key in self.held if key.startswith("positions/")})

    def group(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.held.items() if k.startswith(prefix)}

    def net(self):
        base = self.group("base/")
        if self.group("shared_columns/"):  # the official form with shared columns adds a target's bias twice
            twice = [name.replace("weight", "bias") for name in self.targets]
            base = {name: 2 * value if name in twice else value for name, value in base.items()}
        return Net(base)

    def selector(self):
        mode = self.settings["mode"].removeprefix("perCell_")
        targets = tuple(name.removesuffix(".weight") for name in self.targets)
        shared = {"shared_columns": True, "ties": "first"} if mode.endswith("appr") else {}
        block = {"kind": "per_neuron", "k": self.settings["k"], "criterion": CRITERIA[mode], "target_modules": targets}
        return SELECT.validate({**block, **shared})

    def allocation(self):
        net, selector = self.net(), self.selector()
        stats = None
        if selector.statistics() is not None:
            rows = [{"x": x[None], "target": t[None]} for x, t in zip(self.held["x"], self.held["target"])]
            spec = dataclasses.replace(selector.statistics(), dtype="float64")
            stats = pegbox.collect(net, spec, rows, loss=lambda m, b: loss_of(m(b["x"]), b["target"]))
        return selector.select(Anatomy.of(net), dict(net.named_parameters()), stats, torch.Generator()), stats

    def model(self, execution):
        allocation, _ = self.allocation()
        return get_peft_model(self.net(), SparseConfig(execution=execution).with_allocation(allocation))

    def order(self, name):
        """Where each value of the vectors stands among ours, which are sorted by row, then column."""
        where = self.held[f"positions/{name}"]
        columns = self.held[f"base/{name}"].shape[1]
        return (where[:, 0] * columns + where[:, 1]).argsort()

    def theta(self, prefix, name):
        """Values in our order. A shared-columns case holds them as (out, k), in its own order of columns."""
        values = self.held[f"{prefix}/{name}_new"]
        columns = self.held.get(f"shared_columns/{name}")
        if columns is not None:
            values = values[:, columns.argsort()]
            return values.flatten()
        return values[self.order(name)]


def loss_of(out, target):
    return nn.functional.mse_loss(out, target)


def values_of(model, case):
    layers = sparse_layers(model)
    return {n: layers[n.removesuffix(".weight")].sparse_values("weight", "default") for n in case.targets}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_positions(path):
    case = Case(path)
    allocation, stats = case.allocation()
    assert sorted(allocation) == case.targets
    for name, choice in allocation.items():
        shape = tuple(case.held[f"base/{name}"].shape)
        own = case.held[f"positions/{name}"].view(shape[0], -1, 2)[..., 1].sort(1).values  # of each row by itself
        shared = case.held.get(f"shared_columns/{name}")
        if shared is not None:
            k, columns = case.settings["k"], row_top(case.held[f"base/{name}"].abs(), case.settings["k"])
            assert torch.equal(columns, own)
            assert torch.equal(frequent_columns(columns, k, shape[1], first_met=True), shared)
            own = shared.sort().values.expand(shape[0], -1)
        assert torch.equal(columns_of(choice.index, shape).long(), own), name
        if stats is not None:  # ours is the mean over the batches
            summed = stats["gradient_sum"][name] * len(case.held["x"])
            torch.testing.assert_close(summed, case.held[f"summed_grad/{name}"], **CLOSE)


@pytest.mark.parametrize("execution", ["lean", "scatter", "bypass", "in_place"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_outputs_gradients_and_training(path, execution):
    case = Case(path)
    model = case.model(execution)
    x, target = case.held["x"].clone().requires_grad_(True), case.held["target"]
    torch.testing.assert_close(model(x).detach(), case.held["out_zero"], **CLOSE)
    values = values_of(model, case)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{n.removesuffix('_new').removesuffix('.weight')}.sparse_weight_values.default"
        for n in case.trainable
    }
    with torch.no_grad():
        for name, parameter in values.items():
            parameter.copy_(case.theta("theta", name))
    out = model(x)
    loss = loss_of(out, target)
    loss.backward()
    torch.testing.assert_close(out.detach(), case.held["out_theta"], **CLOSE)
    torch.testing.assert_close(loss.detach(), case.held["loss"], **CLOSE)
    torch.testing.assert_close(x.grad, case.held["dx"], **CLOSE)
    for name, parameter in values.items():
        torch.testing.assert_close(parameter.grad, case.theta("grad_theta", name), **CLOSE)
    losses = train(model, list(values.values()), case)
    torch.testing.assert_close(losses, case.held["train_losses"], **CLOSE)
    for name, parameter in values.items():
        torch.testing.assert_close(parameter.detach(), case.theta("theta_trained", name), **CLOSE)
    torch.testing.assert_close(model(x).detach(), case.held["out_trained"], **CLOSE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x).detach(), case.held["out_trained"], **CLOSE)
    for name, weight in case.group("merged/").items():
        torch.testing.assert_close(merged.get_parameter(name).detach(), weight, **CLOSE)


def train(model, values, case):
    optimizer = torch.optim.AdamW(values, lr=case.settings["lr"], weight_decay=0.0)
    losses = []
    for _ in range(case.settings["steps"]):
        optimizer.zero_grad()
        loss = loss_of(model(case.held["x"]), case.held["target"])
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)
