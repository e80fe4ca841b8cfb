"""The slices tuner's PEFT model: chooses units before injecting layers, re-orders them where asked, loads saved blocks.

Importing this module registers the method "PEGBOX_SLICES" with PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, Unsupported
from pegbox.parts.allocation import Allocation, Frozen, Units
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.coupled import Coupled, Reordering, block_order, grouped_order, reorder, restore, structures
from pegbox.parts.packed import floating
from pegbox.parts.statistics import fingerprint
from pegbox.tuners.registration import register
from pegbox.tuners.slices.config import NAME, SlicesConfig
from pegbox.tuners.slices.layer import SliceLayer
from pegbox.tuners.sparse.config import select_component
from pegbox.tuners.sparse.execution import base_facts
from pegbox.tuners.targets import bare_name

__all__ = ["SlicesModel", "contiguous_orders", "slice_layers"]

_WEIGHT = ".weight"


class SlicesModel(BaseTuner):
    """PEFT's view of the slices tuner."""

    prefix: str = "slice_"
    tuner_layer_cls = SliceLayer
    target_module_mapping: dict[str, list[str]] = {}
    reordering: Reordering | None = None

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config: SlicesConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        anatomy = Anatomy.of(model)
        given = config.take_allocation()
        stored = given is None and config.allocation == "stored"
        self._choices: dict[str, tuple[int, Tensor | None]]
        if stored:
            self._choices = {module: (axis, None) for module, (axis, _) in config.slices.items()}
            self._check_place(model, anatomy, config)
        else:
            chosen = _units_of(given if given is not None else _select(config, model, anatomy))
            if given is None and self.reordering is not None:  # selected on the units as they stand now
                chosen = {n: Units(c.axis, _was(self.reordering, n, c)) for n, c in chosen.items()}
            config.base = config.base or _mark(model, anatomy)
            if config.layout == "contiguous":
                self._reorder(model, anatomy, chosen)
            self._choices = {n.removesuffix(_WEIGHT): (c.axis, self._in_order(n, c)) for n, c in chosen.items()}
            config.slices = {
                module: [axis, _length(model, anatomy, module, axis)] for module, (axis, _) in self._choices.items()
            }
        config.target_modules, config.exclude_modules = sorted(self._choices), None
        config.layers_to_transform = None
        self._tied = _shared_weights(model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, False, state_dict)
        del self._choices

    def _reorder(self, model: nn.Module, anatomy: Anatomy, chosen: Mapping[str, Units]) -> None:
        if self.reordering is not None:
            raise BadInput("The units of this model are re-ordered already; a second adapter takes layout: gather.")
        self.reordering = reorder(model, contiguous_orders(structures(anatomy), chosen), anatomy)

    def _in_order(self, name: str, choice: Units) -> Tensor:
        """The chosen numbers in the order in which they stand now, so that a block is a range where it can be one."""
        place = None if self.reordering is None else self.reordering.place(name, choice.axis)
        return choice.index if place is None else choice.index[place[choice.index.long()].argsort()]

    def _check_place(self, model: nn.Module, anatomy: Anatomy, config: SlicesConfig) -> None:
        known = {piece.module for piece in anatomy.pieces if piece.kind == "linear"}
        for module, (axis, length) in config.slices.items():
            if module not in known:
                raise BadInput(f"The adapter changes '{module}', and this model has no such linear layer.")
            if _length(model, anatomy, module, axis) != length:
                raise BadInput(
                    f"The adapter was made for a '{module}' of {length} along axis {axis}; here it has "
                    f"{_length(model, anatomy, module, axis)}."
                )

    def _create_and_replace(  # type: ignore[override]
        self,
        config: SlicesConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if current_key not in self._choices:
            return
        axis, index = self._choices[current_key]
        if isinstance(target, SliceLayer):
            target.add(adapter_name, config, axis, index)
            target.set_adapter(target.active_adapters)
            return
        layer = SliceLayer(target, current_key, current_key in self._tied, self._places(current_key + _WEIGHT))
        layer.add(adapter_name, config, axis, index)
        layer.set_adapter(adapter_name)
        self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.set_adapter(self.active_adapters)

    def _places(self, parameter: str) -> dict[int, Tensor]:
        done = self.reordering
        places = {} if done is None else {axis: done.place(parameter, axis) for axis in (0, 1)}
        return {axis: place for axis, place in places.items() if place is not None}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # a slice layer is made on the right device and keeps its dtype

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        restore(model)
        self.reordering = None
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Make room for the file's blocks, whatever their size, and check every tensor of it."""
        bare = {
            name.removeprefix("base_model.model."): (name, m)
            for name, m in model.named_modules()
            if isinstance(m, SliceLayer)
        }
        remapped: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            module_key, _, attribute = key.removeprefix("base_model.model.").rpartition(".")
            if attribute not in ("slice_values", "slice_index"):
                remapped[key] = tensor
                continue
            if module_key not in bare or adapter_name not in bare[module_key][1].slice_values:
                raise Corrupt(f"The adapter has a block for '{module_key}', which this model has no place for.")
            remapped[f"{bare[module_key][0]}.{attribute}.{adapter_name}"] = tensor
        for module_key, (name, layer) in bare.items():
            if adapter_name in layer.slice_values:
                stem = [remapped.get(f"{name}.{part}.{adapter_name}") for part in ("slice_index", "slice_values")]
                _make_room(layer, adapter_name, module_key, *stem)
        return remapped


def slice_layers(model: nn.Module) -> dict[str, SliceLayer]:
    """The model's slice layers by the bare name of the module they wrap."""
    return {m.module_name: m for m in model.modules() if isinstance(m, SliceLayer)}


def contiguous_orders(found: tuple[Coupled, ...], chosen: Mapping[str, Units]) -> dict[str, list[int]]:
    """By structure, an order of its units that makes ranges of the chosen rows and columns."""
    orders = {}
    for structure in found:
        first, second = ("v", "o") if structure.kind == "heads" else ("up", "down")
        made, read = (_units_in(structure, role, chosen) for role in (first, second))
        if not made and not read:
            continue
        if structure.kind == "heads":
            orders[structure.name] = grouped_order(made, read, structure.units, structure.per_group)
        else:
            orders[structure.name] = block_order(made, read, structure.units)
    return orders


def _units_in(structure: Coupled, role: str, chosen: Mapping[str, Units]) -> list[int]:
    share = structure.share(role)
    choice = chosen.get(share.parameter)
    return share.owners(choice.index) if choice is not None and choice.axis == share.axis else []


def _units_of(allocation: Allocation) -> dict[str, Units]:
    found = {name: _as_units(name, c) for name, c in allocation.items() if not isinstance(c, Frozen)}
    if not found:
        raise BadInput("No row and no column was selected, so nothing would train.")
    return found


def _was(done: Reordering, name: str, choice: Units) -> Tensor:
    """Original numbers from present ones."""
    place = done.place(name, choice.axis)
    return choice.index if place is None else place.argsort()[choice.index.long()].to(choice.index.dtype)


def _as_units(name: str, choice: Any) -> Units:
    if not isinstance(choice, Units) or not name.endswith(_WEIGHT):
        raise Unsupported(
            f"'{name}': the slices tuner takes rows or columns of linear weights, not {type(choice).__name__.lower()}."
        )
    return choice


def _select(config: SlicesConfig, model: nn.Module, anatomy: Anatomy) -> Allocation:
    """Run the config's selector on the model."""
    selector: Any = select_component(config.select)
    if "units" not in selector.produces:
        raise Unsupported(f"select '{selector.kind}' does not choose rows or columns, which the slices tuner needs.")
    if selector.statistics() is not None:
        raise BadInput(
            f"select '{selector.kind}' needs statistics of calibration data. Collect them, select, and attach with"
            " config.with_allocation(allocation)."
        )
    named = {anatomy.canonical(name): p for name, p in model.named_parameters()}
    weights = {n: floating(p) if selector.needs_weights else p for n, p in named.items()}
    return selector.select(anatomy, weights, None, torch.Generator().manual_seed(config.seed))


def _mark(model: nn.Module, anatomy: Anatomy) -> str:
    """Which base this is: its checkpoint's fingerprint, or one of the weights in memory."""
    source = getattr(model, "pegbox_source", None)
    if source is not None:
        return f"checkpoint:{source.fingerprint}"
    return "" if next(model.parameters()).is_meta else f"weights:{fingerprint(model, anatomy)}"


def _length(model: nn.Module, anatomy: Anatomy, module: str, axis: int) -> int:
    layer = model.get_submodule(anatomy.actual(module))
    return int(base_facts(layer).shape[axis])


def _make_room(layer: SliceLayer, adapter: str, key: str, index: Tensor | None, values: Tensor | None) -> None:
    if index is None or values is None:
        raise Corrupt(f"The adapter's file has no complete entry for '{key}' (numbers and values).")
    axis = layer.option(adapter).axis
    if values.ndim != 2 or values.shape[axis] != index.numel() or values.shape[1 - axis] != layer.shape[1 - axis]:
        raise Corrupt(
            f"'{key}': {index.numel()} numbers and a block {tuple(values.shape)} don't fit a weight {layer.shape}."
        )
    layer.resize(adapter, index.numel())
    layer.loaded(adapter, index)


def _shared_weights(model: nn.Module) -> set[str]:
    """Bare names of modules whose weight another module holds too."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), set()).add(bare_name(name))
    return {name for names in owners.values() if len(names) > 1 for name in names}


register(NAME, SlicesConfig, SlicesModel, SlicesModel.prefix)
