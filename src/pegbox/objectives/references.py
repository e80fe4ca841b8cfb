"""Reference models for objectives: the base without its tuner, a frozen copy, or another model of the run.

`reference_of` decides which; `Reference.rows` and `Reference.logp` run it on a batch: in eval mode, without gradient,
without labels, on exactly the inputs that the policy sees, leaving every mode as it was. The policy's own forward comes
afterwards (an in-place tuner must not be toggled between a forward and its backward).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.context import Context
from pegbox.parts.tokens import score, walk
from pegbox.parts.view import Batch, ModelView

__all__ = ["Reference", "ReferenceDtype", "ReferenceRows", "evaluating", "head_parameters", "reference_of"]

ReferenceDtype = Literal["same", "bfloat16", "float16"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module of `model`, and afterwards each one's own mode again."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def head_parameters(view: ModelView) -> list[nn.Parameter] | None:
    """The head's trained parameters; None where a view doesn't say."""
    return getattr(view, "head_parameters", None)


@dataclass
class ReferenceRows:
    """The reference on a batch's valid positions: rows with a head to apply per tile, or the logits themselves."""

    rows: Tensor | None = None  # (n, D)
    head: Callable[[Tensor], Tensor] | None = None
    logits: Tensor | None = None  # (n, V), where the head itself is tuned

    def tile(self, part: slice) -> Tensor:
        """(rows of the tile, V) logits, no gradient."""
        if self.logits is not None:
            return self.logits[part]
        assert self.rows is not None
        assert self.head is not None
        with torch.no_grad():
            return self.head(self.rows[part])


@dataclass
class Reference:
    """A reference model. `model` None: the policy's own model inside `view_context`."""

    model: nn.Module | None = None
    view_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    cache: dict[int, Tensor] | None = None  # log r[y] of each sample's valid tokens, by sample id
    passes: int = field(default=0, compare=False)  # forward passes made

    def state_dict(self) -> dict[str, Any]:
        """The cached statistics; the model itself is made anew."""
        return {} if self.cache is None else {str(k): v for k, v in self.cache.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.cache is not None:
            self.cache = {int(k): v for k, v in state.items()}

    @contextmanager
    def _running(self, view: ModelView) -> Iterator[ModelView]:
        """The reference's view, in eval mode and without gradient."""
        with torch.no_grad():
            if self.model is None:
                with evaluating(view.model), self.view_context():
                    yield view
            else:
                another: Callable[[nn.Module], ModelView] = getattr(view, "of", type(view))
                yield another(self.model)
        self.passes += 1

    def rows(self, view: ModelView, batch: Batch) -> ReferenceRows:
        """What the reference says at the batch's valid positions, for a full-vocabulary divergence."""
        _, valid = view.targets(batch)
        with self._running(view) as ref:
            rows = ref.hidden(batch)[valid]
            if self.model is None and _head_is_tuned(view):
                return ReferenceRows(logits=ref.head(rows))
            return ReferenceRows(rows=rows, head=ref.head)

    def logp(self, view: ModelView, batch: Batch) -> Tensor:
        """(n,) log r[y] at the batch's valid positions, in row-major order; from the cache where it is complete."""
        targets, valid = view.targets(batch)
        counts = valid.sum(-1).tolist()
        if self.cache is None:
            return self._logp(view, batch, targets, valid)
        ids = _cacheable_ids(batch)
        if all(i in self.cache for i in ids):
            return torch.cat([self._cached(i, n) for i, n in zip(ids, counts)]).to(targets.device)
        logp = self._logp(view, batch, targets, valid)
        for i, part in zip(ids, logp.split(counts)):
            self.cache[i] = part.cpu()
        return logp

    def _logp(self, view: ModelView, batch: Batch, targets: Tensor, valid: Tensor) -> Tensor:
        with self._running(view) as ref:
            rows, wanted = ref.hidden(batch)[valid], targets[valid]
            vocabulary = int(getattr(view, "vocabulary", 1 << 15))
            return walk(
                rows,
                lambda tile, part: (score(ref.head(tile), wanted[part]).logp,) * 2,
                vocabulary=vocabulary,
            )[1]

    def _cached(self, sample: int, count: int) -> Tensor:
        assert self.cache is not None
        found = self.cache[sample]
        if found.numel() != count:
            raise BadInput(
                f"The cached reference of sample {sample} has {found.numel()} tokens, the batch has {count}: its "
                "length or mask changed between epochs. Set cache: false."
            )
        return found


def _cacheable_ids(batch: Batch) -> list[int]:
    if batch.get("corrupted_ids") is not None:
        raise Unsupported(
            "Cached reference statistics can't be used with a data policy that changes the inputs each time a sample "
            "is seen. Set cache: false, or leave the policy out."
        )
    if batch.get("sequence_ids") is not None:
        raise Unsupported(
            "Cached reference statistics are kept per sample; packed rows hold several. Set cache: false."
        )
    ids = batch.get("sample_ids")
    if ids is None:
        raise BadInput("Cached reference statistics need `sample_ids` in the batch. Set cache: false.")
    return [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]


def _head_is_tuned(view: ModelView) -> bool:
    """Whether the policy's head differs from the reference's: it trains, or an adapter sits on it."""
    head = getattr(view, "head_module", None)
    wrapped = head is not None and hasattr(head, "active_adapters")  # PEFT's layers and ModulesToSaveWrapper
    return wrapped or head_parameters(view) != []


def reference_of(ctx: Context, source: str = "base", dtype: ReferenceDtype = "same", cache: bool = False) -> Reference:
    """The reference named `source`: "base" (adapter off, or a frozen copy), or a role of the run.

    Raises:
        BadInput: an unknown role; a reference that shares storage with trained weights (its divergence would be 0
            for ever); a vocabulary of another size.
    """
    store: dict[int, Tensor] | None = {} if cache else None
    if source == "base" and ctx.reference is not None:
        return Reference(view_context=ctx.reference, cache=store)
    if source == "base":
        model = copy.deepcopy(ctx.model)
        if dtype != "same":
            model = model.to(getattr(torch, dtype))
    elif source in ctx.roles:
        model = ctx.roles[source]
        _check_apart(ctx.model, model, source)
    else:
        roles = ", ".join(sorted(ctx.roles)) or "none"
        raise BadInput(f"reference '{source}' is neither 'base' nor a role under `models:` (there: {roles}).")
    _check_vocabulary(ctx.model, model, source)
    return Reference(model=model.requires_grad_(False).eval(), cache=store)


def _check_apart(policy: nn.Module, reference: nn.Module, source: str) -> None:
    held = {p.untyped_storage().data_ptr() for p in reference.parameters()}
    for name, p in policy.named_parameters():
        if p.requires_grad and p.untyped_storage().data_ptr() in held and p.numel():
            raise BadInput(
                f"The reference '{source}' shares the storage of the trained weight '{name}', so its divergence would "
                "stay 0. Load the reference as a model of its own, or use reference: base."
            )


def _check_vocabulary(policy: nn.Module, reference: nn.Module, source: str) -> None:
    sizes = [_rows_of_head(m) for m in (policy, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise BadInput(
            f"The policy's head has {sizes[0]} tokens, the reference '{source}' has {sizes[1]}: one of them was "
            "resized. Resize the other in the same way (same added tokens, same order)."
        )


def _rows_of_head(model: nn.Module) -> int | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return getattr(head, "out_features", None)
