"""Points between a base and a tuned model (WiSE-FT): one amount for all, per block, per group, or weighted by Fisher.

    theta(a) = (1 - a) theta_0 + a theta_1                    F-weighted: ((1-a) F_0 theta_0 + a F_1 theta_1) / (...)

0 is the base, 1 the tuned model, both exactly. This is the convention of WiSE-FT's code (Wortsman et al.,
arXiv:2109.01903); arXiv:2410.16476 writes the amounts the other way round. Fisher weights after Matena and Raffel,
arXiv:2111.09832. After LiNeS (`lines.py`) in a recipe's list of weight operations it gives the curve of the edited
update. All floating tensors move, norms and head included; integers are the tuned model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.algebra import State, StateReader, check_alike, computed_in
from pegbox.parts.algebra import interpolate as mix
from pegbox.weights.base import WEIGHTS, WeightOp
from pegbox.weights.layers import Stacks, blocks_in
from pegbox.weights.updates import Updates

__all__ = ["FISHER_FLOOR", "Interpolate", "empirical_fisher", "fisher_mix", "interpolated", "mix", "tensors_meant"]

FISHER_FLOOR = 1e-8
Number = Annotated[float, Field(allow_inf_nan=False)]


def fisher_mix(
    base: Tensor, tuned: Tensor, amount: float, base_fisher: Tensor, tuned_fisher: Tensor, floor: float = FISHER_FLOOR
) -> Tensor:
    """The mean of two tensors, each entry weighted by Fisher information (at least `floor`), in the base's dtype."""
    if amount == 0.0:
        return base
    if amount == 1.0:
        return tuned.to(base.dtype)
    dtype = computed_in(base.dtype, tuned.dtype)
    low = (1 - amount) * base_fisher.to(dtype).clamp(min=floor)
    high = amount * tuned_fisher.to(dtype).clamp(min=floor)
    return ((low * base.to(dtype) + high * tuned.to(dtype)) / (low + high)).to(base.dtype)


def interpolated(
    base: State,
    tuned: State,
    amounts: float | Mapping[str, float],
    *,
    fisher: tuple[State, State] | None = None,
    floor: float = FISHER_FLOOR,
    extrapolate: bool = False,
    ties: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the point once, one pair of tensors in memory at a time.

    Args:
        base, tuned: states of one model (lazy readers or plain dicts).
        amounts: one number, or tensor name -> number for every floating tensor.
        fisher: Fisher information of (base, tuned) by name; a tensor that is missing in both is interpolated plainly.
        extrapolate: allow amounts outside [0, 1]. ties: second names of tied tensors, left out.

    Raises:
        BadInput: other names or shapes; an amount that is not finite, or outside [0, 1]; Fisher information that is
            negative or of other names or shapes.
    """
    updates = Updates(base, [tuned], ties)
    moving = set(updates.names)
    table = dict.fromkeys(moving, float(amounts)) if isinstance(amounts, int | float) else dict(amounts)
    if unknown := set(table) - moving:
        raise BadInput(f"An amount is given for '{min(unknown)}', which is no floating tensor of these models.")
    if missing := moving - set(table):
        raise BadInput(f"No amount is given for '{min(missing)}'. Give one for every tensor.")
    for name, amount in table.items():
        check_amount(amount, extrapolate, f"the amount of '{name}'")
    if fisher is not None:
        _check_fisher(base, *fisher)
    for name in updates.base:
        if name not in moving:
            yield name, tuned[name].to(base[name].dtype)
        elif fisher is not None and name in fisher[0]:
            yield name, fisher_mix(base[name], tuned[name], table[name], fisher[0][name], fisher[1][name], floor)
        else:
            yield name, mix(base[name], tuned[name], table[name])


def check_amount(amount: float, extrapolate: bool, what: str) -> None:
    """Raise `BadInput` for an amount that is no number, or outside [0, 1] where that is not allowed."""
    if not math.isfinite(amount):
        raise BadInput(f"{what} must be finite, got {amount}.")
    if not extrapolate and not 0 <= amount <= 1:
        raise BadInput(
            f"{what} is {amount}, outside [0, 1] (0 the base, 1 the tuned model). Set extrapolate to allow it."
        )


def _check_fisher(base: State, first: State, second: State) -> None:
    check_alike(first, second, "the tuned model's Fisher information")
    for name in first:
        if name not in base:
            raise BadInput(f"There is Fisher information for '{name}', which is no tensor of these models.")
        for side in (first, second):
            if tuple(side[name].shape) != tuple(base[name].shape):
                raise BadInput(
                    f"The Fisher information of '{name}' is {tuple(side[name].shape)}, not the tensor's shape."
                )
            if bool((side[name] < 0).any()):
                raise BadInput(f"The Fisher information of '{name}' has negative entries; it is a mean of squares.")


@WEIGHTS.register
class Interpolate(WeightOp):
    """A point between base and tuned model.

    Args:
        amount: 0 the base, 1 the tuned model.
        blocks: one amount per block, from the first to the last, in place of `amount` inside the blocks.
        groups: words ("attention", "head", "blocks 0-5") or name prefixes -> amount; later ones win, over blocks too.
        stacks: with several lists of blocks: each numbered by itself, or one behind the other.
        fisher: {base: FILE, tuned: FILE}: safetensors with the mean squared gradients by parameter name.
        floor: least Fisher weight. extrapolate: allow amounts outside [0, 1].
    """

    tuned_models: ClassVar[int | None] = 1
    reproduces: ClassVar[str] = "arXiv:2109.01903"

    kind: Literal["interpolate"] = "interpolate"
    amount: Number = 0.5
    blocks: tuple[Number, ...] = ()
    groups: dict[str, Number] = Field(default_factory=dict)
    stacks: Stacks = "separate"
    fisher: dict[Literal["base", "tuned"], str] | None = None
    floor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = FISHER_FLOOR
    extrapolate: bool = False

    @field_validator("fisher")
    @classmethod
    def _both(cls, given: dict[str, str] | None) -> dict[str, str] | None:
        if given is not None and set(given) != {"base", "tuned"}:
            raise BadInput("weights.fisher: give both files, {base: ..., tuned: ...}.")
        return given

    @model_validator(mode="after")
    def _amounts(self) -> Interpolate:
        for amount in (self.amount, *self.blocks, *self.groups.values()):
            check_amount(amount, self.extrapolate, "weights.kind=interpolate: an amount")
        return self

    def apply(
        self, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Any
    ) -> Iterator[tuple[str, Tensor]]:
        if len(tuned) != 1:
            raise BadInput(f"weights.kind=interpolate takes one tuned model, not {len(tuned)}. Merge them first.")
        ties = getattr(anatomy, "ties", None)
        names = Updates(base, tuned, ties).names
        amounts: float | dict[str, float] = self.amount
        if self.blocks or self.groups:
            amounts = self._table(names, anatomy)
        read = None if self.fisher is None else (StateReader(self.fisher["base"]), StateReader(self.fisher["tuned"]))
        yield from interpolated(
            base, tuned[0], amounts, fisher=read, floor=self.floor, extrapolate=self.extrapolate, ties=ties
        )

    def _table(self, names: Sequence[str], anatomy: Any) -> dict[str, float]:
        table = dict.fromkeys(names, self.amount)
        if self.blocks:
            table |= _by_block(names, self.blocks, anatomy, self.stacks)
        for word, amount in self.groups.items():
            table |= dict.fromkeys(tensors_meant(word, names, anatomy), amount)
        return table


def _by_block(names: Sequence[str], amounts: Sequence[float], anatomy: Any, stacks: Stacks) -> dict[str, float]:
    block_of = anatomy.block_of if anatomy is not None and anatomy.stacks else blocks_in(names)
    places = {name: place for name in names if (place := block_of(name)) is not None}
    sizes: dict[str, int] = {}
    for stack, index in places.values():
        sizes[stack] = max(sizes.get(stack, 0), index + 1)
    begins, total = {}, 0
    for stack, size in sizes.items():
        begins[stack] = total if stacks == "concatenated" else 0
        total = total + size if stacks == "concatenated" else max(total, size)
    if len(amounts) != total:
        raise BadInput(f"weights.blocks: {len(amounts)} amounts for {total} blocks. Give one for each block.")
    return {name: amounts[begins[stack] + index] for name, (stack, index) in places.items()}


def tensors_meant(word: str, names: Sequence[str], anatomy: Any = None) -> list[str]:
    """Tensor names that a word of the anatomy, a name, a prefix or a glob means. Raises `BadInput` if it means none."""
    found = [n for n in names if n == word or n.startswith(f"{word}.") or fnmatchcase(n, word)]
    if not found and anatomy is not None:
        known = set(names)
        found = [n for n in anatomy.parameters([word]) if n in known]
    if not found:
        raise BadInput(f"'{word}' matches no tensor that could be moved. One of them is '{names[0]}'.")
    return found


def empirical_fisher(model: Any, loss: Any, samples: Sequence[Any]) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of each sample's loss, by parameter name (one sample at a time).

    Args:
        loss: (model, sample) -> a scalar.
    """
    if not samples:
        raise BadInput("Fisher information needs at least one sample.")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    total = {n: torch.zeros_like(p, dtype=computed_in(p.dtype)) for n, p in named.items()}
    for sample in samples:
        gradients = torch.autograd.grad(loss(model, sample), list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients):
            if gradient is not None:
                total[name].add_(gradient.to(total[name].dtype).square(), alpha=1 / len(samples))
    return total
