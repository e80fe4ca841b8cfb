"""Text classification with a sequence classifier: rows with a text (or a pair) and a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from pegbox.data.collate import ClassCollator
from pegbox.data.dataset import EncodedSet, encode_rows
from pegbox.data.encode import pad_id_of
from pegbox.data.rows import Row
from pegbox.parts.task import TASK, Task
from pegbox.tasks.views import ClassificationView

__all__ = ["ClassificationTask"]


@TASK.register
class ClassificationTask(Task):
    """A sequence classifier. `labels`: how many classes (0: read off the training rows)."""

    kind: Literal["classification"] = "classification"
    labels: int = 0

    hosts: ClassVar[frozenset[str]] = frozenset({"supervised"})
    causal: ClassVar[bool] = False
    model_task: ClassVar[str] = "sequence-classification"

    def load(self, source: Any, *, labels: int | None = None, **options: Any) -> tuple[nn.Module, Any]:
        from pegbox.models import load

        count = labels or self.labels or 2
        arguments = {**dict(options.pop("model_kwargs", None) or {}), "num_labels": count}
        model, tokenizer = load(source, task=self.model_task, model_kwargs=arguments, **options)
        config: Any = model.config
        if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
            config.pad_token_id = pad_id_of(tokenizer)
        return model, tokenizer

    def load_meta(self, source: Any, **options: Any) -> nn.Module:
        from pegbox.models import load_meta

        return load_meta(source, task=self.model_task, model_kwargs={"num_labels": self.labels or 2}, **options)

    def encode(self, rows: Sequence[Row], tokenizer: Any, **options: Any) -> EncodedSet:
        """Options: max_length, label_names, cache (see `pegbox.data.encode_rows`)."""
        for chat_only in ("template", "train_on"):
            options.pop(chat_only, None)
        return encode_rows(rows, tokenizer, **options)

    def collator(self, tokenizer: Any, **options: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return ClassCollator(pad_id_of(tokenizer))

    def view(self, model: nn.Module) -> ClassificationView:
        return ClassificationView(model)

    def metrics(self, rows: Sequence[Row]) -> list[str]:
        return ["accuracy"]
