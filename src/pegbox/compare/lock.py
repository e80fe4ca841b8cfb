"""The lock: everything that must be the same for all rows of a comparison, fixed by the first call.

`compare.yaml` holds it beside its hash. A later call (to add recipes, to run one cell) must arrive at the same lock;
what differs is named.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.files import write_text
from pegbox.recipe import dump_yaml, parse_yaml

__all__ = ["FILE", "Lock", "open_lock"]

FILE = "compare.yaml"


class Lock(BaseModel):
    """What all rows share.

    Args:
        model, fingerprint: the base, as given and as found.
        data: hashes and counts of the train, validation and test rows, after the split.
        encoding: template hash, mask rule, max length, packing.
        training: settings common to all rows (effective batch, budget, schedule rules, precision).
        evaluation: suites with their versions, metrics with theirs, decoding.
        seeds, trials: the report's seeds, and the rate multipliers tried with the tuning seed.
        libraries: versions of what computes.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    model: str
    fingerprint: str
    data: dict[str, Any]
    encoding: dict[str, Any]
    training: dict[str, Any]
    evaluation: dict[str, Any]
    seeds: list[int]
    trials: dict[str, Any]
    libraries: dict[str, str]
    notes: list[str] = Field(default_factory=list)

    def digest(self) -> str:
        """12 hex digits over everything but the notes."""
        body = self.model_dump(mode="json", exclude={"notes"})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]


def open_lock(folder: Path, wanted: Lock) -> Lock:
    """Write the lock on the first call; afterwards demand that `wanted` equals it.

    Raises:
        BadInput: the lock has changed; every difference is named, with both values.
        Corrupt: the file was edited or truncated.
    """
    path = folder / FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, dump_yaml({"digest": wanted.digest(), "lock": wanted.model_dump(mode="json")}))
        return wanted
    present = read_lock(path)
    if present.digest() != wanted.digest():
        differences = _differences(present.model_dump(mode="json"), wanted.model_dump(mode="json"))
        raise BadInput(
            f"{folder} holds a comparison under another lock. What differs:\n"
            + "\n".join(f"- {line}" for line in differences)
            + "\nUse the same settings, or another --out."
        )
    return present


def read_lock(path: Path) -> Lock:
    """The lock in a file. Raises `Corrupt`."""
    try:
        block = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        lock = Lock.model_validate(block["lock"])
    except Exception as error:
        raise Corrupt(f"{path} can't be read as a comparison's lock ({error}).") from error
    if lock.digest() != block.get("digest"):
        raise Corrupt(f"{path} was changed by hand: its digest does not match. Restore it, or use another --out.")
    return lock


def _differences(left: Any, right: Any, path: str = "") -> list[str]:
    if path == "notes":
        return []
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted({*left, *right})
        return [line for k in keys for line in _differences(left.get(k), right.get(k), f"{path}.{k}".lstrip("."))]
    return [] if left == right else [f"{path}: {left!r} (locked), {right!r} (asked for now)"]
