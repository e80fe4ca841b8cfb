"""Cells: one training each. A comparison is a set of cells in a fixed order, each in a folder of its own.

`cells/<recipe digest>/trial-<k>` tune the rate (one tuning seed, a third of the budget); `cells/<digest>/seed-<s>` are
the report's. Order is seed-major (A1 B1 C1 A2 ...), so drift of the machine and interruptions hit all rows alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Cell", "Row", "final_cells", "trial_cells"]


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe under a name, with its resolved blocks."""

    name: str
    recipe: dict[str, Any] = field(hash=False)
    rate_key: str = "optim.lr"
    notes: tuple[str, ...] = ()
    train: dict[str, Any] = field(default_factory=dict, hash=False)  # training settings of this row alone

    @property
    def digest(self) -> str:
        body = {k: v for k, v in self.recipe.items() if k not in {"title", "paper", "summary"}} | {"train": self.train}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Cell:
    """One training: a row, its overrides, a seed and a share of the budget."""

    row: Row
    label: str  # "trial-0" | "seed-1"
    seed: int
    overrides: tuple[tuple[str, Any], ...] = ()
    budget_share: float = 1.0

    @property
    def key(self) -> str:
        """ "lift/seed-1": how a user names the cell."""
        return f"{self.row.name}/{self.label}"

    def folder(self, root: Path) -> Path:
        return root / "cells" / self.row.digest / self.label

    @property
    def is_trial(self) -> bool:
        return self.label.startswith("trial")


def trial_cells(
    rows: Sequence[Row], settings: dict[str, list[dict[str, Any]]], tuning_seed: int, share: float
) -> list[Cell]:
    """Trial k of every row before trial k+1 of any. `settings[row name][k]` = {dotted key: value}."""
    most = max((len(tried) for tried in settings.values()), default=0)
    cells = []
    for k in range(most):
        for row in rows:
            if k < len(settings[row.name]):
                overrides = tuple(settings[row.name][k].items())
                cells.append(Cell(row, f"trial-{k}", tuning_seed, overrides, share))
    return cells


def final_cells(rows: Sequence[Row], chosen: dict[str, dict[str, Any]], seeds: Sequence[int]) -> list[Cell]:
    """Seed-major: every row with the first seed, then every row with the second, ..."""
    return [Cell(row, f"seed-{seed}", seed, tuple(chosen[row.name].items())) for seed in seeds for row in rows]
