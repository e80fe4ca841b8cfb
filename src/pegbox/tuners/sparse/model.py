"""The sparse tuner's PEFT model: chooses entries before injecting layers, and loads saved index sets of any size.

Importing this module registers the method "PEGBOX_SPARSE" with PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from pegbox.errors import BadInput, Corrupt, Unsupported
from pegbox.parts.allocation import Allocation, Entries, Frozen, PerTensor, Units, Whole
from pegbox.parts.indexsets import check_index, everything, from_units, index_dtype, numel
from pegbox.parts.packed import Share, full_shape
from pegbox.parts.rowsets import columns_of, flat_of_columns, laid_out, pack_columns, unpack_columns
from pegbox.tuners.registration import register
from pegbox.tuners.sparse.config import NAME, SparseConfig, select_component
from pegbox.tuners.sparse.execution import base_facts, onloaded
from pegbox.tuners.sparse.layer import TENSORS, SparseLayer
from pegbox.tuners.targets import bare_name, resolve_targets

__all__ = ["SparseModel", "index_of_choice", "select_entries", "sparse_layers"]

PARTS = ("values", "index", "left_index", "left_values")


class SparseModel(BaseTuner):
    """PEFT's view of the sparse tuner."""

    prefix: str = "sparse_"
    tuner_layer_cls = SparseLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config: SparseConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        given = config.take_allocation()
        if given is not None:
            config.sites = sites_of(given)
        if given is not None:
            config.target_modules = sorted({name.rsplit(".", 1)[0] for name, c in given.items() if not _frozen(c)})
            config.exclude_modules = config.layers_to_transform = None
        else:
            config.target_modules = resolve_targets(model, config.target_modules or "all-linear")
        self._tied = _shared_weights(model)
        wanted = self._wanted(model, config, given)
        if not wanted and not config.sites and state_dict is None:
            raise BadInput(
                f"The sparse tuner's targets {config.target_modules} have none of the tensors {config.tensors}, or all"
                " are excluded. Choose other target_modules or tensors."
            )
        stored = config.allocation == "stored" or state_dict is not None
        self._choices = dict.fromkeys(wanted) if stored else self._choose(model, config, given, wanted)
        config.held_tensors = sorted(self._choices)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, False, state_dict)
        del self._choices

    def _wanted(self, model: nn.Module, config: SparseConfig, given: Allocation | None) -> list[str]:
        """Names (bare) of the tensors that this adapter tunes."""
        if given is not None:
            chosen = [name for name, choice in given.items() if _has_entries(choice)]
            other = [name for name in chosen if name.rsplit(".", 1)[-1] not in TENSORS]
            if other:
                raise Unsupported(
                    f"The sparse tuner holds entries of weights and biases; '{other[0]}' is neither. Leave its module"
                    " out of select.target_modules."
                )
            return chosen
        if config.allocation == "stored" and config.held_tensors is not None:
            return list(config.held_tensors)
        names = []
        inside = [key + "." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for key, module in model.named_modules():
            if not key or any(key.startswith(prefix) for prefix in inside):
                continue
            result = self._check_target_module_exists(config, key)
            if not result or not hasattr(result, "__bool__"):
                continue
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            names += [f"{key}.{t}" for t in config.tensors if _has_tensor(base, t)]
        return names

    def _choose(
        self, model: nn.Module, config: SparseConfig, given: Allocation | None, wanted: list[str]
    ) -> dict[str, Tensor]:
        modules = {name: _module_of(model, name) for name in wanted}
        shapes = {name: _shape(modules[name], name.rsplit(".", 1)[1]) for name in wanted}
        if given is None:
            given = select_entries(config, modules, shapes, _parameter_count(model))
        return {name: index_of_choice(given[name], shapes[name], name) for name in given if _has_entries(given[name])}

    def _create_and_replace(  # type: ignore[override]
        self,
        config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        choices = {t: self._choices[f"{current_key}.{t}"] for t in TENSORS if f"{current_key}.{t}" in self._choices}
        if not choices and not self._choices and not config.sites:  # from a state dict: every tensor it may hold
            choices = {t: None for t in config.tensors if _has_tensor(target, t)}
        if not choices and current_key not in config.sites:
            return
        if isinstance(target, SparseLayer):
            target.add(adapter_name, config, choices)
            target.set_adapter(target.active_adapters)
            return
        layer = SparseLayer(target, current_key, tied=current_key in self._tied)
        layer.set_adapter(adapter_name)
        layer.add(adapter_name, config, choices)
        layer.set_adapter(adapter_name)
        self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.set_adapter(self.active_adapters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # a sparse layer is made on the right device and keeps its dtype

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Values are held in what their config says, whatever PEFT would prefer."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved: an index set with equally many entries in every row as column numbers (see `rowsets`)."""
        kept = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
        ending = f".sparse_weight_index.{adapter_name}"
        for key in [key for key in kept if key.endswith(ending)]:
            layer = layers.get(key.removesuffix(ending))
            if layer is not None:
                kept[key] = _in_columns(kept[key], layer)
        return kept

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if ".sparse_sites." in key:
            return key.replace(f".sparse_sites.{adapter_name}.", ".sparse_sites.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Make room for the file's index sets, whatever their size, and check every tensor of it."""
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
        bare = {name.removeprefix("base_model.model."): (name, layer) for name, layer in layers.items()}
        remapped: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            if ".sparse_sites." in key:
                remapped[_site_key(key, tensor, bare, adapter_name)] = tensor
                continue
            module_key, _, attribute = key.removeprefix("base_model.model.").rpartition(".")
            place = bare.get(module_key)
            if place is None or not attribute.startswith("sparse_"):
                if ".sparse_" in key:
                    raise Corrupt(f"The adapter has entries for '{module_key}', which this model has no place for.")
                remapped[key] = tensor
                continue
            name, layer = place
            target, _, part = attribute.removeprefix("sparse_").partition("_")
            if target not in TENSORS or part not in PARTS or adapter_name not in layer._of(target, "values"):
                raise Corrupt(f"The adapter's tensor '{key}' has no place in this model.")
            if part.endswith("index") and tensor.ndim == 2:  # column numbers per row
                tensor = _flat(tensor, layer, target, module_key)
            layer.resize(adapter_name, target, part, tensor.numel())
            remapped[f"{name}.{attribute}.{adapter_name}"] = tensor
        _check_loaded(bare, adapter_name, remapped)
        _check_sites(bare, adapter_name, remapped)
        return remapped


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The model's sparse layers by the bare name of the module they wrap."""
    return {m.module_name: m for m in model.modules() if isinstance(m, SparseLayer)}


def select_entries(
    config: SparseConfig,
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    whole: int | None = None,
) -> Allocation:
    """Run the config's selector on the targets' weights; from shapes alone on the meta device. whole: parameters of the
    model, for budgets that are a share of it."""
    selector: Any = select_component(config.select)
    if "entries" not in selector.produces:
        raise Unsupported(f"select '{selector.kind}' does not choose single entries, which the sparse tuner needs.")
    if selector.statistics() is not None:
        raise BadInput(
            f"select '{selector.kind}' needs statistics of data. Collect them, select, and attach with"
            " config.with_allocation(allocation)."
        )
    turned = frozenset(name for name, m in modules.items() if name.endswith("weight") and base_facts(m).transposed)
    if any(base_facts(m).device.type == "meta" for m in modules.values()):
        counts = selector.count(None, laid_out(shapes if whole is None else Share(shapes, whole), turned))
        return Allocation(
            {n: Entries(torch.empty(k, dtype=index_dtype(numel(shapes[n])), device="meta")) for n, k in counts.items()}
        )
    weights = {name: _weight(module, name.rsplit(".", 1)[1]) for name, module in modules.items()}
    given = weights if whole is None else Share(weights, whole)
    return selector.select(None, laid_out(given, turned), None, torch.Generator().manual_seed(config.seed))


def index_of_choice(choice: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Any choice of weights as entries."""
    match choice:
        case Entries(index=index):
            return index
        case Whole():
            return everything(numel(shape))
        case Units(axis=axis, index=index):
            return from_units(axis, index, shape)
        case PerTensor(role="tuner", index=Tensor() as index):
            return index
    raise Unsupported(f"{name}: the sparse tuner can't hold the choice {type(choice).__name__}.")


def sites_of(allocation: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """module -> the modules that an allocation gives its weight."""
    found = {}
    for name, choice in allocation.items():
        if isinstance(choice, PerTensor):
            if choice.role != "tuner" or not name.endswith(".weight"):
                raise Unsupported(f"{name}: the sparse tuner can give tuners to weights only, not a {choice.role}.")
            found[name.removesuffix(".weight")] = list(choice.options["sites"])
    return found


def _site_key(key: str, tensor: Tensor, bare: Mapping[str, tuple[str, SparseLayer]], adapter: str) -> str:
    """The place of a saved tensor of a module beside a matrix. Raises `Corrupt`."""
    head, _, rest = key.partition(".sparse_sites.")
    place = bare.get(head.removeprefix("base_model.model."))
    sites: Any = place[1].sparse_sites if place is not None else {}
    own = dict(sites[adapter].named_parameters()) if adapter in sites else {}
    if place is None or rest not in own or own[rest].shape != tensor.shape:
        raise Corrupt(f"The adapter's tensor '{key}' {list(tensor.shape)} has no place in this model.")
    return f"{place[0]}.sparse_sites.{adapter}.{rest}"


def _check_sites(bare: Mapping[str, tuple[str, SparseLayer]], adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for module_key, (name, layer) in bare.items():
        if adapter in layer.sparse_sites:
            for part, _ in layer.sparse_sites[adapter].named_parameters():
                if f"{name}.sparse_sites.{adapter}.{part}" not in tensors:
                    raise Corrupt(f"The adapter's file has no '{part}' for the module beside '{module_key}'.")


def _in_columns(index: Tensor, layer: SparseLayer) -> Tensor:
    """An index as it is written: packed column numbers where every row has equally many, else flat positions."""
    facts = base_facts(layer.get_base_layer())
    columns = columns_of(index, facts.shape, facts.transposed)
    return index if columns is None else pack_columns(columns, numel(facts.shape) // columns.shape[0])


def _flat(columns: Tensor, layer: SparseLayer, tensor: str, key: str) -> Tensor:
    facts = base_facts(layer.get_base_layer())
    try:
        flat = flat_of_columns(unpack_columns(columns), layer.shape_of(tensor), facts.transposed)
    except BadInput as error:
        raise Corrupt(f"'{key}.{tensor}': {error} The adapter was made on another base, or is damaged.") from None
    return flat.to(columns.device)


def _check_loaded(bare: Mapping[str, tuple[str, SparseLayer]], adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for module_key, (name, layer) in bare.items():
        for target in TENSORS:
            if adapter not in layer._of(target, "values"):
                continue
            found = {p: tensors.get(f"{name}.sparse_{target}_{p}.{adapter}") for p in PARTS}
            _check_pair(module_key, layer, target, found["index"], found["values"], required=True)
            _check_pair(module_key, layer, target, found["left_index"], found["left_values"], required=False)
        if adapter in layer._moves:
            layer.moved(adapter)


def _check_pair(
    key: str, layer: SparseLayer, target: str, index: Tensor | None, values: Tensor | None, required: bool
) -> None:
    if index is None and values is None and not required:
        return
    if index is None or values is None:
        raise Corrupt(f"The adapter's file has no complete entry for '{key}.{target}' (index and values).")
    if index.numel() != values.numel():
        raise Corrupt(f"'{key}.{target}': {index.numel()} positions but {values.numel()} values.")
    try:
        check_index(index, numel(layer.shape_of(target)), f"{key}.{target}")
    except BadInput as error:
        raise Corrupt(f"{error} The adapter was made on another base, or is damaged.") from None


def _shared_weights(model: nn.Module) -> set[str]:
    """Bare names of modules whose weight another module holds too."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(bare_name(name))
    return {name for names in owners.values() if len(set(names)) > 1 for name in names}


def _parameter_count(model: nn.Module) -> int:
    """Parameters of the base, packed ones at their full size; adapters' own are left out."""
    own = {id(p) for m in model.modules() if isinstance(m, BaseTunerLayer) for p in _adapter_parameters(m)}
    return sum(numel(full_shape(p)) for p in model.parameters() if id(p) not in own)


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    base = {id(p) for p in layer.get_base_layer().parameters()}
    return [p for p in layer.parameters() if id(p) not in base]


def _module_of(model: nn.Module, tensor: str) -> nn.Module:
    try:
        module = model.get_submodule(tensor.rsplit(".", 1)[0])
    except AttributeError:
        raise BadInput(f"The allocation names '{tensor}', which this model does not have.") from None
    if isinstance(module, SparseLayer):
        module.revert()
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _has_tensor(module: nn.Module, tensor: str) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if tensor == "weight" and not isinstance(getattr(base, "weight", None), Tensor):
        return hasattr(base, "in_features") and hasattr(base, "out_features")
    return isinstance(getattr(base, tensor, None), Tensor)


def _shape(module: nn.Module, tensor: str) -> tuple[int, ...]:
    return base_facts(module).shape if tensor == "weight" else tuple(getattr(module, tensor).shape)


def _weight(module: nn.Module, tensor: str) -> Tensor:
    if tensor == "weight" and base_facts(module).packed:
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module).detach()
    if base_facts(module).offloaded:
        return onloaded(module, tensor)
    return getattr(module, tensor).detach()


def _has_entries(choice: Any) -> bool:
    """Whether single weights of a tensor train (beside or without a module of its own)."""
    return not _frozen(choice) and not (isinstance(choice, PerTensor) and choice.index is None)


def _frozen(choice: Any) -> bool:
    return isinstance(choice, Frozen)


register(NAME, SparseConfig, SparseModel, SparseModel.prefix)
