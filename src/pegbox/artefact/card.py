"""The artefact's card, README.md: what it is, what it was made from, how good it is, and how to load it.

The loading lines are meant to be copied; they run as they stand in the artefact's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pegbox.artefact.manifest import Manifest, Part
from pegbox.parts.files import write_text
from pegbox.parts.results import Measurement, Metrics

__all__ = ["CardInfo", "DataEntry", "render_card", "write_card"]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataEntry(_Plain):
    """One set of rows a run has seen."""

    name: str
    role: str = "train"
    rows: int | None = None
    sha256: str = ""
    licence: str | None = None


class CardInfo(_Plain):
    """What the card says beside the manifest.

    Args:
        title: one line. recipe: its name; recipe_yaml: resolved, as text. licence: of this artefact.
    """

    title: str = ""
    recipe: str = ""
    recipe_yaml: str = ""
    data: list[DataEntry] = Field(default_factory=list)
    metrics: Metrics | None = None
    licence: str | None = None

    def record(self) -> dict[str, Any]:
        """The same for `artefact.json`, without the recipe's text and without the rows behind the metrics."""
        plain = self.model_dump(mode="json", exclude={"recipe_yaml"}, exclude_none=True)
        return {key: value for key, value in plain.items() if value}


def write_card(folder: Path, manifest: Manifest, card: CardInfo) -> None:
    """Write README.md into `folder`."""
    write_text(folder / "README.md", render_card(manifest, card))


def render_card(manifest: Manifest, card: CardInfo) -> str:
    """The card as Markdown with the hub's YAML head."""
    sections = [
        _head(manifest, card),
        f"# {card.title or 'A tuned ' + manifest.root.ref}",
        _loading(manifest),
        _origin(manifest, card),
        _parts(manifest),
        _metrics(card.metrics),
        f"## Recipe\n\n```yaml\n{card.recipe_yaml.strip()}\n```" if card.recipe_yaml else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(manifest: Manifest, card: CardInfo) -> str:
    entries: dict[str, Any] = {"library_name": "peft" if _adapters(manifest) else "pegbox", "tags": ["pegbox"]}
    if manifest.root.kind == "hub":
        entries["base_model"] = manifest.root.ref.partition("@")[0]
    licence = card.licence or manifest.root.licence
    if licence:
        entries["license"] = licence.lower()
    lines = [f"{key}: {json.dumps(value)}" for key, value in sorted(entries.items())]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _loading(manifest: Manifest) -> str:
    text = (
        "## Loading\n\nIn this folder (elsewhere, give its path instead of `.`):\n\n```python\n"
        "import pegbox  # first: it registers its tuners with PEFT\n"
        "from pegbox.artefact import load_artefact\n\n"
        'model, tokenizer = load_artefact(".")\n```\n\n'
        f"The base, `{manifest.root.ref}`, is found again by that name; a copy elsewhere is given as `base=`."
    )
    adapters = _adapters(manifest)
    if len(adapters) == 1 and len(_applied(manifest)) == 1:
        text += (
            "\n\nWith PEFT's own loader:\n\n```python\nimport pegbox  # first: it registers its tuners with PEFT\n"
            "from peft import PeftModel\nfrom pegbox.models import load\n\n"
            f"base, tokenizer = load({json.dumps(manifest.root.ref)}{_load_arguments(manifest)})\n"
            f'model = PeftModel.from_pretrained(base, "{adapters[0].path}")\n```'
        )
    return text


def _load_arguments(manifest: Manifest) -> str:
    root = manifest.root
    arguments = {"precision": root.precision} if root.precision == "nf4" else {}
    if root.task != "causal-lm":
        arguments["task"] = root.task
    text = "".join(f", {name}={json.dumps(value)}" for name, value in arguments.items())
    return text + (f", model_kwargs={root.model_kwargs!r}" if root.model_kwargs else "")


def _origin(manifest: Manifest, card: CardInfo) -> str:
    root = manifest.root
    rows = [
        ("base", f"`{root.ref}`" + (f" at {root.revision}" if root.revision else "")),
        ("base's fingerprint", f"`{root.fingerprint}`"),
        ("base's licence", root.licence or "not stated by the source"),
        ("made on", root.precision),
        ("recipe", card.recipe),
        ("this artefact's licence", card.licence or ""),
        ("answers end at token ids", ", ".join(map(str, manifest.stop_ids))),
    ]
    for entry in card.data:
        count = f"{entry.rows} rows, " if entry.rows is not None else ""
        licence = f", licence {entry.licence}" if entry.licence else ", licence not stated"
        rows.append((f"{entry.role} data", f"{entry.name} ({count}sha256 `{entry.sha256}`{licence})"))
    return "## What it was made from\n\n" + _table(("what", "which"), [row for row in rows if row[1]])


def _parts(manifest: Manifest) -> str:
    if not manifest.parts:
        return ""
    rows = [
        (p.path, p.kind, p.component.get("kind", ""), str(sum(f.size for f in p.files.values())))
        for p in manifest.parts
    ]
    return "## Parts\n\n" + _table(("folder", "kind", "by", "bytes"), rows)


def _metrics(metrics: Metrics | None) -> str:
    if metrics is None or not metrics.after:
        return ""
    rows: list[tuple[str, ...]] = []
    for suite, after in sorted(metrics.after.items()):
        rows += _suite(suite, metrics.before.get(suite), after)
    return "## Measured\n\n" + _table(("suite", "metric", "base", "tuned", "95 % interval", "rows"), rows)


def _suite(suite: str, before: Measurement | None, after: Measurement) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, score in after.scores.items():
        old = before.scores.get(name) if before is not None else None
        interval = f"{score.low:.4g} to {score.high:.4g}" if score.low is not None and score.high is not None else ""
        rows.append((suite, name, f"{old.value:.4g}" if old else "", f"{score.value:.4g}", interval, str(score.n)))
    return rows


def _adapters(manifest: Manifest) -> list[Part]:
    return [part for part in manifest.parts if part.kind == "adapter"]


def _applied(manifest: Manifest) -> list[Part]:
    return [part for part in manifest.parts if part.kind not in ("data", "json")]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines: list[tuple[str, ...]] = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
