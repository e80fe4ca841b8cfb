"""Text with a causal language model: chat, completion and plain-text rows, and preference rows for their objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from pegbox.data.collate import PackingCollator, PaddingCollator
from pegbox.data.dataset import EncodedSet, encode_rows
from pegbox.data.encode import pad_id_of
from pegbox.data.rows import Row
from pegbox.parts.task import TASK, Task
from pegbox.tasks.views import CausalView

__all__ = ["TextTask"]


@TASK.register
class TextTask(Task):
    """A causal language model over text."""

    kind: Literal["text"] = "text"

    hosts: ClassVar[frozenset[str]] = frozenset({"supervised", "preference", "policy"})
    causal: ClassVar[bool] = True
    model_task: ClassVar[str] = "causal-lm"

    def load(self, source: Any, **options: Any) -> tuple[nn.Module, Any]:
        from pegbox.models import load

        model, tokenizer = load(source, task=self.model_task, **options)
        return model, tokenizer

    def load_meta(self, source: Any, **options: Any) -> nn.Module:
        from pegbox.models import load_meta

        return load_meta(source, task=self.model_task, **options)

    def encode(self, rows: Sequence[Row], tokenizer: Any, **options: Any) -> EncodedSet:
        """Options: template, train_on, max_length, overlong, cache (see `pegbox.data.encode_rows`)."""
        return encode_rows(rows, tokenizer, **options)

    def collator(
        self, tokenizer: Any, *, packing: bool = False, max_length: int = 1024, **options: Any
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Padded batches, or with `packing` rows joined up to `max_length` tokens."""
        pad = pad_id_of(tokenizer)
        return PackingCollator(pad, capacity=max_length) if packing else PaddingCollator(pad)

    def view(self, model: nn.Module) -> CausalView:
        return CausalView(model)

    def metrics(self, rows: Sequence[Row]) -> list[str]:
        """What suits the rows: a checker's verdict, exact match for short answers, else the loss and perplexity."""
        kinds = {row.kind for row in rows}
        if kinds <= {"text"}:
            return ["perplexity"]
        if rows and all(row.answer is not None for row in rows):
            return ["verified", "perplexity"]
        if rows and all(len(_expected(row)) <= SHORT for row in rows):
            return ["exact_match", "perplexity"]
        return ["perplexity"]


SHORT = 48  # characters: answers up to this length are compared word for word by default


def _expected(row: Row) -> str:
    last = row.messages[-1] if row.messages else {}
    return str(last.get("content") or "") if last.get("role") == "assistant" else ""
