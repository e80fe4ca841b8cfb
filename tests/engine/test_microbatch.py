"""The micro-batch halves until it fits; without `auto`, lack of memory is said before step 1."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
import torch

from engine.helpers import examples, model, stage, weights
from pegbox.engine import microbatch
from pegbox.engine.microbatch import is_out_of_memory
from pegbox.errors import DoesNotFit
from pegbox.objectives.token import Tokens


class Greedy(Tokens):
    """A loss that runs out of memory above so many positions."""

    kind: Literal["greedy"] = "greedy"
    most: int = 24

    def losses(self, state: Any, view: Any, batch: Any, totals: Any, ref: Any) -> Any:
        if batch["input_ids"].numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return super().losses(state, view, batch, totals, ref)


@pytest.mark.parametrize(("most", "micro"), [(96, 8), (48, 4), (24, 2), (12, 1)])
def test_auto_halves_until_the_longest_rows_fit(tmp_path, most, micro):
    rows = examples(20, longest=12)
    assert max(len(r["input_ids"]) for r in rows) == 12
    outcome, _ = stage(tmp_path, objective=Greedy(most=most), train_set=rows, batch=8, micro_batch="auto", probe=True)
    assert json.loads((tmp_path / "micro_batch.json").read_text())["micro"] == micro
    assert outcome.steps == 4


def test_what_cannot_fit_is_said_with_what_would_help(tmp_path):
    with pytest.raises(DoesNotFit, match=r"2 row.*--micro-batch auto") as caught:
        stage(tmp_path / "a", objective=Greedy(most=12), micro_batch=2, probe=True)
    assert caught.value.exit_code == 3
    with pytest.raises(DoesNotFit, match=r"1 row.*of 12 positions.*gradient_checkpointing.*--max-length"):
        stage(tmp_path / "b", objective=Greedy(most=6), micro_batch="auto", probe=True)
    assert not (tmp_path / "a/checkpoints").exists() or not list((tmp_path / "a/checkpoints").iterdir())


def test_an_evaluation_batch_is_tried_too(tmp_path):
    with pytest.raises(DoesNotFit):
        stage(tmp_path, objective=Greedy(most=24), micro_batch=2, eval_set=examples(4, 1, 20), probe=True, eval_every=1)


def test_on_a_cpu_the_free_memory_decides(tmp_path, monkeypatch):
    class Memory:
        available = 0

    seen = []
    attempt = microbatch._attempt

    def watched(trainer: Any, rows: Any, collate: Any) -> Any:
        found = attempt(trainer, rows, collate)
        seen.append(found[0])
        if len(rows) == 1:
            Memory.available = int(found[0].saved_bytes * 2.5 / microbatch.CPU_SHARE)
        return found

    import psutil

    monkeypatch.setattr(microbatch, "_attempt", watched)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    stage(tmp_path, batch=8, micro_batch="auto", probe=True)
    assert [p.micro for p in seen] == [1, 2]


def test_a_resumed_run_keeps_the_micro_batch_it_began_with(tmp_path):
    options = {"batch": 8, "micro_batch": "auto", "probe": True, "save_every": 2, "net": None}
    _, a = stage(tmp_path, **{**options, "net": model()})
    (tmp_path / "micro_batch.json").write_text('{"micro": 1, "saved_bytes": 5}')
    outcome, b = stage(tmp_path, resume=True, **{**options, "net": model()})
    assert outcome.cost.peak_saved_bytes == 5
    assert all(torch.equal(p, weights(b)[n]) for n, p in weights(a).items())


def test_errors_that_mean_no_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
