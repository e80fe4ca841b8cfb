"""The run's log: one JSON object per line, with a version, safe to append to after a kill.

    {"version": 1, "event": "step", "step": 12, "loss": 0.83, "lr": 1e-4, "grad_norm": 1.2, "tokens": 9120, ...}

Events: start, step, eval, save, notice, end. On resuming, records beyond the checkpoint's step are cut off, so that
each step stands there once. NaN is written as null, so that every line is strict JSON.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pegbox.parts.files import write_text, writing

__all__ = ["LOG_SCHEMA", "LogRecord", "LogWriter", "as_json", "log_schema"]

LOG_SCHEMA = 1


class LogRecord(BaseModel):
    """One line of `log.jsonl`.

    Args:
        loss: the objective's, of this step (a mean over the steps since the last record).
        tokens, seconds: since the stage began, over resumptions; tokens are input tokens without padding.
        memory: bytes; the allocator's peak on a GPU, the process's resident size on a CPU.
        readings: named losses and whatever the objective and the step report.
        metrics: values of an evaluation.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    event: Literal["start", "step", "eval", "save", "notice", "end"]
    step: int
    epoch: float | None = None
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    memory: int | None = None
    readings: dict[str, float | None] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    total_steps: int | None = None
    text: str | None = None
    stage: str | None = None  # in a run's joined log: which stage


def log_schema() -> dict[str, Any]:
    """The JSON schema of a log line."""
    return LogRecord.model_json_schema()


class LogWriter:
    """Appends records to a file and flushes each."""

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None and path.exists():
            write_text(path, "".join(_upto(path, resume_step)))
        elif path.exists() and resume_step is None:
            path.unlink()

    def write(self, record: LogRecord) -> None:
        line = json.dumps(as_json(record), allow_nan=False)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()

    def sync(self) -> None:
        """Make what was written durable (called before a checkpoint is sealed)."""
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())


def as_json(record: LogRecord) -> dict[str, Any]:
    """A record as strict JSON: absent fields left out, numbers that are not finite as null."""
    return _strict(record.model_dump(exclude_none=True))


def _upto(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the kill cut this line off
        if record.get("step", 0) <= step and line.endswith("\n"):
            kept.append(line)
    return kept


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items() if not (k in {"readings", "metrics"} and not v)}
    return value
