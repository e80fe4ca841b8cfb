"""The slices tuner's layer around a linear module: some rows or columns of its weight train.

Two executions (chosen per layer, see `held.choose_execution`):
    in_place   the tuned block is written into the base weight, the pretrained one is kept aside; y = x W^T is the
               base's own product, and backward forms the block's gradient alone
    bypass     base(x) plus a small product with the block; for packed and offloaded bases, several active adapters

In place, a forward compares one stamp; it writes only after an optimizer step, a touch or a switch. If somebody
switches the adapter off between a forward and its backward (a reference pass), backward writes it again; if the values
moved in between, it raises.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from pegbox.errors import BadInput, RunFailed, Unsupported
from pegbox.parts.parameterinfo import CLOCK, info_of
from pegbox.tuners.slices.held import HeldSlices
from pegbox.tuners.slices.products import Block, InPlaceLinear, added
from pegbox.tuners.sparse.execution import base_facts
from pegbox.tuners.sparse.products import operation_of

__all__ = ["SliceLayer"]

Stamp = tuple[Any, ...]


@dataclass
class Written:
    """What the base weight holds at the moment: whose block, where, and the pretrained one it covers."""

    home: Any  # the tensor that is written into
    stamp: Stamp | None = None
    block: Block | None = None
    original: Tensor | None = None


class SliceLayer(HeldSlices):
    """See the file's header. One instance serves all adapters of a module."""

    def __init__(self, base_layer: nn.Module, name: str, tied: bool, place: dict[int, Tensor]):
        super().__init__(base_layer, name, tied, place)
        self._merged: list[tuple[Block, Tensor]] = []  # what each merge covered
        self._start_anew()
        self.register_state_dict_pre_hook(_revert_before_state_dict)
        self.register_load_state_dict_pre_hook(_revert_before_load)

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters and self.merged:
            self.unmerge()
        active = self.adapters_on()
        if self.merged or not active:
            self.revert()
            return self.base_layer(x, *args, **kwargs)
        for adapter in active:
            self._require_loaded(adapter)
        if len(active) == 1 and not args and not kwargs and self._can_write(active[0]):
            return self._in_place(x, active[0])
        self.revert()
        y = self.base_layer(x, *args, **kwargs)
        for adapter in active:
            block = self.block(adapter)
            change: Tensor = self.slice_values[adapter]
            if self._options[adapter].coordinates == "absolute":
                change = change - block.take(self.pretrained(), block.axis).to(change.dtype)
            y = added(y, x, change, block)
        return y

    def _can_write(self, adapter: str) -> bool:
        """Whether the base's forward is a plain product that a tuned block written into its weight goes through."""
        written = self._options[adapter].execution == "in_place"
        return written and operation_of(self.base_layer) is not None and not _has_hooks(self.base_layer)

    @torch.compiler.disable
    def _in_place(self, x: Tensor, adapter: str) -> Tensor:
        self.sync(adapter)
        block = self.block(adapter)
        bias = getattr(self.base_layer, "bias", None)
        if not torch.is_grad_enabled():
            return F.linear(x, block.logical(self.base.weight), bias)
        lent = _Lent(self, adapter, block, self.identity(adapter))
        return InPlaceLinear.apply(x, bias, lent, self.slice_values[adapter])

    def _require_loaded(self, adapter: str) -> None:
        if adapter in self._waiting:
            raise BadInput(
                f"{self.module_name}: adapter '{adapter}' was made from a saved config, but its file is not loaded."
                " Use PeftModel.from_pretrained, or set allocation='select' to choose units anew."
            )

    # ---- what is written into the base weight

    def _start_anew(self) -> None:
        """Nothing is written."""
        self.written = Written(getattr(self.base_layer, "weight", None))
        self._blocks = {}

    def identity(self, adapter: str) -> Stamp:
        """(adapter, its positions, its values): changes whenever one of them does."""
        values, index = self.slice_values[adapter], self.slice_index[adapter]
        info = info_of(values)
        writes = info.writes if info else 0
        return adapter, id(index), id(values), _version(values), _version(index), writes, CLOCK.unattributed

    def sync(self, adapter: str) -> None:
        """Make the base weight hold this adapter's block."""
        held, weight = self.written, self.base.weight
        if weight is not held.home:
            self.written = held = Written(weight)  # what was written into another tensor is gone with it
        stamp = (*self.identity(adapter), CLOCK.now)
        if stamp != held.stamp:
            self._write(stamp, adapter)

    @torch.no_grad()
    def _write(self, stamp: Stamp, adapter: str) -> None:
        held, block = self.written, self.block(adapter)
        weight: Tensor = self.base.weight.detach()
        if weight.is_meta:
            held.stamp = stamp
            return
        if hasattr(weight, "device_mesh"):
            raise Unsupported(
                f"{self.module_name}: the base is sharded, so nothing can be written into it. Use execution: bypass."
            )
        if held.stamp is None or held.stamp[:2] != stamp[:2] or held.block is not block:
            self.revert()
            held.block, held.original = block, block.take(weight, block.axis)
        assert held.original is not None
        block.put_(weight, self._tuned(adapter, held.original).to(weight.dtype))
        held.stamp = stamp

    def _tuned(self, adapter: str, original: Tensor) -> Tensor:
        """The tuned block over this pretrained one, not yet rounded to the base's dtype."""
        values = self.slice_values[adapter].detach()
        return values if self._options[adapter].coordinates == "absolute" else original.to(values.dtype) + values

    @torch.no_grad()
    def revert(self) -> None:
        """The base weight holds the pretrained block, bit for bit; the next forward writes again."""
        held = self.written
        if held.stamp is None:
            return
        if held.original is not None and held.block is not None and self.base.weight is held.home:
            held.block.put_(self.base.weight.detach(), held.original)
        self.written = Written(self.base.weight)

    # ---- PEFT's switches

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        BaseTunerLayer.set_adapter(self, adapter_names, inference_mode=inference_mode)
        self.revert()

    def enable_adapters(self, enabled: bool) -> None:
        BaseTunerLayer.enable_adapters(self, enabled)
        if not enabled:
            self.revert()

    def delete_adapter(self, adapter_name: str) -> None:
        self.revert()
        BaseTunerLayer.delete_adapter(self, adapter_name)
        self._options.pop(adapter_name, None)
        self._blocks.pop(adapter_name, None)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write blocks into the base for good (until `unmerge`), rounded once to the base's dtype."""
        names = check_adapters_to_merge(self, adapter_names)
        self.revert()
        for adapter in names:
            if adapter in self.slice_values:
                self._require_loaded(adapter)
                self._merge_one(adapter, safe_merge)
                self.merged_adapters.append(adapter)

    def _merge_one(self, adapter: str, safe: bool) -> None:
        if base_facts(self.base_layer).packed:
            raise Unsupported(f"{self.module_name}: rows and columns can't be merged into a packed weight.")
        if self.tied:
            raise Unsupported(
                f"{self.module_name}.weight is shared with another module, so that merging would change both."
                " Load the base with tie_word_embeddings=False."
            )
        values, block = self.slice_values[adapter].detach(), self.block(adapter)
        if safe and not bool(torch.isfinite(values).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        weight = self.base.weight.detach()
        before = block.take(weight, block.axis)
        tuned = before.to(values.dtype) + values
        if self._options[adapter].coordinates == "absolute":
            tuned = values if not self._merged else before.to(values.dtype) + (values - self._pretrained_at(block))
        block.put_(weight, tuned.to(weight.dtype))
        self._merged.append((block, before))

    def _pretrained_at(self, block: Block) -> Tensor:
        """The block from before the first merge."""
        weight = self.base.weight.detach().clone()
        for other, before in reversed(self._merged):
            other.put_(weight, before)
        return block.take(weight, block.axis)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back, bit for bit, what was there before `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for block, before in reversed(self._merged):
            block.put_(self.base.weight.detach(), before)
        self._merged.clear()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.revert()
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class _Lent:
    """A `products.Holder`: remembers which values the forward ran on, and refuses a backward on others."""

    __slots__ = ("adapter", "block", "identity", "layer")

    def __init__(self, layer: SliceLayer, adapter: str, block: Block, identity: Stamp):
        self.layer, self.adapter, self.block, self.identity = layer, adapter, block, identity

    def first_weight(self) -> Tensor:
        return self.layer.base.weight

    def weight(self) -> Tensor:
        layer = self.layer
        if layer.identity(self.adapter) != self.identity:
            raise RunFailed(
                f"{layer.module_name}: the trained block changed between a forward and its backward (an optimizer step "
                "in between), so the gradient would be wrong. Run backward before stepping."
            )
        layer.sync(self.adapter)
        return layer.base.weight.detach()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "_hf_hook" in module.__dict__  # accelerate's replaces the forward


def _revert_before_state_dict(layer: Any, *args: Any) -> None:
    layer.revert()


def _revert_before_load(layer: Any, *args: Any) -> None:
    layer.revert()
