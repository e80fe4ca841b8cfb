"""First values of an adapter, handed from a preparation to the tuner that is attached next.

A preparation that takes a part out of the base's weights (W <- W - B A) leaves B and A here, on the model; the tuner
puts them into its layers as it attaches. With the adapter's own scale s the layer computes s B' A' x, so both factors
are divided by sqrt(s): the sum is W x again whatever the scale.

Until they are taken up, the model computes something else than the base did, so nobody may forget them: a training
forward of a model on which they still wait is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy

__all__ = ["apply_initial", "pending", "set_initial"]

Factors = tuple[Tensor, Tensor]  # A (r, n), B (m, r)
_ATTRIBUTE = "_pegbox_initial"


def set_initial(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Leave (A, B) by module name on a bare model. Raises `BadInput` where a module has some already."""
    present = pending(model)
    for name in factors:
        if name in present:
            raise BadInput(f"'{name}' has had a part taken out already; the same model can't be prepared twice.")
    model.__dict__[_ATTRIBUTE] = {**present, **factors}
    if not present:
        handles: list[Any] = []
        handles.append(model.register_forward_pre_hook(lambda module, _: _guard(module, handles)))


def _guard(model: nn.Module, handles: list[Any]) -> None:
    """Refuse to train a model whose adapter did not take up what was left for it."""
    waiting = pending(model)
    if waiting and model.training and torch.is_grad_enabled():
        for name in waiting:
            if not _has_values(model.get_submodule(name)):
                raise BadInput(
                    f"A part of '{name}' was taken out by a preparation and no adapter has taken it up, so the model "
                    "no longer computes what its base did. Use tuner lora on the same modules, attached by pegbox."
                )
        model.__dict__.pop(_ATTRIBUTE)  # an adapter with values of its own was loaded
    if not pending(model):
        for handle in handles:
            handle.remove()


def _has_values(module: nn.Module) -> bool:
    """Whether a LoRA layer whose B is not zero stands here."""
    return any(bool(layer.weight.any()) for layer in getattr(module, "lora_B", {}).values())


def pending(model: nn.Module) -> dict[str, Factors]:
    """What waits for a tuner on this (bare) model."""
    return model.__dict__.get(_ATTRIBUTE, {})


@torch.no_grad()
def apply_initial(bare: nn.Module, wrapped: nn.Module, adapter: str = "default") -> int:
    """Put what waits on `bare` into the LoRA layers of `wrapped`; returns how many layers got theirs.

    Raises `BadInput` where a prepared module has no LoRA layer, or one of another rank: the model would silently
    compute something else.
    """
    factors = pending(bare)
    if not factors:
        return 0
    anatomy = Anatomy.of(wrapped)
    modules = {anatomy.canonical(name): m for name, m in wrapped.named_modules() if hasattr(m, "base_layer")}
    for name, (a, b) in factors.items():
        layer = modules.get(name)
        if layer is None or adapter not in getattr(layer, "lora_A", {}):
            raise BadInput(
                f"A part of '{name}' was taken out by a preparation, but the tuner has no LoRA layer there. Give the "
                "tuner the targets of the preparation (kind: lora)."
            )
        _fill(name, layer, adapter, a, b)
    bare.__dict__.pop(_ATTRIBUTE)
    return len(factors)


def _fill(name: str, layer: Any, adapter: str, a: Tensor, b: Tensor) -> None:
    into, out = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if into.shape != a.shape or out.shape != b.shape:
        raise BadInput(
            f"'{name}' was prepared with rank {a.shape[0]}, the tuner has rank {into.shape[0]}. "
            "Set the preparation's rank and the tuner's r to the same number."
        )
    scale = float(layer.scaling[adapter])
    if scale <= 0:
        raise BadInput(f"The tuner's scale at '{name}' is {scale}; a prepared layer needs a positive lora_alpha.")
    into.copy_(a / scale**0.5)
    out.copy_(b / scale**0.5)
