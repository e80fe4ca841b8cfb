"""The full tuner: the base's own tensors train, all of them, or what a selection names of them.

    theta[i] <- theta[i] - update[i]   for i selected,      theta[i] bit-exact as before for all others

What is left is the tensors' new values, not differences, so loading is bit-exact. Entries and slices train in place:
the gradient is masked as it arrives, and after every optimizer step the unselected entries are put back, so that they
stay exact under any optimizer, decay and momentum. (A selection that is small is cheaper in the sparse tuner, whose
optimizer state has the size of the selection.)

What this file does not do: give the base back (there is no copy of it), or choose anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pegbox.errors import BadInput, Unsupported, WrongBase, did_you_mean
from pegbox.parts import deltas
from pegbox.parts.allocation import Allocation, Choice, Entries, Frozen, Units, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.indexsets import check_index, from_units, index_dtype, union
from pegbox.parts.initial import pending
from pegbox.tuners.axis import TUNER
from pegbox.tuners.base import Tuner
from pegbox.tuners.redraw import Redraw

__all__ = ["Full", "full_state"]

FILE = "delta.safetensors"
_STATE, _HELD = "_pegbox_full", "_pegbox_held"


@dataclass
class FullState:
    """What a model carries while it trains in this form.

    allocation: what moves now. touched: what has moved since the base; a changed selection adds to it.
    """

    allocation: Allocation
    touched: Allocation = field(default_factory=Allocation)
    hooks: list[Any] = field(default_factory=list)


@dataclass
class Held:
    """The entries of a tensor that must not move, and the values they keep."""

    frozen: Tensor  # bool, the tensor's shape
    values: Tensor

    def on(self, device: torch.device) -> Held:
        """The same, moved after its parameter if the model has gone to another device."""
        if self.frozen.device != device:
            self.frozen, self.values = self.frozen.to(device), self.values.to(device)
        return self

    def mask(self, gradient: Tensor) -> Tensor:
        """The gradient, 0 at the held entries (whatever it was there, NaN too)."""
        return gradient.masked_fill(self.on(gradient.device).frozen, 0)


@TUNER.register
class Full(Tuner):
    """Train the base's own tensors. Attaching again with another selection changes what moves from then on."""

    kind: Literal["full"] = "full"

    part_kind: ClassVar[str] = "delta"
    takes: ClassVar[frozenset[str]] = frozenset({"whole", "entries", "units"})
    needs_floating_base: ClassVar[bool] = True
    needs_resident_base: ClassVar[bool] = True
    rewrites_base: ClassVar[bool] = True
    several_active: ClassVar[bool] = False
    reference_view: ClassVar[bool] = False
    moves: ClassVar[frozenset[str]] = frozenset({"set"})
    merge: ClassVar[Literal["exact", "lossy", "no"]] = "exact"

    def attach(self, model: nn.Module, allocation: Allocation | None, ctx: Context) -> nn.Module:
        """Set what requires a gradient, and hold the rest. Without a selection everything trains.

        Raises `BadInput` for a name the model has not or a selection of nothing, `Unsupported` for packed weights and
        for single entries of sharded ones.
        """
        if pending(model):
            raise Unsupported("a preparation took a part out of the weights for an adapter; use tuner 'lora' with it.")
        return _attach(model, allocation, before=full_state(model))

    def schedules(self, selector: Any, ctx: Context) -> list[Any]:
        schedule = getattr(selector, "schedule", None)
        if schedule is None or not schedule.moves:
            return []
        state = full_state(ctx.model)
        if state is None:
            raise BadInput("Attach the full tuner before asking for its schedule.")
        return [Redraw(selector, ctx, state.allocation, lambda model, chosen: self.attach(model, chosen, ctx))]

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        raise Unsupported("tuner 'full' changes the base itself, so there is no way back; load a frozen copy.")

    def save(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Write the present values of everything touched. Dense tensors keep their dtype."""
        state = full_state(model)
        if state is None:
            raise BadInput("The model has no full tuner attached, so there is nothing to save.")
        named = _parameters(model)
        delta = deltas.Delta({name: _read(named[name], choice) for name, choice in state.touched.items()})
        deltas.save(delta, folder / FILE)
        return {"tuner": self.kind, "file": FILE, "tensors": len(delta), "entries": delta.entries()}

    def load(self, model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
        """Copy saved values in, in place. Bit-exact where the base has the dtype they were saved in."""
        delta = deltas.load(folder / FILE)
        named = _parameters(model)
        for name, piece in delta.items():
            _check_fits(name, piece, named)
        for name, piece in delta.items():  # one at a time: what `apply` keeps for a way back is not needed
            deltas.apply(deltas.Delta({name: piece}), named)
        if trainable:
            chosen = {n: Whole() if p.index is None else Entries(p.index) for n, p in delta.items()}
            return _attach(model, Allocation(chosen), before=full_state(model))
        return model


def full_state(model: nn.Module) -> FullState | None:
    """What the full tuner keeps on `model`, or None where it is not attached."""
    return model.__dict__.get(_STATE)


# ---- attaching


def _attach(model: nn.Module, allocation: Allocation | None, before: FullState | None) -> nn.Module:
    named = _parameters(model)
    chosen = _chosen(model, allocation, named)
    _release(named.values(), before)
    state = FullState(chosen, before.touched if before else Allocation())
    for name, parameter in named.items():
        choice = chosen.get(name, Frozen())
        if isinstance(choice, Frozen):
            parameter.requires_grad_(False)
            continue
        if not parameter.is_floating_point():
            raise Unsupported(
                f"'{name}' is stored as {parameter.dtype}: packed weights can't train themselves. Use an adapter, or "
                "load the base in fp32 or bf16, or leave this matrix out of the selection."
            )
        parameter.requires_grad_(True)
        if not isinstance(choice, Whole):
            state.hooks.append(_hold(name, parameter, choice))
        state.touched[name] = _join(state.touched.get(name), choice, tuple(parameter.shape))
    setattr(model, _STATE, state)
    return model


def _chosen(model: nn.Module, allocation: Allocation | None, named: Mapping[str, nn.Parameter]) -> Allocation:
    """The allocation under the names of `named_parameters`, checked."""
    if allocation is None:
        return Allocation(dict.fromkeys(named, Whole()))
    anatomy = Anatomy.of(model)
    chosen = Allocation()
    for name, choice in allocation.items():
        known = anatomy.ties.get(name, name)
        if known not in named:
            raise BadInput(f"The selection names '{name}', which this model has not.{_near(name, named)}")
        shape = tuple(named[known].shape)
        _check_choice(known, choice, shape)
        complete = isinstance(choice, Entries) and choice.index.numel() == named[known].numel()
        chosen[known] = Whole() if complete else choice
    if not any(_size(choice) for choice in chosen.values()):
        raise BadInput("The selection is empty: no tensor would train. Widen the scope or raise the ratio or budget.")
    return chosen


def _near(name: str, named: Iterable[str]) -> str:
    leaf = name.rsplit(".", 2)[-2:]
    return did_you_mean(name, [known for known in named if known.rsplit(".", 2)[-2:] == leaf][:20])


def _check_choice(name: str, choice: Choice, shape: tuple[int, ...]) -> None:
    match choice:
        case Entries(index=index):
            check_index(index, torch.Size(shape).numel(), name)
        case Units(axis=axis, index=index):
            if not 0 <= axis < len(shape):
                raise BadInput(f"{name}: slices along axis {axis} of a tensor of shape {shape}.")
            check_index(index, shape[axis], name)
        case Whole() | Frozen():
            pass
        case _:
            raise BadInput(f"{name}: tuner 'full' takes whole tensors, slices and entries, got {choice}.")


def _size(choice: Choice) -> int:
    return choice.index.numel() if isinstance(choice, Entries | Units) else int(isinstance(choice, Whole))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}


def _join(old: Choice | None, new: Choice, shape: tuple[int, ...]) -> Choice:
    """What moved under `old` or `new`."""
    if isinstance(old, Whole) or isinstance(new, Whole):
        return Whole()
    if old is None or isinstance(old, Frozen):
        return new
    if isinstance(old, Units) and isinstance(new, Units) and old.axis == new.axis:
        return Units(old.axis, union(old.index, new.index))
    return Entries(union(_entries(old, shape), _entries(new, shape)))


def _entries(choice: Choice, shape: tuple[int, ...]) -> Tensor:
    """The flat positions of entries or slices."""
    if isinstance(choice, Entries):
        return choice.index.to(index_dtype(torch.Size(shape).numel()))
    assert isinstance(choice, Units)
    return from_units(choice.axis, choice.index, shape)


# ---- holding what must not move


def _hold(name: str, parameter: nn.Parameter, choice: Choice) -> Any:
    """Mask gradients from now on, and note the values that `_restore` puts back after each step."""
    if hasattr(parameter, "full_tensor"):
        raise Unsupported(f"'{name}' is sharded: single entries of it can't be held. Use DDP, or tuner 'sparse'.")
    frozen = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    match choice:
        case Entries(index=index):
            frozen.view(-1)[index.to(parameter.device).long()] = False
        case Units(axis=axis, index=index):
            frozen.index_fill_(axis, index.to(parameter.device).long(), False)
    held = Held(frozen, parameter.detach().clone())
    setattr(parameter, _HELD, held)
    return parameter.register_hook(held.mask)


def _release(parameters: Iterable[nn.Parameter], state: FullState | None) -> None:
    for hook in state.hooks if state else ():
        hook.remove()
    for parameter in parameters:
        parameter.__dict__.pop(_HELD, None)


def _restore(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After any optimizer's step: entries that must not move are put back (decay and momentum had a hand on them)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = getattr(parameter, _HELD, None)
            if held is not None:
                held.on(parameter.device)
                with torch.no_grad():
                    torch.where(held.frozen, held.values, parameter, out=parameter)


register_optimizer_step_post_hook(_restore)


# ---- values in and out


def _read(parameter: nn.Parameter, choice: Choice) -> deltas.Piece:
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # gather what is sharded
    values, shape = whole.detach().cpu(), tuple(whole.shape)
    if isinstance(choice, Whole):
        return deltas.Piece(shape, values, None, "set")
    index = _entries(choice, shape).cpu()
    return deltas.Piece(shape, values.flatten()[index.long()], index, "set")


def _check_fits(name: str, piece: deltas.Piece, named: Mapping[str, nn.Parameter]) -> None:
    if name not in named:
        raise WrongBase(f"The update holds '{name}', which this base has not.{_near(name, named)}")
    if tuple(named[name].shape) != piece.shape:
        raise WrongBase(f"'{name}' has shape {tuple(named[name].shape)} in this base and {piece.shape} in the update.")
    if not named[name].is_floating_point():
        raise WrongBase(f"'{name}' is stored as {named[name].dtype} in this base; load it in fp32 or bf16.")
