"""Choosing the trained entries again while training: values and optimizer state follow, nothing else changes.

Right before updates T, 2T, ...:  index <- selector(current weights);  entries that stay keep value and moments, entries
that enter start from the current weight with moments 0, entries that leave keep their value and lose their moments; the
step count is not reset. Source: Liu et al., arXiv:2506.00772, algorithm 1; the accumulative form: its appendix A.

`MaskRefresh` is the schedule for the engine, `callbacks_for` wraps it for anybody's transformers trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.context import seed_of
from pegbox.parts.indexsets import budget_counts, intersect
from pegbox.parts.optimstate import owner_of, remap, replace
from pegbox.tuners.sparse.config import SparseConfig, select_component
from pegbox.tuners.sparse.in_place import is_sharded
from pegbox.tuners.sparse.layer import TENSORS, SparseLayer
from pegbox.tuners.sparse.model import sparse_layers

__all__ = ["MaskRefresh", "Refreshed", "callbacks_for", "refresh"]

Slots = dict[str, tuple[SparseLayer, str]]  # bare tensor name -> (layer, "weight" | "bias")


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did: entries that train now, entries among them that did before, entries ever touched."""

    trained: int
    kept: int
    touched: int
    digest: str


@torch.no_grad()
def refresh(
    model: nn.Module,
    selector: Any,
    optimizer: Any = None,
    *,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> Refreshed:
    """Select again on the current weights, and move values and optimizer state.

    Args:
        selector: a component of the select axis that chooses entries; its `schedule.mode` says whether entries may
            leave ("dynamic") or are only added up to `schedule.limit` ("accumulative").
        optimizer: the optimizer (or several) that steps the values; None: there is no state to move.
        generator: for selectors that draw.

    Raises `Unsupported` on a sharded model and where the number of entries would change under DDP, `RunFailed` if
    ranks choose differently.
    """
    slots = _slots(model, adapter)
    _check_whole(slots)
    generator = generator or torch.Generator().manual_seed(0)
    chosen = _choose(selector, slots, adapter, generator)
    digest = chosen.digest()
    _same_on_all_ranks(digest)
    trained = kept = touched = 0
    for name, (layer, tensor) in slots.items():
        choice = chosen.get(name)
        if not isinstance(choice, Entries):
            raise BadInput(f"The new selection has no entries for '{name}', which is being trained.")
        before = layer.slot(adapter, tensor).index
        kept += intersect(choice.index, before).numel()
        if choice.index.numel() != before.numel():
            _check_resizable(name)
        old, values, source = layer.move(adapter, tensor, choice.index)
        owner = owner_of(optimizer, old) if optimizer is not None else None
        if owner is not None:
            replace(owner, old, values)
            remap(owner, values, source, old.shape)
        trained += choice.index.numel()
        touched += layer.touched(adapter, tensor)
    return Refreshed(trained, kept, touched, digest)


@dataclass
class MaskRefresh:
    """A selector's schedule at work. `every` is 1 because it keeps time itself: right before updates T, 2T, ..."""

    selector: Any
    seed: int = 0
    adapter: str = "default"
    every: int | None = 1
    done: list[Refreshed] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Whether to select again before the next update, after `step` finished ones."""
        schedule = self.selector.schedule
        return schedule.moves and (step + 1) % schedule.every == 0

    def refresh(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Called before every optimizer step."""
        if self.due(step):
            draw = torch.Generator().manual_seed(seed_of(self.seed, "refresh", step))
            self.done.append(refresh(model, self.selector, optimizer, adapter=self.adapter, generator=draw))


def callbacks_for(config: SparseConfig | Any, adapter: str = "default") -> list[Any]:
    """transformers callbacks that a sparse config (or a selector) needs in anybody's trainer; none if nothing moves.

    `Trainer(..., callbacks=pegbox.callbacks_for(config))`. An AdaLoRA config gets the call that reallocates its ranks.
    """
    if str(getattr(getattr(config, "peft_type", None), "value", "")) == "ADALORA":
        return [_callback("on_optimizer_step", lambda state, model, _: _reallocate(model, state.global_step + 1))]
    block = config.select if isinstance(config, SparseConfig) else config
    selector = select_component(block)
    schedule = getattr(selector, "schedule", None)
    if schedule is None or not schedule.moves:
        return []
    work = MaskRefresh(selector, seed=config.seed if isinstance(config, SparseConfig) else 0, adapter=adapter)
    return [_callback("on_step_begin", lambda state, model, opt: work.refresh(state.global_step, model, opt))]


def _callback(event: str, act: Callable[[Any, nn.Module, Any], None]) -> Any:
    from transformers import TrainerCallback

    def handle(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        act(state, given["model"], given.get("optimizer"))

    return type("PegboxCallback", (TrainerCallback,), {event: handle})()


def _reallocate(model: nn.Module, step: int) -> None:
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    inner.base_model.update_and_allocate(step)


# ---- choosing


def _slots(model: nn.Module, adapter: str) -> Slots:
    found: Slots = {}
    for module_name, layer in sparse_layers(model).items():
        for tensor in TENSORS:
            if adapter in layer._of(tensor, "values"):
                if adapter not in layer.adapters_on(tensor) or layer.merged:
                    raise BadInput(f"Adapter '{adapter}' is inactive or merged, so its weights can't be reselected.")
                found[f"{module_name}.{tensor}"] = (layer, tensor)
    if not found:
        raise BadInput(f"The model has no sparse adapter '{adapter}' to select again.")
    return found


def _choose(selector: Any, slots: Slots, adapter: str, generator: torch.Generator) -> Allocation:
    if selector.schedule.mode == "accumulative":
        return _accumulate(selector, slots, adapter, generator)
    if getattr(selector, "scope", "global") == "per_tensor":  # one tensor at a time: nothing is held
        result = Allocation()
        for name, (layer, tensor) in slots.items():
            result.update(selector.select(None, {name: layer.tuned(tensor)}, None, copy_of(generator)))
        return result
    weights = {name: layer.tuned(tensor) for name, (layer, tensor) in slots.items()}
    return selector.select(None, weights, None, generator)


def _accumulate(selector: Any, slots: Slots, adapter: str, generator: torch.Generator) -> Allocation:
    """To each tensor's set the next entries, as many as it started with, until the limit is full."""
    if selector.scope != "per_tensor":
        raise Unsupported("An accumulative schedule needs scope 'per_tensor'.")
    shapes = {name: layer.shape_of(tensor) for name, (layer, tensor) in slots.items()}
    step, limit = _counts(selector.budget, shapes), _counts(selector.schedule.limit, shapes)
    result = Allocation()
    for name, (layer, tensor) in slots.items():
        present = layer.slot(adapter, tensor).index
        extra = min(step[name], limit[name] - present.numel())
        if extra <= 0:
            result[name] = Entries(present)
            continue
        draw = torch.Generator().manual_seed(seed_of(generator.initial_seed(), name))
        result[name] = Entries(selector.more(name, layer.tuned(tensor), present, extra, draw))
    return result


def _counts(budget: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return budget_counts(budget, shapes, "per_tensor")


def copy_of(generator: torch.Generator) -> torch.Generator:
    """A generator in the same state: each tensor draws from its own stream of the one seed."""
    return torch.Generator().manual_seed(generator.initial_seed())


# ---- several processes


def _check_whole(slots: Slots) -> None:
    for name, (layer, _) in slots.items():
        if layer.in_place.regathered or is_sharded(getattr(layer.base_layer, "weight", None)):
            raise Unsupported(
                f"'{name}' is sharded over processes, so it can't be selected from again. Use DDP, or a schedule"
                " without refresh (select.schedule.every: null)."
            )


def _check_resizable(name: str) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise Unsupported(
            f"'{name}' would change its number of trained entries, which DDP's buckets can't follow. Use scope"
            " 'per_tensor' and a dynamic schedule."
        )


def _same_on_all_ranks(digest: str) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        raise RunFailed(
            "The processes chose different entries at a refresh: their weights or library versions differ. Compare"
            " `pegbox doctor` on all machines."
        )


def read_index(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The trained entries now, by bare tensor name."""
    return {name: layer.slot(adapter, tensor).index.clone() for name, (layer, tensor) in _slots(model, adapter).items()}
