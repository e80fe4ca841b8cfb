"""What happens around a step: guard against NaN, schedules, evaluation, checkpoints, stopping, the log.

`Hooks` is the engine's own callback; it decides when the trainer logs, evaluates, saves and stops. `Schedule` is what a
caller may add for work between steps (a selector's refresh): before every `every`-th optimizer step. `Listener` is what
sees the run's events: the log, the display, a user's code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import TrainerCallback

from pegbox.engine.distributed import is_main
from pegbox.engine.log import LogRecord
from pegbox.engine.signals import Interrupted, StopRequest
from pegbox.errors import RunFailed
from pegbox.parts.metering import memory_now

__all__ = ["Clock", "Hooks", "Listener", "Schedule"]


@runtime_checkable
class Schedule(Protocol):
    """Work that is done again and again between steps. May have `state_dict`/`load_state_dict`; then it is saved.

    May also have `begin(step, model)`, called in every process before its first step (after a resume's state is
    loaded), and `after_step(step, model)`, called in every process after each step and before a checkpoint.
    """

    every: int | None

    def refresh(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called before the optimizer step that follows `step` finished ones, at positive multiples of `every`."""


class Listener:
    """Told of every event, in the main process. Subclass and override; records are `LogRecord`s."""

    def record(self, record: LogRecord) -> None:
        """Any event: start, step, eval, save, notice, end."""


class Clock:
    """Seconds of training, over resumptions."""

    def __init__(self) -> None:
        self.before, self._since = 0.0, time.perf_counter()

    def restart(self) -> None:
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._since

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, saved: Mapping[str, float]) -> None:
        self.before = saved["seconds"]
        self.restart()


class Hooks(TrainerCallback):
    """Ties a trainer made of the engine's mixins to the settings, the schedules and the listeners.

    Args:
        trainer: it.
        schedules: see `Schedule`.
        listeners: see `Listener`.
        stop: the request to stop.
        rows_per_epoch: the training set's size.
    """

    def __init__(
        self,
        trainer: Any,
        schedules: Sequence[Schedule],
        listeners: Sequence[Listener],
        stop: StopRequest,
        rows_per_epoch: int,
    ):
        self.trainer, self.schedules, self.listeners, self.stop = trainer, list(schedules), list(listeners), stop
        self.rows_per_epoch = rows_per_epoch
        self.clock = Clock()
        self.history: list[LogRecord] = []

    # ---- telling

    def tell(self, record: LogRecord) -> None:
        self.history.append(record)
        if is_main():
            for listener in self.listeners:
                listener.record(record)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.restart()
        self.tell(LogRecord(event="start", step=state.global_step, total_steps=state.max_steps))
        if self.trainer.pending_evaluation:  # the run was stopped inside it
            self.trainer._determine_best_metric(self.trainer.evaluate())
        done = state.global_step >= state.max_steps or self.trainer.out_of_patience()
        if done or self.trainer.pending_evaluation:
            raise Interrupted
        for schedule in self.schedules:
            if hasattr(schedule, "begin"):
                schedule.begin(state.global_step, self.trainer.model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.tell(self._step_record(state, logs))
        elif any(k.startswith("eval_") for k in logs):
            metrics = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
            seconds = metrics.pop("seconds", None)
            self.tell(LogRecord(event="eval", step=state.global_step, metrics=metrics, seconds=seconds))

    def _step_record(self, state: Any, logs: Mapping[str, Any]) -> LogRecord:
        return LogRecord(
            event="step",
            step=state.global_step,
            epoch=logs.get("epoch"),
            loss=logs["loss"],
            lr=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens=self.trainer.tokens_seen,
            seconds=self.clock.seconds,
            memory=memory_now(self.trainer.args.device),
            readings=self.trainer.step_readings() | _further(logs),
            total_steps=state.max_steps,
        )

    # ---- one step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        for schedule in self.schedules:
            if schedule.every and step and step % schedule.every == 0:
                optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
                schedule.refresh(step, self.trainer.model, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop at the first loss or gradient that is not finite, before it reaches the weights."""
        loss, norm = float(self.trainer.step_loss), self.trainer.grad_norm
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise RunFailed(self.trainer.describe_non_finite(loss, norm))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        settings, step = self.trainer.train_settings, state.global_step
        for schedule in self.schedules:
            if hasattr(schedule, "after_step"):
                schedule.after_step(step, self.trainer.model)
        state.epoch = step * settings.batch / self.rows_per_epoch
        last = step >= state.max_steps
        control.should_log = step % settings.log_every == 0 or last
        every, save = settings.eval_every, settings.save_every
        control.should_evaluate = every is not None and (step % every == 0 or last)
        control.should_save = save is not None and (step % save == 0 or last)
        control.should_training_stop = last
        if self.stop.agreed():
            self.trainer.pending_evaluation |= control.should_evaluate
            control.should_evaluate, control.should_save, control.should_training_stop = False, True, True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = False
        self.tell(
            LogRecord(event="save", step=state.global_step, text=str(self.trainer.store.folder(state.global_step)))
        )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loader's one pass is the whole run: nothing more is due at its end."""
        control.should_log = control.should_evaluate = False
        control.should_save = self.stop.requested and self.trainer._sealed != state.global_step

    # ---- state kept over a resume

    def state_dict(self) -> dict[str, Any]:
        saved = {f"{i}": s.state_dict() for i, s in enumerate(self.schedules) if hasattr(s, "state_dict")}
        return {
            "clock": self.clock.state_dict(),
            "schedules": saved,
            "since_best": self.trainer.since_best,
            "pending_evaluation": self.trainer.pending_evaluation,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.clock.load_state_dict(saved["clock"])
        self.trainer.since_best = saved["since_best"]
        self.trainer.pending_evaluation = saved["pending_evaluation"]
        for i, state in saved["schedules"].items():
            self.schedules[int(i)].load_state_dict(state)  # type: ignore[attr-defined]


def _further(logs: Mapping[str, Any]) -> dict[str, float]:
    """Readings that a host's trainer logs itself (rewards, KL, ...)."""
    own = {"loss", "learning_rate", "grad_norm", "epoch", "step", "num_tokens", "num_input_tokens_seen"}
    return {k: float(v) for k, v in logs.items() if k not in own and isinstance(v, int | float)}
