"""What was measured of each system's claim: read from the package's own summary of the project's evidence files.

A record says claim, baseline, method, seeds, result and verdict (holds | does not hold | inconclusive). The scripts and
full results stand in the repository's `evidence/` folder; `tools/collect-evidence` writes the summary.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from pegbox.errors import BadInput, did_you_mean

__all__ = ["VERDICTS", "records", "verdict_of"]

VERDICTS = ("holds", "does not hold", "inconclusive")


@cache
def records() -> dict[str, list[dict[str, Any]]]:
    """Evidence records by recipe name."""
    entry = files("pegbox.recipes") / "evidence.json"
    return json.loads(entry.read_text(encoding="utf-8")) if entry.is_file() else {}


def records_of(slug: str) -> list[dict[str, Any]]:
    """One system's records. Raises `BadInput` for a name without any."""
    if slug not in records():
        raise BadInput(f"No evidence for '{slug}'.{did_you_mean(slug, records())}")
    return records()[slug]


def verdict_of(slug: str) -> str:
    """The verdicts of a system's claims in a few words, "not measured" where there are none."""
    verdicts = [record["verdict"] for record in records().get(slug, [])]
    if not verdicts:
        return "not measured"
    if len(set(verdicts)) == 1:
        return verdicts[0] if len(verdicts) == 1 else f"{verdicts[0]} ({len(verdicts)} claims)"
    return ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
