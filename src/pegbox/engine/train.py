"""`train_stage`: one training of one prepared model, from the first step to the last, resumable at any moment.

    settings, data, objective, step -> trainer with the mixins -> checkpoints/, log.jsonl, the model as it ends

Linear on purpose: what is checked, what is built, what runs, what is left. It knows no method and no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pegbox.data.base import DataPolicy
from pegbox.engine.arguments import as_bad_input, enable_checkpointing, host_arguments, host_inputs, no_progress_bars
from pegbox.engine.batches import RowStream, StepBatches, lengths_of, steps_for_tokens, train_loader
from pegbox.engine.callbacks import Hooks, Listener, Schedule
from pegbox.engine.checkpoint import CheckpointStore
from pegbox.engine.distributed import (
    barrier,
    check_same_on_ranks,
    checksum,
    is_main,
    join_processes,
    rank,
    shard,
    world,
)
from pegbox.engine.evaluation import Evaluator
from pegbox.engine.hosts import trainer_class
from pegbox.engine.log import LogRecord, LogWriter, as_json
from pegbox.engine.microbatch import Probe, choose_micro_batch
from pegbox.engine.resume import BufferWatch
from pegbox.engine.seams import check_step
from pegbox.engine.settings import TrainSettings
from pegbox.engine.signals import Interrupted, StopRequest
from pegbox.errors import RunFailed, Stopped, Unsupported
from pegbox.objectives.base import Objective
from pegbox.optim.base import Step
from pegbox.parts.context import Context, seed_of
from pegbox.parts.files import read_json, write_json
from pegbox.parts.metering import machine, optimizer_state_bytes, parameter_counts
from pegbox.parts.results import Cost
from pegbox.parts.rowsource import RowSource
from pegbox.parts.view import ModelView

__all__ = ["TrainOutcome", "train_stage"]


@dataclass
class TrainOutcome:
    """What a stage's training gave.

    Args:
        status: "finished" or "stopped_early".
        steps: finished optimizer steps (the model holds the best ones' weights if `select` was best).
        log: every record since this call began, as dicts.
        cost: what it used.
        best: {"step", "metric", "value"} of the best evaluation, if there was one.
        states: the components' states at the end: "objective", "step", "data.0", ...
    """

    status: str
    steps: int
    log: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    best: dict[str, Any] | None = None
    states: dict[str, Any] = field(default_factory=dict)


class _LogListener(Listener):
    def __init__(self, writer: LogWriter):
        self.writer = writer

    def record(self, record: LogRecord) -> None:
        self.writer.write(record)


def train_stage(
    model: nn.Module,
    view: ModelView | Callable[[nn.Module], ModelView] | None,
    train_set: Sequence[Any],
    eval_set: Sequence[Any] | None,
    collator: Callable[[list[Any]], Any] | None,
    objective: Objective,
    step: Step,
    policies: Sequence[DataPolicy],
    settings: TrainSettings,
    out: Path,
    ctx: Context,
    callbacks: Sequence[Any] = (),
    evaluator: Evaluator | None = None,
    resume: bool = False,
    *,
    rewards: Sequence[Callable[..., Any]] = (),
    streams: Mapping[str, Sequence[Any]] | None = None,
    identity: Any = None,
    selection_digest: str | None = None,
) -> TrainOutcome:
    """Train `model` in place.

    Args:
        model: what trains (tuner attached); parameters that require a gradient are trained.
        view: its view, or a function from model to view (None where the host makes the loss).
        train_set, eval_set: encoded examples, by position; for hosts of TRL their datasets.
        collator: examples -> batch; a batch's "sample_ids" are positions in `train_set`.
        callbacks: any of `Schedule`, `Listener`, transformers' `TrainerCallback`.
        evaluator: model -> {metric: value}, called in every process.
        resume: go on from the newest complete checkpoint in `out/checkpoints`, if there is one.
        rewards: TRL reward functions, for a policy objective.
        streams: further encoded examples by name, which components draw from (`ctx.streams`); "validation" is
            `eval_set` already.
        identity: JSON that must be the same on resuming, beside the settings (recipe, data, base).
        selection_digest: compared between processes before anything is wrapped.

    Raises:
        BadInput: settings changed since the checkpoint, checkpoints present without `resume`, empty data.
        Unsupported: a step that can't work with this objective or sharding.
        RunFailed: a loss that is not finite, a checkpoint that can't be written.
        Stopped: SIGTERM; a checkpoint was written.
        DoesNotFit: out of memory, with what would fit.
    """
    check_step(objective, step)
    _check_sharding(settings, step)
    join_processes(settings.device)
    check_same_on_ranks(selection_digest or "", "the selection")
    store = CheckpointStore(out / "checkpoints", settings.save_total_limit)
    notices: list[str] = []
    newest = _newest(store, resume, notices)
    stop = StopRequest()
    with stop:
        stage = _Stage(model, view, train_set, eval_set, collator, objective, step, policies, settings, out, ctx)
        stage.rewards = list(rewards)
        stage.streams = dict(streams or {})
        stage.build(callbacks, evaluator, store, stop, identity, newest)
        for text in notices:
            stage.hooks.tell(LogRecord(event="notice", step=0, text=text))
        return stage.run(newest)


def _check_sharding(settings: TrainSettings, step: Step) -> None:
    if settings.sharding == "full" and (not step.needs_backward or type(step).estimate is not Step.estimate):
        raise Unsupported(f"optim '{step.kind}' works on whole weights; it can't be used with sharding 'full'.")


def _newest(store: CheckpointStore, resume: bool, notices: list[str]) -> Path | None:
    """The checkpoint to go on from: the main process looks and moves broken ones aside, then all look."""
    if not resume:
        if is_main():
            store.refuse_if_any()
        barrier()
        return None
    found = store.newest(notices.append) if is_main() else None
    barrier()
    return found if is_main() else store.newest()


class _Stage:
    """The pieces of one `train_stage` call, built in order."""

    def __init__(
        self,
        model: nn.Module,
        view: Any,
        train_set: Any,
        eval_set: Any,
        collator: Any,
        objective: Objective,
        step: Step,
        policies: Sequence[DataPolicy],
        settings: TrainSettings,
        out: Path,
        ctx: Context,
    ):
        self.model, self.view, self.train_set, self.eval_set, self.collator = model, view, train_set, eval_set, collator
        self.objective, self.step, self.policies = objective, step, policies
        self.settings, self.out, self.ctx = settings, out, ctx
        self.own_data = objective.host == "supervised"
        self.rewards: list[Callable[..., Any]] = []
        self.streams: dict[str, Sequence[Any]] = {}
        self.batches: StepBatches | None = None
        self.probe = Probe()

    # ---- building

    def build(
        self,
        callbacks: Sequence[Any],
        evaluator: Evaluator | None,
        store: CheckpointStore,
        stop: StopRequest,
        identity: Any,
        newest: Path | None,
    ) -> None:
        from transformers import PrinterCallback, TrainerCallback

        if self.settings.gradient_checkpointing:
            enable_checkpointing(self.model, self.settings)
        if self.own_data:
            for policy in self.policies:
                self.train_set = policy.prepare(self.train_set, self.ctx)
        self.cached = getattr(getattr(self.model, "config", None), "use_cache", None)
        self.adapters = set(getattr(self.model, "peft_config", {}))
        self.trainer = self._trainer()
        trainer = self.trainer
        trainer.remove_callback(PrinterCallback)
        trainer.train_settings, trainer.evaluator, trainer.stop_request = self.settings, evaluator, stop
        trainer.store, trainer.watch, trainer.count_flops = store, BufferWatch(self.model), self.settings.probe
        if world() > 1:
            check_same_on_ranks(checksum(self.model), "the set of initial weights")
        trainer.row_names = self._row_names
        if self.own_data:
            self._data(newest)
        if self.settings.sharding == "full":
            trainer.shell = shard(self.model, trainer.args.device.type)
        trainer.settings = {"train": self.settings.pinned(), "world": world(), "identity": identity}
        schedules = [c for c in callbacks if isinstance(c, Schedule)]
        listeners = [c for c in callbacks if isinstance(c, Listener)]
        others = [c for c in callbacks if isinstance(c, TrainerCallback)]
        unknown = [c for c in callbacks if c not in schedules and c not in listeners and c not in others]
        if unknown:
            raise TypeError(f"callbacks must be Schedule, Listener or TrainerCallback, got {unknown[0]!r}")
        if is_main():
            at = int(newest.name.rsplit("-", 1)[1]) if newest is not None else None
            listeners = [_LogListener(LogWriter(self.out / "log.jsonl", at)), *listeners]
        self.hooks = Hooks(trainer, schedules, listeners, stop, max(1, len(self.train_set)))
        for callback in (*others, self.hooks):
            trainer.add_callback(callback)
        trainer.extra = {"hooks": self.hooks, **self._stateful_sampler()}

    def _trainer(self) -> Any:
        host, settings = self.objective.host, self.settings
        inputs = host_inputs(self.objective, self.ctx.tokenizer, self.rewards)
        arguments = host_arguments(self.objective, self.step, settings, self.out / "checkpoints")
        if self.collator is not None:
            inputs["data_collator"] = self.collator
        with no_progress_bars(), as_bad_input(self.objective):
            return trainer_class(host)(
                model=self.model,
                args=arguments,
                train_dataset=self.train_set,
                eval_dataset=self.eval_set,
                objective=self.objective,
                step=self.step,
                policies=self.policies,
                view=self.view,
                ctx=self.ctx,
                sharding=settings.sharding,
                precision=settings.precision,
                loader=self._loader if self.own_data else None,
                **inputs,
            )

    # ---- data

    def _data(self, newest: Path | None) -> None:
        settings, trainer = self.settings, self.trainer
        if self.collator is None:
            raise TypeError("a supervised objective needs a collator")
        lengths = lengths_of(self.train_set) if settings.tokens is not None or settings.probe else []
        self._open_streams()
        stream = RowStream(len(self.train_set), settings.seed)
        total = self._total_steps(stream, lengths)
        self.ctx.batch = settings.batch
        trainer.setup_components(total)
        samplers = [
            p.sampler(trainer.states[f"data.{i}"], self.train_set, self.ctx) for i, p in enumerate(self.policies)
        ]
        samplers = [s for s in samplers if s is not None]
        if len(samplers) > 1:
            raise Unsupported(f"{len(samplers)} data policies want to order the rows; only one can.")
        stream.sampler = samplers[0] if samplers else None
        micro = self._micro_batch(lengths, newest)
        self.batches = StepBatches(stream, settings.batch, micro, total, rank(), world())
        self.batches.first = lambda: trainer.state.global_step
        trainer.args._n_gpu = min(1, trainer.args.n_gpu)  # several processes, never several GPUs in one
        trainer.args.max_steps, trainer.args.num_train_epochs = total, 1
        trainer.args.gradient_accumulation_steps = self.batches.accumulation
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = self.batches.micro

    def _open_streams(self) -> None:
        """Tell components of the tasks, and give them the further rows as batches."""
        assert self.collator is not None
        trainer, wanted = self.trainer, {"train": self.train_set, **self.streams}
        if self.eval_set is not None and len(self.eval_set):
            wanted["validation"] = self.eval_set
        self.ctx.tasks = tuple(_tasks_of(self.train_set))

        def place(batch: Any) -> Any:
            return trainer.through_policies(trainer._prepare_inputs(batch), training=False)

        self.ctx.streams = {name: RowSource(rows, self.collator, place) for name, rows in wanted.items()}

    def _total_steps(self, stream: RowStream, lengths: Sequence[int]) -> int:
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        if settings.tokens is not None:
            exact = all(type(p).sampler is DataPolicy.sampler for p in self.policies)
            return settings.bounded(steps_for_tokens(stream, lengths, settings.batch, settings.tokens, exact))
        assert settings.epochs is not None
        steps = max(1, math.ceil(settings.epochs * len(self.train_set) / settings.batch - 1e-9))
        return settings.bounded(steps)

    def _micro_batch(self, lengths: Sequence[int], newest: Path | None) -> int:
        """The rows per forward: given, remembered from before the resume, or tried out."""
        kept = self.out / "micro_batch.json"
        if newest is not None and kept.is_file():
            remembered = read_json(kept)
            self.probe = Probe(**remembered)
            return self.probe.micro
        self.trainer.probing = True
        try:
            self.probe = choose_micro_batch(
                self.trainer, self.train_set, self.eval_set, lengths, self.collator, self.settings
            )
        finally:
            self.trainer.probing = False
        if is_main():
            write_json(kept, self.probe.as_json())
        barrier()
        return self.probe.micro

    def _loader(self) -> Any:
        assert self.batches is not None
        args, workers = self.trainer.args, self.trainer.args.dataloader_num_workers
        options: dict[str, Any] = {"pin_memory": args.dataloader_pin_memory and args.device.type == "cuda"}
        if workers:
            options |= {"num_workers": workers, "persistent_workers": args.dataloader_persistent_workers}
            options |= {"prefetch_factor": args.dataloader_prefetch_factor, "in_order": args.dataloader_in_order}
            options |= {"multiprocessing_context": args.dataloader_multiprocessing_context}
        return train_loader(self.train_set, self.batches, self.collator, options)

    def _stateful_sampler(self) -> dict[str, Any]:
        sampler = self.batches.stream.sampler if self.batches is not None else None
        return {"sampler": sampler} if hasattr(sampler, "load_state_dict") else {}

    def _row_names(self, ids: Sequence[int]) -> list[str]:
        """Stable row ids for a batch's `sample_ids`: the examples' own, or positions in the training set."""
        known = {}
        for i in range(len(self.train_set)):
            example = self.train_set[i]
            if hasattr(example, "get"):
                held, names = example.get("sample_ids", [example.get("sample_id", i)]), example.get("row_ids")
                for j, sample in enumerate(held):  # a packed example holds several rows
                    known[int(sample)] = str(names[j] if names is not None else example.get("row_id", i))
        return [known.get(i, str(i)) for i in ids]

    # ---- running

    def run(self, newest: Path | None) -> TrainOutcome:
        trainer = self.trainer
        torch.manual_seed(seed_of(self.settings.seed, "train", rank()))
        try:
            trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
        except Interrupted:
            trainer.is_in_train = False
        finally:
            self._leave_model_as_found()
        steps = trainer.state.global_step
        if trainer.stop_request.requested and (steps < trainer.state.max_steps or trainer.pending_evaluation):
            raise Stopped(
                f"Stopped on request after step {steps} of {trainer.state.max_steps}; the checkpoint is "
                f"{trainer.store.folder(steps)}. Go on with --resume."
            )
        if self.settings.select == "best" and not trainer.load_best():
            raise RunFailed("select: best was asked for and no evaluation gave a value. Give eval_every and data.")
        status = "stopped_early" if trainer.out_of_patience() and steps < trainer.state.max_steps else "finished"
        outcome = TrainOutcome(status, steps, cost=self._cost(), best=self._best(), states=trainer.states)
        self.hooks.tell(LogRecord(event="end", step=steps, text=status, seconds=self.hooks.clock.seconds))
        outcome.log = [as_json(r) for r in self.hooks.history]
        return outcome

    def _leave_model_as_found(self) -> None:
        """Undo what trainers do to a model for good: no key-value cache, a second adapter as DPO's reference."""
        model: Any = self.model
        if self.cached is not None:
            model.config.use_cache = self.cached
        for name in set(getattr(model, "peft_config", {})) - self.adapters:
            model.delete_adapter(name)

    def _best(self) -> dict[str, Any] | None:
        state = self.trainer.state
        if state.best_metric is None:
            return None
        return {"step": state.best_global_step, "metric": self.settings.metric, "value": state.best_metric}

    def _cost(self) -> Cost:
        trainer = self.trainer
        trained, total = parameter_counts(self.model)
        device = trainer.args.device
        peak = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        flops = trainer.flops_per_position
        return Cost(
            trainable_parameters=trained,
            total_parameters=total,
            optimizer_state_bytes=optimizer_state_bytes(optimizer) if optimizer is not None else 0,
            peak_saved_bytes=self.probe.saved_bytes,
            peak_device_bytes=peak,
            training_flops=int(flops * trainer.positions_seen) if flops is not None else None,
            training_tokens=trainer.tokens_seen,
            steps=trainer.state.global_step,
            seconds=self.hooks.clock.seconds,
            machine=machine(),
        )


def _tasks_of(examples: Any) -> list[str]:
    """Names of the tasks by number, up to the highest number that an example has."""
    numbers = getattr(examples, "task_ids", None)
    if numbers is not None:
        return list(examples.tasks)[: int(max(numbers, default=-1)) + 1]
    names: dict[int, str] = {}
    for i in range(len(examples)):
        example = examples[i]
        if hasattr(example, "get"):
            number = int(example.get("task_id", 0))
            names.setdefault(number, str(example.get("task", number)))
    return [names.get(k, str(k)) for k in range(max(names, default=-1) + 1)]
