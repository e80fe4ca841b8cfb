"""What every evidence script does alike: its command line, and the record that it leaves.

A record says claim, baseline, method, seeds, results, checks and verdict. It is written once, at the end, so that a
broken-off measurement never stands for a whole one.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["arguments", "verdict", "write", "write_all"]

BEGAN = time.perf_counter()


def arguments(
    slug: str, about: str | None, seeds: int, extend: Callable[[argparse.ArgumentParser], Any] | None = None
) -> argparse.Namespace:
    """`--seeds N` and `--out FILE` (and what `extend` adds), on one thread so that two measurements can share a
    machine."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{slug}.json")
    if extend is not None:
        extend(parser)
    torch.set_num_threads(1)
    return parser.parse_args()


def verdict(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """ "holds" if every check does."""
    return "holds" if all(check["holds"] for check in checks.values()) else "does not hold"


def write(out: Path, slug: str, record: Mapping[str, Any]) -> None:
    """Write the record of `slug`, with the machine and the seconds since the script began, and show its checks."""
    whole = {"slug": slug, **record, **_circumstances()}
    _save(out, whole)
    print(json.dumps(record.get("checks", {}), indent=1), record["verdict"], whole["seconds"], "s")


def write_all(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the records of several systems that one measurement gave (each with its `slug`), and show what they say."""
    _save(out, [{**record, **_circumstances()} for record in records])
    for record in records:
        print(record["slug"], record["verdict"], record.get("summary", ""))


def _circumstances() -> dict[str, Any]:
    machine = {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"seconds": round(time.perf_counter() - BEGAN, 1), "machine": machine}


def _save(out: Path, content: Any) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
