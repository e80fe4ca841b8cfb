"""Moving the trained entries while training: values and optimizer state follow, nothing else changes.

The selector says when (`due`), what has to be seen for it (`watches`) and where to (`relocate`): a mask chosen again on
the weights of now, entries dropped and grown, a later stage with fewer of them. Entries that stay keep value and state;
entries that leave keep their value, or go back to the pretrained one, and lose their state; entries that enter start
with state 0 (or as the selector's seeds say); the step count is not reset. Source: Liu et al., arXiv:2506.00772,
algorithm 1 (refresh); Ansell et al., arXiv:2401.16405 (drop and grow).

`MaskRefresh` is the schedule for the engine, `callbacks_for` wraps it for anybody's transformers trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.parts.allocation import Allocation, Entries
from pegbox.parts.context import seed_of
from pegbox.parts.indexsets import intersect, locate
from pegbox.parts.moves import Held, Relocation
from pegbox.parts.optimstate import drop, owner_of, remap, replace, seed_moments
from pegbox.parts.watching import Watch
from pegbox.tuners.sparse.config import SparseConfig, select_component
from pegbox.tuners.sparse.execution import base_facts
from pegbox.tuners.sparse.in_place import is_sharded
from pegbox.tuners.sparse.layer import TENSORS, SparseLayer
from pegbox.tuners.sparse.model import sparse_layers
from pegbox.tuners.sparse.products import operation_of

__all__ = ["MaskRefresh", "Refreshed", "callbacks_for", "read_index", "refresh", "start_watching", "stop_watching"]

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
    step: int = 0,
    total: int = 0,
) -> Refreshed:
    """Ask the selector where its entries go, and move values and optimizer state there.

    Args:
        selector: a component of the select axis that chooses entries; `relocate` says how they move.
        optimizer: the optimizer (or several) that steps the values; None: there is no state to move.
        generator: for selectors that draw.
        step, total: finished optimizer steps, and those of the whole training, for selectors that go by them.

    Raises `Unsupported` on a sharded model and where the number of entries would change under DDP, `RunFailed` if
    ranks choose differently.
    """
    slots = _slots(model, adapter)
    _check_whole(slots)
    generator = generator or torch.Generator().manual_seed(0)
    owners = {name: _owner(optimizer, layer.sparse_values(tensor, adapter)) for name, (layer, tensor) in slots.items()}
    held = {name: _held(name, *slots[name], adapter, owners[name]) for name in slots}
    moves = selector.relocate(step, total, held, generator)
    digest = Allocation({name: Entries(move.index) for name, move in moves.items()}).digest()
    _same_on_all_ranks(digest)
    trained = kept = touched = 0
    for name, (layer, tensor) in slots.items():
        move, before = moves[name], layer.slot(adapter, tensor).index
        kept += intersect(move.index, before).numel()
        if move.index.numel() != before.numel():
            _check_resizable(name)
        _carry_out(move, layer, tensor, adapter, owners[name])
        trained += move.index.numel()
        touched += layer.touched(adapter, tensor)
    return Refreshed(trained, kept, touched, digest)


def _owner(optimizer: Any, values: nn.Parameter) -> torch.optim.Optimizer | None:
    return None if optimizer is None else owner_of(optimizer, values)


def _held(name: str, layer: SparseLayer, tensor: str, adapter: str, owner: torch.optim.Optimizer | None) -> Held:
    slot = layer.slot(adapter, tensor)
    values = slot.values.detach()
    return Held(
        name=name,
        shape=layer.shape_of(tensor),
        index=slot.index,
        values=values,
        absolute=slot.absolute,
        reference=partial(layer.reference_values, adapter, tensor),
        tuned=partial(layer.tuned, tensor),
        state={} if owner is None else owner.state.get(slot.values, {}),
        watched=layer.watches.get((adapter, tensor)),
    )


def _carry_out(
    move: Relocation, layer: SparseLayer, tensor: str, adapter: str, owner: torch.optim.Optimizer | None
) -> None:
    old, values, source = layer.move(adapter, tensor, move.index, move.leave)
    if owner is None:
        return
    replace(owner, old, values)
    if move.reset:
        drop(owner, values)
        return
    remap(owner, values, source, old.shape)
    if move.seeds is not None and move.seeds.index.numel():
        at = locate(move.seeds.index, layer.slot(adapter, tensor).index)
        seed_moments(owner, values, at, move.seeds.mean, move.seeds.square, move.seeds.samples)


@dataclass
class MaskRefresh:
    """A selector's moves at work: a schedule for the engine. `every` is 1 because the selector keeps time itself.

    Args:
        total: () -> optimizer steps of the whole training, for selectors that go by them.
        model: what trains; needed to go on with gradients that were being watched when a checkpoint was written.
    """

    selector: Any
    seed: int = 0
    adapter: str = "default"
    every: int | None = 1
    done: list[Refreshed] = field(default_factory=list)
    total: Callable[[], int] = lambda: 0
    model: nn.Module | None = None

    def due(self, step: int) -> bool:
        """Whether entries move before the next update, after `step` finished ones."""
        return bool(self.selector.due(step, self.total()))

    def begin(self, step: int, model: nn.Module) -> None:
        """Called before the first update of this process; only a training's very first begins to watch here."""
        self.selector.begin(self.total())
        if step == 0 and self.selector.watches(0, self.total()):
            start_watching(model, self.adapter)

    def after_step(self, step: int, model: nn.Module) -> None:
        """Called after every update, in every process: what was seen of it is complete."""
        for watch in _watches(model, self.adapter).values():
            watch.close()

    def refresh(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Called before every optimizer step but the first."""
        self.after_step(step, model)
        if self.due(step):
            draw = torch.Generator().manual_seed(seed_of(self.seed, "refresh", step))
            moved = refresh(
                model, self.selector, optimizer, adapter=self.adapter, generator=draw, step=step, total=self.total()
            )
            self.done.append(moved)
            stop_watching(model)
        if self.selector.watches(step, self.total()):
            start_watching(model, self.adapter)

    def state_dict(self) -> dict[str, Any]:
        """Gradients seen so far; empty while nothing is watched."""
        watches = {} if self.model is None else _watches(self.model, self.adapter)
        return {"watched": {name: watch.state_dict() for name, watch in watches.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.model is None:
            raise BadInput("Moves can go on from a checkpoint only where they were given the model.")
        stop_watching(self.model)
        if not state["watched"]:
            return
        start_watching(self.model, self.adapter)
        for name, watch in _watches(self.model, self.adapter).items():
            watch.load_state_dict(state["watched"][name])


def start_watching(model: nn.Module, adapter: str = "default") -> None:
    """From the next backward on, watch the gradients of all tensors that the adapter trains entries of.

    Raises `Unsupported` for a layer whose whole gradient is not to be had, or is sharded.
    """
    slots = _slots(model, adapter)
    _check_whole(slots)
    for name, (layer, tensor) in slots.items():
        facts = base_facts(layer.base_layer)
        bypassed = layer.option(adapter, "execution") == "bypass"
        if bypassed and not facts.packed and not getattr(operation_of(layer.base_layer), "sparse_product", False):
            raise Unsupported(f"'{name}': its gradient can't be watched beside the base. Use execution: scatter.")
        values = layer.sparse_values(tensor, adapter)
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        layer.watches[(adapter, tensor)] = Watch(values.numel(), wide)


def stop_watching(model: nn.Module) -> None:
    """Forget what was seen."""
    for layer in sparse_layers(model).values():
        layer.watches.clear()


def _watches(model: nn.Module, adapter: str) -> dict[str, Watch]:
    return {
        f"{name}.{tensor}": watch
        for name, layer in sparse_layers(model).items()
        for (owner, tensor), watch in layer.watches.items()
        if owner == adapter
    }


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

    def before(state: Any, model: nn.Module, optimizer: Any) -> None:
        work.total = lambda: int(state.max_steps)
        if state.global_step == 0:
            work.begin(0, model)
        work.refresh(state.global_step, model, optimizer)

    return [_callback("on_step_begin", before)]


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


# ---- slots


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
