"""Model views: a causal language model and a sequence classifier behind the few questions of `parts.view.ModelView`.

`CausalView.hidden` runs the model's own forward, wrappers (DDP, PEFT, accelerate) included, with the output embedding
replaced for that call by one that hands its input out and makes no logits. `head` goes through that same module, so
an adapter on it counts, and then applies what the model itself does to its logits (scaling, soft-capping).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from pegbox.errors import Unsupported
from pegbox.parts.tokens import shift
from pegbox.parts.view import SIDE_KEYS, Batch

__all__ = ["CausalView", "ClassificationView", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The model below DDP, FSDP and torch.compile; PEFT's wrapper stays."""
    while True:
        if type(model).__name__ in _WRAPPERS:
            model = cast(nn.Module, model.module)
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})


class _Reach(torch.autograd.Function):
    """Passes a tensor through and makes parameters reachable from it, without a gradient for them.

    DDP with `find_unused_parameters` looks for them from the forward's output, and the head is used only after it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, *([None] * ctx.count))


class CausalView:
    """A causal language model. Shapes: B batch, T tokens, D width, V vocabulary."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._autocast: tuple[str, torch.dtype] | None = None
        if self.head_module is None:
            raise Unsupported(
                f"{type(unwrap(model)).__name__} has no output embedding, so it is no causal language model; "
                "load it with AutoModelForCausalLM."
            )

    def of(self, model: nn.Module) -> CausalView:
        """The same kind of view of another model."""
        return type(self)(model)

    @property
    def head_module(self) -> Any:
        """The output embedding, as the model holds it now (an adapter's layer where one is attached)."""
        get = getattr(unwrap(self.model), "get_output_embeddings", None)
        return get() if get is not None else None

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The head's own parameters that train."""
        return [p for p in self.head_module.parameters() if p.requires_grad]

    @property
    def vocabulary(self) -> int:
        """V, the number of logits."""
        head = self.head_module
        return int(getattr(head, "out_features", 0) or _config(self.model).vocab_size)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The part of `batch` that goes into the forward."""
        return {k: v for k, v in batch.items() if k not in SIDE_KEYS and v is not None}

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) next-token logits, from the model's own forward."""
        return self._tail(self._forward(batch).logits, batch)

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, D) what the head would be given; no logits are made."""
        with _captured(self.head_module) as caught:
            self._forward(batch)
        if len(caught) != 1:
            raise Unsupported(
                f"{type(unwrap(self.model)).__name__} called its output embedding {len(caught)} times in one forward; "
                "only models that call it once can be trained on hidden rows."
            )
        hidden, self._autocast = caught[0]
        return self._tail(hidden, batch)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of any rows of `hidden`: (N, D) -> (N, V), under the autocast that the forward ran in."""
        with self._head_context(hidden):
            return _after_head(self.head_module(hidden), _config(self.model))

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) target ids aligned with `hidden`, and the mask of those that count."""
        return shift(
            batch["labels"],
            batch.get("sequence_ids"),
            batch.get("position_ids"),
            batch.get("attention_mask"),
            batch.get("corrupted_ids"),
        )

    def _forward(self, batch: Batch) -> Any:
        inputs = self.inputs(batch)
        if _accepts(unwrap(self.model), "use_cache"):
            inputs.setdefault("use_cache", False)
        return self.model(**inputs)

    def _tail(self, x: Tensor, batch: Batch) -> Tensor:
        """The last T positions: adapters that prepend virtual tokens lengthen what comes out."""
        ids = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
        return x[:, -ids.shape[1] :]

    def _head_context(self, hidden: Tensor) -> AbstractContextManager[Any]:
        if self._autocast is None or torch.is_autocast_enabled(hidden.device.type):
            return nullcontext()
        device, dtype = self._autocast
        return torch.autocast(device, dtype=dtype)


@contextmanager
def _captured(head: nn.Module) -> Iterator[list[tuple[Tensor, tuple[str, torch.dtype] | None]]]:
    """While this lasts, `head` hands its inputs (and the autocast they came under) out and returns a thin tensor."""
    caught: list[tuple[Tensor, tuple[str, torch.dtype] | None]] = []
    parameters = [p for p in head.parameters() if p.requires_grad]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        device = x.device.type
        on = torch.is_autocast_enabled(device)
        caught.append((x, (device, torch.get_autocast_dtype(device)) if on else None))
        thin = x[..., :1]
        return _Reach.apply(thin, *parameters) if torch.is_grad_enabled() and parameters else thin

    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield caught
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.forward = before


def _config(model: nn.Module) -> Any:
    config: Any = unwrap(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _after_head(logits: Tensor, config: Any) -> Tensor:
    """What a model does to its logits after the head: Cohere, Falcon-H1 and Granite scale them, Gemma caps them."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            scale = float(value)
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:
            scale = float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
    if scale != 1.0:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def _accepts(model: nn.Module, name: str) -> bool:
    unwrap_peft: Any = getattr(model, "get_base_model", lambda: model)
    base = unwrap_peft()
    return name in inspect.signature(base.forward).parameters


class ClassificationView:
    """A sequence classifier. `hidden` is (B, 1, D), what its last layer is given; targets are one label per row."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._last: nn.Module | None = None

    def of(self, model: nn.Module) -> ClassificationView:
        """The same kind of view of another model."""
        return type(self)(model)

    @property
    def vocabulary(self) -> int:
        """The number of classes."""
        return int(_config(self.model).num_labels)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The part of `batch` that goes into the forward."""
        return {k: v for k, v in batch.items() if k not in SIDE_KEYS and v is not None}

    def logits(self, batch: Batch) -> Tensor:
        """(B, C) class logits."""
        return self.model(**self.inputs(batch)).logits

    def hidden(self, batch: Batch) -> Tensor:
        """(B, 1, D) the input of the layer that makes the logits; (B, T, D) models are read at the row they pool."""
        calls: list[tuple[nn.Module, Tensor]] = []
        linears = [m for m in self.model.modules() if getattr(m, "out_features", None) == self.vocabulary]
        hooks = [m.register_forward_pre_hook(lambda m, args: calls.append((m, args[0]))) for m in linears]
        try:
            self.model(**self.inputs(batch))
        finally:
            for hook in hooks:
                hook.remove()
        if not calls:
            raise Unsupported(f"{type(unwrap(self.model)).__name__} has no linear layer that makes its class logits.")
        self._last, rows = calls[-1]
        return rows[:, None] if rows.ndim == 2 else self._pooled(rows, batch)[:, None]

    def head(self, hidden: Tensor) -> Tensor:
        """Class logits of rows of `hidden`: (N, D) -> (N, C). Call `hidden` first."""
        if self._last is None:
            raise Unsupported("ClassificationView.head needs the rows that `hidden` returned.")
        return self._last(hidden)

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, 1) labels and the mask of those that count."""
        labels = batch["labels"].reshape(-1, 1)
        valid = labels != -100
        return labels.masked_fill(~valid, 0), valid

    def _pooled(self, rows: Tensor, batch: Batch) -> Tensor:
        """(B, D) the last token that is no padding, as transformers' generic classifier pools."""
        ids, pad = batch["input_ids"], _config(self.model).pad_token_id
        if pad is None:
            return rows[:, -1]
        positions = torch.arange(ids.shape[1], device=ids.device)
        last = (positions * (ids != pad)).argmax(-1)
        return rows[torch.arange(ids.shape[0], device=ids.device), last]
