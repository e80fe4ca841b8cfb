"""What a sparse layer holds: for each adapter and target tensor a slot, saved by PEFT, and the base layer it is for.

Names of what is saved: `sparse_<tensor>_<part>.<adapter>` with tensor weight or bias, and part values, index,
left_index or left_values (see `slots.py`). What a forward does with it is in `layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pegbox.errors import Unsupported
from pegbox.parts.indexsets import check_index, index_dtype, numel
from pegbox.parts.packed import floating
from pegbox.parts.parameterinfo import ParameterInfo, attach_info, info_of, touch
from pegbox.parts.watching import Watch
from pegbox.tuners.sparse.execution import base_facts, choose_execution, onloaded
from pegbox.tuners.sparse.sites import make_sites
from pegbox.tuners.sparse.slots import Slot, move, touched, values_dtype

__all__ = ["TENSORS", "HeldEntries"]

TENSORS = ("weight", "bias")


class HeldEntries(nn.Module, BaseTunerLayer):
    """The slots of all adapters of one module; PEFT's containers, and every change to them."""

    adapter_layer_names = (*(f"sparse_{t}_values" for t in TENSORS), "sparse_sites")
    other_param_names = tuple(f"sparse_{t}_{part}" for t in TENSORS for part in ("index", "left_index", "left_values"))

    def __init__(self, base_layer: nn.Module, name: str, tied: bool = False):
        super().__init__()
        self.base_layer = base_layer
        self.module_name, self.tied = name, tied
        for tensor in TENSORS:
            setattr(self, f"sparse_{tensor}_values", nn.ParameterDict())
            for part in ("index", "left_index", "left_values"):
                setattr(self, f"sparse_{tensor}_{part}", BufferDict(persistent=True))
        self.sparse_sites = nn.ModuleDict()  # adapter -> modules beside the matrix (see `sites.py`)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._options: dict[str, dict[str, str]] = {}  # adapter -> execution, gradient, coordinates
        self._scales: dict[str, float] = {}  # adapter -> what its values are multiplied by
        self._moves: dict[str, int] = {}  # adapter -> how often its index sets were replaced; -1: waits for its file
        self.watches: dict[tuple[str, str], Watch] = {}  # (adapter, tensor) -> who looks at the whole tensor's gradient

    def revert(self) -> None:
        """Take what is written into the base weight out again."""
        raise NotImplementedError

    def _start_anew(self) -> None:
        """Forget what depends on the tensors' identity."""
        raise NotImplementedError

    def add(self, adapter: str, config: Any, choices: dict[str, Tensor | None]) -> None:
        """Add an adapter. choices: tensor -> index (k,), or None for one whose index comes from a file."""
        self.revert()
        facts = base_facts(self.base_layer)
        execution = choose_execution(config.execution, facts, self.tied, config.coordinates, self.module_name)
        self._options[adapter] = {
            "execution": execution,
            "gradient": config.gradient,
            "values": config.values,
            "coordinates": config.coordinates,
        }
        self._scales[adapter] = config.scale
        for tensor, index in choices.items():
            if execution == "bypass" and tensor != "weight":
                raise Unsupported(f"{self.module_name}: a {tensor} can't be tuned beside a packed or offloaded base.")
            shape = self.shape_of(tensor)
            empty = torch.empty(0, dtype=index_dtype(numel(shape)), device=facts.device)
            where = f"{self.module_name}.{tensor}"
            chosen = empty if index is None else index.to(facts.device, index_dtype(numel(shape)))
            check_index(chosen, numel(shape), where)
            self._install(adapter, tensor, chosen)
        if config.sites.get(self.module_name):
            dtype = values_dtype(facts.dtype, config.values)
            made = make_sites(self.base_layer, facts, config.sites[self.module_name], dtype, self.module_name)
            self.sparse_sites[adapter] = made.train(self.training)
        self._moves[adapter] = 0 if all(c is not None for c in choices.values()) else -1  # -1: waits for its file
        self.attach_infos()

    def _install(self, adapter: str, tensor: str, index: Tensor) -> None:
        self._of(tensor, "index")[adapter] = index
        self._of(tensor, "values")[adapter] = nn.Parameter(self.start_values(adapter, tensor, index))

    def start_values(self, adapter: str, tensor: str, index: Tensor) -> Tensor:
        """Values (k,) that leave the weight as it is: 0 for delta, the pretrained entries for absolute."""
        dtype = values_dtype(base_facts(self.base_layer).dtype, self._options[adapter]["values"])
        if self._options[adapter]["coordinates"] == "delta" or index.is_meta:
            return torch.zeros(index.numel(), dtype=dtype, device=index.device)
        return self.pretrained(tensor)[index.long()].to(dtype)

    def resize(self, adapter: str, tensor: str, part: str, count: int) -> None:
        """Give a saved tensor of `count` entries a place to be loaded into; a parameter of other size is replaced."""
        self.revert()
        values, index = self.sparse_values(tensor, adapter), self._of(tensor, "index")[adapter]
        like = values.detach() if part.endswith("values") else index
        if part == "values":
            if values.numel() != count:
                self._replace_values(adapter, tensor, torch.zeros(count, dtype=like.dtype, device=like.device))
        else:
            self._of(tensor, part)[adapter] = torch.zeros(count, dtype=like.dtype, device=like.device)
        self.moved(adapter)

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Expect tensors of these shapes (by name below this layer) to be copied in: a checkpoint's index sets may have
        other sizes than those that were selected at the start, and entries may have left since or not have left yet."""
        for tensor in TENSORS:
            for adapter in list(self._of(tensor, "values")):
                for part in ("values", "index", "left_index", "left_values"):
                    shape = shapes.get(f"sparse_{tensor}_{part}.{adapter}")
                    if shape is not None:
                        self.resize(adapter, tensor, part, numel(shape))
                    elif part.startswith("left") and adapter in self._of(tensor, part):
                        self.revert()
                        del self._of(tensor, part)[adapter]
                        self.moved(adapter)

    def attach_infos(self) -> None:
        """Tell optimizers what each values parameter stands for."""
        for tensor in TENSORS:
            for adapter, values in self._of(tensor, "values").items():
                if info_of(values) is None:
                    attach_info(values, self._info(adapter, tensor))

    def _info(self, adapter: str, tensor: str) -> ParameterInfo:
        return ParameterInfo(
            name=f"{self.module_name}.{tensor}",
            shape=self.shape_of(tensor),
            index=lambda: self._of(tensor, "index")[adapter],
            reference=lambda: self.reference_values(adapter, tensor),
            coordinates=self._options[adapter]["coordinates"],  # type: ignore[arg-type]
        )

    def reference_values(self, adapter: str, tensor: str) -> Tensor:
        """(k,) the pretrained values of the trained entries."""
        self.revert()
        dtype = self.sparse_values(tensor, adapter).dtype
        return self.pretrained(tensor)[self._of(tensor, "index")[adapter].long()].to(dtype)

    def slot(self, adapter: str, tensor: str) -> Slot:
        """An adapter's share of a tensor."""
        left = self._of(tensor, "left_index")
        has_left = adapter in left
        return Slot(
            index=self._of(tensor, "index")[adapter],
            values=self.scaled_values(tensor, adapter),
            left_index=left[adapter] if has_left else None,
            left_values=self._of(tensor, "left_values")[adapter] if has_left else None,
            absolute=self._options[adapter]["coordinates"] == "absolute",
        )

    def sites_of(self, adapter: str) -> list[Any]:
        """The modules that an adapter has beside the matrix."""
        return list(self.sparse_sites[adapter]) if adapter in self.sparse_sites else []  # type: ignore[call-overload]

    def adapters_on(self, tensor: str) -> list[str]:
        """Active adapters that tune this tensor."""
        if self._disable_adapters:
            return []
        held = self._of(tensor, "values")
        return [adapter for adapter in self.active_adapters if adapter in held]

    @property
    def base(self) -> Any:
        """The wrapped module."""
        return self.base_layer

    def sparse_values(self, tensor: str, adapter: str) -> nn.Parameter:
        return self._of(tensor, "values")[adapter]

    def scaled_values(self, tensor: str, adapter: str) -> Tensor:
        """What is added to the pretrained entries: trained values, times the adapter's scale (a new tensor then)."""
        values, scale = self.sparse_values(tensor, adapter), self._scales.get(adapter, 1.0)
        return values if scale == 1.0 else values * scale

    def option(self, adapter: str, name: str) -> str:
        """An adapter's execution, gradient or coordinates on this layer."""
        return self._options[adapter][name]

    def _replace_values(self, adapter: str, tensor: str, values: Tensor) -> nn.Parameter:
        """Values of another size need another parameter: autograd keeps a leaf's size for as long as a graph lives."""
        old = self.sparse_values(tensor, adapter)
        self._of(tensor, "values")[adapter] = nn.Parameter(values, requires_grad=old.requires_grad)
        self.attach_infos()
        return self.sparse_values(tensor, adapter)

    @torch.no_grad()
    def move(
        self, adapter: str, tensor: str, index: Tensor, leave: Literal["keep", "revert"] = "keep"
    ) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
        """Train other entries from now on (see `slots.move`).

        Returns the values parameter before and after (the same object if k is the same), and each entry's place in it
        before (-1: new).
        """
        if self._scales.get(adapter, 1.0) != 1.0:
            raise Unsupported(f"{self.module_name}: the entries of an adapter with a scale can't move while it trains.")
        self.revert()
        check_index(index, numel(self.shape_of(tensor)), f"{self.module_name}.{tensor}")
        slot = self.slot(adapter, tensor)
        result = move(slot, index, self.pretrained(tensor) if slot.absolute else None, leave)
        before = values = self.sparse_values(tensor, adapter)
        if values.shape == result.values.shape:
            values.copy_(result.values)
        else:
            values = self._replace_values(adapter, tensor, result.values)
        self._of(tensor, "index")[adapter] = result.index
        for part, held in (("left_index", result.left_index), ("left_values", result.left_values)):
            if held.numel():
                self._of(tensor, part)[adapter] = held
            elif adapter in self._of(tensor, part):
                del self._of(tensor, part)[adapter]
        self.moved(adapter)
        touch([values])
        return before, values, result.source

    def moved(self, adapter: str) -> None:
        """Say that an adapter's index sets have changed (or have been loaded)."""
        self._moves[adapter] = max(self._moves[adapter], 0) + 1

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        if tensor == "weight":
            return base_facts(self.base_layer).shape
        return tuple(getattr(self.base_layer, tensor).shape)

    def pretrained(self, tensor: str) -> Tensor:
        """The base's tensor, flat, as stored now; packed ones as floats. Revert first to have the pretrained one."""
        held = getattr(self.base_layer, tensor)
        if held.is_meta and base_facts(self.base_layer).offloaded:
            return onloaded(self.base_layer, tensor).reshape(-1)
        return floating(held).detach().reshape(-1)

    def _of(self, tensor: str, part: str) -> Any:
        return getattr(self, f"sparse_{tensor}_{part}")

    def touched(self, adapter: str, tensor: str) -> int:
        """How many entries of a tensor this adapter has ever trained."""
        return touched(self.slot(adapter, tensor)).numel()

    # ---- moving, copying, printing

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves go through; casts do not reach the values: they stay float32 when the base becomes bfloat16."""
        self.revert()
        exact = [(t, a, v.detach().clone()) for t in TENSORS for a, v in self._of(t, "values").items()]
        left = [(t, a, v.clone()) for t in TENSORS for a, v in self._of(t, "left_values").items()]
        result = super()._apply(fn, recurse)
        with torch.no_grad():
            for tensor, adapter, values in exact:
                held = self.sparse_values(tensor, adapter)
                if held.dtype != values.dtype and not held.is_meta:
                    held.data = values.to(held.device)
            for tensor, adapter, values in left:
                held = self._of(tensor, "left_values")[adapter]
                if held.dtype != values.dtype:
                    self._of(tensor, "left_values")[adapter] = values.to(held.device)
        self._start_anew()
        self.attach_infos()
        return result

    def __getstate__(self) -> dict[str, Any]:
        self.revert()
        return {k: v for k, v in self.__dict__.items() if k not in ("in_place", "_patterns", "_quick", "watches")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watches = {}
        self._start_anew()
        self.attach_infos()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device only: PEFT would cast the values to the base's dtype."""
        target = device or base_facts(self.base_layer).device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, name)
            if adapter_name in held and not getattr(held[adapter_name], "is_meta", False):
                held[adapter_name] = held[adapter_name].to(target)
        self.attach_infos()

    def extra_repr(self) -> str:
        counts = {a: v.numel() for a, v in self._of("weight", "values").items()}
        return f"kept={counts}"
