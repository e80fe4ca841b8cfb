"""`multi_view`: a weighted sum of losses on several views of each row; MORepair's objective with two of them.

    L = sum_k w_k L_k / sum_k w_k,     L_k = mean token loss over view k's tokens of the optimizer batch

    MORepair    w = (1, lam): the repaired code, and the repaired code with the reason for it; lam 0 is plain SFT

A view is the row written in another way (prompt and target), made by a data policy and found under the batch's `views`.
Each view is counted for itself, so a longer one weighs no more. NEFTune's noise may be put on the embeddings,
independently in each forward.

Paper: arXiv:2404.12636; the general form also serves reasons-first targets (one view) and multi-task rationale
distillation. `inner` is any per-token objective; composes with every tuner and step. Executions with the same result:
`sequential` (one forward and backward per view, one graph in memory at a time) and `joined` (one forward over all
views). What it does not do: write views, or choose weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from pegbox.errors import BadInput
from pegbox.objectives.base import OBJECTIVE, Objective
from pegbox.objectives.token import Tokens
from pegbox.parts.context import Context
from pegbox.parts.noise import embedding_noise
from pegbox.parts.tokens import IGNORE
from pegbox.parts.view import Batch, ModelView

__all__ = ["MultiView", "join"]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FIRST = ""  # the row itself


class _Part(NamedTuple):
    name: str
    share: float
    batch: Batch


@OBJECTIVE.register
class MultiView(Objective):
    """A per-token objective over several views.

    Args:
        inner: `tokens` or an objective made of it.
        weight: of the row itself. views: weights of the others, by name; one of weight 0 is neither made nor run.
        normalise: divide by the weights' sum ("weights") or not ("none").
        execution: see the module.
        neftune: alpha of the noise on the embeddings while training; 0 for none.
    """

    reproduces: ClassVar[str] = "arXiv:2404.12636"
    separable: ClassVar[bool] = True

    kind: Literal["multi_view"] = "multi_view"
    inner: Annotated[Objective, OBJECTIVE] = Field(default_factory=Tokens)
    weight: Weight = 1.0
    views: dict[str, Weight] = Field(default_factory=lambda: {"explain": 1.0})
    normalise: Literal["weights", "none"] = "weights"
    execution: Literal["sequential", "joined"] = "sequential"
    neftune: Weight = 0.0

    @field_validator("views")
    @classmethod
    def _named(cls, views: dict[str, float]) -> dict[str, float]:
        for name in views:
            if not name.isidentifier() or name.startswith("_"):
                raise BadInput(f"objective.views: '{name}' is no name for a view; use letters, e.g. explain.")
        return views

    def model_post_init(self, context: Any, /) -> None:
        if not self.weight + sum(self.views.values()):
            raise BadInput("objective.weight and all objective.views are 0: nothing is left to learn. Raise one.")
        kind = type(self.inner)
        if kind.before_step is not Objective.before_step or kind.after_step is not Objective.after_step:
            raise BadInput(
                f"objective.inner: '{self.inner.kind}' looks at whole steps of one view. Use tokens or asft."
            )
        walk = self._walk  # what is no loss per token is refused here
        if self.execution == "joined" and walk.normalize != "tokens":
            raise BadInput("objective.execution 'joined' counts over the whole step; leave inner.normalize out.")

    @cached_property
    def _walk(self) -> Tokens:
        """The inner objective as a walk over tokens."""
        found = self.inner if isinstance(self.inner, Tokens) else getattr(self.inner, "tokens", None)
        if not isinstance(found, Tokens):
            raise BadInput(f"objective.inner: '{self.inner.kind}' is no loss per token. Use tokens or asft.")
        return found

    @property
    def view_names(self) -> tuple[str, ...]:
        return tuple(name for name, weight in self.views.items() if weight > 0)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether the inner objective runs a reference model."""
        return self.inner.needs_reference

    def shares(self) -> dict[str, float]:
        """Factor of each view's loss; "" is the row itself. Views without weight are left out."""
        weights = {FIRST: self.weight, **self.views}
        total = sum(weights.values()) if self.normalise == "weights" else 1.0
        return {name: weight / total for name, weight in weights.items() if weight > 0}

    def setup(self, ctx: Context) -> Any:
        if ctx.tokenizer is not None and getattr(ctx.tokenizer, "eos_token_id", None) is None:
            raise BadInput("The tokenizer has no end-of-sequence token, so a target's end can't be taught. Add one.")
        return self.inner.setup(ctx)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """The inner objective's counts of the row, and of each view under "view/"; 0 where a batch has none."""
        own = self.inner.count(batch)
        found, given = dict(own), self._given(batch)
        for name in self.view_names:
            counts = self.inner.count(given[name]) if name in given else {k: v * 0 for k, v in own.items()}
            found |= {f"{name}/{key}": value for key, value in counts.items()}
        return found

    def reference(self, state: Any, view: ModelView, batch: Batch) -> Any:
        """What the inner objective wants, per view, or of all views joined."""
        parts = self._parts(batch)
        if self._joins(parts):
            return self.inner.reference(state, view, join([p.batch for p in parts]))
        return {part.name: self.inner.reference(state, view, part.batch) for part in parts}

    def losses(
        self, state: Any, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        parts = self._parts(batch)
        if self._joins(parts):
            yield from self._joined(state, view, parts, totals, ref)
            return
        for name, share, part in parts:
            given = None if ref is None else ref[name]
            own = _of_view(totals, name)
            items = self.inner.losses(state, view, part, own, given)
            for title, value in self._noisy(view, items):
                yield from _scaled(name, share, title, value, own)
        if not parts:  # rows of this micro-batch have none of the views that count
            yield "tokens", _nothing(view)

    # ---- in parts

    def _given(self, batch: Batch) -> Mapping[str, Batch]:
        if self.view_names and batch.get("views") is None:
            raise BadInput(
                f"The batch has no views, and objective '{self.kind}' reads {', '.join(self.view_names)}. A policy "
                "makes them (data: [{kind: views}]), and rows packed by a policy lose them."
            )
        return batch.get("views") or {}

    def _parts(self, batch: Batch) -> list[_Part]:
        """The views that this batch has and that count."""
        given = {FIRST: batch, **self._given(batch)}
        return [_Part(name, share, given[name]) for name, share in self.shares().items() if name in given]

    def _joins(self, parts: list[_Part]) -> bool:
        return self.execution == "joined" and len(parts) > 1

    def _noisy(self, view: ModelView, items: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The items, with noise on whatever forward makes them."""
        while True:
            with embedding_noise(view.model, self.neftune):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _joined(
        self, state: Any, view: ModelView, parts: list[_Part], totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        factors = [part.share / _of_view(totals, part.name)["tokens"].clamp(min=1) for part in parts]
        whole = join([p.batch for p in parts], factors)
        with embedding_noise(view.model, self.neftune):
            tokens = self._walk.per_token(view, whole, ref)
        yield "tokens", tokens.loss
        assert tokens.sample is not None
        start = 0
        for part in parts:
            count = len(part.batch["sample_ids"])
            mine = (tokens.sample >= start) & (tokens.sample < start + count)
            own = _of_view(totals, part.name)
            by = own["tokens"].clamp(min=1) / own["micro"]
            yield f"_{part.name or 'first'}/tokens", -tokens.logp[mine].sum() / by.to(tokens.logp)
            start += count
        scale = sum(part.share for part in parts)
        for title, value in self._walk.penalties(state, view, totals):
            yield title, value * scale


def _of_view(totals: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A view's own totals, without its name."""
    if not name:
        return dict(totals)
    return {key.removeprefix(f"{name}/"): value for key, value in totals.items() if key.startswith(f"{name}/")}


def _scaled(
    name: str, share: float, title: str, value: Tensor, totals: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """A loss with its weight, and as a reading without; other readings under the view's name."""
    if title.startswith("_"):
        if not name:
            yield title, value
        elif value.ndim == 0:  # values per sample are told for the row itself only
            yield f"_{name}/{title[1:]}", value
        return
    yield f"{name}/{title}" if name else title, value if share == 1.0 else value * share
    if share != 1.0:
        yield f"_{name or 'first'}/{title}", value.detach() * totals["micro"].to(value)


def _nothing(view: ModelView) -> Tensor:
    """A zero with a graph."""
    parameter = next(p for p in view.model.parameters() if p.requires_grad)
    return parameter.reshape(-1)[:1].sum() * 0


# ---- one batch of several -------------------------------------------------------------------------------------------

_FILL = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORE,
    "position_ids": 0,
    "sequence_ids": -1,
    "corrupted_ids": 0,
}
_PER_SAMPLE = ("sample_ids", "task_ids", "sample_weight")


def join(batches: list[Batch], factors: list[Tensor] | None = None) -> dict[str, Any]:
    """Several batches as one, padded to the widest; each sample's weight times its batch's factor.

    Raises `BadInput` for a key that can't be joined.
    """
    width = max(b["input_ids"].shape[1] for b in batches)
    out: dict[str, Any] = {}
    for key in dict.fromkeys(k for b in batches for k in b if k != "views"):
        if any(key not in b for b in batches):
            raise BadInput(f"The views' batches can't be joined: only some hold '{key}'. Use execution: sequential.")
        values = [b[key] for b in batches]
        if key in _FILL:
            values = _distinct(values, batches) if key == "sequence_ids" else values
            out[key] = torch.cat([F.pad(v, (0, width - v.shape[1]), value=_FILL[key]) for v in values])
        elif key in _PER_SAMPLE:
            out[key] = torch.cat(values)
        elif not isinstance(values[0], Tensor) and all(v == values[0] for v in values):
            out[key] = values[0]
        else:
            raise BadInput(f"The views' batches can't be joined: '{key}' is unknown. Use execution: sequential.")
    if factors is not None:
        own = [b["sample_weight"] for b in batches]
        scaled = [w.double() * f.to(device=w.device, dtype=torch.float64) for w, f in zip(own, factors)]
        out["sample_weight"] = torch.cat(scaled)
    return out


def _distinct(owners: list[Tensor], batches: list[Batch]) -> list[Tensor]:
    """Sequence ids that count on over the batches."""
    out, start = [], 0
    for owner, batch in zip(owners, batches):
        out.append(torch.where(owner >= 0, owner + start, owner))
        start += len(batch["sample_ids"])
    return out
