"""The built-in repair task: small Python functions with one bug each, its exact reason, and tests.

    rows(split, n, seed) -> list[Row]       SPLITS       problem(...) -> an entry of the set from your own function

A function belongs to one split, so no function that is tested was ever trained on. Row i of a split depends on the seed
and i alone. Bugs are `mutation.py`'s, as far as the tests find them out without running for ever; which ones these are
was found by running them and stands in the set (`assets/repair.jsonl`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from pegbox.data.repair.mutation import canonical, mutants
from pegbox.data.repair.rows import read_repair
from pegbox.data.rows import Row, content_of, row_id
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.context import seed_of
from pegbox.parts.languages import Job, check_all
from pegbox.parts.sandbox import Limits

__all__ = ["SPLITS", "problem", "problems", "rows"]

SPLITS = ("train", "validation", "test")


def rows(split: str, n: int, seed: int = 0, families: Sequence[str] = ()) -> list[Row]:
    """The first `n` bugs of a split in the seed's order, functions taking turns; fewer where the split has fewer.

    Args:
        families: names of operators, all by default.

    Raises:
        BadInput: an unknown split or operator, or n < 1.
    """
    from pegbox.data.repair.mutation import OPERATORS

    if split not in SPLITS:
        raise BadInput(f"repair: unknown split '{split}'.{did_you_mean(split, SPLITS)}")
    for family in families:
        if family not in OPERATORS:
            raise BadInput(f"repair: unknown operator '{family}'.{did_you_mean(family, OPERATORS)}")
    if n < 1:
        raise BadInput(f"repair: the number of rows must be at least 1, got {n}.")
    by_function = [[r for r in _bugs(i) if not families or r.task in families] for i in _members(split)]
    order = random.Random(seed_of(seed, "repair", split))
    for found in by_function:
        order.shuffle(found)
    order.shuffle(by_function)
    longest = max((len(found) for found in by_function), default=0)
    turns = [found[i] for i in range(longest) for found in by_function if i < len(found)]
    return turns[:n]


@cache
def problems() -> tuple[dict[str, Any], ...]:
    """The set's entries: name, split, problem, code, tests, bugs (positions among the mutants)."""
    lines = files("pegbox.data").joinpath("assets", "repair.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def problem(name: str, text: str, code: str, tests: str, split: str = "train", seconds: float = 2.0) -> dict[str, Any]:
    """An entry from a right function: its mutants are run, and those that its tests refuse are kept.

    Raises `BadInput` where the function itself fails, or no mutant does.
    """
    limits, right = Limits(seconds=seconds), canonical(code)
    made = mutants(right)
    outcomes = check_all([Job("python", c, tests) for c in (right, *(m.code for m in made))], limits)
    if not outcomes[0].passed:
        raise BadInput(f"{name}: the function fails its own tests: {outcomes[0].output[-200:]}")
    bugs = [i for i, outcome in enumerate(outcomes[1:]) if outcome.status == "failed"]
    if not bugs:
        raise BadInput(f"{name}: the tests pass on every mutant; write sharper ones.")
    return {"name": name, "split": split, "problem": text, "code": right, "tests": tests, "bugs": bugs}


def _members(split: str) -> list[int]:
    return [i for i, entry in enumerate(problems()) if entry["split"] == split]


@cache
def _bugs(index: int) -> tuple[Row, ...]:
    entry = problems()[index]
    made = mutants(entry["code"])
    return tuple(_row(entry, made[i]) for i in entry["bugs"])


def _row(entry: dict[str, Any], mutant: Any) -> Row:
    record = {
        "buggy": mutant.code,
        "fixed": entry["code"],
        "problem": entry["problem"],
        "tests": entry["tests"],
    }
    source = f"repair:{entry['split']}"
    fields = read_repair(record, source)
    facts = {"rationale": mutant.rationale, "operator": mutant.operator, "line": mutant.line, "name": entry["name"]}
    row = Row("", task=mutant.operator, group=entry["name"], source=source, **fields)
    return replace(row, id=row_id(content_of(row)), meta={**row.meta, **facts})
