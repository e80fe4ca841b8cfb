"""An encoded set: many sequences in a few flat arrays, read as a list of examples, kept on disk as one file.

    example i  =  ids[starts[i] : starts[i+1]], labels = ids where trained, else -100

Arrays keep a set of a million tokens at 5 MB instead of the 60 MB that lists take. A stored set carries the checksum of
its arrays: a file that is truncated or altered is no cache hit.

What this file does not know: rows, tokenizers, templates.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from pegbox.errors import Corrupt
from pegbox.parts.files import write_tensors

__all__ = ["EncodeReport", "EncodedSet", "cache_folder"]

IGNORED = -100
FORMAT = 1  # raised whenever the stored form or the meaning of an encoding changes


@dataclass
class EncodeReport:
    """What encoding did: counts of rows, and what the template was found to do."""

    rows: int = 0
    examples: int = 0
    cut: int = 0  # examples shortened to max_length
    dropped: int = 0  # examples whose answer was cut away whole
    unrolled: int = 0  # rows that became several sequences (rewriting templates, long texts)
    recut: int = 0  # examples tokenised in pieces
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    template: str = ""
    closing: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class EncodedSet(Sequence[dict[str, Any]]):
    """Examples as dicts: input_ids, labels (lists), sample_id, task_id, weight, row_id, task.

    For classification `labels` is one class number (or a number to regress) and `label_names` lists the classes.
    """

    ids: np.ndarray  # (N,) int32, all sequences one after the other
    trained: np.ndarray  # (N,) bool
    starts: np.ndarray  # (n+1,) int64
    sample_ids: np.ndarray  # (n,) int64
    weights: np.ndarray  # (n,) float32
    task_ids: np.ndarray  # (n,) int64
    row_ids: list[str]
    tasks: list[str]
    kind: str = "tokens"  # or "classification"
    targets: np.ndarray | None = None  # (n,) int64 or float32, for classification
    types: np.ndarray | None = None  # (N,) int32 token types of text pairs, where the tokenizer has them
    label_names: list[str] = field(default_factory=list)
    report: EncodeReport = field(default_factory=EncodeReport)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens per example."""
        return np.diff(self.starts)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """All examples as plain dicts."""
        return list(self)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(index)
        place = slice(int(self.starts[i]), int(self.starts[i + 1]))
        ids = self.ids[place]
        example: dict[str, Any] = {
            "input_ids": ids.tolist(),
            "labels": np.where(self.trained[place], ids, IGNORED).tolist(),
            "sample_id": int(self.sample_ids[i]),
            "task_id": int(self.task_ids[i]),
            "weight": float(self.weights[i]),
            "row_id": self.row_ids[i],
            "task": self.tasks[int(self.task_ids[i])],
        }
        if self.targets is not None:
            example["labels"] = self.targets[i].item()
        if self.types is not None:
            example["token_type_ids"] = self.types[place].tolist()
        return example

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def digest(self) -> str:
        """sha256 over everything that training sees."""
        total = hashlib.sha256(json.dumps([self.kind, self.row_ids, self.tasks, self.label_names]).encode())
        for name, array in sorted(self._arrays().items()):
            total.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        import torch

        words = {
            "row_ids": self.row_ids,
            "tasks": self.tasks,
            "kind": self.kind,
            "label_names": self.label_names,
            "report": asdict(self.report),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self._arrays().items()}
        write_tensors(path, tensors, {"format": str(FORMAT), "sha256": self.digest(), "words": json.dumps(words)})

    @classmethod
    def load(cls, path: Path) -> EncodedSet:
        """Read what `save` wrote. Raises `Corrupt` for a file that is not exactly that."""
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                head = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            words = json.loads(head["words"])
            report = EncodeReport(**words.pop("report"))
            found = cls(**arrays, **words, report=report)
            intact = head["format"] == str(FORMAT) and head["sha256"] == found.digest()
        except Exception as error:
            raise Corrupt(f"{path} is not a readable encoded set ({error}). Delete it.") from error
        if not intact:
            raise Corrupt(f"{path} fails its checksum or has another format. Delete it.")
        return found

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("ids", "trained", "starts", "sample_ids", "weights", "task_ids", "targets", "types")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def cache_folder() -> Path:
    """$PEGBOX_CACHE, or the platform's folder for caches."""
    if os.environ.get("PEGBOX_CACHE"):
        return Path(os.environ["PEGBOX_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pegbox"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "pegbox" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pegbox"
