"""Evaluation during training: the objective's value on the evaluation set, and whatever an evaluator returns.

Random state, train/eval modes and gradients are as before afterwards, so that evaluating changes nothing. The best
value so far decides on the best checkpoint and on stopping early; both survive a resume.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from pegbox.engine.distributed import agree, gather_rows, rank, sum_over_ranks, world
from pegbox.engine.host_type import TrainerLike
from pegbox.engine.packing import restore_random, take_random
from pegbox.engine.problem import total_counts
from pegbox.engine.settings import TrainSettings
from pegbox.engine.signals import Interrupted, StopRequest
from pegbox.errors import BadInput, RunFailed, did_you_mean
from pegbox.parts.view import Batch

__all__ = ["Evaluating", "Evaluator", "eval_batches"]

Evaluator = Callable[[nn.Module], Mapping[str, float]]
_log = logging.getLogger(__name__)


def eval_batches(dataset: Any, collate: Callable[..., Any], size: int, *, split: bool = True) -> Iterator[Any]:
    """Collated evaluation batches of this process, in order.

    With `split`, processes take turns; where a forward is a collective call (sharding) everyone sees every batch.
    """
    starts = list(range(0, len(dataset), size))
    mine = starts[rank() :: world()] if split else starts
    for start in mine:
        yield collate([dataset[i] for i in range(start, min(start + size, len(dataset)))])


class Evaluating(TrainerLike):
    """Mixin: `evaluate` of the trainer by pegbox's rules. Attributes set by whoever makes the trainer."""

    train_settings: TrainSettings | None = None  # None: the trainer's own evaluation
    evaluator: Evaluator | None = None
    stop_request: StopRequest
    pending_evaluation: bool = False
    since_best: int = 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """All metrics as {"eval_<name>": value}; {} if it was left because the run is to stop."""
        if self.train_settings is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        began, numbers = time.perf_counter(), take_random()
        modes = [(m, m.training) for m in self.model.modules()]
        try:
            metrics = self._measure(eval_dataset if eval_dataset is not None else self.eval_dataset)
            self.pending_evaluation = False
        except Interrupted:
            self.pending_evaluation = True
            self.control.should_save = self.control.should_training_stop = True
            return {}
        finally:
            self.stop_request.interruptible = False
            restore_random(numbers)
            for module, mode in modes:
                module.training = mode
        named = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        self.log({**named, f"{metric_key_prefix}_seconds": time.perf_counter() - began})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _measure(self, dataset: Any) -> dict[str, float]:
        self.stop_request.check()
        self.stop_request.interruptible = True
        metrics: dict[str, float] = {}
        if dataset is not None and len(dataset):
            loss = self._objective_loss(dataset)
            if loss is not None:
                metrics["loss"] = loss
        if self.evaluator is not None:
            self.model.eval()
            with torch.no_grad():
                found = self.evaluator(self.model)
            values = torch.tensor([float(v) for v in found.values()], dtype=torch.float64)
            values = gather_rows(values.unsqueeze(0))[0]  # all processes decide on the first one's values
            metrics |= dict(zip(found, values.tolist()))
        self.stop_request.interruptible = False
        self.stop_request.check()
        return metrics

    def _objective_loss(self, dataset: Any) -> float | None:
        if self.owns_loss:  # the trainer's own evaluation, e.g. DPO's
            return self._host_loss(dataset)
        assert self.train_settings is not None
        size = self.train_settings.eval_batch or self.args.per_device_train_batch_size
        split = self.sharding == "none"
        groups = self._apart(dataset)

        def batches() -> Iterator[Any]:
            return chain.from_iterable(eval_batches(rows, self.data_collator, size, split=split) for rows in groups)

        return self.evaluate_objective(batches, self.stop_request.check, split)

    def _apart(self, dataset: Any) -> list[Any]:
        """The evaluation set in parts whose rows never share a batch, as a policy wants it."""
        for i, policy in enumerate(self.policies):
            groups = policy.apart(self.states[f"data.{i}"], dataset, self.ctx)
            if groups is not None:
                return [Subset(dataset, list(rows)) for rows in groups if len(rows)]
        return [dataset]

    def evaluate_objective(
        self, batches: Callable[[], Iterator[Any]], check: Callable[[], None], split: bool = True
    ) -> float | None:
        """The objective's value over a whole evaluation set: one pass that counts, one that adds up.

        Args:
            batches: gives the collated evaluation batches of this process, anew at each call.
            check: called after each batch (raises to stop); the processes stay in step.
            split: whether the processes hold different batches, or all of them the same.
        """
        if self.owns_loss or self.objective is None or not self.objective.has_value:
            return None
        self.model.eval()
        shares = 1 if split else world()
        prepared = (self.through_policies(self._prepare_inputs(b), training=False) for b in batches())
        totals = {n: t.to(self.args.device) / shares for n, t in total_counts(self.objective, prepared).items()}
        total = torch.zeros((), dtype=torch.float64)
        for raw in _aligned(batches()):
            if raw is not None:
                batch = self.through_policies(self._prepare_inputs(raw), training=False)
                total = total + self.run_job(partial(self._value, batch, totals)).double().cpu()
            check()
        return float(sum_over_ranks(total) / shares)

    def _value(self, batch: Batch, totals: dict[str, Tensor]) -> Tensor:
        with self.acting(batch):
            value = self.micro_loss.value(batch, totals, self.micro_loss.reference(batch))
        if value is None:
            raise RunFailed(f"Objective '{self.objective.kind}' says it has a value and gave none.")
        return value

    def _host_loss(self, dataset: Any) -> float | None:
        log, self.log = self.log, lambda *_, **__: None  # its record would come without our fields
        try:
            own = dataset is self.eval_dataset  # prepared already by the trainer
            return super().evaluate(None if own else dataset, metric_key_prefix="eval").get("eval_loss")
        finally:
            self.log = log

    def _determine_best_metric(self, metrics: Mapping[str, float] | None, trial: Any = None) -> bool:
        """Update the best value; asks for a checkpoint where the best is to be kept."""
        if self.train_settings is None:
            return super()._determine_best_metric(metrics, trial)
        if not metrics:
            return False
        name = f"eval_{self.train_settings.metric}"
        if name not in metrics:
            known = [m.removeprefix("eval_") for m in metrics]
            raise BadInput(
                f"metric '{self.train_settings.metric}' is not among those measured.{did_you_mean(name, known)}"
            )
        value, best = metrics[name], self.state.best_metric
        better = math.isfinite(value) and (
            best is None or (value > best if self.train_settings.rising else value < best)
        )
        self.since_best = 0 if better else self.since_best + 1
        if better:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            if self.train_settings.select == "best":
                self.control.should_save = True
        if self.out_of_patience():
            self.control.should_training_stop = True
        return better

    def out_of_patience(self) -> bool:
        """True if `early_stopping` evaluations in a row were no better than the best."""
        patience = self.train_settings.early_stopping if self.train_settings is not None else None
        return patience is not None and self.since_best >= patience


def _aligned(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, then None for as long as another process still has some (so that collective calls match)."""
    while True:
        batch = next(batches, None)
        if not agree(batch is not None):
            return
        yield batch
