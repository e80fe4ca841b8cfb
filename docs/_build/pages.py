"""Pages made while the site is built: the catalogue with its cards, the decisions, the API reference."""

from __future__ import annotations

from pathlib import Path

import mkdocs_gen_files

from pegbox.evidence import verdict_of
from pegbox.recipe import catalogue

ROOT = Path(__file__).parents[2]
API = (
    "pegbox",
    "pegbox.parts.component",
    "pegbox.parts.context",
    "pegbox.parts.allocation",
    "pegbox.parts.view",
    "pegbox.parts.protocol",
    "pegbox.parts.task",
    "pegbox.select.base",
    "pegbox.tuners.base",
    "pegbox.objectives.base",
    "pegbox.optim.base",
    "pegbox.data.base",
    "pegbox.prepare.base",
    "pegbox.weights.base",
    "pegbox.evaluate.base",
    "pegbox.run",
    "pegbox.recipe",
    "pegbox.spec",
    "pegbox.errors",
)


def write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text)


def systems() -> str:
    lines = ["# Systems", "", "| recipe | what it is | paper | evidence |", "|---|---|---|---|"]
    for slug, block in catalogue().items():
        card = ROOT / "docs" / "cards" / f"{slug}.md"
        name = f"[{slug}](cards/{slug}.md)" if card.is_file() else slug
        lines.append(f"| {name} | {block.get('title', slug)} | {block.get('paper', '')} | {verdict_of(slug)} |")
    return "\n".join(lines) + "\n"


def decisions() -> str:
    lines = ["# Decisions", ""]
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}](decisions/{path.name})")
    return "\n".join(lines) + "\n"


write("systems.md", systems())
write("decisions.md", decisions())
write("api.md", "# API\n\n" + "\n".join(f"::: {name}\n" for name in API))
