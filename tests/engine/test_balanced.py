"""Balanced objectives through the engine: validation streams, exact resume of histories and samplers, packed rows."""

import pytest
import torch

from engine.helpers import examples, stage, weights
from pegbox.data.base import DATA
from pegbox.errors import BadInput
from pegbox.objectives.base import OBJECTIVE


def tasked(count=20, seed=0):
    return [{**e, "task_id": i % 5 // 3, "task": "ab"[i % 5 // 3]} for i, e in enumerate(examples(count, seed))]


def steps_of(outcome):
    return [r for r in outcome.log if r["event"] == "step"]


BALANCES = {
    "coba": {"kind": "coba", "warmup": 2, "history_length": 3, "rows": 2, "interval": 2},
    "famo": {"kind": "famo"},
    "famo, next step": {"kind": "famo", "reevaluate": False},
    "famo on validation": {"kind": "famo", "on": "valid", "rows": 2},
}


def trained(out, balance, **options):
    return stage(
        out,
        objective=OBJECTIVE.validate({"kind": "task_balanced", "balance": balance}),
        train_set=tasked(),
        eval_set=tasked(6, seed=1),
        policies=[
            DATA.validate({"kind": "mixture"}),
            DATA.validate({"kind": "layout", "mode": "pack", "seq_length": 30}),
        ],
        steps=6,
        **options,
    )


@pytest.mark.parametrize("name", BALANCES)
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, name):
    """Histories, logits, their Adam, and the places in both streams of rows go on exactly."""
    whole, net = trained(tmp_path / "whole", BALANCES[name], save_every=3, save_total_limit=None)
    import shutil

    for folder in (tmp_path / "whole" / "checkpoints").iterdir():
        if folder.name.endswith("-6"):
            shutil.rmtree(folder)
    again, other = trained(tmp_path / "whole", BALANCES[name], save_every=3, save_total_limit=None, resume=True)
    a, b = weights(net), weights(other)
    assert all(torch.equal(a[n], b[n]) for n in a)
    states = [o.states["objective"] for o in (whole, again)]
    assert torch.equal(states[0].balance.weights, states[1].balance.weights)
    assert [r["loss"] for r in steps_of(whole)][3:] == [r["loss"] for r in steps_of(again)]


def test_the_log_tells_tasks_and_weights(tmp_path):
    outcome, _ = trained(tmp_path, BALANCES["coba"])
    readings = steps_of(outcome)[-1]["readings"]
    assert {"loss/a", "loss/b", "weight/a", "weight/b"} <= readings.keys()
    assert readings["weight/a"] + readings["weight/b"] == pytest.approx(1, abs=1e-6)
    assert len(outcome.states["objective"].balance.balancer.history) == 1 + 3


def test_packed_rows_count_their_tokens_and_name_their_samples(tmp_path):
    outcome, _ = trained(tmp_path, BALANCES["famo"], batch=2, micro_batch=1)
    assert outcome.cost.training_tokens > 6 * 2 * 12  # each row holds more than the longest example


def test_coba_without_validation_rows_is_refused_before_training(tmp_path):
    with pytest.raises(BadInput, match="validation rows"):
        stage(
            tmp_path,
            objective=OBJECTIVE.validate({"kind": "task_balanced", "balance": "coba"}),
            train_set=tasked(),
        )
