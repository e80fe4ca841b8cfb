"""One PEFT model as several: its adapter off, or one of its adapters on, for a single forward and without cost.

PEFT's own switches walk the model several times, look at every adapter's state and move `requires_grad`: on a small
model that takes as long as a token's forward. Decoding switches for every token. Here a switch sets the flags that
the layers read, keeps what it found, and puts exactly that back, also after an exception. Layers that do more when
they are switched (merged weights, copied modules) are switched by their own methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from pegbox.errors import BadInput, did_you_mean

__all__ = ["adapter_off", "adapter_on", "adapter_parameters", "is_adapted"]

_FOUND: WeakKeyDictionary[nn.Module, tuple[Any, list[Any], list[Any]]] = WeakKeyDictionary()


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is PEFT's wrapper of another."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What would train of `model` by name: its adapter's values, or all floating parameters where it has none."""
    if not is_adapted(model):
        return {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    bare = {id(p) for p in _bare_parameters(model)}
    return {name: p for name, p in model.named_parameters() if id(p) not in bare and p.is_floating_point()}


def _bare_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The base's own parameters, below every tuner layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner = next((o for o in layers if name.startswith(o + ".")), None)
        if owner is None or name.removeprefix(owner + ".").startswith("base_layer."):
            yield p


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """A scope in which no adapter of `model` acts; exactly undone on leaving. For forwards without gradients."""
    if _prompts(model):
        with model.disable_adapter():
            yield
        return
    quick, slow = _layers(model)
    before, flag = [layer._disable_adapters for layer in quick], model._adapters_disabled
    with ExitStack() as stack:
        for layer in slow:
            stack.enter_context(_by_its_own_method(layer, False))
        try:
            for layer in quick:
                layer._disable_adapters = True
            model._adapters_disabled = True
            yield
        finally:
            for layer, value in zip(quick, before):
                layer._disable_adapters = value
            model._adapters_disabled = flag


@contextmanager
def adapter_on(model: Any, name: str) -> Iterator[None]:
    """A scope in which the adapter `name` of `model` acts, and no other; exactly undone on leaving."""
    if name not in model.peft_config:
        raise BadInput(f"The model has no adapter '{name}'.{did_you_mean(name, model.peft_config)}")
    quick, slow = _layers(model)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in quick]
    flags = model._adapters_disabled, model.active_adapter
    with ExitStack() as stack:
        for layer in slow:
            stack.enter_context(_by_its_own_method(layer, True, name))
        try:
            for layer in quick:
                layer._disable_adapters = False
                if layer._active_adapter not in (name, [name]):
                    layer._active_adapter = [name]
            model._adapters_disabled, model.active_adapter = False, name
            yield
        finally:
            for layer, (off, active) in zip(quick, before):
                layer._disable_adapters, layer._active_adapter = off, active
            model._adapters_disabled, model.active_adapter = flags


def _prompts(model: Any) -> bool:
    config = model.peft_config[model.active_adapter]
    return bool(config.is_prompt_learning or config.is_adaption_prompt)


def _layers(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """(layers whose flags are all there is to switch, layers that do more), walked once per set of adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = tuple(model.peft_config)  # type: ignore[arg-type]
    kept = _FOUND.get(model)
    if kept is None or kept[0] != names:
        found = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        plain = [m for m in found if getattr(type(m), "enable_adapters", None) is BaseTunerLayer.enable_adapters]
        kept = (names, plain, [m for m in found if not any(m is p for p in plain)])
        _FOUND[model] = kept
    quick = [m for m in kept[1] if not m.merged]
    return quick, kept[2] + [m for m in kept[1] if m.merged]


@contextmanager
def _by_its_own_method(layer: Any, on: bool, name: str | None = None) -> Iterator[None]:
    """Switch one layer by `enable_adapters` and `set_adapter`; what trains is as before afterwards."""
    trained = [(p, p.requires_grad) for p in layer.parameters()]
    was_off, active = layer._disable_adapters, layer._active_adapter
    merged = list(getattr(layer, "merged_adapters", ()) or ())
    try:
        if name is not None:
            layer.set_adapter([name] if _knows(layer, name) else [])
        layer.enable_adapters(on)
        yield
    finally:
        if name is not None:
            layer.set_adapter(active if isinstance(active, list) else [active])
        layer.enable_adapters(not was_off)
        if merged and not layer.merged:
            layer.merge(adapter_names=merged)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def _knows(layer: Any, name: str) -> bool:
    """Whether a layer holds the adapter; copied modules refuse the name of one they don't hold."""
    copies = getattr(layer, "_get_available_adapters", None)
    return copies is None or name in copies()
