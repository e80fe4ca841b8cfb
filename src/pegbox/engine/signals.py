"""Stopping on request: SIGTERM becomes a flag that all processes agree on, at a step's end or during an evaluation."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from pegbox.engine.distributed import agree, world

__all__ = ["Interrupted", "StopRequest"]


class Interrupted(Exception):
    """An evaluation was left because the run is to stop."""


class StopRequest:
    """A context manager: inside it SIGTERM asks for a stop instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self.interruptible = False  # an evaluation runs: it may be left at once
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.interruptible and world() == 1:  # several processes leave together, at the next `check`
            self.interruptible = False
            raise Interrupted

    def agreed(self) -> bool:
        """True on every process if it was asked on any. A collective call."""
        self.requested = agree(self.requested) if world() > 1 else self.requested
        return self.requested

    def check(self) -> None:
        """Raise `Interrupted` on every process if a stop was asked for."""
        if self.agreed():
            raise Interrupted
