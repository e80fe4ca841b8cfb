"""The one table behind every form: columns with a heading, a text and a value to sort by."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from pegbox.report import words
from pegbox.report.model import Comparison, Entry

__all__ = ["Cell", "Column", "Table", "cost_table", "group_table", "main_table", "to_csv", "to_latex"]


@dataclass(frozen=True)
class Cell:
    """A text, a smaller note under it, the value it sorts by, and a tone (good, bad, quiet, "")."""

    text: str
    note: str = ""
    value: float | str | None = None
    tone: str = ""


@dataclass(frozen=True)
class Column:
    key: str
    head: str
    note: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    rows: list[tuple[Entry, list[Cell]]]


_TONES = {"better": "good", "worse": "bad"}


def main_table(c: Comparison) -> Table:
    """Recipe, the target, the verdict against the reference, retention, and the chief costs."""
    measured = [("target", c.primary)] if c.primary else []
    columns = [Column("name", "Recipe", numeric=False)]
    columns += (
        [Column("target", words.score_label(c.primary), "before → after" if len(c.entries) == 2 else "")]
        if measured
        else []
    )
    if _judged(c):
        columns.append(Column("verdict", f"Against {c.reference}", "points, 95 % interval", numeric=False))
    columns += [Column(f"{s}/{n}", words.score_label(n), s) for s, n in c.retention()]
    columns += [
        Column("trainable", "Trainable"),
        Column("memory", "Memory", _memory_kind(c)),
        Column("seconds", "Time"),
    ]
    columns.append(Column("rate", "Rate"))
    return Table(
        [Column(k.key, k.head, "" if k.key == "target" else k.note, k.numeric) for k in columns],
        [(e, [_main_cell(c, e, k.key) for k in columns]) for e in c.entries],
    )


def _judged(c: Comparison) -> bool:
    return any(c.primary in e.verdicts.get("target", {}) for e in c.entries)


def _memory_kind(c: Comparison) -> str:
    kinds = {words.memory_of(e.cost)[1] for e in c.entries if words.memory_of(e.cost)[0] is not None}
    return " / ".join(sorted(kinds))


def _main_cell(c: Comparison, e: Entry, key: str) -> Cell:
    match key:
        case "name":
            return Cell(e.name, e.title if e.title != e.name else "", e.name)
        case "target":
            return _score_cell(e, "target", c.primary)
        case "verdict":
            return _verdict_cell(c, e)
        case "trainable" | "memory" | "seconds":
            return _cost_cell(e, key)
        case "rate":
            return _rate_cell(e)
    suite, _, name = key.partition("/")
    return _score_cell(e, suite, name)


def _score_cell(e: Entry, suite: str, name: str) -> Cell:
    score = e.scores.get(suite, {}).get(name)
    if score is None:
        return Cell(
            e.status if suite == "target" and e.status != "finished" else "–",
            e.reason if suite == "target" else "",
            None,
            "quiet",
        )
    change = e.changes.get(suite, {}).get(name)
    tone = ""
    if change is not None and e.kind != "free":
        tone = "good" if change.low > 0 else "bad" if change.high < 0 else ""
    return Cell(words.score_text(score), words.interval(score), score.value, tone)


def _verdict_cell(c: Comparison, e: Entry) -> Cell:
    told = e.verdicts.get("target", {}).get(c.primary)
    score = e.scores.get("target", {}).get(c.primary)
    if told is None:
        return Cell("reference" if e.name == c.reference else "–", "", None, "quiet")
    return Cell(told.verdict or "–", words.told_text(told, score), told.value, _TONES.get(told.verdict or "", "quiet"))


def _cost_cell(e: Entry, key: str) -> Cell:
    if e.cost is None:
        return Cell("–", "", None, "quiet")
    if key == "trainable":
        share = e.cost.trainable_parameters / e.cost.total_parameters if e.cost.total_parameters else None
        note = "" if share is None else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
        return Cell(words.count(e.cost.trainable_parameters), note, e.cost.trainable_parameters)
    if key == "memory":
        used, _ = words.memory_of(e.cost)
        return Cell(words.size(used), "", used)
    return Cell(words.seconds(e.cost.seconds), "", e.cost.seconds)


def _rate_cell(e: Entry) -> Cell:
    if e.rate is None or e.rate.value is None:
        return Cell("–", "", None, "quiet")
    note = f"{len(e.rate.trials)} tried" if e.rate.trials else "published"
    return Cell(words.rate_text(e.rate.value), note + (", edge" if e.rate.at_edge else ""), e.rate.value)


def group_table(c: Comparison) -> Table | None:
    """The primary score by group; None where there are no groups."""
    groups = c.groups()
    if not groups:
        return None
    columns = [Column("name", "Recipe", numeric=False), *(Column(g, g) for g in groups)]
    rows = [
        (e, [Cell(e.name, "", e.name), *(_score_cell(e, "target", f"{c.primary}/{g}") for g in groups)])
        for e in c.entries
        if e.scores.get("target")
    ]
    return Table(columns, rows)


_COSTS = [
    ("trainable_parameters", "Trainable parameters", words.count),
    ("total_parameters", "All parameters", words.count),
    ("optimizer_state_bytes", "Optimizer state", words.size),
    ("peak_saved_bytes", "Peak saved tensors", words.size),
    ("peak_device_bytes", "Peak device memory", words.size),
    ("training_flops", "Training FLOPs", words.count),
    ("training_tokens", "Training tokens", words.count),
    ("steps", "Steps", words.count),
    ("seconds", "Training time", words.seconds),
    ("artefact_bytes", "Artefact", words.size),
]


def cost_table(c: Comparison) -> Table:
    """Every count of every row that trained; a column that nobody has is left out."""
    entries = [e for e in c.entries if e.cost is not None]
    shown = [k for k in _COSTS if any(getattr(e.cost, k[0]) for e in entries)]
    columns = [Column("name", "Recipe", numeric=False), *(Column(key, head) for key, head, _ in shown)]
    rows = []
    for e in entries:
        cells = [Cell(say(getattr(e.cost, key)), "", getattr(e.cost, key)) for key, _, say in shown]
        rows.append((e, [Cell(e.name, "", e.name), *cells]))
    return Table(columns, rows)


def to_csv(c: Comparison) -> str:
    """One line per row and score in full precision, with intervals, change, verdict and the chief costs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = "recipe kind status reason seeds suite score value low high n change change_low change_high difference"
    head += " difference_low difference_high p p_holm verdict rate trainable_parameters seconds"
    writer.writerow(head.split())
    for e in c.entries:
        start = [e.name, e.kind, e.status, e.reason, len(e.seeds)]
        end = [
            e.rate.value if e.rate else None,
            e.cost.trainable_parameters if e.cost else None,
            e.cost.seconds if e.cost else None,
        ]
        scores = [(s, n, score) for s, named in e.scores.items() for n, score in named.items()]
        for suite, name, score in scores:
            changed, told = e.changes.get(suite, {}).get(name), e.verdicts.get(suite, {}).get(name)
            middle = [suite, name, score.value, score.low, score.high, score.n]
            middle += [changed.value, changed.low, changed.high] if changed else [None] * 3
            middle += [told.value, told.low, told.high, told.p, told.adjusted, told.verdict] if told else [None] * 6
            writer.writerow([*start, *middle, *end])
        if not scores:
            writer.writerow([*start, *[None] * 15, *end])
    return out.getvalue()


def to_latex(c: Comparison) -> str:
    """The main table for a paper (booktabs), with its notes as a comment and a caption."""
    table = main_table(c)
    align = "".join("r" if k.numeric else "l" for k in table.columns)
    lines = [*(f"% {_one_line(n)}" for n in c.notes), r"\begin{table}", r"\centering", rf"\caption{{{_caption(c)}}}"]
    lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines.append(" & ".join(_escape(k.head) for k in table.columns) + r" \\")
    lines.append(r"\midrule")
    for _, cells in table.rows:
        texts = [
            _escape(cell.text) + (rf" {{\small [{_escape(cell.note)}]}}" if _bracket(k, cell) else "")
            for k, cell in zip(table.columns, cells, strict=True)
        ]
        lines.append(" & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _bracket(column: Column, cell: Cell) -> bool:
    return bool(cell.note) and " – " in cell.note and column.numeric


def _caption(c: Comparison) -> str:
    about = [c.title, c.model, c.data, *c.notes]
    return _escape(". ".join(_one_line(a).rstrip(".") for a in about if a) + ".")


def _one_line(text: str) -> str:
    return " ".join(text.split())


_LATEX = {
    "\\": r"\textbackslash{}",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "→": r"$\rightarrow$",
    "∞": r"$\infty$",
}


def _escape(text: str) -> str:
    return "".join(_LATEX.get(ch, ch) for ch in text)
