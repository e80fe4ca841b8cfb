"""Every step has exactly its rows, whatever the number of processes, the micro-batch, or where it begins."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.engine.batches import RowStream, StepBatches, length_of, steps_for_tokens, train_loader
from pegbox.errors import BadInput


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 17), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 3)
)
def test_processes_and_micro_batches_cut_one_and_the_same_stream(rows, share, world, micro, steps, seed):
    batch = share * world
    one = flat(StepBatches(RowStream(rows, seed), batch, batch, steps))
    assert len(one) == steps * batch
    several = [list(StepBatches(RowStream(rows, seed), batch, micro, steps, r, world)) for r in range(world)]
    assert {len(s) for s in several} == {len(StepBatches(RowStream(rows, seed), batch, micro, steps, 0, world))}
    per_rank = [flat(s) for s in several]
    joined = [r for s in range(steps) for q in per_rank for r in q[s * share : (s + 1) * share]]
    assert joined == one
    for epoch in range(len(one) // rows):
        assert sorted(one[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 8), st.data())
def test_going_on_at_a_step_gives_the_rest_of_the_stream(rows, batch, steps, data):
    first = data.draw(st.integers(0, steps))
    whole = list(StepBatches(RowStream(rows, 1), batch, 2, steps))
    rest = StepBatches(RowStream(rows, 1), batch, 2, steps)
    rest.first = lambda: first
    assert list(rest) == whole[first * rest.accumulation :]


def test_seeds_and_epochs_differ_and_order_can_be_kept():
    assert flat(StepBatches(RowStream(50, 0), 50, 50, 1)) != flat(StepBatches(RowStream(50, 1), 50, 50, 1))
    both = flat(StepBatches(RowStream(50, 0), 50, 50, 2))
    assert both[:50] != both[50:]
    assert flat(StepBatches(RowStream(5, 0, shuffle=False), 5, 5, 2)) == [0, 1, 2, 3, 4] * 2


class Reversed:
    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter([2, 1, 0])


def test_a_policys_sampler_takes_the_permutations_place():
    sampler = Reversed()
    batches = StepBatches(RowStream(3, 0, sampler), 2, 2, 3)
    assert list(batches) == [[2, 1], [0, 2], [1, 0]]
    assert sampler.epochs == [0, 1]
    batches.first = lambda: 2
    assert list(batches) == [[1, 0]]


class Endless:
    """A sampler that counts on and can be restored."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while True:
            self.at += 1
            yield self.at % 7

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, saved):
        self.at = saved["at"]


def test_a_sampler_with_a_state_goes_on_from_it():
    sampler = Endless()
    rows = iter(StepBatches(RowStream(7, 0, sampler), 2, 1, 6))
    seen = [next(rows) for _ in range(4)]
    state = sampler.state_dict()
    rest = [next(rows) for _ in range(4)]
    other = Endless()
    other.load_state_dict(state)
    again = StepBatches(RowStream(7, 0, other), 2, 1, 6)
    again.first = lambda: 2
    assert list(itertools.islice(iter(again), 4)) == rest
    assert seen == [[1], [2], [3], [4]]


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="empty"):
        RowStream(0, 0)
    with pytest.raises(BadInput, match="multiple of 3"):
        StepBatches(RowStream(5, 0), 4, 1, 1, 0, 3)
    with pytest.raises(BadInput, match="no rows"):
        flat(StepBatches(RowStream(3, 0, []), 2, 2, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 2000))
def test_a_token_budget_is_the_first_step_that_reaches_it(lengths, batch, tokens):
    stream = RowStream(len(lengths), 3)
    steps = steps_for_tokens(stream, lengths, batch, tokens)

    def seen(n):
        return sum(lengths[i] for i in flat(StepBatches(stream, batch, batch, n)))

    assert seen(steps) >= tokens
    assert steps == 1 or seen(steps - 1) < tokens


def test_lengths_and_the_loader_leave_global_random_numbers_alone():
    assert length_of({"input_ids": [1, 2, 3]}) == 3
    assert length_of({"pixels": 1}) == 1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = train_loader([10, 11, 12], StepBatches(RowStream(3, 0, shuffle=False), 2, 1, 2), list)
    assert list(loader) == [[10], [11], [12], [10]]
    assert torch.equal(before, torch.get_rng_state())
