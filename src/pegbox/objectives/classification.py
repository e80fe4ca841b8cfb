"""`classification`: cross-entropy over class labels, one per row.

loss = sum_b w_b * -log softmax(z_b)[y_b] / N,   N labelled rows in the whole optimizer batch
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pegbox.errors import BadInput
from pegbox.objectives.base import OBJECTIVE, Objective
from pegbox.parts.tokens import IGNORE
from pegbox.parts.view import Batch, ModelView

__all__ = ["Classification"]


@OBJECTIVE.register
class Classification(Objective):
    """Cross-entropy over class logits.

    Args:
        label_smoothing: mass moved from the label to all classes alike.
        class_weights: a factor per class, in the order of the labels; the sum is still divided by the rows.
    """

    needs_causal_model: ClassVar[bool] = False

    kind: Literal["classification"] = "classification"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()

    def count(self, batch: Batch) -> dict[str, Tensor]:
        if batch.get("labels") is None:
            raise BadInput("The batch has no `labels`: classification needs one label per row.")
        return {"rows": (batch["labels"] != IGNORE).sum().double()}

    def losses(
        self, state: Any, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        logits, labels = view.logits(batch), batch["labels"].reshape(-1)
        self._check(logits, labels)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        weight = wide.new_tensor(self.class_weights) if self.class_weights else None
        per_row = F.cross_entropy(
            wide, labels, weight=weight, ignore_index=IGNORE, label_smoothing=self.label_smoothing, reduction="none"
        )
        if batch.get("sample_weight") is not None:
            per_row = per_row * batch["sample_weight"].to(per_row)
        rows = totals["rows"].to(per_row).clamp(min=1)
        yield "classification", per_row.sum() / rows
        with torch.no_grad():
            hit = (logits.argmax(-1) == labels).sum()
            yield "_accuracy", hit / (labels != IGNORE).sum().clamp(min=1)
            if batch.get("sample_ids") is not None:
                yield "_sample_ce", per_row.detach()

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        classes = logits.shape[-1]
        if self.class_weights and len(self.class_weights) != classes:
            raise BadInput(f"class_weights has {len(self.class_weights)} entries, the model has {classes} classes.")
        if labels.is_floating_point():
            raise BadInput("Labels are real numbers; `classification` takes class numbers. Regression is another task.")
        if labels.numel() and int(labels.max()) >= classes:
            raise BadInput(f"Label {int(labels.max())} is outside the model's {classes} classes (0 to {classes - 1}).")
