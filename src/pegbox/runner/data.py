"""A run's rows: loaded and split once, encoded once per tokenizer, named by their hashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pegbox.data.dataset import RowSet, Splits, load_rows, load_splits
from pegbox.data.rows import Row
from pegbox.errors import BadInput
from pegbox.parts.task import Task
from pegbox.spec import DataSettings

__all__ = ["RunData"]


class RunData:
    """The rows of one stage or run by use: train, validation, test.

    Args:
        settings: which rows, and how they are encoded. seed: of the split.
    """

    def __init__(self, settings: DataSettings, seed: int = 0):
        self.settings, self.seed = settings, seed
        self._splits: Splits | None = None
        self._encoded: dict[tuple[str, int], Any] = {}

    @property
    def splits(self) -> Splits:
        if self._splits is None:
            s = self.settings
            if not s.train and not s.test and not s.validation:
                raise BadInput("No rows. Give --data: a file, a folder, a hub id, or the built-in 'network'.")
            if not s.train:
                self._splits = self._without_training()
                return self._splits
            self._splits = load_splits(
                [_grouped(source, s.group) for source in s.train],
                validation=s.validation or s.validation_split,
                test=s.test or s.test_split,
                mapping=s.map,
                format=s.format,
                seed=0,  # the split is the data's own: seeds of a run never change who is tested
            )
        return self._splits

    def _without_training(self) -> Splits:
        """Rows to measure on only, for runs that train nothing."""
        s = self.settings
        given = {use: [_grouped(v, s.group) for v in getattr(s, use)] for use in ("validation", "test")}
        loaded = {u: load_rows(v, mapping=s.map, format=s.format) for u, v in given.items() if v}
        rows = {u: list(found.rows) for u, found in loaded.items()}
        return Splits([], rows.get("validation", []), rows.get("test", []), next(iter(loaded.values())).format)

    def rows(self, use: str) -> list[Row]:
        """The rows of one use ("train", "validation", "test"), at most `limit` of them."""
        rows: list[Row] = getattr(self.splits, use)
        return rows[: self.settings.limit] if self.settings.limit else rows

    @property
    def target(self) -> list[Row]:
        """What "target" measures: the test rows, or the validation rows where there are none."""
        return self.rows("test") or self.rows("validation")

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(row.kind for row in self.rows("train") or self.target)

    @property
    def labels(self) -> list[Any]:
        """The classes of a classification set, sorted."""
        found = {row.label for row in self.rows("train") if row.label is not None}
        return sorted(found, key=lambda v: (str(type(v)), v))

    def encoded(self, use: str, task: Task, tokenizer: Any) -> Any:
        """The rows of one use as examples."""
        key = (use, id(tokenizer))
        if key not in self._encoded:
            self._encoded[key] = self.encode(self.rows(use), task, tokenizer)
        return self._encoded[key]

    def other(self, source: Any) -> list[Row]:
        """All rows of a further source, read as this run's are."""
        given = source if isinstance(source, list | tuple) else [source]
        return list(load_rows([_grouped(v, self.settings.group) for v in given], format=self.settings.format).rows)

    @property
    def tasks(self) -> list[str]:
        """Names of the rows' tasks in the order of their numbers: the training rows' first, each part sorted."""
        trained = {row.task for row in self.rows("train")}
        others = {row.task for use in ("validation", "test") for row in self.rows(use)} - trained
        return [*sorted(trained), *sorted(others)]

    def encode(self, rows: Sequence[Row], task: Task, tokenizer: Any) -> Any:
        """Any rows, under this run's settings."""
        s = self.settings
        options: dict[str, Any] = {"template": s.template, "train_on": s.train_on, "max_length": s.max_length}
        if len(self.tasks) > 1:
            options["task_names"] = self.tasks
        if self.labels:
            options["label_names"] = [str(label) for label in self.labels]
        return task.encode(rows, tokenizer, cache=True, **options)

    def digests(self) -> dict[str, dict[str, Any]]:
        """Count and hash of the rows of each use."""
        uses = ("train", "validation", "test")
        return {u: {"rows": len(r), "sha256": RowSet(r, "").digest()} for u in uses if (r := self.rows(u))}

    def names(self) -> list[str]:
        """The sources as the user gave them."""
        return [str(source) for source in (*self.settings.train, *self.settings.validation, *self.settings.test)]


def _grouped(source: Any, group: str | None) -> Any:
    if group is None:
        return source
    block: dict[str, Any] = {"path": str(source)} if isinstance(source, str | Path) else dict(source)
    return {**block, "map": {"group": group, **block.get("map", {})}}
