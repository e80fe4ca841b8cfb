"""`--match`: every row at the reference's trained count, or under one memory cap."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pegbox.compare.cells import Row
from pegbox.compare.match import TOLERANCE, match_count
from pegbox.compare.settings import CompareSettings, find_row
from pegbox.errors import BadInput
from pegbox.recipe import Recipe, override

__all__ = ["match_sizes"]


def match_sizes(rows: Sequence[Row], settings: CompareSettings, keep: set[str]) -> list[Row]:
    """The rows with their size knobs (params) or micro-batches (memory) set; rows in `keep` stay as they are."""
    kind, _, value = settings.match.partition("=")
    if kind == "params":
        return _match_params(rows, settings, keep)
    if kind == "memory" and value:
        from pegbox.plan import parse_bytes

        return [row if row.digest in keep else _under(row, settings, parse_bytes(value)) for row in rows]
    raise BadInput(f"--match {settings.match}: write none, params, or memory=V (e.g. memory=8GiB).")


def _match_params(rows: Sequence[Row], settings: CompareSettings, keep: set[str]) -> list[Row]:
    reference = find_row(rows, settings.reference) if settings.reference else rows[0]
    count = _counter(settings)
    wanted = count(reference.recipe)
    matched = []
    for row in rows:
        knob = (row.recipe.get("knobs") or {}).get("size")
        if row.digest in keep or row.name == reference.name:
            matched.append(row)
        elif knob is None:
            matched.append(replace(row, notes=(*row.notes, "size not matched: no knob")))
        else:
            matched.append(_turned(row, knob, wanted, count))
    return matched


def _turned(row: Row, knob: str, wanted: int, count: Any) -> Row:
    start = Recipe.of(row.recipe).get(knob)
    whole = isinstance(start, int)

    def at(value: float) -> dict[str, Any]:
        recipe = copy.deepcopy(row.recipe)
        override(recipe, knob, int(value) if whole else value)
        return recipe

    value, near = match_count(
        lambda v: count(at(v)), float(start), wanted, whole=whole, most=float("inf") if whole else 1.0
    )
    note = f"{knob} {start} -> {int(value) if whole else round(value, 6)}" + (
        "" if near else f" (not within {TOLERANCE:.0%} of the reference)"
    )
    return replace(row, recipe=at(value), notes=(*row.notes, note))


def _counter(settings: CompareSettings) -> Any:
    from pegbox.plan import trained_count

    known: dict[str, int] = {}

    def count(recipe: dict[str, Any]) -> int:
        key = Recipe.of(recipe).digest()
        if key not in known:
            known[key] = trained_count(Recipe.of(recipe), settings.run["model"])
        return known[key]

    return count


def _under(row: Row, settings: CompareSettings, cap: int) -> Row:
    """The largest micro-batch (then with checkpointing) whose planned memory stays under the cap."""
    from pegbox.plan import plan_recipe

    batch = int(settings.run.get("batch") or 8)
    length = int(settings.run.get("max_length") or 512)
    for checkpointing in (False, True):
        for micro in [m for m in range(batch, 0, -1) if batch % m == 0]:
            planned = plan_recipe(
                Recipe.of(row.recipe),
                settings.run["model"],
                micro_batch=micro,
                length=length,
                checkpointing=checkpointing,
            )
            if planned.total_bytes <= cap:
                note = f"micro-batch {micro}" + (", gradient checkpointing" if checkpointing else "")
                train = {"micro_batch": micro, "gradient_checkpointing": checkpointing}
                return replace(row, notes=(*row.notes, note), train=train)
    raise BadInput(f"--match {settings.match}: '{row.name}' does not fit even with one row per forward. Raise the cap.")
