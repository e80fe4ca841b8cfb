"""Episodes: which rows make a step, that they follow from the seed, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pegbox.data.base import DATA
from pegbox.data.policies.episodes import split_rows
from pegbox.errors import BadInput
from pegbox.parts.context import Context
from pegbox.protocols.meta import Meta

CTX = Context(model=torch.nn.Linear(1, 1), seed=3, tasks=("a", "b", "c"))


class Rows(list):
    task_ids = [0] * 10 + [1] * 5 + [2] * 7


def order(**options):
    policy = DATA.validate({"kind": "episodes", **options})
    return policy, policy.sampler(policy.setup(CTX), Rows(range(22)), CTX)


def test_a_step_holds_whole_tasks_with_disjoint_parts():
    _, rows = order(tasks=3, support=2, query=3)
    step = list(itertools.islice(rows, 15))
    tasks = [{Rows.task_ids[i] for i in step[k : k + 5]} for k in (0, 5, 10)]
    assert sorted(map(tuple, tasks)) == [(0,), (1,), (2,)]
    assert all(len(set(step[k : k + 5])) == 5 for k in (0, 5, 10))
    assert list(itertools.islice(rows, 15)) == step  # from the seed and the place alone


@given(rows=st.integers(1, 12), support=st.integers(1, 6), query=st.integers(0, 6))
def test_small_tasks_repeat_their_parts(rows, support, query):
    first, second = split_rows(range(rows), support, query)
    assert (len(first), len(second)) == (support, query)
    if rows > 1:
        assert not set(first) & set(second)
    if rows >= support + query:
        assert len({*first, *second}) == support + query


def test_batches_say_their_episode():
    policy, _ = order(tasks=2, support=4, query=2)
    state, ctx = policy.setup(CTX), Context(model=CTX.model, tasks=CTX.tasks)
    for _ in range(2):
        marks = [policy.on_batch(state, {"labels": torch.zeros(2, 3)}, ctx)["episode"].tolist() for _ in range(6)]
        assert marks == [[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 1]]
        ctx.step = lambda: 1


def test_a_micro_batch_across_parts():
    policy, _ = order(support=4, query=2)
    with pytest.raises(BadInput, match="straddles"):
        policy.on_batch(policy.setup(CTX), {"labels": torch.zeros(6, 3)}, CTX)


@pytest.mark.parametrize("options", [{"support": 0}, {"query": -1}, {"tasks": 0}])
def test_no_support(options):
    with pytest.raises(BadInput):
        DATA.validate({"kind": "episodes", **options})
    with pytest.raises(Exception, match="greater"):
        Meta(**options)


def test_a_single_task_warns():
    with pytest.warns(UserWarning, match="one task"):
        DATA.validate({"kind": "episodes"}).setup(Context(model=CTX.model, tasks=("only",)))


def test_rows_at_once_divide_both_parts():
    assert Meta(support=8, query=4, at_once=2).at_once == 2
    with pytest.raises(BadInput, match="must divide"):
        Meta(support=8, query=4, at_once=3)
