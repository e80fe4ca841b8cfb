"""LIFT against vectors from its official optimizer: masks, refreshes with migrated moments, alignment."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from conftest import GOLDEN
from pegbox.analyze.spectra import alignment
from pegbox.optim.sparse_adam import UnscaledEpsAdamW
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.indexsets import from_mask
from pegbox.select import SELECT
from pegbox.tuners.sparse import MaskRefresh, SparseConfig, export_delta, sparse_layers

ROOT = GOLDEN / "lift"
SETTINGS = json.loads((ROOT / "cases.json").read_text()) if (ROOT / "cases.json").is_file() else {}
RUNS = sorted(name for name, s in SETTINGS.items() if isinstance(s, dict) and (ROOT / f"{name}.npz").is_file())

pytestmark = pytest.mark.skipif(not SETTINGS, reason=f"no golden vectors in {ROOT}")


def tensor(array):
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("path", sorted(ROOT.glob("masks*.npz")), ids=lambda p: p.stem)
def test_masks(path):
    data = np.load(path)
    weight = tensor(data["W"])
    largest = [case for case in SETTINGS["masks"] if "largest" in case["mask_type"]]
    assert largest
    for case in largest:
        select = SELECT.validate(
            {"kind": "low_rank_magnitude", "filter_rank": case["r"], "budget": {"rank": case["R"]}}
        )
        chosen = select.select(None, {"w": weight}, None, torch.Generator())["w"].index
        assert torch.equal(chosen, from_mask(tensor(data[f"mask/{case['name']}"]))), case["name"]
    magnitude = SELECT.validate({"kind": "magnitude", "budget": {"rank": 1}})
    chosen = magnitude.select(None, {"w": weight}, None, torch.Generator())["w"].index
    assert torch.equal(chosen, from_mask(tensor(data["mask/magnitude_R1"])))


@pytest.mark.parametrize("execution", ["in_place", "scatter"])
@pytest.mark.parametrize("name", RUNS)
def test_run_with_refresh(name, execution):
    case, data = SETTINGS[name], np.load(ROOT / f"{name}.npz")
    start = tensor(data["W0"])
    net = nn.Sequential(nn.Linear(case["n"], case["m"], bias=False, dtype=torch.float64))
    net[0].weight.data.copy_(start)
    given = Allocation({"0.weight": Entries(from_mask(tensor(data["mask0"])))})
    config = SparseConfig(coordinates="absolute", execution=execution).with_allocation(given)
    model = get_peft_model(net, config)
    layer = sparse_layers(model)["0"]
    values = layer.sparse_values("weight", "default")
    optimizer = UnscaledEpsAdamW([values], lr=case["lr"], betas=tuple(case["betas"]), eps=case["eps"])
    schedule = MaskRefresh(
        SELECT.validate(
            {
                "kind": "low_rank_magnitude",
                "filter_rank": case["r"],
                "budget": {"rank": case["R"]},
                "schedule": {"every": case["T_m"]},
            }
        )
    )
    assert [s for s in range(1, case["steps"] + 1) if schedule.due(s)] == case["refresh_after_update"]
    for step in range(case["steps"]):
        values.grad = tensor(data["grads"][step]).flatten()[layer.slot("default", "weight").index.long()]
        optimizer.step()
        schedule.refresh(step + 1, model, optimizer)
        state = optimizer.state[values]
        close = {"rtol": 0, "atol": 1e-10}
        assert torch.equal(layer.slot("default", "weight").index, from_mask(tensor(data["mask_after"][step])))
        torch.testing.assert_close(layer.tuned("weight"), tensor(data["W"][step]), **close)
        torch.testing.assert_close(state["exp_avg"], tensor(data["m_after"][step]), **close)
        torch.testing.assert_close(state["exp_avg_sq"], tensor(data["v_after"][step]), **close)
    exported = export_delta(model)["0.weight"]
    rebuilt = start.flatten().clone()
    rebuilt[exported.index.long()] = exported.values
    assert torch.equal(rebuilt.view_as(start), layer.effective("weight"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("alignment*.npz")), ids=lambda p: p.stem)
def test_alignment(path):
    data = np.load(path)
    score = alignment(tensor(data["A"]), tensor(data["B"]), int(data["p"]))
    assert score == pytest.approx(float(data["score"]), abs=1e-10)
