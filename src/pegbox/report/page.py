"""The HTML page: one file, nothing fetched, made from a `Comparison` by the templates beside."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pegbox.report.charts import COLOURS, line_chart, scatter_chart
from pegbox.report.findings import shown_all
from pegbox.report.model import Comparison
from pegbox.report.points import curve_plots, scatter_plots
from pegbox.report.table import cost_table, group_table, main_table
from pegbox.report.words import score_label

__all__ = ["page"]


def page(c: Comparison) -> str:
    """The page's whole text."""
    shown = [_sample(c, s) for s in c.samples]
    colours = {e.name: i % COLOURS for i, e in enumerate(c.entries)}
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            c=c,
            colours=colours,
            main=main_table(c),
            groups=group_table(c),
            costs=cost_table(c),
            scatters=[(p, scatter_chart(p)) for p in scatter_plots(c)],
            curves=[(p, line_chart(p), _legend(p.lines)) for p in curve_plots(c)],
            samples=shown,
            findings=shown_all(c.findings),
            filters=_filters(shown),
            score_label=score_label,
            lock=[(key, _value(value)) for key, value in c.lock.items()],
            recipes=[e for e in c.entries if e.recipe],
        )
    )


def _legend(lines: list[Any]) -> list[tuple[str, int]]:
    return [(line.name, line.index % COLOURS) for line in lines if line.name]


def _sample(c: Comparison, sample: Any) -> dict[str, Any]:
    """A sample for the template: what happened to it, and its answers in the table's order."""
    before = sample.values.get("base")
    tuned = [v for name, v in sample.values.items() if name != "base"]
    tags = []
    if before is not None and tuned:
        tags += ["fixed"] * (max(tuned) > before) + ["broken"] * (min(tuned) < before)
    order = [e.name for e in c.entries if e.name in sample.answers]
    answers = [
        {"name": name, "text": sample.answers[name], "value": sample.values.get(name), "base": name == "base"}
        for name in [*order, *(n for n in sample.answers if n not in order)]
    ]
    return {"row": sample, "answers": answers, "tags": tags}


_TAGS = {"fixed": "Set right by tuning", "broken": "Broken by tuning"}


def _filters(shown: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(tag, its words, how many samples have it), for tags that some sample has."""
    counts = {tag: sum(tag in s["tags"] for s in shown) for tag in _TAGS}
    return [(tag, _TAGS[tag], n) for tag, n in counts.items() if n]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pegbox.report", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
