"""The facade of the data axis: sources in, rows out; rows in, splits out; rows in, encoded examples out.

    load_rows(sources) -> RowSet     prepare_splits(rowset) -> Splits     encode_rows(rows, tokenizer) -> EncodedSet
    load_splits(sources, ...) -> Splits does the first two as a run wants them.

What this file does not know: how any of it is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pegbox.data import network, repair
from pegbox.data.encode import encode_rows
from pegbox.data.encoded import EncodedSet
from pegbox.data.formats import convert, detect, rename
from pegbox.data.rows import Row, base_id
from pegbox.data.sources import Source, as_source, read_records
from pegbox.data.splits import keys_of, split_rows, without_duplicates_of
from pegbox.errors import BadInput

__all__ = [
    "EncodedSet",
    "LoadReport",
    "RowSet",
    "Sources",
    "Splits",
    "encode_rows",
    "load_rows",
    "load_splits",
    "prepare_splits",
]

Sources = str | Path | Source | Mapping[str, Any] | Sequence[str | Path | Source | Mapping[str, Any]]

NETWORK_COUNTS = {"train": 1200, "validation": 100, "test": 300}  # rows of the built-in task unless a limit is given
REPAIR_COUNTS = {"train": 1000, "validation": 100, "test": 300}  # as many as there are
_TASKS = {"network": (network.rows, NETWORK_COUNTS), "repair": (repair.rows, REPAIR_COUNTS)}


@dataclass
class LoadReport:
    """What was read: per source its path, detected format, rows read and used; and exact duplicates over all."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class RowSet(Sequence[Row]):
    """Rows of one kind, the format they were written in ("chat", or "chat, qa" for a mix), and the report."""

    rows: list[Row]
    format: str
    report: LoadReport = field(default_factory=LoadReport)

    @property
    def kind(self) -> str:
        return self.rows[0].kind

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def digest(self) -> str:
        """sha256 over ids and weights, in order: the data's name in a lock."""
        lines = "\n".join(f"{row.id} {row.weight}" for row in self.rows)
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass
class Splits:
    """Rows by use. `report` counts rows, separate keys, and rows removed from training as duplicates of the others."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    format: str
    report: dict[str, Any] = field(default_factory=dict)


def load_rows(
    sources: Sources, *, mapping: Mapping[str, str] | None = None, format: str = "auto", deduplicate: bool = False
) -> RowSet:
    """Read every source, in order.

    Args:
        mapping, format: for sources that don't say their own.
        deduplicate: keep the first of exact duplicates only. Otherwise all stay, with "#n" in their ids.

    Raises:
        BadInput: anything that can't be read, with file, line and column; no rows at all; kinds that don't mix.
    """
    listed = _listed(sources)
    if not listed:
        raise BadInput("No data source given. Give a file, a folder, a hub name, or 'network'.")
    report, parts, formats = LoadReport(), [], []
    for source in listed:
        rows, name = _read(source, mapping or {}, format)
        parts.append([replace(row, task=row.task or source.task) for row in rows] if source.task else rows)
        formats.append(name)
        report.sources.append({"path": source.path, "format": name, "read": len(rows), "weight": source.weight})
    _mix(parts, listed, report)
    rows = _numbered([row for part in parts for row in part], report, deduplicate)
    kinds = {row.kind for row in rows}
    if len(kinds) > 1 and kinds - {"chat", "completion", "text"}:
        raise BadInput(f"The sources hold rows of kinds that don't mix: {', '.join(sorted(kinds))}. Give one kind.")
    return RowSet(rows, ", ".join(dict.fromkeys(formats)), report)


def prepare_splits(
    rows: RowSet,
    *,
    validation: float | RowSet = 0.0,
    test: float | RowSet = 0.0,
    seed: int = 0,
) -> Splits:
    """Train, validation and test rows: shares of `rows` by hash, or sets of their own.

    Groups and exact duplicates never straddle: what a given set holds too is removed from training (and from the other
    share), and counted.
    """
    shares = {n: s for n, s in (("validation", validation), ("test", test)) if not isinstance(s, RowSet)}
    given = {n: s.rows for n, s in (("validation", validation), ("test", test)) if isinstance(s, RowSet)}
    pool = list(rows.rows)
    for other in given.values():
        pool = without_duplicates_of(pool, other)
    if "test" in given and "validation" in given:
        given["validation"] = without_duplicates_of(given["validation"], given["test"])
    removed = len(rows) - len(pool)
    if not pool:
        raise BadInput("No training row is left: every one also stands in the validation or test data.")
    parts = split_rows(pool, {n: float(s) for n, s in shares.items()}, seed) | given
    for name in ("validation", "test"):
        parts.setdefault(name, [])
    counts = {name: len(part) for name, part in parts.items()}
    report = {"rows": counts, "keys": len(set(keys_of(pool))), "removed_from_train": removed, "seed": seed}
    return Splits(parts["train"], parts["validation"], parts["test"], rows.format, report)


def load_splits(
    sources: Sources,
    *,
    validation: float | Sources = 0.05,
    test: float | Sources = 0.0,
    mapping: Mapping[str, str] | None = None,
    format: str = "auto",
    seed: int = 0,
) -> Splits:
    """Load and split as a run wants it. The built-in task brings its own validation and test rows."""
    rows = load_rows(sources, mapping=mapping, format=format)
    listed = _listed(sources)
    builtin = len(listed) == 1 and listed[0].builtin and listed[0].split in (None, "train")
    sets: dict[str, float | RowSet] = {}
    for name, given in (("validation", validation), ("test", test)):
        if isinstance(given, int | float):
            own = {"path": listed[0].path, "split": name, "seed": listed[0].seed, "families": listed[0].families}
            sets[name] = load_rows(own) if builtin else float(given)
        else:
            sets[name] = load_rows(given, mapping=mapping, format=format)
    return prepare_splits(rows, validation=sets["validation"], test=sets["test"], seed=seed)


def _listed(sources: Sources) -> list[Source]:
    if isinstance(sources, str | Path | Source | Mapping):
        return [as_source(sources)]
    return [as_source(s) for s in sources]


def _read(source: Source, mapping: Mapping[str, str], format: str) -> tuple[list[Row], str]:
    if source.builtin:
        if source.map or source.format != "auto" or source.config:
            raise BadInput(
                f"The built-in '{source.path}' task makes its own rows: `map`, `format` and `config` don't apply."
            )
        make, counts = _TASKS[source.path]
        split = source.split or "train"
        return make(split, source.limit or counts.get(split, 0), source.seed, source.families), source.path
    names = source.map or mapping
    records = []
    for record, where in read_records(source):
        records.append((rename(record, names, where) if names and isinstance(record, dict) else record, where))
        if source.limit is not None and len(records) == source.limit:
            break
    if not records:
        raise BadInput(f"{source.path} holds no rows. Expected at least one.")
    columns = {key for record, _ in records if isinstance(record, dict) for key, v in record.items() if v is not None}
    fmt = detect(columns, source.path, source.format if source.format != "auto" else format)
    return [convert(record, fmt, where) for record, where in records], fmt.name


def _mix(parts: list[list[Row]], sources: list[Source], report: LoadReport) -> None:
    """Cut weighted sources to their shares: as many rows as possible without repeating any, spread by hash."""
    if all(source.weight is None for source in sources):
        return
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    unit = min(len(part) / weight for part, weight in zip(parts, weights))
    for i, (part, weight) in enumerate(zip(parts, weights)):
        count = max(1, round(unit * weight))
        chosen = set(sorted(range(len(part)), key=lambda n: (hashlib.sha256(part[n].id.encode()).digest(), n))[:count])
        parts[i] = [row for n, row in enumerate(part) if n in chosen]
        report.sources[i]["used"] = len(parts[i])


def _numbered(rows: list[Row], report: LoadReport, deduplicate: bool) -> list[Row]:
    """Give the n-th exact duplicate its "#n", or leave it out."""
    seen: dict[str, int] = {}
    out = []
    for row in rows:
        name = base_id(row.id)
        seen[name] = seen.get(name, 0) + 1
        if seen[name] == 1:
            out.append(row)
        elif not deduplicate:
            out.append(replace(row, id=f"{name}#{seen[name]}"))
    report.duplicates = sum(n - 1 for n in seen.values())
    report.rows = len(out)
    return out
