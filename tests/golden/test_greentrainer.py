"""GreenTrainer against its official code: selections, cost tables, importance, the budget of the backward pass."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from conftest import GOLDEN, golden_cases
from pegbox.parts.cost_chain import chain_costs
from pegbox.parts.statistics_drop import tensor_importance
from pegbox.select.knapsack import backward_budget
from pegbox.select.knapsack_solve import floored, knapsack_suffix, official_suffix

ROOT = GOLDEN / "greentrainer"


def entries(pattern):
    """Every entry of every case file that matches."""
    return [
        pytest.param(case, id=f"{path.stem}-{i}")
        for path in golden_cases("greentrainer", pattern)
        for i, case in enumerate(json.loads(path.read_text()))
    ] or [pytest.param(None, marks=pytest.mark.skip(reason=f"no {pattern} in {ROOT}"))]


@pytest.mark.parametrize("case", entries("selection*.json"))
def test_selection(case):
    own, steps, limit = case["t_dw"], case["t_dy"], case["budget"]
    chosen, value = official_suffix(case["importance"], own, steps, limit)
    assert chosen.astype(int).tolist() == case["official_selection"]
    assert value == pytest.approx(max(case["official_value"], 0), abs=1e-6)
    chosen, value = knapsack_suffix(case["importance"], own, np.cumsum(steps), limit)
    assert value == pytest.approx(case["optimal_value"], abs=1e-5)
    assert float(np.array(case["importance"])[chosen].sum()) == pytest.approx(value)
    if chosen.any():
        deepest = int(np.flatnonzero(chosen)[-1])
        assert sum(steps[: deepest + 1]) + int(np.array(own)[chosen].sum()) <= limit


@pytest.mark.parametrize("case", entries("rho_bp*.json"))
def test_share_left_for_the_backward_pass(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = backward_budget(case["rho"], case["t_fp"], case["t_bp"], clamp=True)
    assert left == pytest.approx(case["rho_bp"], abs=1e-12)


def cost_tables():
    found = []
    for path in golden_cases("greentrainer", "cost_table*.json"):
        file = json.loads(path.read_text())
        found += [pytest.param(name, file, id=f"{path.stem}-{name}") for name in file["models"]]
    return found or [pytest.param("", None, marks=pytest.mark.skip(reason=f"no cost tables in {ROOT}"))]


def model_of(name, sizes):
    """The random model of a case, on the meta device."""
    from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

    with torch.device("meta"):
        if name == "bloom":
            return BloomForCausalLM(
                BloomConfig(
                    vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], n_layer=sizes["layers"],
                    n_head=sizes["heads"],
                )
            )  # fmt: skip
        positions = next(s[0] for n, s in zip(*(sizes["models"][name][k] for k in ("names", "shapes"))) if "pos" in n)
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], ffn_dim=sizes["ffn"],
                num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
                word_embed_proj_dim=sizes["hidden"], max_position_embeddings=positions - 2,
            )
        )  # fmt: skip


@pytest.mark.parametrize(("name", "sizes"), cost_tables())
def test_cost_table(name, sizes):
    case, model = sizes["models"][name], model_of(name, sizes)
    table = chain_costs(model, (sizes["batch"], sizes["tokens"]))
    assert list(table.names) == case["names"]
    assert [list(p.shape) for _, p in model.named_parameters()] == case["shapes"]
    assert table.through == pytest.approx(case["t_dy"], rel=1e-6)
    assert table.own == pytest.approx(case["t_dw"], rel=1e-6)
    assert table.forward == pytest.approx(case["t_fp"], rel=1e-6)
    unit = table.full / 1000
    own, through = floored(table.own, unit), floored(table.through, unit)
    assert own.tolist() == case["t_dw_q"]
    assert through.tolist() == case["t_dy_q"]
    assert (own.sum() + through.sum()) / 1000 == pytest.approx(case["disco"])


class Net(nn.Module):
    """c(tanh(b(tanh(a(x)))))."""

    def __init__(self, state):
        super().__init__()
        for name in "abc":
            weight = state[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            layer.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})
            setattr(self, name, layer)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("path", golden_cases("greentrainer", "importance_*.npz"), ids=lambda p: p.stem)
def test_importance(path):
    settings = json.loads((path.parent / "importance_cases.json").read_text())[path.stem]
    data = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
    net = Net({k.removeprefix("init."): v for k, v in data.items() if k.startswith("init.")})
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings["optimizer"]]
    optimizer = kind(net.parameters(), lr=settings["lr"])

    def loss():
        return nn.functional.cross_entropy(net(data["x"]), data["y"])

    taking = settings["names"][settings["first_trained_index"] :]
    found = tensor_importance(net, [loss], optimizer, names=taking)
    expected = data["importance"].tolist()
    assert [found[name] for name in settings["names"]] == pytest.approx(expected, abs=1e-10)
