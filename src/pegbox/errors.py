"""The errors a user can meet, and the exit codes they map to.

Every message names the offending thing, what was allowed, and the remedy. `PegboxError` is deliberately not a
`ValueError`: pydantic lets it through its validators unchanged, so the message reaches the user as it was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadInput",
    "Corrupt",
    "DoesNotFit",
    "MissingExtra",
    "PegboxError",
    "RunFailed",
    "Stopped",
    "Unsupported",
    "WrongBase",
    "did_you_mean",
]


class PegboxError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class RunFailed(PegboxError):
    """Training or evaluation failed (NaN loss, a crashed stage)."""


class BadInput(PegboxError):
    """A key, row, file or value that can't be accepted."""

    exit_code = 2


class Unsupported(BadInput):
    """A composition that can't be right, with the reason."""


class MissingExtra(BadInput):
    """An optional dependency is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}'. Install it with: pip install 'pegbox[{extra}]'")


class DoesNotFit(PegboxError):
    """The run would not fit the machine or the given memory."""

    exit_code = 3


class Stopped(PegboxError):
    """Stopped on request after writing a checkpoint; `--resume` goes on."""

    exit_code = 4


class WrongBase(PegboxError):
    """An artefact was given a base other than the one it was made on."""

    exit_code = 5


class Corrupt(PegboxError):
    """A file that fails its checksum, is truncated, or has the wrong format."""

    exit_code = 5


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of `known`, if any is near, then all of them: " Did you mean 'x'? Known: ..."."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{hint} Known: {', '.join(names) or '(none)'}."
