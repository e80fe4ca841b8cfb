"""Two processes (gloo) give what one gives at the same global batch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.forks import in_processes
from engine.helpers import examples, model, stage, weights
from pegbox.engine.distributed import check_same_on_ranks, full, is_main, join_processes, rank, world
from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.optim.base import OPTIM


def _train(out: Path, options: dict[str, Any], lora: bool) -> None:
    net = model(lora, attention_dropout=0.0)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    outcome, net = stage(out, net=net, **{"batch": 8, "micro_batch": 2, "steps": 3, **options})
    final = {n: full(p) for n, p in weights(net).items()}
    if is_main():
        losses = torch.tensor([r["loss"] for r in outcome.log if r["event"] == "step"])
        values = torch.tensor([r["metrics"]["loss"] for r in outcome.log if r["event"] == "eval"])
        tokens = torch.tensor(outcome.cost.training_tokens)
        save_file({**final, "losses": losses, "values": values, "tokens": tokens}, str(out / "final.safetensors"))


def _compare(tmp_path: Path, options: dict[str, Any], lora: bool = False, **more: Any) -> None:
    options = {"eval_set": examples(5, 1), "eval_every": 3, **options}
    _train(tmp_path / "one", options, lora)
    codes = in_processes(_train, 2, tmp_path / "two", {**options, **more}, lora)
    assert codes == [0, 0]
    one, two = (load_file(str(tmp_path / n / "final.safetensors")) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=2e-6, msg=name)


def test_ddp_equals_one_process(tmp_path):
    _compare(tmp_path, {}, lora=True)


@pytest.mark.distributed_slow
def test_ddp_of_all_weights_with_a_checkpoint_equals_one_process(tmp_path):
    _compare(tmp_path, {"save_every": 2, "gradient_checkpointing": True})


@pytest.mark.distributed_slow
def test_fully_shard_equals_one_process(tmp_path):
    _compare(tmp_path, {"save_every": 2}, sharding="full")


@pytest.mark.distributed_slow
def test_zeroth_order_in_two_processes_equals_one(tmp_path):
    _compare(tmp_path, {"step": OPTIM.validate({"kind": "mezo", "lr": 1e-3})})


class _Fail:
    """A schedule that breaks the run at a step, in every process."""

    every = 1

    def __init__(self, at: int):
        self.at = at

    def refresh(self, step: int, net: Any, optimizer: Any) -> None:
        if step == self.at:
            raise InterruptedError


def _whole_or_resumed(out: Path, sharding: str, at: int) -> None:
    options: dict[str, Any] = {"batch": 8, "micro_batch": 2, "sharding": sharding, "save_every": 2, "steps": 5}
    try:
        _, net = stage(out, net=model(attention_dropout=0.1), callbacks=[_Fail(at)], **options)
    except InterruptedError:
        torch.distributed.barrier()
        _, net = stage(out, net=model(attention_dropout=0.1), callbacks=[_Fail(99)], resume=True, **options)
    final = {n: full(p) for n, p in weights(net).items()}
    if is_main():
        save_file(final, str(out / "final.safetensors"))


@pytest.mark.distributed_slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_resume_bit_for_bit(tmp_path, sharding):
    for name, at in (("whole", 99), ("broken", 3)):
        assert in_processes(_whole_or_resumed, 2, tmp_path / name, sharding, at) == [0, 0]
    whole, broken = (load_file(str(tmp_path / n / "final.safetensors")) for n in ("whole", "broken"))
    assert all(torch.equal(whole[n], broken[n]) for n in whole)


def _check(differ: bool) -> None:
    join_processes("cpu")
    assert world() == 2
    digest = hashlib.sha256(str(rank() if differ else 0).encode()).hexdigest()
    if differ:
        with pytest.raises(RunFailed, match="differs between processes"):
            check_same_on_ranks(digest)
    else:
        check_same_on_ranks(digest)


@pytest.mark.parametrize("differ", [False, True])
def test_selections_are_compared_across_ranks(differ):
    assert in_processes(_check, 2, differ) == [0, 0]


def test_sharding_needs_processes_and_a_step_on_whole_gradients(tmp_path):
    with pytest.raises(BadInput, match="several processes"):
        stage(tmp_path / "a", sharding="full")
    with pytest.raises(Unsupported, match="whole weights"):
        stage(tmp_path / "b", sharding="full", step=OPTIM.validate("mezo"))
