"""What a slice layer holds: for each adapter its block and its original row or column numbers, saved by PEFT.

Names of what is saved: `slice_values.<adapter>` (as the stored weight, n in place of one axis) and
`slice_index.<adapter>` (n,) int32. What a forward does with it is in `layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.packed import floating
from pegbox.parts.parameterinfo import ParameterInfo, attach_info, info_of
from pegbox.parts.slices import Slice
from pegbox.tuners.slices.products import Block
from pegbox.tuners.sparse.execution import BaseFacts, base_facts, onloaded
from pegbox.tuners.sparse.products import LinearOperation, operation_of
from pegbox.tuners.sparse.slots import values_dtype

__all__ = ["HeldSlices", "Option"]


@dataclass(frozen=True)
class Option:
    """How one adapter runs on this layer."""

    axis: int
    execution: str
    coordinates: str
    layout: str


class HeldSlices(nn.Module, BaseTunerLayer):
    """The blocks of all adapters of one linear layer.

    Args:
        place: axis -> where each original position stands now; axes that were not re-ordered are absent.
    """

    adapter_layer_names = ("slice_values",)
    other_param_names = ("slice_index",)

    def __init__(self, base_layer: nn.Module, name: str, tied: bool, place: dict[int, Tensor]):
        super().__init__()
        self.base_layer = base_layer
        self.module_name, self.tied, self.place = name, tied, place
        self.slice_values = nn.ParameterDict()
        self.slice_index = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._options: dict[str, Option] = {}
        self._waiting: set[str] = set()  # adapters whose file is not loaded yet
        self._blocks: dict[str, Block] = {}

    def revert(self) -> None:
        """Take what is written into the base weight out again."""
        raise NotImplementedError

    def _start_anew(self) -> None:
        """Forget what depends on the tensors' identity."""
        raise NotImplementedError

    def add(self, adapter: str, config: Any, axis: int, index: Tensor | None) -> None:
        """Add an adapter; `index` (n,) original positions, None for one whose numbers come from a file."""
        self.revert()
        facts = base_facts(self.base_layer)
        linear = isinstance(operation_of(self.base_layer), LinearOperation)
        execution = choose_execution(config, facts, linear, self.tied, self.module_name)
        self._options[adapter] = Option(axis, execution, config.coordinates, config.layout)
        chosen = torch.empty(0, dtype=torch.int32) if index is None else index
        self._check(chosen)
        self._install(adapter, chosen.to(facts.device, torch.int32))
        if index is None:
            self._waiting.add(adapter)

    def _install(self, adapter: str, index: Tensor) -> None:
        self._blocks.pop(adapter, None)
        self.slice_index[adapter] = index
        self.slice_values[adapter] = nn.Parameter(self._start_values(adapter, index))
        self.attach_infos()

    def _start_values(self, adapter: str, index: Tensor) -> Tensor:
        """A block that leaves the weight as it is: zeros, or the pretrained slice."""
        option, facts = self._options[adapter], base_facts(self.base_layer)
        dtype = values_dtype(facts.dtype)
        if option.coordinates == "absolute" and not index.is_meta and index.numel():
            return self.block(adapter).take(self.pretrained(), option.axis).to(dtype)
        shape = [index.numel() if axis == option.axis else n for axis, n in enumerate(facts.shape)]
        return torch.zeros(shape, dtype=dtype, device=facts.device)

    def resize(self, adapter: str, count: int) -> None:
        """Give a saved block of `count` rows or columns a place to be loaded into."""
        self.revert()
        option, values = self._options[adapter], self.slice_values[adapter]
        shape = [count if axis == option.axis else n for axis, n in enumerate(values.shape)]
        self.slice_index[adapter] = torch.arange(count, dtype=torch.int32, device=values.device)
        self.slice_values[adapter] = nn.Parameter(values.new_zeros(shape), requires_grad=values.requires_grad)
        self.attach_infos()

    def loaded(self, adapter: str, index: Tensor) -> None:
        """A file's numbers are about to be copied in: check them, forget what was derived from others."""
        self._check(index, adapter)
        self._waiting.discard(adapter)
        self._blocks.pop(adapter, None)

    def _check(self, index: Tensor, adapter: str | None = None) -> None:
        if index.is_meta or not index.numel():
            return
        axis = self._options[adapter or next(reversed(self._options))].axis
        length = self.shape[axis]
        if int(index.min()) < 0 or int(index.max()) >= length:
            raise BadInput(
                f"{self.module_name}: the adapter changes position {int(index.max())} of an axis of {length}. It was "
                "made on another base."
            )
        if index.unique().numel() != index.numel():
            raise BadInput(f"{self.module_name}: a position stands twice in the adapter.")

    # ---- reading

    def block(self, adapter: str) -> Block:
        """Where an adapter's rows or columns stand now."""
        found = self._blocks.get(adapter)
        index = self.slice_index[adapter]
        if found is None or found.at.device != index.device:
            option, at = self._options[adapter], index.long()
            place = self.place.get(option.axis)
            if place is not None:
                at = place.to(at.device)[at]
            transposed = base_facts(self.base_layer).transposed and not base_facts(self.base_layer).packed
            found = Block.of(option.axis, transposed, at, option.layout != "gather")
            self._blocks[adapter] = found
        return found

    def slice_of(self, adapter: str) -> Slice:
        """The adapter's update with original numbers, on the CPU."""
        option = self._options[adapter]
        mode: Any = "set" if option.coordinates == "absolute" else "add"
        values, index = self.slice_values[adapter].detach().cpu().clone(), self.slice_index[adapter].long().cpu()
        return Slice(option.axis, self.shape[option.axis], index, values, mode)

    def option(self, adapter: str) -> Option:
        return self._options[adapter]

    def adapters_on(self) -> list[str]:
        """Active adapters that change this layer."""
        if self._disable_adapters:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.slice_values]

    @property
    def base(self) -> Any:
        return self.base_layer

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored weight; of a packed one, (out, in)."""
        return base_facts(self.base_layer).shape

    def pretrained(self) -> Tensor:
        """The base's weight as stored now; packed ones as floats. Revert first to have the pretrained one."""
        held = self.base.weight
        if held.is_meta and base_facts(self.base_layer).offloaded:
            return onloaded(self.base_layer, "weight")
        return floating(held).detach()

    def attach_infos(self) -> None:
        """Tell optimizers what each block stands for."""
        for adapter, values in self.slice_values.items():
            if info_of(values) is None:
                attach_info(values, self._info(adapter))

    def _info(self, adapter: str) -> ParameterInfo:
        return ParameterInfo(
            name=f"{self.module_name}.weight",
            shape=self.shape,
            index=lambda: self._flat(adapter),
            reference=lambda: self.reference_values(adapter).reshape(-1),
            coordinates=self._options[adapter].coordinates,  # type: ignore[arg-type]
        )

    def _flat(self, adapter: str) -> Tensor:
        """(k,) flat original positions of the block's entries, in the block's order."""
        rows, columns = (torch.arange(n) for n in self.shape)
        index = self.slice_index[adapter].long().cpu()
        at = (index, columns) if self._options[adapter].axis == 0 else (rows, index)
        return (at[0][:, None] * self.shape[1] + at[1]).reshape(-1)

    def reference_values(self, adapter: str) -> Tensor:
        """The pretrained block."""
        self.revert()
        block = self.block(adapter)
        return block.take(self.pretrained(), block.axis).to(self.slice_values[adapter].dtype)

    # ---- moving, copying, printing

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves go through; casts do not reach the blocks: they stay float32 when the base becomes bfloat16."""
        self.revert()
        exact = {a: v.detach().clone() for a, v in self.slice_values.items()}
        result = super()._apply(fn, recurse)
        with torch.no_grad():
            for adapter, values in exact.items():
                held = self.slice_values[adapter]
                if held.dtype != values.dtype and not held.is_meta:
                    held.data = values.to(held.device)
        self._start_anew()
        self.attach_infos()
        return result

    def __getstate__(self) -> dict[str, Any]:
        self.revert()
        return {k: v for k, v in self.__dict__.items() if k != "written"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_anew()
        self.attach_infos()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device only: PEFT would cast the block to the base's dtype."""
        target = device or base_facts(self.base_layer).device
        for held in (self.slice_values, self.slice_index):
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name] = held[adapter_name].to(target)
        self.attach_infos()

    def extra_repr(self) -> str:
        sizes = {a: ("columns", "rows")[self.block(a).rows] + f" {v.numel()}" for a, v in self.slice_index.items()}
        return f"trained={sizes}"


def choose_execution(config: Any, facts: BaseFacts, linear: bool, tied: bool, name: str) -> str:
    """in_place or bypass. Raises `Unsupported` with the reason where what was asked for would be wrong."""
    if facts.sharded:
        raise Unsupported(f"{name}: attach the slices tuner before the model is sharded.")
    if not (facts.packed or linear):
        raise Unsupported(f"{name}: rows and columns can be tuned of linear layers only.")
    if config.layout == "contiguous" and facts.packed:
        raise Unsupported(f"{name}: a quantized weight can't be re-ordered into ranges. Use layout: gather.")
    if config.coordinates == "absolute" and (facts.packed or facts.offloaded):
        raise Unsupported(f"{name}: absolute coordinates need the base's own numbers. Use coordinates: delta.")
    against = {
        "the weight is quantized": facts.packed,
        "the weight is offloaded": facts.offloaded,
        "the weight is shared with another module": tied,
        "the weight is not contiguous in memory": not facts.contiguous,
    }
    reasons = [reason for reason, holds in against.items() if holds]
    if config.execution == "in_place" and reasons:
        raise Unsupported(f"{name}: in place is not possible: {reasons[0]}. Use execution: auto.")
    if config.execution == "auto":
        return "bypass" if reasons else "in_place"
    return str(config.execution)
