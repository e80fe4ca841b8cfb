"""What a run leaves: an ordered list of parts on a fingerprinted root, described by `artefact.json`.

    state_0 = the root's fingerprint,   state_i = sha256(state_{i-1}, part_i)

A part names as `parent` the state it was made on. An additive part (a difference that is simply added) fits any state
over the same root, so such parts from several runs compose; every other part fits exactly the state it names.
Tensors, JSON and text only; every file is listed with its size and sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pegbox.errors import BadInput, Corrupt, WrongBase
from pegbox.parts.files import read_json, recover_folder, sha256_file

__all__ = [
    "ALLOWED",
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "Part",
    "PartKind",
    "Root",
    "artefact_folder",
    "check_base",
    "check_chain",
    "read",
    "record_files",
]

MANIFEST = "artefact.json"
VERSION = 1
ALLOWED = {".safetensors", ".json", ".jsonl", ".txt", ".md", ".yaml", ".jinja", ".model", ".tiktoken"}

PartKind = Literal["prep", "adapter", "delta", "packed", "trajectory", "modules", "data", "json"]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Plain):
    """One file as it was written."""

    size: int
    sha256: str


class Root(_Plain):
    """The base everything stands on.

    Args:
        ref: what `pegbox.models.resolve` finds it by. kind, alias, revision, licence: see `Source`.
        fingerprint: of the checkpoint before anything was attached.
        task: the model class, a key of `pegbox.models.TASK_CLASSES`.
        precision: what the update was made on: fp32, bf16 or nf4.
        model_kwargs: further arguments the base has to be loaded with (number of labels).
    """

    ref: str
    kind: str
    fingerprint: str
    alias: str | None = None
    revision: str | None = None
    licence: str | None = None
    task: str = "causal-lm"
    precision: str = "fp32"
    model_kwargs: dict[str, Any] = Field(default_factory=dict)


class Part(_Plain):
    """One step from the root to the tuned model.

    Args:
        kind: what it is. data and json parts don't change the model.
        path: its folder inside the artefact.
        parent: the state it was made on.
        additive: whether it may follow any state over the same root.
        axis, component: who reads it: the axis's name, and the component's block in a recipe.
        meta: what the component's `save` returned.
        files: by path relative to the part's folder.
    """

    kind: PartKind
    path: str
    parent: str
    additive: bool = False
    axis: str | None = None
    component: dict[str, Any] = Field(default_factory=dict)
    meta: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        return _checked_path(value)

    def after(self, state: str) -> str:
        """The state this part leads to from `state`."""
        content = [state, self.kind, self.axis, self.component, {n: f.sha256 for n, f in self.files.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Manifest(_Plain):
    """The content of `artefact.json`."""

    version: int = VERSION
    root: Root
    parts: list[Part] = Field(default_factory=list)
    files: dict[str, FileRecord] = Field(default_factory=dict)  # beside the parts: the tokenizer's
    tokenizer: str | None = None  # its folder
    stop_ids: list[int] = Field(default_factory=list)
    info: dict[str, Any] = Field(default_factory=dict)  # versions, recipe, data hashes, metrics

    @property
    def state(self) -> str:
        """The state behind the last part."""
        state = self.root.fingerprint
        for part in self.parts:
            state = part.after(state)
        return state


def artefact_folder(place: str | Path) -> Path:
    """The artefact's folder, given it or its run's. Raises `BadInput` if neither is there."""
    folder = Path(place).absolute()
    for candidate in (folder, folder / "artefact"):
        recover_folder(candidate)
        if (candidate / MANIFEST).exists():
            return candidate
    raise BadInput(f"'{place}' holds no artefact: neither {MANIFEST} nor artefact/{MANIFEST} is there.")


def read(place: str | Path, *, verify: bool = True) -> Manifest:
    """Read an artefact's manifest and, unless told not to, check every file against it.

    Raises:
        BadInput: nothing is there.
        Corrupt: the manifest or a file is damaged (the file is named), or was written by a newer version.
    """
    folder = artefact_folder(place)
    content = read_json(folder / MANIFEST)
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise Corrupt(f"{folder} has format {version}; this pegbox reads up to {VERSION}. Upgrade pegbox.")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise Corrupt(f"{folder / MANIFEST} is damaged ({error.errors()[0]['msg']}).") from error
    if verify:
        _verify(folder, manifest)
    check_chain(manifest)
    return manifest


def check_base(manifest: Manifest, fingerprint: str, where: str = "The given base") -> None:
    """Raise `WrongBase`, with both fingerprints, unless `fingerprint` is the root's."""
    if fingerprint != manifest.root.fingerprint:
        raise WrongBase(
            f"{where} has fingerprint {fingerprint}, but the artefact was made on {manifest.root.fingerprint} "
            f"('{manifest.root.ref}'). Load it on that base."
        )


def check_chain(manifest: Manifest) -> None:
    """Raise `WrongBase` unless every part stands on what it was made on."""
    state = manifest.root.fingerprint
    for number, part in enumerate(manifest.parts):
        if not part.additive and part.parent != state:
            raise WrongBase(
                f"part {number} ('{part.path}', {part.kind}) was made on {part.parent}, but would stand on {state}. "
                "Only additive parts fit another parent over the same root."
            )
        state = part.after(state)


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file below `folder`, by relative path; cards are free to be edited and are left out.

    Raises:
        BadInput: a file that is neither tensors nor JSON nor text.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == "README.md":
            continue
        if path.suffix not in ALLOWED or path.is_symlink():
            raise BadInput(f"an artefact holds tensors, JSON and text only; {path.name} is neither.")
        relative = path.relative_to(folder).as_posix()
        found[relative] = FileRecord(size=path.stat().st_size, sha256=sha256_file(path))
    return found


def _verify(folder: Path, manifest: Manifest) -> None:
    _verify_files(folder, manifest.files)
    for part in manifest.parts:
        _verify_files(folder / part.path, part.files)


def _verify_files(folder: Path, records: dict[str, FileRecord]) -> None:
    for name, record in _inside(records):
        path = folder / name
        if not path.is_file():
            raise Corrupt(f"{path} is missing. Copy the artefact again.")
        if (size := path.stat().st_size) != record.size:
            raise Corrupt(f"{path} has {size} bytes, but {record.size} were written. Copy the artefact again.")
        if sha256_file(path) != record.sha256:
            raise Corrupt(f"{path} fails its checksum. Copy the artefact again.")


def _inside(records: dict[str, FileRecord]) -> Iterable[tuple[str, FileRecord]]:
    return ((_checked_path(name), record) for name, record in records.items())


def _checked_path(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise Corrupt(f"the artefact names a path outside itself: '{value}'.")
    return value
