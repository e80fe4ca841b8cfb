"""Selections that are weighed again while training: exact resume, optimizer state, and when they may change."""

from __future__ import annotations

import json

import pytest
import torch

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.select import SELECT, Schedule
from pegbox.testing import tiny_llama
from pegbox.tuners.full import Full, full_state

IDS = torch.arange(24).view(2, 12)


def loss_of(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def weighing(model, every=2, **options):
    """The schedule of a knapsack selection on `model`, and an optimizer over everything."""
    selector = SELECT.validate({"kind": "knapsack", "rho": 0.6, "schedule": {"every": every}, **options})
    stepper = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ctx = Context(model, seed=5, total_steps=8)
    ctx.gather = lambda wanted, optimizer: wanted.gather(model, [{"input_ids": IDS}], loss_of, lambda: optimizer)
    stats = ctx.gather(selector.statistics(), stepper)
    first = selector.select(Anatomy.of(model), dict(model.named_parameters()), stats, ctx.generator("select", 0))
    Full().attach(model, first, ctx)
    (schedule,) = Full().schedules(selector, ctx)
    return schedule, stepper


def steps(model, schedule, stepper, numbers):
    model.train()
    for step in numbers:
        if step and step % schedule.every == 0:
            schedule.refresh(step, model, stepper)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss_of(model, {"input_ids": IDS + step}).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == schedule.active
        stepper.step()
        stepper.zero_grad()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved <= schedule.active  # a frozen tensor keeps its value under decay and momentum
        assert all(p.requires_grad for p in model.parameters())


def test_it_is_weighed_again_and_resumes_exactly(llama):
    schedule, stepper = weighing(llama)
    steps(llama, schedule, stepper, range(7))
    assert [facts["step"] for facts in schedule.told] == [2, 4, 6]
    stopped = tiny_llama()
    schedule_a, stepper_a = weighing(stopped)
    steps(stopped, schedule_a, stepper_a, range(5))
    resumed = tiny_llama()
    schedule_b, stepper_b = weighing(resumed)
    resumed.load_state_dict(stopped.state_dict())
    stepper_b.load_state_dict(stepper_a.state_dict())
    schedule_b.load_state_dict(json.loads(json.dumps(schedule_a.state_dict())))
    assert schedule_b.active == schedule_a.active
    assert schedule_b.told == schedule_a.told
    assert full_state(resumed).touched.digest() == full_state(stopped).touched.digest()
    steps(resumed, schedule_b, stepper_b, range(5, 7))
    assert all(torch.equal(p, resumed.get_parameter(n)) for n, p in llama.named_parameters())


@pytest.mark.parametrize("keep", [True, False])
def test_state_of_tensors_that_leave_is_kept_or_dropped(llama, keep):
    schedule, stepper = weighing(llama, every=1, importance="random", keep_state=keep)
    ever = set(schedule.active)
    for step in range(4):
        steps(llama, schedule, stepper, [step])
        ever |= schedule.active
    held = {n for n, p in llama.named_parameters() if p in stepper.state}
    assert schedule.active < ever
    assert held == (ever if keep else schedule.active)


def test_weighing_leaves_the_run_as_it_was(llama):
    schedule, stepper = weighing(llama)
    steps(llama, schedule, stepper, range(2))
    before = {n: p.detach().clone() for n, p in llama.named_parameters()}
    state = {p: {k: v.clone() for k, v in entry.items()} for p, entry in stepper.state.items()}
    numbers = torch.get_rng_state()
    schedule._choose(2, stepper)
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())
    assert set(stepper.state) == set(state)
    assert all(torch.equal(v, state[p][k]) for p, entry in stepper.state.items() for k, v in entry.items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert llama.training


def test_it_does_not_change_in_the_middle_of_an_accumulation(llama):
    schedule, stepper = weighing(llama)
    llama.train()
    loss_of(llama, {"input_ids": IDS}).backward()
    with pytest.raises(BadInput, match="gradients were being accumulated"):
        schedule.refresh(2, llama, stepper)


def test_it_needs_something_to_gather_with(llama):
    selector = SELECT.validate({"kind": "knapsack", "schedule": {"every": 2}})
    Full().attach(llama, None, Context(llama))
    with pytest.raises(Unsupported, match="looks at weights"):
        Full().schedules(selector, Context(llama))


def test_epochs_become_steps():
    assert Schedule(epochs=2).in_steps(12.5) == Schedule(every=25)
    assert Schedule(epochs=0.01).in_steps(4).every == 1
    assert Schedule(every=3).in_steps(10) == Schedule(every=3)
    assert Schedule(epochs=1).moves
    assert not Schedule().moves
