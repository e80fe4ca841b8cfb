"""The live display: loss, tokens per second, time left, memory; lines instead of a bar where nobody watches.

A `Listener` over the same records as the log. On a terminal it is one rich progress bar with its numbers and, above it,
a line per evaluation and checkpoint; elsewhere (a file, a CI job) one line every few seconds.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pegbox.engine.callbacks import Listener
from pegbox.engine.log import LogRecord

__all__ = ["ProgressDisplay", "describe_bytes", "describe_seconds"]


def describe_bytes(count: float | None) -> str:
    """1536 -> "1.5 KiB"."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def describe_seconds(seconds: float | None) -> str:
    """3725 -> "1:02:05"."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressDisplay(Listener):
    """Shows a stage as it trains.

    Args:
        console: where to; by default standard error, so that standard output stays for results.
        label: the stage's name.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, console: Console | None = None, label: str = "training", every: float = 10.0):
        self.console = console if console is not None else Console(stderr=True)
        self.label, self.every = label, every
        self.rate: float | None = None  # tokens per second, a running mean
        self.pace: float | None = None  # seconds per step, a running mean
        self._last: LogRecord | None = None
        self._said = 0.0
        self._bar: Progress | None = None
        self._task: Any = None

    def record(self, record: LogRecord) -> None:
        match record.event:
            case "start":
                self._start(record)
            case "step":
                self._step(record)
            case "eval":
                values = "  ".join(f"{k} {v:.4g}" for k, v in record.metrics.items() if v is not None)
                self._say(f"step {record.step}: {values}")
            case "notice":
                self._say(record.text or "")
            case "end":
                self._end(record)

    def _start(self, record: LogRecord) -> None:
        self._last = None
        total = record.total_steps or 0
        if not self.console.is_terminal:
            self._say(f"{self.label}: {total} steps" + (f", going on after {record.step}" if record.step else ""))
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self.console, transient=False)
        self._task = self._bar.add_task(self.label, total=total, completed=record.step, numbers="")
        self._bar.start()

    def _step(self, record: LogRecord) -> None:
        self._measure(record)
        numbers = self._numbers(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, numbers=numbers)
            return
        last = record.total_steps is not None and record.step >= record.total_steps
        if last or time.monotonic() - self._said >= self.every:
            self._said = time.monotonic()
            self._say(f"step {record.step}/{record.total_steps}  {numbers}")

    def _measure(self, record: LogRecord) -> None:
        before, self._last = self._last, record
        if before is None or record.seconds is None or before.seconds is None or record.step <= before.step:
            return
        seconds = max(record.seconds - before.seconds, 1e-9)
        self.pace = _mixed(self.pace, seconds / (record.step - before.step))
        if record.tokens is not None and before.tokens is not None:
            self.rate = _mixed(self.rate, (record.tokens - before.tokens) / seconds)

    def _numbers(self, record: LogRecord) -> str:
        left = None
        if self.pace is not None and record.total_steps is not None:
            left = self.pace * (record.total_steps - record.step)
        loss = f"{record.loss:.4f}" if record.loss is not None else "-"
        rate = f"{self.rate:,.0f}" if self.rate is not None else "-"
        return f"loss {loss}  {rate} tokens/s  left {describe_seconds(left)}  memory {describe_bytes(record.memory)}"

    def _say(self, text: str) -> None:
        (self._bar.console if self._bar is not None else self.console).print(text, highlight=False, markup=False)

    def _end(self, record: LogRecord) -> None:
        self.close()
        self._say(
            f"{self.label}: {record.text or 'done'} after {record.step} steps, {describe_seconds(record.seconds)}"
        )

    def close(self) -> None:
        """Take the bar down; also to be called when a run fails."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _mixed(before: float | None, now: float, share: float = 0.2) -> float:
    return now if before is None else (1 - share) * before + share * now
