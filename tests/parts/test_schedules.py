"""Learning-rate multipliers against their closed forms and against transformers' own."""

import math

import pytest
import torch

from pegbox.errors import BadInput
from pegbox.parts.schedules import SCHEDULES, cosine_floor_linear, factor, warmup_steps


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_equals_transformers(name):
    from transformers import get_scheduler

    kind = {"constant": "constant_with_warmup"}.get(name, name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=20).lr_lambdas[0]
    ours = factor(name, 20, 3)
    assert [ours(t) for t in range(21)] == pytest.approx([theirs(t) for t in range(21)], abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_floor_is_where_the_rate_ends(name):
    plain, ours = factor(name, 20, 3), factor(name, 20, 3, floor=0.1)
    assert [ours(t) for t in range(3)] == [plain(t) for t in range(3)]
    assert [ours(t) for t in range(3, 21)] == pytest.approx([0.1 + 0.9 * plain(t) for t in range(3, 21)])
    assert ours(20) == pytest.approx(0.1)


def test_a_constant_rate_has_no_floor():
    from pegbox.optim.base import OPTIM

    with pytest.raises(BadInput, match="no use for it"):
        OPTIM.validate({"kind": "adamw", "schedule": "constant", "floor": 0.1})
    assert OPTIM.validate({"kind": "adamw", "schedule": "cosine", "floor": 0.1}).factor(10)(10) == pytest.approx(0.1)


def test_cosine_floor_linear_is_continuous_and_ends_at_zero():
    ours = factor("cosine_floor_linear", 200, 4)
    assert ours(4) == 1.0
    assert ours(120) == pytest.approx(0.05)
    assert ours(121) == pytest.approx(0.05 * 79 / 80)
    assert ours(200) == 0.0
    middle = 4 + (120 - 4) / 2
    assert cosine_floor_linear(int(middle), 200, 4) == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_stays_between_zero_and_one_for_all_lengths(name, warmup):
    values = [factor(name, 10, warmup)(t) for t in range(12)]
    assert all(0.0 <= v <= 1.0 for v in values)
    assert max(values) == 1.0 or warmup == 10


def test_a_fraction_is_rounded_up():
    assert warmup_steps(100, 0.03) == 3
    assert warmup_steps(101, 0.03) == 4
    assert factor("linear", 100, 0.1)(5) == 0.5


def test_bad_names_and_warmups_are_refused():
    with pytest.raises(BadInput, match="Did you mean 'cosine'"):
        factor("cosin", 10)
    with pytest.raises(BadInput, match="warmup"):
        factor("linear", 10, 11)
    with pytest.raises(BadInput, match="warmup"):
        factor("linear", 10, -1)
