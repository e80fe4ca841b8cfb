"""Checkpoint folders that count only when they are complete.

    checkpoints/checkpoint-120/{model,optimizer,...}.safetensors, *.json, manifest.json

`manifest.json` = {file: [bytes, sha256]} is written last, by temporary name, sync and rename: a folder without a
manifest that verifies does not exist for a reader. Older checkpoints go only after the new one is good. Tensors are
safetensors, everything else JSON: nothing is unpickled, ever.

What this file does not know: trainers, what the files mean.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pegbox.engine.packing import pack, unpack
from pegbox.errors import BadInput, Corrupt, PegboxError, RunFailed
from pegbox.parts.files import fsync_tree, read_json, sha256_file, write_json

__all__ = ["CheckpointStore", "load_tensors", "load_tree", "save_tensors", "save_tree"]

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
_log = logging.getLogger(__name__)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises `OSError`, or safetensors' own error, if it can't."""
    from safetensors.torch import save_file

    save_file({n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises `Corrupt`."""
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except Exception as error:
        raise Corrupt(f"{path} is not a readable safetensors file ({error}).") from error


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Write any nested state as `<name>.safetensors` and `<name>.json`."""
    tensors, described = pack(tree, name)
    save_tensors(folder / f"{name}.safetensors", tensors)
    (folder / f"{name}.json").write_text(json.dumps(described), encoding="utf-8")


def load_tree(folder: Path, name: str, device: Any = "cpu") -> Any:
    """Read what `save_tree` wrote. Raises `Corrupt`."""
    return unpack(load_tensors(folder / f"{name}.safetensors"), read_json(folder / f"{name}.json"), device)


class CheckpointStore:
    """The checkpoints of one stage.

    Args:
        root: the folder that holds them.
        keep: how many to keep beside the best one; None keeps all.
    """

    def __init__(self, root: Path, keep: int | None = None):
        self.root, self.keep = root, keep

    def folder(self, step: int) -> Path:
        return self.root / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of all checkpoint folders, complete or not, newest first."""
        if not self.root.is_dir():
            return []
        found = (_NAME.match(p.name) for p in self.root.iterdir() if p.is_dir())
        return sorted((int(m[1]) for m in found if m), reverse=True)

    @contextmanager
    def opened(self, step: int) -> Iterator[Path]:
        """An empty folder for the checkpoint of `step`, to be filled and then sealed.

        If anything fails it is removed again and the earlier checkpoints are as they were. Raises `RunFailed`.
        """
        folder = self.folder(step)
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            yield folder
        except PegboxError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Exception as error:  # safetensors has error classes of its own
            shutil.rmtree(folder, ignore_errors=True)
            raise self.failure(step, error) from error

    def failure(self, step: int, error: BaseException) -> RunFailed:
        """What to tell when a checkpoint can't be written."""
        good = next((s for s in self.steps() if s != step and self.fault(s) is None), None)
        kept = (
            f"The checkpoint of step {good} is intact; go on from it with --resume" if good else "No earlier one exists"
        )
        return RunFailed(
            f"The checkpoint of step {step} could not be written to {self.folder(step)}: {error}. {kept}, once "
            "there is space and the folder is writable."
        )

    def seal(self, step: int) -> None:
        """Sync every file, then write the manifest that makes the folder count."""
        folder = self.folder(step)
        fsync_tree(folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        manifest = {str(p.relative_to(folder)): [p.stat().st_size, sha256_file(p)] for p in files}
        write_json(folder / MANIFEST, manifest)

    def fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None."""
        folder = self.folder(step)
        try:
            manifest = read_json(folder / MANIFEST)
        except Corrupt as error:
            return str(error)
        for name, (size, digest) in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if sha256_file(path) != digest:
                return f"{name} fails its checksum"
        return None

    def newest(self, notice: Callable[[str], None] = _log.warning) -> Path | None:
        """The newest complete checkpoint; incomplete ones before it are renamed out of the way, each with a notice."""
        for step in self.steps():
            fault = self.fault(step)
            if fault is None:
                return self.folder(step)
            aside = self._aside(step)
            os.rename(self.folder(step), aside)
            notice(f"Skipped the checkpoint of step {step} ({fault}); it is now {aside}.")
        return None

    def _aside(self, step: int) -> Path:
        n = 0
        while (path := self.root / f"broken-checkpoint-{step}.{n}").exists():
            n += 1
        return path

    def rotate(self, best: int | None = None) -> None:
        """Remove all but the newest `keep` complete checkpoints and the best one."""
        if self.keep is None:
            return
        for step in self.steps()[self.keep :]:
            if step != best:
                # without its manifest a half-removed folder can't be mistaken for a checkpoint
                (self.folder(step) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.folder(step), ignore_errors=True)

    def refuse_if_any(self) -> None:
        """Raises `BadInput` if the folder already holds checkpoints (of another run)."""
        if self.steps():
            raise BadInput(
                f"{self.root} already holds checkpoints of a run. Continue it with --resume, or choose another --out."
            )
