"""Data policies: which examples, in what form and order. A policy acts at four places, each optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from pegbox.parts.component import Axis, Component
from pegbox.parts.context import Context
from pegbox.parts.view import Batch

__all__ = ["DATA", "DataPolicy"]


class DataPolicy(Component):
    """Acts on the whole set (`prepare`), on the order (`sampler`), on a batch (`on_batch`), on outcomes (`observe`)."""

    changes_labels: ClassVar[bool] = False
    gives_episodes: ClassVar[bool] = False  # its batches say which episode they are of
    keeps_views: ClassVar[bool] = True  # other forms of a row (`views`) stand in what `prepare` returns too
    needs_row_losses: ClassVar[bool] = False  # learns from what `observe` tells of each row's loss
    acts_on_views: ClassVar[bool] = False  # `on_batch` may be called on each view's batch too, in any order
    training_only: ClassVar[bool] = True  # not applied in evaluation
    moves_weights: ClassVar[bool] = False  # `acting` changes the base's weights for a while

    def setup(self, ctx: Context) -> Any:
        """Mutable state, or None."""
        return None

    def sources(self) -> Mapping[str, Any]:
        """Further rows that the policy draws from while training, by name: sources as `--data` takes them. They are
        encoded like the training rows and stand in `ctx.streams` from `setup` on."""
        return {}

    @property
    def view_names(self) -> frozenset[str]:
        """Names of the other forms of a row that it can make."""
        return frozenset()

    def rewrite(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The rows (`data.rows.Row`) in another wording, before they are encoded; the very same object if unchanged."""
        return rows

    def views(self, rows: Sequence[Any], names: Sequence[str]) -> Mapping[str, Sequence[Any]]:
        """Those of the forms `names` that it makes: rows with their ids and other messages. They are encoded alike,
        and stand under `views` in examples and batches. Raises `BadInput` for a row without what is needed."""
        return {}

    def prepare(self, dataset: Sequence[dict[str, Any]], ctx: Context) -> Sequence[dict[str, Any]]:
        """Filter, add or rewrite encoded examples before training."""
        return dataset

    def sampler(self, state: Any, dataset: Sequence[dict[str, Any]], ctx: Context) -> Any | None:
        """A torch Sampler over `dataset`, or None for the engine's seeded shuffle."""
        return None

    def on_batch(self, state: Any, batch: Batch, ctx: Context) -> Batch:
        """Change a collated batch on its device, right before the reference and the forward."""
        return batch

    def acting(self, state: Any, batch: Batch, ctx: Context) -> AbstractContextManager[Any]:
        """Held from a micro-batch's first forward to the end of its backward, and around its evaluation: for what is
        different in the model for this batch alone. On leaving the model is as it was, bit for bit."""
        return nullcontext()

    def apart(self, state: Any, dataset: Sequence[dict[str, Any]], ctx: Context) -> Sequence[Sequence[int]] | None:
        """Row numbers in groups whose rows never share an evaluation batch; None: any rows may."""
        return None

    def save(self, state: Any, folder: Path) -> None:
        """Leave what was learnt in an existing empty folder beside the stage's artefact."""

    def observe(self, state: Any, sample_ids: Tensor, outcomes: dict[str, Tensor]) -> None:
        """Told of each sample's loss after a step."""


DATA: Axis[DataPolicy] = Axis("data", DataPolicy, "pegbox.data.policies")
