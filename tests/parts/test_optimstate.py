"""Editing optimizer state: what stays is bit-identical, what is new is zero, for every per-entry optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pegbox.errors import Unsupported
from pegbox.parts import optimstate
from pegbox.parts.parameterinfo import CLOCK, ParameterInfo, attach_info, info_of, touch

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
}


def stepped(make, size=5):
    p = nn.Parameter(torch.arange(float(size)))
    optimizer = make([p])
    for i in range(3):
        p.grad = torch.arange(1.0, size + 1) * (i + 1)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("source", [[4, -1, 0, 2, -1], [1, 3], [0, 1, 2, 3, 4, -1, -1], [-1, -1, -1, -1, -1]])
def test_remap(name, source):
    optimizer, p = stepped(OPTIMIZERS[name])
    keys = optimstate.per_entry(optimizer, p)
    assert keys
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    source = torch.tensor(source)
    shape = p.shape
    p.data = torch.zeros(len(source))
    optimstate.remap(optimizer, p, source, shape)
    for key in keys:
        got = optimizer.state[p][key]
        assert got.shape == p.shape
        assert torch.equal(got[source >= 0], before[key][source[source >= 0]])
        assert (got[source < 0] == 0).all()
    if "step" in before:
        assert optimizer.state[p]["step"] == before["step"]
    p.grad = torch.ones_like(p)
    optimizer.step()


def test_replace():
    optimizer, p = stepped(OPTIMIZERS["adamw"])
    q = nn.Parameter(torch.zeros(7))
    state = optimizer.state[p]
    optimstate.replace(optimizer, p, q)
    assert optimizer.param_groups[0]["params"] == [q]
    assert optimizer.state[q] is state
    assert p not in optimizer.state
    optimstate.remap(optimizer, q, torch.tensor([0, 1, 2, 3, 4, -1, -1]), p.shape)
    q.grad = torch.ones(7)
    optimizer.step()


def test_permute_drop_seed_and_fill():
    optimizer, p = stepped(OPTIMIZERS["adamw"])
    state = optimizer.state[p]
    before = state["exp_avg"].clone()
    optimstate.permute(optimizer, p, torch.tensor([4, 3, 2, 1, 0]))
    assert torch.equal(state["exp_avg"], before.flip(0))
    optimstate.drop(optimizer, p, torch.tensor([1, 3]))
    assert state["exp_avg"].tolist()[1] == state["exp_avg_sq"].tolist()[3] == 0.0
    assert state["exp_avg"][0] != 0
    optimstate.seed(optimizer, p, torch.tensor([0]), {"exp_avg": torch.tensor([7.0])})
    assert state["exp_avg"][0] == 7.0
    with pytest.raises(Unsupported, match="no per-entry state 'mass'"):
        optimstate.seed(optimizer, p, torch.tensor([0]), {"mass": torch.tensor([7.0])})
    optimstate.remap(optimizer, p, torch.tensor([-1, 0, 1, 2, 3]), fill={"exp_avg_sq": 2.5})
    assert (state["exp_avg"][0], state["exp_avg_sq"][0]) == (0.0, 2.5)
    optimstate.drop(optimizer, p)
    assert p not in optimizer.state


def test_packed_state_is_refused_and_a_fresh_optimizer_has_nothing_to_move():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p])
    optimstate.remap(optimizer, p, torch.tensor([0, 1, 2]))
    optimizer.state[p] = {"state1": torch.zeros(3, dtype=torch.uint8), "absmax1": torch.zeros(1)}
    with pytest.raises(Unsupported, match="8-bit"):
        optimstate.remap(optimizer, p, torch.tensor([0, 1, 2]))


def test_the_owner_is_found_through_wrappers_and_among_several():
    from accelerate import Accelerator

    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first, second = torch.optim.SGD([p], 0.1), torch.optim.SGD([q], 0.1)
    wrapped = Accelerator(cpu=True).prepare(second)
    assert optimstate.owner_of([first, wrapped], q) is second
    assert optimstate.owner_of(first, q) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_noticed_and_attributed(name):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for parameter in (p, q):
        attach_info(parameter, ParameterInfo("w", (3,), lambda: torch.arange(3), lambda: torch.ones(3), "delta"))
    clock = CLOCK.now
    p.grad = torch.ones(3)
    OPTIMIZERS[name]([p]).step()
    assert CLOCK.now > clock
    assert (info_of(p).writes, info_of(q).writes) == (1, 0)
    touch([q])
    assert info_of(q).writes == 1
    before = CLOCK.unattributed
    touch()
    assert CLOCK.unattributed == before + 1
    assert info_of(torch.ones(1)) is None
