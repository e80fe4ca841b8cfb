"""Every optimizer of the step axis: its first step in closed form, who decays, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pegbox.errors import BadInput
from pegbox.optim import OPTIM, decays, split_decay
from pegbox.parts.parameterinfo import ParameterInfo, attach_info


def leaf(values, grad=None, dtype=torch.float64):
    param = nn.Parameter(torch.tensor(values, dtype=dtype))
    param.grad = torch.tensor(grad, dtype=dtype) if grad is not None else None
    return param


def test_adamw_first_step_is_the_sign_of_the_gradient_and_decay():
    w = leaf([[1.0, -2.0]], [[0.5, -3.0]])
    OPTIM.validate({"kind": "adamw", "lr": 0.1, "weight_decay": 0.5}).optimizer([{"params": [("w", w)]}]).step()
    expected = torch.tensor([[1.0, -2.0]], dtype=torch.float64) * (1 - 0.05) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(w.detach(), expected.double(), atol=1e-7, rtol=0)


def test_adamw_second_step_closed_form():
    w = leaf([[1.0]], [[2.0]])
    step = OPTIM.validate({"kind": "adamw", "lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-3})
    optimizer = step.optimizer([{"params": [w]}])
    optimizer.step()
    w.grad.fill_(-1.0)
    optimizer.step()
    m, v = 0.8 * 0.2 * 2 - 0.2, 0.9 * 0.1 * 4 + 0.1
    first = 1.0 - 0.1 * 2.0 / (2.0 + 1e-3)
    expected = first - 0.1 * (m / (1 - 0.64)) / (math.sqrt(v / (1 - 0.81)) + 1e-3)
    assert w.item() == pytest.approx(expected, abs=1e-12)


def test_sgd_decay_stays_out_of_the_momentum():
    w = leaf([[1.0]], [[1.0]])
    optimizer = OPTIM.validate({"kind": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}).optimizer(
        [{"params": [w]}]
    )
    expected, u = 1.0, 0.0
    for _ in range(3):
        optimizer.step()
        u = 0.5 * u + 1.0
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * u
    assert w.item() == pytest.approx(expected, abs=1e-12)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2  # put back after the step


def test_sgd_does_not_decay_what_has_no_gradient():
    w = leaf([[1.0]])
    OPTIM.validate({"kind": "sgd", "lr": 0.1, "weight_decay": 0.2}).optimizer([{"params": [w]}]).step()
    assert w.item() == 1.0


def test_adafactor_state_is_a_row_and_a_column():
    w = leaf([[0.0] * 6] * 4, [[1.0] * 6] * 4, torch.float32)
    optimizer = OPTIM.validate({"kind": "adafactor", "lr": 1e-2}).optimizer([{"params": [w]}])
    optimizer.step()
    numbers = sum(t.numel() for t in optimizer.state[w].values() if torch.is_tensor(t) and t.numel() > 1)
    assert numbers == 4 + 6
    assert (w < 0).all()


def test_adamw_8bit_holds_bytes_and_goes_down():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(128, 64))
    optimizer = OPTIM.validate({"kind": "adamw_8bit", "lr": 1e-1, "weight_decay": 0.0}).optimizer(
        [{"params": [("w", w)]}]
    )
    start = w.detach().square().sum()
    for _ in range(5):
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.step()
    assert w.detach().square().sum() < 0.8 * start
    assert optimizer.state[w]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor", "adamw_8bit"])
def test_the_loss_changes_and_the_rate_reaches_the_optimizer(kind):
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    w = nn.Parameter(torch.ones(80, 80))
    optimizer = OPTIM.validate({"kind": kind, "lr": 0.05}).optimizer([{"params": [w]}])
    assert optimizer.param_groups[0]["lr"] == 0.05
    before = w.detach().clone()
    w.square().sum().backward()
    optimizer.step()
    assert not torch.equal(w.detach(), before)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), True),
        ("model.norm.weight", (4,), False),
        ("transformer.h.0.ln_1.weight", (4,), False),
        ("fc1.bias", (4,), False),
        ("encoder.norm.scale", (4, 1), False),
        ("lm_head.weight", (9, 4), True),
        ("normalizer_free.weight", (4, 4), True),
        ("", (3, 3), True),
        ("", (), False),
    ],
)
def test_who_decays(name, shape, expected):
    assert decays(name, torch.zeros(shape)) is expected


@pytest.mark.parametrize(("shape", "name", "expected"), [((4, 4), "q.weight", True), ((4,), "q.bias", False)])
def test_sparse_values_count_as_the_tensor_they_stand_for(shape, name, expected):
    values = nn.Parameter(torch.zeros(2))
    attach_info(values, ParameterInfo(name, shape, lambda: torch.arange(2), lambda: torch.zeros(2), "delta"))
    assert decays("layer.values", values) is expected


def test_split_keeps_rates_and_explicit_decays():
    w, b = leaf([[1.0]]), leaf([1.0])
    owned = {"params": [("o", leaf([[2.0]]))], "weight_decay": 0.3, "lr": 1.0}
    groups = split_decay([{"params": [("w", w), ("bias", b)], "lr": 0.7}, owned, {"params": []}], 0.1)
    assert [(g["weight_decay"], g["lr"], len(g["params"])) for g in groups] == [
        (0.1, 0.7, 1),
        (0.0, 0.7, 1),
        (0.3, 1.0, 1),
    ]
    assert groups[0]["params"][0][1] is w


def test_factor_goes_from_warm_up_to_zero():
    factor = OPTIM.validate({"kind": "adamw", "schedule": "linear", "warmup": 0.1}).factor(100)
    values = [factor(k) for k in range(101)]
    assert values[10] == pytest.approx(1.0)
    assert values[0] < values[5] < values[10] > values[50] > values[100] == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize(
    "block",
    [
        {"kind": "adamw", "lr": 0},
        {"kind": "adamw", "betas": [1.0, 0.9]},
        {"kind": "adamw", "eps": -1},
        {"kind": "sgd", "nesterov": True},
        {"kind": "adafactor", "beta2_decay": 0.5},
        {"kind": "adamw_8bit", "min_8bit_size": 1},
        {"kind": "adamw", "learning_rate": 1e-3},
    ],
)
def test_bad_options_are_refused(block):
    with pytest.raises(BadInput):
        OPTIM.validate(block)
