"""A run's folder: what lies where, who may write, and what state it is in.

    run.yaml  recipe.yaml  status.json  metrics.json  log.jsonl  report.html
    artefact/  stages/<name>/{stage.json, allocation.safetensors, prep-<i>/, artefact/, checkpoints/, log.jsonl}
    examples/<suite>.<before|after>.jsonl

Everything is written atomically; one process holds the folder's lock at a time.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pegbox.errors import BadInput, Corrupt
from pegbox.parts.files import lock_folder, read_json, write_json, write_text
from pegbox.recipe import dump_yaml, parse_yaml
from pegbox.spec import RunSpec

__all__ = ["Workspace", "describe_run", "library_versions", "list_runs", "read_spec", "verify_run"]

LIBRARIES = ("pegbox", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


class Workspace:
    """Paths and state of one run folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def artefact(self) -> Path:
        return self.folder / "artefact"

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name

    def file(self, name: str) -> Path:
        return self.folder / name

    def check(self, spec: RunSpec, *, resume: bool) -> None:
        """Whether the folder can take `spec`: a new one, or with `resume` the same run's. Writes nothing.

        Raises:
            BadInput: another run lies here; `resume` without a run; settings that changed (all named).
        """
        present = self.file("run.yaml").exists()
        if not present and self.folder.exists() and any(p.name != ".lock" for p in self.folder.iterdir()):
            raise BadInput(f"{self.folder} is not empty and holds no run. Choose another --out.")
        if present and not resume:
            raise BadInput(
                f"{self.folder} already holds a run. Add --resume to go on with it, or choose another --out."
            )
        if resume and not present:
            raise BadInput(f"--resume: {self.folder} holds no run. Leave --resume out to start one there.")
        if present:
            changed = read_spec(self.folder).changed(spec)
            if changed:
                raise BadInput(
                    "These settings differ from the run being resumed:\n"
                    + "\n".join(f"- {line}" for line in changed)
                    + "\nUse the same settings, or another --out."
                )

    def open(self, spec: RunSpec) -> None:
        """Write the run's settings into the folder, unless they stand there."""
        if self.file("run.yaml").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = {"versions": library_versions(), "recipe": spec.recipe.plain()}
        write_text(self.file("recipe.yaml"), dump_yaml(recipe))
        write_text(self.file("run.yaml"), dump_yaml(spec.plain()))

    @contextmanager
    def locked(self, *, main: bool = True) -> Iterator[None]:
        """Hold the folder's lock (in the main process). Raises `BadInput` when another run has it."""
        if not main:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder):
            yield

    def set_status(self, status: str, **details: Any) -> None:
        """running | finished | stopped | failed, with what belongs to it."""
        write_json(self.file("status.json"), {"version": 1, "status": status, **details})

    def status(self) -> dict[str, Any]:
        path = self.file("status.json")
        return read_json(path) if path.exists() else {"version": 1, "status": "new"}


def read_spec(folder: Path) -> RunSpec:
    """The settings of the run in `folder`. Raises `BadInput` if there is none, `Corrupt` if it can't be read."""
    path = folder / "run.yaml"
    if not path.is_file():
        raise BadInput(f"{folder} holds no run (no run.yaml). Give the folder that `pegbox train --out` named.")
    block = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(block, dict):
        raise Corrupt(f"{path} is empty or damaged.")
    return RunSpec.of(block)


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Runs at or below `folder`, newest first."""
    found = []
    for path in sorted(folder.rglob("run.yaml"), key=lambda p: -p.stat().st_mtime):
        block = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        title = (block.get("recipe") or {}).get("title", "?")
        status = Workspace(path.parent).status()["status"]
        found.append({"path": str(path.parent), "status": status, "recipe": title, "model": block.get("model", "?")})
    return found


def describe_run(folder: Path) -> dict[str, Any]:
    """Settings, state and results of one run as plain values."""
    spec = read_spec(folder)
    metrics = folder / "metrics.json"
    return {
        "path": str(folder),
        "status": Workspace(folder).status(),
        "run": spec.plain(),
        "metrics": read_json(metrics) if metrics.is_file() else None,
    }


def verify_run(folder: Path) -> list[str]:
    """Check artefacts and checkpoints. Returns a line per thing checked; raises `Corrupt` at the first fault."""
    from pegbox.artefact import read
    from pegbox.engine.checkpoint import CheckpointStore

    read_spec(folder)
    lines = []
    for artefact in sorted(folder.rglob("artefact.json")):
        read(artefact.parent)
        lines.append(f"{artefact.parent}: artefact verified")
    for checkpoints in sorted(p for p in folder.rglob("checkpoints") if p.is_dir()):
        store = CheckpointStore(checkpoints)
        for step in store.steps():
            fault = store.fault(step)
            if fault is not None:
                raise Corrupt(f"{store.folder(step)}: {fault}")
            lines.append(f"{store.folder(step)}: checkpoint verified")
    return lines or [f"{folder}: nothing to verify yet"]


def library_versions() -> dict[str, str]:
    """Versions of what computes, and of Python."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
