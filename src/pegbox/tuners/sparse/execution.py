"""Which of the executions is right for a layer, from plain facts about its base; the reasons when one is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pegbox.errors import Unsupported
from pegbox.tuners.sparse.products import operation_of

__all__ = ["BaseFacts", "base_facts", "choose_execution", "onloaded", "product_is_cheaper"]


@dataclass(frozen=True)
class BaseFacts:
    """What there is to know of a base layer.

    shape: of the full weight, also where it is packed. packed: quantized, so that entries can't be written. offloaded:
    not in this process's memory between calls. sharded: a part of the weight only. operation: has a backward of ours.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    packed: bool
    offloaded: bool
    sharded: bool
    contiguous: bool
    operation: bool
    matrix: bool
    transposed: bool = False


def base_facts(module: nn.Module) -> BaseFacts:
    """Read the facts off a module with a `weight` (or packed weights with `in_features` and `out_features`)."""
    weight: Any = getattr(module, "weight", None)
    sharded = hasattr(weight, "device_mesh")
    packed = weight is None or not weight.is_floating_point() or (not sharded and _is_subclass(weight))
    hook: Any = getattr(module, "_hf_hook", None)
    offloaded = bool(getattr(hook, "offload", False))
    if packed:
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            raise Unsupported(f"the sparse tuner can't tune a {type(module).__name__}: it has no floating weight.")
        tensor: torch.Tensor = weight if weight is not None else next(iter((*module.parameters(), *module.buffers())))
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        dtype = getattr(module, "compute_dtype", None) or torch.float32
        return BaseFacts(shape, dtype, tensor.device, True, offloaded, False, True, False, True)
    operation = operation_of(module)
    return BaseFacts(
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        device=torch.device(hook.execution_device) if offloaded else weight.device,
        packed=False,
        offloaded=offloaded,
        sharded=sharded,
        contiguous=weight.is_contiguous(),
        operation=operation is not None,
        matrix=weight.ndim >= 2,
        transposed=bool(getattr(operation, "transposed", False)),
    )


def choose_execution(wanted: str, facts: BaseFacts, tied: bool, coordinates: str, name: str) -> str:
    """The execution to use. Raises `Unsupported` with the reason where `wanted` would be wrong."""
    if facts.sharded:
        raise Unsupported(
            f"{name}: attach the sparse tuner before the model is sharded; a shard can't be selected from."
        )
    reasons = _against_in_place(facts, tied)
    if wanted == "auto":
        wanted = "bypass" if facts.packed or facts.offloaded else "scatter" if reasons else "in_place"
    if wanted == "lean":  # where there is no choice between the two
        wanted = "bypass" if facts.packed or facts.offloaded else "lean" if facts.operation else "scatter"
    if wanted == "in_place" and reasons and facts.matrix:
        raise Unsupported(f"{name}: in place is not possible: {reasons[0]}. Use execution='auto'.")
    if wanted == "scatter" and (facts.packed or facts.offloaded):
        raise Unsupported(f"{name}: a weight can't be built from a packed or offloaded base. Use execution='bypass'.")
    if wanted == "bypass" and coordinates == "absolute" and (facts.packed or facts.offloaded):
        raise Unsupported(
            f"{name}: absolute coordinates need the base's entries, which a packed or offloaded base does not have at"
            " hand. Use coordinates='delta'."
        )
    if wanted == "bypass" and not facts.packed and not facts.operation:
        raise Unsupported(f"{name}: bypass needs a linear layer, a convolution or an embedding. Use execution='auto'.")
    return wanted


def product_is_cheaper(tokens: int, kept: int, shape: tuple[int, ...], transposed: bool) -> bool:
    """Whether a sparse product beside the base's beats building a weight, which reads and writes all of it.

    Per output: `tokens` times (its kept entries, and a sum to read and write) against one number per input.
    """
    inputs, outputs = shape[:2] if transposed else (shape[1], shape[0])
    return tokens * (kept + 2 * outputs) <= inputs * outputs


def onloaded(module: nn.Module, tensor: str) -> torch.Tensor:
    """A copy of a tensor of a module that accelerate keeps elsewhere."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, tensor).detach().clone()


def _against_in_place(facts: BaseFacts, tied: bool) -> list[str]:
    found = []
    if facts.packed:
        found.append("the weight is quantized")
    if facts.offloaded:
        found.append("the weight is offloaded")
    if tied:
        found.append("the weight is shared with another module, whose gradient would be missed")
    if not facts.contiguous:
        found.append("the weight is not contiguous in memory")
    if not facts.operation:
        found.append("this kind of layer has no backward of ours")
    return found


def _is_subclass(weight: torch.Tensor) -> bool:
    """A tensor subclass (torchao's quantized tensors look floating)."""
    return type(weight.data) is not torch.Tensor
