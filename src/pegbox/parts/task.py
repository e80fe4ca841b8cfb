"""Tasks: what differs by modality, and only that. The contract; the tasks themselves live in `pegbox.tasks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from pegbox.parts.component import Axis, Component
from pegbox.parts.view import ModelView

__all__ = ["TASK", "Task"]


class Task(Component):
    """How a model of one modality is loaded, fed, looked at and asked.

    `source` below is a resolved model source (`pegbox.models.Source`), `rows` are `pegbox.data` rows.
    """

    hosts: ClassVar[frozenset[str]] = frozenset({"supervised"})  # the objective hosts that can train it
    causal: ClassVar[bool] = True
    model_task: ClassVar[str] = "causal-lm"  # which model class: a key of `pegbox.models.TASK_CLASSES`

    def load(self, source: Any, **options: Any) -> tuple[nn.Module, Any]:
        """The bare base and its tokenizer or processor."""
        raise NotImplementedError

    def load_meta(self, source: Any) -> nn.Module:
        """The same architecture on the meta device."""
        raise NotImplementedError

    def encode(self, rows: Sequence[Any], tokenizer: Any, **options: Any) -> Any:
        """Encoded examples that `collator` can batch."""
        raise NotImplementedError

    def collator(self, tokenizer: Any, **options: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Examples -> batch, with the keys of `parts.view`."""
        raise NotImplementedError

    def view(self, model: nn.Module) -> ModelView:
        """How method code sees `model`."""
        raise NotImplementedError

    def metrics(self, rows: Sequence[Any]) -> list[str]:
        """The metric kinds that suit these rows, the first being the one that selects checkpoints."""
        raise NotImplementedError


TASK: Axis[Task] = Axis("task", Task, "pegbox.tasks", default="text")
