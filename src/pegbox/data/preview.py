"""What `pegbox data` shows: the first rows as the model will see them, lengths, the detected format, what was cut.

    summary = preview(rowset, tokenizer, n=3)      plain data, for --json
    render(summary)                                the same for a terminal, trained tokens in colour

Tokens are shown by merging neighbours of equal mask, so that one sees where training begins and ends; a token that
is white space only is made visible.

What this file does not do: printing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pegbox.data.dataset import RowSet
from pegbox.data.encode import encode_rows
from pegbox.data.encoded import EncodedSet
from pegbox.data.rows import Row

__all__ = ["preview", "render", "segments"]

_TRAINED, _CONTEXT = "bold green", "dim"
_PERCENTILES = (0, 50, 90, 95, 99, 100)


def preview(rowset: RowSet, tokenizer: Any = None, n: int = 3, **options: Any) -> dict[str, Any]:
    """Format, counts and, with a tokenizer, lengths and the first `n` examples; plain JSON values.

    `options` go to `encode_rows` (template, train_on, max_length, side, overlong, cache). Preference rows, which are
    encoded by their trainer, are shown as text.
    """
    out: dict[str, Any] = {
        "format": rowset.format,
        "kind": rowset.kind,
        "rows": len(rowset),
        "duplicates": rowset.report.duplicates,
        "sources": rowset.report.sources,
        "tasks": dict(sorted(Counter(row.task for row in rowset.rows if row.task).items())),
        "groups": len({row.group for row in rowset.rows if row.group}),
        "digest": rowset.digest(),
    }
    if tokenizer is None or rowset.kind == "preference":
        return out | {"examples": [_untokenised(row) for row in rowset.rows[:n]]}
    encoded = encode_rows(rowset.rows, tokenizer, **options)
    out["encoding"] = asdict(encoded.report)
    out["lengths"] = _lengths(encoded)
    if encoded.label_names:
        out["labels"] = encoded.label_names
    out["examples"] = [_example(encoded[i], tokenizer, encoded) for i in range(min(n, len(encoded)))]
    return out


def segments(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> list[dict[str, Any]]:
    """Neighbouring tokens of equal mask as {"text", "trained", "tokens"}; the texts join to the decoded whole."""
    out: list[dict[str, Any]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            text = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            out.append({"text": text, "trained": bool(trained[start]), "tokens": end - start})
            start = end
    return out


def render(summary: dict[str, Any]) -> RenderableType:
    """The preview for a terminal."""
    return Group(_overview(summary), *[_panel(example) for example in summary["examples"]], _legend())


def _lengths(encoded: EncodedSet) -> dict[str, Any]:
    lengths = encoded.lengths
    trained = np.add.reduceat(encoded.trained.astype(np.int64), encoded.starts[:-1]) if len(encoded) else np.zeros(0)
    return {
        "tokens": _percentiles(lengths),
        "trained": _percentiles(trained),
        "total": int(lengths.sum()),
        "total_trained": int(trained.sum()),
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    named = {0: "least", 50: "median", 100: "most"}
    return {named.get(p, f"p{p}"): int(np.percentile(values, p, method="higher")) for p in _PERCENTILES}


def _example(example: dict[str, Any], tokenizer: Any, encoded: EncodedSet) -> dict[str, Any]:
    ids, labels = example["input_ids"], example["labels"]
    classed = encoded.kind == "classification"
    trained = [False] * len(ids) if classed else [label != -100 for label in labels]
    shown = {"row": example["row_id"], "tokens": len(ids), "trained": sum(trained)}
    if classed:
        shown["label"] = encoded.label_names[labels] if encoded.label_names else labels
    return shown | {"segments": segments(ids, trained, tokenizer)}


def _untokenised(row: Row) -> dict[str, Any]:
    parts = [{"text": f"{m['role']}: {m.get('content', '')}\n", "trained": False} for m in row.messages]
    if row.kind in ("chat", "completion"):
        parts = [part | {"trained": m["role"] == "assistant"} for part, m in zip(parts, row.messages)]
    for name, side in (("chosen", row.chosen), ("rejected", row.rejected)):
        parts += [{"text": f"{name}: {m.get('content', '')}\n", "trained": name == "chosen"} for m in side]
    if row.text:
        parts.append({"text": row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}", "trained": False})
    return {"row": row.id, "segments": parts} | ({"label": row.label} if row.label is not None else {})


def _overview(summary: dict[str, Any]) -> RenderableType:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("format", f"{summary['format']} ({summary['kind']} rows)")
    for source in summary["sources"]:
        used = f", {source['used']} used" if "used" in source else ""
        table.add_row("source", f"{source['path']}: {source['read']} rows{used}")
    table.add_row("rows", f"{summary['rows']}, exact duplicates: {summary['duplicates']}")
    if summary["tasks"]:
        table.add_row("tasks", ", ".join(f"{name} {count}" for name, count in summary["tasks"].items()))
    if "encoding" in summary:
        _add_encoding(table, summary["encoding"], summary["lengths"])
    return table


def _add_encoding(table: Table, encoding: dict[str, Any], lengths: dict[str, Any]) -> None:
    table.add_row("template", encoding["template"])
    if encoding["closing"]:
        table.add_row("end of turn", repr(encoding["closing"]))
    for name in ("tokens", "trained"):
        table.add_row(f"{name} per example", "  ".join(f"{k} {v}" for k, v in lengths[name].items()))
    table.add_row("tokens in all", f"{lengths['total']}, trained {lengths['total_trained']}")
    table.add_row("cut", f"{encoding['cut']} examples, dropped {encoding['dropped']}")
    if encoding["unrolled"]:
        table.add_row("unrolled", f"{encoding['unrolled']} rows became several sequences")
    for note in encoding["notes"]:
        table.add_row("note", note)


def _panel(example: dict[str, Any]) -> Panel:
    text = Text()
    for segment in example["segments"]:
        text.append(_visible(segment["text"]), style=_TRAINED if segment["trained"] else _CONTEXT)
    title = f"row {example['row']}"
    if "tokens" in example:
        title += f": {example['tokens']} tokens, {example['trained']} trained"
    if "label" in example:
        title += f", label {example['label']}"
    return Panel(text, title=Text(title), title_align="left")


def _visible(text: str) -> str:
    return text if text.strip() else text.replace("\n", "⏎\n").replace(" ", "␣")


def _legend() -> Text:
    return Text.assemble(("trained", _TRAINED), "  ", ("context", _CONTEXT))
