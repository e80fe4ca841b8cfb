"""`views`: further targets for the same row, written from its columns by templates, for objectives over several views.

    MORepair               explain: "{answer}\n\n{rationale}"         the code, then why (arXiv:2404.12636)
    Fine-tune-CoT          answer:  "{rationale}\n\n{answer}"         one target, the reasons first (arXiv:2212.10071)
    step-by-step           explain: "{rationale}" with a prompt "{prompt}\n\nExplain."       (arXiv:2305.02301)

A template names the row's `answer` (its last assistant turn), its `prompt` (the user's turn before it) and any further
column. It changes what is trained on, never what is asked at inference: prompts in evaluation are the rows' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from pegbox.data.base import DATA, DataPolicy
from pegbox.data.rows import Row
from pegbox.errors import BadInput
from pegbox.parts.context import Context
from pegbox.parts.rationales import usable
from pegbox.parts.tokens import IGNORE
from pegbox.parts.view import Batch

__all__ = ["ViewsPolicy", "filled"]

_FIELD = re.compile(r"\{(\w+)\}")


def filled(template: str, columns: Mapping[str, Any]) -> str | None:
    """The template with {name} replaced by columns; None where one is absent or empty. Other braces stay."""
    names = _FIELD.findall(template)
    values = {name: str(columns.get(name) or "") for name in names}
    if not all(value.strip() for value in values.values()):
        return None
    return _FIELD.sub(lambda found: values[found.group(1)], template)


@DATA.register
class ViewsPolicy(DataPolicy):
    """Views from templates.

    Args:
        templates: view -> its target. prompts: view -> its own prompt, where it differs from the row's.
        answer: the row's own target.
        missing: a row without a column that a template names: refuse, or train it on its other views ("leave_out").
        longest: characters of a rationale; longer ones count as missing, and so do those that only repeat the answer.
        eos_as_pad: no end-of-sequence token is ever a label, as where padding is known by its id alone (for comparison
            with published models, which were not taught to stop).
    """

    reproduces: ClassVar[str] = "arXiv:2404.12636"
    acts_on_views: ClassVar[bool] = True
    training_only: ClassVar[bool] = False  # labels are the same in evaluation

    kind: Literal["views"] = "views"
    templates: dict[str, str] = Field(default_factory=lambda: {"explain": "{answer}\n\n{rationale}"})
    prompts: dict[str, str] = Field(default_factory=dict)
    answer: str = "{answer}"
    missing: Literal["refuse", "leave_out"] = "refuse"
    longest: Annotated[int, Field(ge=1)] | None = None
    eos_as_pad: bool = False

    @field_validator("templates")
    @classmethod
    def _named(cls, templates: dict[str, str]) -> dict[str, str]:
        for name, template in templates.items():
            if not name.isidentifier() or name.startswith("_"):
                raise BadInput(f"data.views.templates: '{name}' is no name for a view; use letters, e.g. explain.")
            if not template.strip():
                raise BadInput(f"data.views.templates.{name} is empty; name columns, e.g. '{{answer}} {{rationale}}'.")
        return templates

    def model_post_init(self, context: Any, /) -> None:
        unknown = sorted(set(self.prompts) - set(self.templates))
        if unknown:
            raise BadInput(f"data.views.prompts.{unknown[0]}: there is no template of that name.")

    @property
    def view_names(self) -> frozenset[str]:
        return frozenset(self.templates)

    def setup(self, ctx: Context) -> None:
        if self.eos_as_pad and getattr(ctx.tokenizer, "eos_token_id", None) is None:
            raise BadInput("data.views.eos_as_pad: the tokenizer has no end-of-sequence token. Leave it out.")

    def rewrite(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows with `answer` filled; the very same object if it asks for nothing else."""
        if self.answer == "{answer}":
            return rows
        return self._written(rows, "answer", self.answer, "{prompt}", refuse=True)

    def views(self, rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Row]]:
        """One row list per view that is wanted, from the rows' own columns. Raises `BadInput` where one is missing."""
        return {
            name: self._written(rows, name, template, self.prompts.get(name, "{prompt}"))
            for name, template in self.templates.items()
            if name in names
        }

    def on_batch(self, state: Any, batch: Batch, ctx: Context) -> Batch:
        if not self.eos_as_pad:
            return batch
        labels = batch["labels"]
        return {**batch, "labels": labels.masked_fill(labels == ctx.tokenizer.eos_token_id, IGNORE)}

    def _written(
        self, rows: Sequence[Row], name: str, template: str, prompt: str, *, refuse: bool = False
    ) -> list[Row]:
        out, lacking = [], []
        for row in rows:
            columns = self._columns(row)
            target, asked = filled(template, columns), filled(prompt, columns) if prompt != "{prompt}" else None
            if target is None or (prompt != "{prompt}" and asked is None):
                lacking.append(row)
            else:
                out.append(replace(row, messages=_worded(row, target, asked)))
        if lacking and (refuse or self.missing == "refuse" or not out):
            raise BadInput(_complaint(name, template, lacking, len(rows)))
        return out

    def _columns(self, row: Row) -> dict[str, Any]:
        if not row.messages or row.messages[-1]["role"] != "assistant":
            raise BadInput(f"{row.source or row.id}: a {row.kind} row ends in no answer, so it has no views.")
        answer = str(row.messages[-1].get("content") or "")
        asked: Mapping[str, Any] = next((m for m in reversed(row.messages[:-1]) if m["role"] == "user"), {})
        columns = {**row.meta, "answer": answer, "prompt": asked.get("content", "")}
        reason = str(columns.get("rationale") or row.messages[-1].get("reasoning_content") or "")
        columns["rationale"] = reason if usable(reason, answer, longest=self.longest) else ""
        return columns


def _worded(row: Row, target: str, prompt: str | None) -> list[dict[str, Any]]:
    last = {k: v for k, v in row.messages[-1].items() if k != "reasoning_content"}
    messages = [*row.messages[:-1], {**last, "content": target}]
    if prompt is not None:
        at = max(i for i, m in enumerate(messages) if m["role"] == "user")
        messages[at] = {**messages[at], "content": prompt}
    return messages


def _complaint(name: str, template: str, rows: Sequence[Row], count: int) -> str:
    places = ", ".join(row.source or row.id for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    columns = ", ".join(dict.fromkeys(_FIELD.findall(template)))
    return (
        f"{len(rows)} of {count} rows lack a usable column of view '{name}' (it names {columns}): {places}. Give the "
        "column, have rationales written (pegbox.data.rationales), set the view's weight to 0, or train such rows on "
        "their other views (missing: leave_out)."
    )
