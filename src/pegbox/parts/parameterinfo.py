"""What a trained parameter stands for, told to optimizers by metadata on the parameter, and when it was last written.

A sparse tuner trains a vector of k values that stands for k entries of a larger tensor. Optimizers, analyses and plans
read that from `info_of(parameter)` without importing a tuner.

Whoever changes a parameter's data in a way that autograd's version counter doesn't see (`param.data.add_`, a fused
kernel) must `touch()` it. Optimizers need not: every `torch.optim` step is noticed here by a process-wide hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["CLOCK", "Clock", "ParameterInfo", "attach_info", "info_of", "make_room", "sized_buffers", "touch"]


@dataclass
class ParameterInfo:
    """What a vector of values stands for.

    Args:
        name: the tensor's name in the bare base model.
        shape: the full tensor's shape.
        index: () -> (k,) sorted row-major flat positions of the values in it (live: it moves at a refresh).
        reference: () -> (k,) the pretrained values at these positions, in the values' dtype.
        coordinates: "absolute": a value is the weight itself, decay pulls it to 0; "delta": the difference from the
            pretrained weight, decay pulls it to the pretrained value.
    """

    name: str
    shape: tuple[int, ...]
    index: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    coordinates: Literal["absolute", "delta"]
    writes: int = field(default=0, repr=False)  # steps and touches so far, for who must know whether values changed


class Clock:
    """Process-wide counts of writes; comparing them is all that an up-to-date layer pays per forward.

    now: of all optimizer steps and touches. unattributed: of touches that did not say which parameter changed.
    """

    def __init__(self) -> None:
        self.now = 0
        self.unattributed = 0


CLOCK = Clock()
_ATTRIBUTE = "_pegbox"


def attach_info(parameter: nn.Parameter, info: ParameterInfo) -> None:
    """Say what `parameter` stands for."""
    setattr(parameter, _ATTRIBUTE, info)


def info_of(parameter: Tensor) -> ParameterInfo | None:
    """What `parameter` stands for, or None for an ordinary one."""
    return getattr(parameter, _ATTRIBUTE, None)


def touch(parameters: Iterable[Tensor] | None = None) -> None:
    """Say that parameters (all, if None) may have changed without autograd's or an optimizer's knowledge."""
    CLOCK.now += 1
    if parameters is None:
        CLOCK.unattributed += 1
        return
    for parameter in parameters:
        info = info_of(parameter)
        if info is not None:
            info.writes += 1


def make_room(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Before saved tensors are copied into a model by name: let modules whose tensors change size adapt to them.

    Such a module has a method `make_room(shapes by name below it)`; what it holds and the file does not, it drops.
    """
    for prefix, module in model.named_modules():
        adapt = getattr(module, "make_room", None)
        if callable(adapt):
            start = f"{prefix}." if prefix else ""
            adapt({n.removeprefix(start): tuple(t.shape) for n, t in tensors.items() if n.startswith(start)})


def sized_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of modules whose tensors change size; a checkpoint needs all of them, changed or not."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if callable(getattr(module, "make_room", None)):
            own = {n: b for n, b in module.named_buffers() if not n.startswith("base_layer.")}
            found.update({f"{prefix}.{n}" if prefix else n: b for n, b in own.items()})
    return found


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    touch(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_after_step)
