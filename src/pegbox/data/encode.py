"""Rows to encoded examples: masks, truncation, task numbers, classes, and the cache of encoded sets.

Truncation keeps the beginning (`side="right"`) or the end; a row whose answer is cut away whole is refused, or dropped
and counted. The cache key is a hash over everything that could change the result: the rows, the tokenizer, the
template, the options and the format's version. Writers never meet half a file, and a file that fails its checksum is
made again.

What this file does not do: choosing masks (masks.py), batching (collate.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pegbox.data.encoded import FORMAT, EncodedSet, EncodeReport, cache_folder
from pegbox.data.masks import Masked, TrainOn, mask_chat, mask_text
from pegbox.data.rows import Row, content_of, sample_id
from pegbox.data.templates import ChatTemplate, resolve_template
from pegbox.errors import BadInput, Corrupt

__all__ = ["Overlong", "encode_rows", "pad_id_of", "tokenizer_digest"]

Overlong = Literal["refuse", "drop"]


@dataclass(frozen=True)
class _Options:
    train_on: TrainOn
    max_length: int | None
    side: Literal["right", "left"]
    overlong: Overlong


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    template: str | Path | ChatTemplate | None = None,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    side: Literal["right", "left"] = "right",
    overlong: Overlong = "refuse",
    label_names: Sequence[str] | None = None,
    task_names: Sequence[str] | None = None,
    cache: bool | Path = False,
) -> EncodedSet:
    """The rows as examples, in order.

    Args:
        template: see `templates.resolve_template`.
        train_on: assistant (every assistant turn) | last (the last one) | all (prompts too).
        max_length: tokens per example; longer ones are cut on `side`, long plain texts become several examples.
        overlong: what happens to a row whose answer is cut away whole: refuse (an error with their number) | drop.
        label_names: classes of a classification set, from the training set; None: the rows' own, sorted.
        task_names: tasks in the order of their numbers, so that several sets number them alike; tasks beyond these
            come after them. None: the rows' own, sorted.
        cache: True: the default folder; a path: that folder; False: none.

    Raises:
        BadInput: no rows, mixed kinds, a row with no trained token; names the rows.
    """
    if not rows:
        raise BadInput("There are no rows to encode: the data is empty, or filtering left nothing.")
    _check_options(train_on, max_length, side, overlong)
    family = {_family(row.kind) for row in rows}
    if len(family) > 1 or "preference" in family:
        kinds = ", ".join(sorted({row.kind for row in rows}))
        raise BadInput(
            f"Rows of these kinds can't be encoded as one set: {kinds}. Give sources of one kind; preference rows go "
            "to a preference objective, through `preference_records`."
        )
    options = _Options(train_on, max_length, side, overlong)
    spoken = _templates(rows, tokenizer, template)
    key = _key(rows, tokenizer, spoken, options, label_names, task_names) if cache else ""
    file = _cache_file(cache, key) if cache else None
    if file is not None and (found := _cached(file)) is not None:
        return found
    if family == {"classification"}:
        made = _encode_classes(rows, tokenizer, options, label_names, task_names)
    else:
        made = _encode_tokens(rows, tokenizer, spoken, options, task_names)
    if file is not None:
        made.save(file)
    return made


def pad_id_of(tokenizer: Any) -> int:
    """What to pad with: pad, else eos, else 0. Any id will do, as padding is masked by position."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None), 0)


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of a tokenizer's whole behaviour as far as it can be read off."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [type(tokenizer).__name__, tokenizer.all_special_tokens, tokenizer("a b")["input_ids"]]
    return hashlib.sha256((text + json.dumps(special)).encode()).hexdigest()


def _check_options(train_on: str, max_length: int | None, side: str, overlong: str) -> None:
    for name, value, known in (
        ("train_on", train_on, ("assistant", "last", "all")),
        ("side", side, ("right", "left")),
        ("overlong", overlong, ("refuse", "drop")),
    ):
        if value not in known:
            raise BadInput(f"{name}: '{value}' is unknown. Known: {', '.join(known)}.")
    if max_length is not None and max_length < 2:
        raise BadInput(f"max_length must be at least 2 tokens, got {max_length}.")


def _family(kind: str) -> str:
    return kind if kind in ("classification", "preference") else "tokens"


# ---- language modelling


Spoken = dict[str, ChatTemplate]  # by the kind of row


def _templates(rows: Sequence[Row], tokenizer: Any, spec: str | Path | ChatTemplate | None) -> Spoken:
    """What each kind of row is spoken through; plain texts and texts with labels through nothing."""
    kinds = {row.kind for row in rows}
    out = {}
    if "chat" in kinds:
        out["chat"] = spec if isinstance(spec, ChatTemplate) else resolve_template(tokenizer, spec)
    if "completion" in kinds:
        out["completion"] = resolve_template(tokenizer, None, "completion")
    return out


def _encode_tokens(
    rows: Sequence[Row],
    tokenizer: Any,
    templates: Spoken,
    options: _Options,
    task_names: Sequence[str] | None = None,
) -> EncodedSet:
    report = EncodeReport(rows=len(rows), template=", ".join(t.name for t in templates.values()) or "none (plain text)")
    report.closing = ", ".join(t.traits.closing or str(tokenizer.eos_token) for t in templates.values())
    if "chat" in templates:
        report.notes = _notes(templates["chat"], [row for row in rows if row.kind == "chat"])
    kept: list[tuple[Row, Masked]] = []
    lost: list[Row] = []
    for row in rows:
        if row.kind == "text":
            pieces = mask_text(row.text, tokenizer, options.max_length)
        else:
            pieces = mask_chat(row, templates[row.kind], options.train_on)
        report.unrolled += len(pieces) > 1
        for piece in pieces:
            short = _truncate(piece, options)
            report.cut += len(short.ids) < len(piece.ids)
            report.recut += piece.recut
            (kept.append((row, short)) if any(short.trained) else lost.append(row))
    _refuse_lost(lost, options)
    report.dropped = len(lost)
    if not kept:
        raise BadInput(f"No row is left: all {len(lost)} lost their whole answer at max_length {options.max_length}.")
    return _assemble(kept, report, task_names)


def _truncate(piece: Masked, options: _Options) -> Masked:
    limit = options.max_length
    if limit is None or len(piece.ids) <= limit:
        return piece
    keep = slice(0, limit) if options.side == "right" else slice(len(piece.ids) - limit, None)
    trained = piece.trained[keep]
    trained[0] = False
    return Masked(piece.ids[keep], trained, piece.part, piece.recut)


def _refuse_lost(lost: list[Row], options: _Options) -> None:
    if not lost or options.overlong == "drop":
        return
    places = ", ".join(row.source or row.id for row in lost[:5]) + (", ..." if len(lost) > 5 else "")
    if options.max_length is None:
        raise BadInput(f"{len(lost)} rows have no trained token: {places}. Each needs a non-empty answer.")
    raise BadInput(
        f"{len(lost)} rows have no trained token within max_length {options.max_length}: {places}. Raise max_length, "
        "cut the other side, shorten their prompts, or drop them (overlong=drop)."
    )


def _notes(template: ChatTemplate, rows: Sequence[Row]) -> list[str]:
    traits, notes = template.traits, []
    if traits.system == "folded" and any(m["role"] == "system" for row in rows for m in row.messages):
        notes.append("the template has no system role: system messages go in front of the first user message")
    if traits.reasoning == "inline" and any("reasoning_content" in m for row in rows for m in row.messages):
        notes.append("the template reads no reasoning field: reasoning goes into the answer as <think>...</think>")
    if traits.opener:
        notes.append(
            f"the generation prompt opens {traits.opener.strip()}: answers are written behind it, closed first"
        )
    if traits.closing == "":
        notes.append("the template has no end of turn: the eos token is appended to the last answer")
    return notes


def _assemble(
    kept: list[tuple[Row, Masked]], report: EncodeReport, task_names: Sequence[str] | None = None
) -> EncodedSet:
    found, named = {row.task for row, _ in kept}, list(task_names or ())
    tasks = named + sorted(found - set(named))
    number = {task: i for i, task in enumerate(tasks)}
    lengths = [len(piece.ids) for _, piece in kept]
    trained = _flat((piece.trained for _, piece in kept), np.bool_)
    report.examples, report.tokens = len(kept), sum(lengths)
    report.trained_tokens, report.longest = int(trained.sum()), max(lengths)
    return EncodedSet(
        ids=_flat((piece.ids for _, piece in kept), np.int32),
        trained=trained,
        starts=np.cumsum([0, *lengths], dtype=np.int64),
        sample_ids=np.array([sample_id(row.id + piece.part) for row, piece in kept], dtype=np.int64),
        weights=np.array([row.weight for row, _ in kept], dtype=np.float32),
        task_ids=np.array([number[row.task] for row, _ in kept], dtype=np.int64),
        row_ids=[row.id for row, _ in kept],
        tasks=tasks,
        report=report,
    )


def _flat(parts: Iterable[Sequence[Any]], dtype: Any) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts])


# ---- classification


def _encode_classes(
    rows: Sequence[Row],
    tokenizer: Any,
    options: _Options,
    names: Sequence[str] | None,
    task_names: Sequence[str] | None = None,
) -> EncodedSet:
    numeric = all(isinstance(row.label, int | float) for row in rows) and any(isinstance(r.label, float) for r in rows)
    known = list(names) if names is not None else sorted({str(row.label) for row in rows}, key=_label_order)
    kept: list[tuple[Row, Masked]] = []
    types: list[list[int]] = []
    cut = 0
    for row in rows:
        encoded = tokenizer(row.text, row.text_pair)
        short = tokenizer(
            row.text, row.text_pair, truncation=options.max_length is not None, max_length=options.max_length
        )
        cut += len(short["input_ids"]) < len(encoded["input_ids"])
        kept.append((row, Masked(list(short["input_ids"]), [False] * len(short["input_ids"]))))
        types.append(list(short.get("token_type_ids") or []))
        if not numeric and str(row.label) not in known:
            raise BadInput(
                f"{row.source or row.id}, column 'label': {row.label!r} does not occur in training. Known: "
                f"{', '.join(known)}."
            )
    out = _assemble(kept, EncodeReport(rows=len(rows), cut=cut, template="none (classification)"), task_names)
    out.kind = "classification"
    out.targets = np.array(
        [row.label if numeric else known.index(str(row.label)) for row in rows], np.float32 if numeric else np.int64
    )
    out.label_names = [] if numeric else known
    out.types = _flat(types, np.int32) if all(types) else None
    return out


def _label_order(label: str) -> tuple[int, float, str]:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


# ---- cache


def _key(
    rows: Sequence[Row],
    tokenizer: Any,
    templates: Spoken,
    options: _Options,
    names: Sequence[str] | None,
    task_names: Sequence[str] | None = None,
) -> str:
    total = hashlib.sha256()
    head = [
        FORMAT,
        tokenizer_digest(tokenizer),
        [t.digest for t in templates.values()],
        repr(options),
        list(names or []),
        *([list(task_names)] if task_names else []),
    ]
    total.update(json.dumps(head).encode())
    for row in rows:
        line = [row.id, row.weight, row.task, content_of(row)]
        total.update(json.dumps(line, sort_keys=True, default=str).encode())
    return total.hexdigest()


def _cache_file(cache: bool | Path, key: str) -> Path:
    folder = Path(cache) if isinstance(cache, str | Path) else cache_folder()
    return folder / "encoded" / f"{key[:40]}.safetensors"


def _cached(file: Path) -> EncodedSet | None:
    if not file.is_file():
        return None
    try:
        return EncodedSet.load(file)
    except Corrupt:
        file.unlink(missing_ok=True)  # made again below, and put in its place whole
        return None
