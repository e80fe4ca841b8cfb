"""The sparse tuner's layer around any module with a weight or a bias: k entries of it train.

Four executions (chosen per layer, see `execution.py`):
    in_place   the tuned entries are written into the base weight; pretrained ones are kept aside; f(x, W) is the base's
    scatter    a tuned weight is built for the call (and again in backward), the base stays untouched
    bypass     base(x) + x D^T with D sparse; for packed or offloaded bases
    lean       for each call the cheaper of the last two; nothing is kept but positions and values
Vectors (norms, biases) are always built: they cost nothing.

In place, a forward compares one stamp; it writes only after an optimizer step, a touch or a switch. If somebody
switches the adapter off between a forward and its backward (a reference pass), backward writes it again; if the values
moved in between, it raises.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.indexsets import numel
from pegbox.parts.parameterinfo import CLOCK, info_of
from pegbox.parts.rowsets import shared_columns_of
from pegbox.tuners.sparse.execution import base_facts, product_is_cheaper
from pegbox.tuners.sparse.held import TENSORS, HeldEntries
from pegbox.tuners.sparse.in_place import InPlace
from pegbox.tuners.sparse.lent import Lent
from pegbox.tuners.sparse.products import (
    Bypass,
    Kept,
    LinearOperation,
    csr_pattern,
    operation_of,
    shared_columns_product,
)
from pegbox.tuners.sparse.slots import (
    Slot,
    add_entries,
    build_with_grad,
    difference_of,
    gather_parts,
    restore_entries,
    write_entries,
)

__all__ = ["TENSORS", "SparseLayer"]


class SparseLayer(HeldEntries):
    """See the file's header. One instance serves all adapters of a module."""

    def __init__(self, base_layer: nn.Module, name: str, tied: bool = False):
        super().__init__(base_layer, name, tied)
        self._merged: list[tuple[str, list[Tensor], list[Tensor]]] = []  # (tensor, positions, entries before)
        self._whole_before: Tensor | None = None  # the weight from before a module beside it was folded in
        self._packed_before: list[nn.Parameter] = []  # packed weights from before each merge
        self.requantize = False  # whether merging into a packed weight is meant
        self._start_anew()
        self.register_state_dict_pre_hook(_revert_before_state_dict)
        self.register_load_state_dict_pre_hook(_revert_before_load)

    _quick: tuple[str, Any, Any] | None  # adapter, operation, and what was active when a forward ran in place

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self._entries_forward(x, *args, **kwargs)
        return self._through_sites(x, y) if self._modules["sparse_sites"]._modules else y  # type: ignore[union-attr]

    def _through_sites(self, x: Tensor, y: Tensor) -> Tensor:
        """The output with what the modules beside the matrix add."""
        if not self._disable_adapters and not self.merged:
            for adapter in self.active_adapters:
                for site in self.sites_of(adapter):
                    y = site(x, y)
        return y

    def _entries_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._quick is not None and not args and not kwargs and self._still_quick():
            return self._quick_forward(x)
        if self._disable_adapters and self.merged:
            self.unmerge()
        active, biased = self.adapters_on("weight"), self.adapters_on("bias")
        if self.merged or not (active or biased):
            self.sync()
            return self.base_layer(x, *args, **kwargs)
        for adapter in {*active, *biased}:
            self._require_loaded(adapter)
        bias = self._built("bias", biased)
        if any(self._options[a]["execution"] == "bypass" for a in active) or self._product_is_cheaper(x, active):
            self.revert()
            return self._bypassed(x, active, *args, **kwargs)
        operation = operation_of(self.base_layer) if active else None
        if operation is None or args or kwargs or _has_hooks(self.base_layer):
            self.revert()
            weight = self._built("weight", active)
            replaced = {name: t for name, t in (("weight", weight), ("bias", bias)) if t is not None}
            return functional_call(self.base_layer, replaced, (x, *args), kwargs)
        return self._kept(x, bias, active, operation)

    def _product_is_cheaper(self, x: Tensor, active: list[str]) -> bool:
        """For lean adapters: a product beside the base's, or a weight built for this call?"""
        lean = [a for a in active if self._options[a]["execution"] == "lean"]
        operation = operation_of(self.base_layer) if lean else None
        if operation is None or not operation.sparse_product:
            return False
        facts = base_facts(self.base_layer)
        if all(self._shared_columns(a) is not None for a in active):
            return True
        kept = sum(self.slot(a, "weight").index.numel() for a in active)
        return product_is_cheaper(x.numel() // max(1, x.shape[-1]), kept, facts.shape, facts.transposed)

    def _shared_columns(self, adapter: str) -> Tensor | None:
        """(k,) the columns that all rows of a lean adapter train, if they are the same (looked up once per set)."""
        key = self._sets(adapter)
        held = self._columns.get(adapter)
        if held is None or held[0] != key:
            slot, facts = self.slot(adapter, "weight"), base_facts(self.base_layer)
            lean = self._options[adapter]["execution"] == "lean" and slot.left_index is None
            found = shared_columns_of(slot.index, facts.shape, facts.transposed) if lean else None
            held = self._columns[adapter] = (key, found)
        return held[1]

    @torch.compiler.disable
    def _kept(self, x: Tensor, bias: Tensor | None, active: list[str], operation: Any) -> Tensor:
        in_place = len(active) == 1 and self._options[active[0]]["execution"] == "in_place"
        if in_place:
            self.sync()
            if bias is None and "weight" in self.base._parameters and self._scales.get(active[0], 1.0) == 1.0:
                self._quick = (active[0], operation, self._active_adapter)
        else:
            self.revert()
        if bias is None:
            bias = getattr(self.base_layer, "bias", None)
        values = [self.scaled_values("weight", a) for a in active]
        lent = Lent(self, active, in_place, operation, [self.identity(a) for a in active])
        return Kept.apply(x, bias, lent, *values)

    def _still_quick(self) -> bool:
        """Nothing has changed since the last forward in place but, perhaps, the values."""
        assert self._quick is not None
        return (
            self._active_adapter is self._quick[2]
            and not self._disable_adapters
            and not self.merged_adapters
            and not _has_hooks(self.base)
            and not torch.compiler.is_compiling()
        )

    def _quick_forward(self, x: Tensor) -> Tensor:
        """In place with one adapter: a stamp is compared, the base's product is made."""
        assert self._quick is not None
        adapter, operation, _ = self._quick
        own, held = self.base._parameters, self.in_place
        identity = self.identity(adapter)
        if held.home is not own["weight"]:
            held.settle(own["weight"])
        stamp = (*identity, CLOCK.now)
        if not held.up_to_date(stamp):
            held.write(stamp, self.slot(adapter, "weight"))
        if not torch.is_grad_enabled():
            return operation.forward(self.base_layer, x, own["weight"], own.get("bias"))
        lent = Lent(self, [adapter], True, operation, [identity])
        return Kept.apply(x, own.get("bias"), lent, self._modules["sparse_weight_values"]._parameters[adapter])  # type: ignore[union-attr]

    def _built(self, tensor: str, adapters: list[str]) -> Tensor | None:
        if not adapters:
            return None
        shape = self.shape_of(tensor)
        built = build_with_grad(self.pretrained(tensor), [self.slot(a, tensor) for a in adapters]).view(shape)
        for adapter in adapters if self.watches and built.requires_grad else ():
            if (adapter, tensor) in self.watches:
                built.register_hook(lambda g, watch=self.watches[(adapter, tensor)]: watch.see(g))
        return built

    def _bypassed(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        facts = base_facts(self.base_layer)
        operation = operation_of(self.base_layer) or (LinearOperation(facts.transposed) if facts.packed else None)
        lent = Lent(self, active, False, operation, [self.identity(a) for a in active])
        for which, adapter in enumerate(active):
            slot = self.slot(adapter, "weight")
            columns = None if self.watches or slot.absolute else self._shared_columns(adapter)
            if columns is not None:
                y = y + shared_columns_product(x, slot.values, columns, facts.transposed, lent.check).to(y.dtype)
                continue
            for index, values in slot.parts():
                change = values
                if slot.absolute:
                    change = difference_of(self.pretrained("weight")[index.long()], values, True)
                seen = partial(lent.observe, which) if values is slot.values and self.watches else None
                y = y + self._sparse_output(x, change, index, facts, operation, lent.check, seen).to(y.dtype)
        return y

    def _sparse_output(
        self, x: Tensor, change: Tensor, index: Tensor, facts: Any, operation: Any, check: Any, seen: Any
    ) -> Tensor:
        if facts.packed or (operation is not None and operation.sparse_product):
            return Bypass.apply(x, change, index, facts.shape, facts.transposed, check, seen)
        dense = torch.zeros(numel(facts.shape), dtype=facts.dtype, device=x.device)
        dense = dense.index_put((index.long(),), change.to(facts.dtype)).view(facts.shape)
        if operation is None:
            raise Unsupported(f"{self.module_name}: bypass is not possible for a {type(self.base_layer).__name__}.")
        return operation.forward(self.base_layer, x, dense, None)

    def _require_loaded(self, adapter: str) -> None:
        if self._moves[adapter] < 0:
            raise BadInput(
                f"{self.module_name}: adapter '{adapter}' was made from a saved config, but its file is not loaded."
                " Use PeftModel.from_pretrained, or set allocation='select' to choose entries anew."
            )

    # ---- what is written into the base weight

    def _start_anew(self) -> None:
        """Nothing is written. The weight of now is home: one that is there in a forward later was gathered."""
        self.in_place = InPlace()
        self.in_place.settle(getattr(self.base_layer, "weight", None))
        self._patterns: dict[Any, Tensor] = {}
        self._columns: dict[str, tuple[Any, Tensor | None]] = {}
        self._quick = None

    def _stamp(self) -> tuple[Any, ...] | None:
        """What the base weight should hold: None for the pretrained weight."""
        if self.merged:
            return None
        active = self.adapters_on("weight")
        if len(active) != 1 or self._options[active[0]]["execution"] != "in_place":
            return None
        return (*self.identity(active[0]), CLOCK.now)

    def identity(self, adapter: str) -> tuple[Any, ...]:
        """(adapter, its index sets, its values): changes whenever the sets or the values do."""
        values = self._modules["sparse_weight_values"]._parameters[adapter]  # type: ignore[union-attr]
        info = info_of(values)  # type: ignore[arg-type]
        written = (id(values), _version(values), info.writes if info else 0, CLOCK.unattributed)
        return adapter, self._sets(adapter), written

    def _sets(self, adapter: str) -> tuple[Any, ...]:
        held = self._modules  # read directly: this runs in every forward of every layer
        index = held["sparse_weight_index"]._buffers[adapter]  # type: ignore[union-attr]
        left = held["sparse_weight_left_index"]._buffers.get(adapter)  # type: ignore[union-attr]
        gone = held["sparse_weight_left_values"]._buffers.get(adapter)  # type: ignore[union-attr]
        return self._moves[adapter], _version(index), _version(left), _version(gone)

    def sync(self) -> None:
        """Make the base weight hold what it should."""
        self.in_place.settle(getattr(self.base_layer, "weight", None))
        stamp = self._stamp()
        if not self.in_place.up_to_date(stamp):
            self.in_place.write(stamp, None if stamp is None else self.slot(stamp[0], "weight"))

    def revert(self) -> None:
        """The base weight holds the pretrained entries, bit for bit; the next forward writes again."""
        if self.in_place.stamp is not None or self.in_place.regathered:
            self.in_place.settle(self.base.weight)
            self.in_place.write(None, None)

    def tuned(self, tensor: str) -> Tensor:
        """The tuned tensor, to read only: the base's own memory where the entries are written into it."""
        if tensor == "weight":
            self.sync()
            if self.in_place.stamp is not None:
                return self.base.weight.detach()
        return self.effective(tensor)

    def effective(self, tensor: str) -> Tensor:
        """The tuned tensor as a new one, with no gradient."""
        self.revert()
        flat = self.pretrained(tensor)
        slots = [self.slot(a, tensor) for a in self.adapters_on(tensor)]
        return add_entries(flat, slots).view(self.shape_of(tensor))

    # ---- PEFT's switches

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        BaseTunerLayer.set_adapter(self, adapter_names, inference_mode=inference_mode)
        self._revert_if_changed()

    def enable_adapters(self, enabled: bool) -> None:
        BaseTunerLayer.enable_adapters(self, enabled)
        self._revert_if_changed()

    def _revert_if_changed(self) -> None:
        stamp = self._stamp()
        held = self.in_place.stamp
        if held is not None and (stamp is None or stamp[:2] != held[:2]):
            self.revert()

    def delete_adapter(self, adapter_name: str) -> None:
        self.revert()
        self._quick = None
        BaseTunerLayer.delete_adapter(self, adapter_name)
        self._options.pop(adapter_name, None)
        self._scales.pop(adapter_name, None)
        self._moves.pop(adapter_name, None)
        self._patterns.clear()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base for good (until `unmerge`), with float32's rounding to the base's dtype."""
        names = check_adapters_to_merge(self, adapter_names)
        self.revert()
        self._check_foldable(names)
        for adapter in names:
            for tensor in TENSORS:
                if adapter in self._of(tensor, "values"):
                    self._require_loaded(adapter)
                    self._merge_one(adapter, tensor, safe_merge)
            for site in self.sites_of(adapter):
                site.fold(self.base.weight.detach(), base_facts(self.base_layer).transposed)
            if adapter in self._options:
                self.merged_adapters.append(adapter)

    def _check_foldable(self, names: list[str]) -> None:
        """Modules beside the matrix can be folded in, and the weight from before is kept."""
        sites = [site for name in names for site in self.sites_of(name)]
        if not sites:
            return
        if not all(site.mergeable for site in sites):
            raise Unsupported(f"{self.module_name}: an adapter behind the matrix is not linear and can't be merged.")
        if base_facts(self.base_layer).packed or self.tied:
            raise Unsupported(f"{self.module_name}: a low-rank module can't be merged into a packed or shared weight.")
        if self._whole_before is None:
            flat = self.pretrained("weight").clone()
            for tensor, positions, before in reversed(self._merged):
                if tensor == "weight":
                    restore_entries(flat, positions, before)
            self._whole_before = flat.view(self.shape_of("weight"))

    def _merge_one(self, adapter: str, tensor: str, safe: bool) -> None:
        if tensor == "weight" and base_facts(self.base_layer).packed:
            self._merge_packed(adapter)
            return
        if tensor == "weight" and self.tied:
            raise Unsupported(
                f"{self.module_name}.weight is shared with another module, so that merging would change both."
                " Load the base with tie_word_embeddings=False."
            )
        flat, slot = self.pretrained(tensor), self.slot(adapter, tensor)
        if safe and not all(bool(torch.isfinite(values).all()) for _, values in slot.parts()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        before = gather_parts(flat, slot)
        self._merged.append((tensor, [index.clone() for index, _ in slot.parts()], before))
        first = not any(name == tensor for name, *_ in self._merged[:-1])
        if first:
            write_entries(flat, slot, before)
            return
        originals = self._pretrained_at(tensor, slot)
        for (index, values), now, original in zip(slot.parts(), before, originals, strict=True):
            change = difference_of(original, values, slot.absolute)
            flat.scatter_(0, index.long(), (now.to(values.dtype) + change).to(flat.dtype))

    def _merge_packed(self, adapter: str) -> None:
        if not self.requantize:
            raise Unsupported(
                f"{self.module_name}: a sparse update can be merged into a packed weight only by quantizing the sum"
                " anew. Use pegbox.tuners.sparse.merge_modules(model, requantize=True) if that is meant."
            )
        from pegbox.tuners.sparse.merge import repacked

        before, slot = self.base.weight, self.slot(adapter, "weight")
        tuned = add_entries(self.pretrained("weight"), [slot]).view(self.shape_of("weight"))
        self.base.weight = repacked(before, tuned, self.module_name)
        self._packed_before.append(before)

    def _pretrained_at(self, tensor: str, slot: Slot) -> list[Tensor]:
        """Entries from before the first merge."""
        flat = self.pretrained(tensor).clone()
        for name, positions, before in reversed(self._merged[:-1]):
            if name == tensor:
                restore_entries(flat, positions, before)
        return gather_parts(flat, slot)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back, bit for bit, what was there before `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for tensor, positions, before in reversed(self._merged):
            restore_entries(self.pretrained(tensor), positions, before)
        if self._whole_before is not None:
            self.base.weight.detach().copy_(self._whole_before)
            self._whole_before = None
        if self._packed_before:
            self.base.weight = self._packed_before[0]
        self._packed_before.clear()
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

    def pattern(self, adapter: str) -> Tensor:
        """The CSR matrix of an adapter's trained entries; its values are not read. Made once per index set, but anew
        each time for a lean adapter, which keeps nothing."""
        key = (adapter, self._sets(adapter))
        if key not in self._patterns:
            for old in [k for k in self._patterns if k[0] == adapter]:
                del self._patterns[old]
            slot, shape = self.slot(adapter, "weight"), self.shape_of("weight")
            made = csr_pattern(slot.index, (shape[0], shape[1]), torch.zeros_like(slot.values))
            if self._options[adapter]["execution"] == "lean":
                return made
            self._patterns[key] = made
        return self._patterns[key]


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "_hf_hook" in module.__dict__  # accelerate's replaces the forward


def _revert_before_state_dict(layer: Any, *args: Any) -> None:
    layer.revert()


def _revert_before_load(layer: Any, *args: Any) -> None:
    layer.revert()
