"""The engine: trainers with pegbox's seams, exact resume, guards and measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pegbox.engine.callbacks import Hooks, Listener, Schedule
    from pegbox.engine.distributed import check_same_on_ranks
    from pegbox.engine.log import LogRecord, log_schema
    from pegbox.engine.settings import TrainSettings
    from pegbox.engine.train import TrainOutcome, train_stage

_HOMES = {
    "Hooks": "callbacks",
    "Listener": "callbacks",
    "LogRecord": "log",
    "Schedule": "callbacks",
    "TrainOutcome": "train",
    "TrainSettings": "settings",
    "check_same_on_ranks": "distributed",
    "log_schema": "log",
    "train_stage": "train",
}

__all__ = [
    "Hooks",
    "Listener",
    "LogRecord",
    "Schedule",
    "TrainOutcome",
    "TrainSettings",
    "check_same_on_ranks",
    "log_schema",
    "train_stage",
]


def __getattr__(name: str) -> Any:
    """Import on first use: transformers' trainer takes a second that the command line should not pay."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
