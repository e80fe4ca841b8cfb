"""The README of an exported model: where it comes from and how close it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pegbox.export.tuned import Opened
from pegbox.parts.files import write_text

__all__ = ["write_export_card"]


def write_export_card(place: Path, opened: Opened, what: str, report: dict[str, Any]) -> None:
    """Write README.md into `place`: the base, its fingerprint and licence, the recipe, and what the export cost."""
    root, info = opened.manifest.root, opened.manifest.info
    licence = info.get("licence") or root.licence
    head = {"tags": ["pegbox"], **({"license": licence.lower()} if licence else {})}
    if root.kind == "hub":
        head["base_model"] = root.ref.partition("@")[0]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in sorted(head.items())), "---", ""]
    lines += [f"# {info.get('title') or 'Tuned ' + root.ref}: {what}", ""]
    lines += [
        f"- base: `{root.ref}`, fingerprint `{root.fingerprint}`",
        f"- base's licence: {root.licence or 'not stated'}",
    ]
    if info.get("recipe"):
        lines.append(f"- recipe: {info['recipe']}")
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in report.items() if not isinstance(value, dict)]
    write_text(place / "README.md", "\n".join(lines) + "\n")
