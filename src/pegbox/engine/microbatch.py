"""How many rows fit into one forward and backward, found out before step 1.

The longest micro-batch and one evaluation batch run first, under a guard that leaves weights, optimizer and random
state as they were: lack of memory then comes in the first minute, with what would fit, and not at the longest row of
the second hour. `auto` starts at the whole batch and halves; the effective batch stays, accumulation makes up for it.
On a CPU nothing raises before the system itself kills the process: there the need of one row is measured and the
number is what the free memory holds. The same pass measures the bytes that autograd saves.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pegbox.engine.distributed import agree, gather_rows, world
from pegbox.engine.problem import StepProblem, total_counts
from pegbox.engine.settings import TrainSettings
from pegbox.errors import BadInput, DoesNotFit
from pegbox.parts.metering import saved_bytes

__all__ = ["Probe", "choose_micro_batch", "is_out_of_memory"]

CPU_SHARE = 0.6  # of the free memory that saved tensors may take; logits' gradients and buffers come on top


@dataclass
class Probe:
    """What was found: rows per forward, and the peak of what autograd saves for the longest of them."""

    micro: int = 1
    saved_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors by which CUDA, MPS and the CPU's allocator say that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC")
    )


def choose_micro_batch(
    trainer: Any,
    train_set: Sequence[Any],
    eval_set: Sequence[Any] | None,
    lengths: Sequence[int],
    collate: Callable[[list[Any]], Any],
    settings: TrainSettings,
) -> Probe:
    """The probe's result; see the module's docstring. Raises `DoesNotFit`, `BadInput`."""
    if settings.batch % world():
        raise BadInput(f"batch {settings.batch} is no multiple of the {world()} processes.")
    most = settings.batch // world()
    auto = settings.micro_batch == "auto"
    size = most if auto else min(int(settings.micro_batch), most)
    if not settings.probe or settings.sharding == "full":
        return Probe(micro=min(size, 8) if auto else size)
    order = sorted(range(len(train_set)), key=lambda i: -lengths[i])
    if auto and trainer.args.device.type == "cpu":
        size = _cpu_size(trainer, [train_set[order[0]]], collate, size)
    while True:
        rows = [train_set[i] for i in (order * math.ceil(size / len(order)))[:size]]
        probe, error = _attempt(trainer, rows, collate)
        if error is None:
            error = _attempt_evaluation(trainer, eval_set, collate, settings.eval_batch or size)
        if not agree(error is not None):
            return probe
        if not auto or size == 1:
            raise DoesNotFit(_message(size, lengths[order[0]], auto)) from error
        size = math.ceil(size / 2)


def _message(size: int, length: int, auto: bool) -> str:
    tries = [] if auto or size == 1 else ["--micro-batch auto (the effective batch stays)"]
    tries += [
        "train.gradient_checkpointing=true",
        f"a --max-length below {length}",
        "a smaller model or --precision nf4",
    ]
    return f"A micro-batch of {size} row(s) of {length} positions does not fit into memory. Try: {'; '.join(tries)}."


def _cpu_size(trainer: Any, row: list[Any], collate: Callable[[list[Any]], Any], most: int) -> int:
    """The largest of most, most / 2, most / 4, ... whose saved tensors fit into the free memory."""
    import psutil

    probe, error = _attempt(trainer, row, collate)
    if error is not None or not probe.saved_bytes:
        return most
    free = int(CPU_SHARE * psutil.virtual_memory().available / world())
    while most > 1 and most * probe.saved_bytes > free:
        most = math.ceil(most / 2)
    return int(gather_rows(torch.tensor([most])).min())


def _attempt(trainer: Any, rows: list[Any], collate: Callable[[list[Any]], Any]) -> tuple[Probe, Exception | None]:
    """Forward and backward of one micro-batch, measured; the error instead if memory ran out."""
    try:
        return _measure(trainer, trainer._prepare_inputs(collate(rows)), len(rows)), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _free()
        return Probe(micro=len(rows)), error


def _measure(trainer: Any, batch: Any, rows: int) -> Probe:
    totals = {n: t.to(trainer.args.device) for n, t in total_counts(trainer.objective, [batch]).items()}
    problem = StepProblem(trainer.micro_loss, [batch], totals, trainer.model)
    with trainer.owners.untouched(), problem.untouched(), saved_bytes(trainer.model) as saved:
        trainer.model.train()
        if trainer.step_component.needs_backward:
            _backward(problem, type(trainer.objective).separable)
        else:
            problem.value()
    return Probe(rows, saved.peak)


def _backward(problem: StepProblem, one_by_one: bool) -> None:
    """As the step will do it: loss by loss where they share no graph, else over their sum."""
    losses = (loss for name, loss in problem.losses(0) if not name.startswith("_"))
    if one_by_one:
        for loss in losses:
            problem.backward(loss)
        return
    parts = list(losses)
    problem.backward(sum(parts[1:], parts[0]))


def _attempt_evaluation(trainer: Any, eval_set: Any, collate: Any, size: int) -> Exception | None:
    """One evaluation batch of the longest rows."""
    from pegbox.engine.batches import length_of

    if not eval_set or not trainer.objective.has_value:
        return None
    longest = sorted(range(len(eval_set)), key=lambda i: -length_of(eval_set[i]))[:size]
    batch = trainer._prepare_inputs(collate([eval_set[i] for i in longest]))
    try:
        totals = {n: t.to(trainer.args.device) for n, t in total_counts(trainer.objective, [batch]).items()}
        trainer._value(batch, totals)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _free()
        return error
    return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
