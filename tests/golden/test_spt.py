"""SPT against vectors from its official code: sensitivities, the allocation for every budget, single-weight layers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from conftest import golden_cases
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.statistics_parameters import sensitivity
from pegbox.select.allotment import Site, allot, grid, module_cost, nearest, ranked, totals
from pegbox.tuners.sparse import SparseConfig, sparse_layers

SENSITIVITIES = golden_cases("spt", "sensitivity*.npz")
ALLOCATIONS = golden_cases("spt", "allocation*.json")
LINEARS = golden_cases("spt", "single_weight_linear*.npz")
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")

pytestmark = pytest.mark.skipif(not SENSITIVITIES, reason="no golden vectors of spt")


def load(path):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}


class Vit(nn.Module):
    """The tiny model of the README, by parameter name."""

    def __init__(self, weights, heads, eps):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.names = list(weights)
        for name, value in weights.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(value.clone()))
        self.depth = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))

    def get(self, name):
        return self.get_parameter(name)

    def linear(self, x, name):
        return F.linear(
            x, self.get(f"{name}.weight"), self.get(f"{name}.bias") if f"{name}.bias" in self.names else None
        )

    def normed(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.get(f"{name}.weight"), self.get(f"{name}.bias"), self.eps)

    def forward(self, x):
        x = self.linear(x, "patch_embed")
        x = torch.cat([self.get("cls_token").expand(len(x), -1, -1), x], 1) + self.get("pos_embed")
        for i in range(self.depth):
            block = f"blocks.{i}"
            h = self.normed(x, f"{block}.norm1")
            q, k, v = (self._heads(self.linear(h, f"{block}.attn.{part}")) for part in "qkv")
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + self.linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
            h = F.gelu(self.linear(self.normed(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + self.linear(h, f"{block}.mlp.fc2")
        return self.linear(self.normed(x, "norm")[:, 0], "head")

    def _heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("path", SENSITIVITIES, ids=lambda p: p.stem)
def test_sensitivities(path):
    data = load(path)
    weights = {k.removeprefix("w."): v for k, v in data.items() if k.startswith("w.")}
    model = Vit(weights, int(data["heads"]), float(data["ln_eps"]))
    count = sum(key.startswith("x") for key in data)
    batches = [(data[f"x{i}"], data[f"y{i}"]) for i in range(count)]
    found = sensitivity(model, batches, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    expected = {k.removeprefix("s."): v for k, v in data.items() if k.startswith("s.")}
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-30)


class Candidates:
    """Scores and sites in the order of the vectors."""

    def __init__(self, setting, data):
        names = [n for n in setting["parameter_order"] if not any(word in n for word in setting["skip"])]
        self.scores = {n: data[f"s.{n}"] for n in names}
        kind, rank = setting["structured_type"], setting["r"]
        self.sites = []
        for name, score in self.scores.items():
            if score.ndim == 1:
                self.sites.append(Site(name, score.numel(), "vector", score.numel()))
            else:
                cost = module_cost(kind, rank, math.prod(score.shape[1:]), score.shape[0])
                self.sites.append(Site(name, score.numel(), "matrix", cost))
        self.options = {"alpha": setting["alpha"], "beta": setting["beta"], "extra": setting["cls_values"]}
        self.count = sum(s.numel() for s in self.scores.values())


def sensitivities_for(path):
    """The sensitivities that belong to an allocation file: the same ending of the name, else the only ones."""
    ending = path.stem.removeprefix("allocation")
    same = [p for p in SENSITIVITIES if p.stem.removeprefix("sensitivity") == ending]
    return load(same[0] if same else SENSITIVITIES[0])


@pytest.mark.parametrize("path", ALLOCATIONS, ids=lambda p: p.stem)
def test_allocations_for_every_budget(path):
    record = json.loads(path.read_text())
    setting = record["setting"]
    held = Candidates(setting, sensitivities_for(path))
    assert held.count == setting["candidates"]
    levels = [tau for tau in grid(setting["unit"]) if tau <= held.count]
    for target in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        expected = record["budgets"].get(str(target))
        tensors, _ = ranked(held.scores, max(levels))
        found = totals(tensors, held.sites, **held.options)[torch.tensor(levels)]
        at = nearest(found, target * setting["unit"])
        if expected is None:
            assert at is None
            continue
        split, entries = allot(held.scores, held.sites, tau=levels[at], **held.options)
        check(expected, split, entries, held)
        budget = round(target * setting["unit"])
        if budget == target * setting["unit"]:
            again, _ = allot(held.scores, held.sites, budget=budget, search="grid", levels=levels, **held.options)
            assert again == split


def check(expected, split, entries, held):
    assert split.total == expected["total_values"]
    whole = {s.tensor: taken for s, taken in zip(held.sites, split.structured)}
    vectors = [s.tensor for s, taken in zip(held.sites, split.structured) if taken and s.kind == "vector"]
    assert sorted(vectors) == sorted(expected["whole_vectors"])
    for block, row in enumerate(expected["structured_matrices_q_k_v_proj_fc1_fc2_per_block"]):
        assert [int(whole[f"blocks.{block}.{name}.weight"]) for name in MATRICES] == row
    singles = {s.tensor: entries[i].tolist() for i, s in enumerate(held.sites) if i in entries and not whole[s.tensor]}
    assert singles == expected["single_indices_flat"]
    assert sum(map(len, singles.values())) == expected["unstructured_values"]
    costs = sum(s.cost for s, taken in zip(held.sites, split.structured) if taken)
    assert costs == expected["structured_values"]


@pytest.mark.parametrize("execution", ["lean", "in_place", "scatter", "bypass"])
@pytest.mark.parametrize("path", LINEARS, ids=lambda p: p.stem)
def test_single_weights_of_a_linear(path, execution):
    data = load(path)
    rows, columns = data["rows_cols"]
    flat = rows * data["W"].shape[1] + columns
    order = flat.argsort()
    bias = data["bias_idx"].flatten()
    if execution == "bypass":
        bias = bias[:0]
    net = nn.Sequential(nn.Linear(data["W"].shape[1], data["W"].shape[0], dtype=data["W"].dtype))
    net[0].load_state_dict({"weight": data["W"], "bias": data["b"]})
    if execution == "bypass":  # has no bias to tune: it stands at its tuned value
        net[0].bias.data.index_add_(0, data["bias_idx"].flatten(), data["db"])
    chosen = {"0.weight": Entries(flat[order].int()), "0.bias": Entries(bias.sort().values.int())}
    given = Allocation({name: choice for name, choice in chosen.items() if choice.index.numel()})
    model = get_peft_model(net, SparseConfig(execution=execution, tensors=["weight", "bias"]).with_allocation(given))
    layer = sparse_layers(model)["0"]
    with torch.no_grad():
        layer.sparse_values("weight", "default").copy_(data["dw"][order])
        if bias.numel():
            layer.sparse_values("bias", "default").copy_(data["db"][bias.argsort()])
    x = data["x"].clone().requires_grad_(True)
    y = model(x)
    y.backward(data["dy"])
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(y.detach(), data["y"], **close)
    torch.testing.assert_close(x.grad, data["grad_x"], **close)
    torch.testing.assert_close(layer.sparse_values("weight", "default").grad, data["grad_dw"][order], **close)
    if bias.numel():
        torch.testing.assert_close(
            layer.sparse_values("bias", "default").grad, data["grad_db"][bias.argsort()], **close
        )
