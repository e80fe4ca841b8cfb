"""LiNeS: the update of each block scaled by a coefficient that grows with depth.

    lam(l) = alpha + beta l / (L - 1) in block l of L;   lam = alpha outside the blocks;   theta = theta_0 + lam tau

Shallow blocks stay near the pre-trained model, deep blocks keep the task; no data, no gradient. Wang et al.,
arXiv:2410.17146. As an operation of its own it edits one tuned model; as a scaler it scales what any merge gives
(`merges.py`). It does not choose alpha or beta: `selection.py` has the scores and grids for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.parts.algebra import State, interpolate, l1_norm
from pegbox.weights.base import WEIGHTS, WeightOp
from pegbox.weights.layers import Stacks, layer_map
from pegbox.weights.updates import Merged, Updates

__all__ = ["Depth", "Lines", "coefficients", "derived_alpha", "scale_adapter"]

Number = Annotated[float, Field(allow_inf_nan=False)]
Outside = Literal["alpha", "zero", "full"] | dict[str, Number]


def coefficients(
    depths: Mapping[str, float | None], alpha: float, beta: float, outside: Outside = "alpha"
) -> dict[str, float]:
    """lam of every tensor from its depth.

    Args:
        depths: 0 (first block) to 1 (last), None outside the blocks.
        alpha, beta: lam = alpha + beta * depth.
        outside: "alpha" (the official code), "zero" (keep the base), "full" (keep the update, as a new head needs), or
            prefix -> coefficient, with alpha for what no prefix matches.
    """
    fixed = {"alpha": alpha, "zero": 0.0, "full": 1.0}
    rules = outside if isinstance(outside, dict) else {}
    used: set[str] = set()
    result = {}
    for name, depth in depths.items():
        if depth is not None:
            lam = alpha + beta * depth
            result[name] = 1.0 if abs(lam - 1.0) < 1e-12 else lam  # alpha + (1 - alpha) need not be 1 in floats
            continue
        rule = max((r for r in rules if name == r or name.startswith(r + ".")), key=len, default=None)
        used |= {rule} if rule else set()
        result[name] = rules[rule] if rule else fixed[outside] if isinstance(outside, str) else alpha
    if unused := set(rules) - used:
        names = [n for n, d in depths.items() if d is None]
        raise BadInput(f"outside: '{min(unused)}' matches no tensor outside the blocks. These are: {', '.join(names)}.")
    return result


def derived_alpha(updates: Updates, merged: Merged) -> float:
    """alpha = (||sum of task vectors||_1 / ||merged update||_1) / K: 1/K for task arithmetic."""
    size = l1_norm(merged.update(name) for name in updates.names)
    if size == 0:
        raise BadInput("The merged update is zero everywhere, so alpha can't be derived from it. Give alpha.")
    return l1_norm(merged.summed(name) for name in updates.names) / size / updates.count


class Depth(BaseModel):
    """How coefficients follow depth; the options that the operation and the scaler of merges share.

    Args:
        outside: the coefficient of tensors outside the blocks (see `coefficients`).
        stacks: encoder and decoder each with its own depth, or counted on.
        layer_order: groups of tensor-name prefixes from shallow to deep, for models without a list of blocks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: Number = 1.0
    outside: Outside = "alpha"
    stacks: Stacks = "separate"
    layer_order: tuple[tuple[str, ...], ...] = ()

    def scales(self, names: Sequence[str], anatomy: Any, alpha: float) -> dict[str, float]:
        """lam of every tensor."""
        depths = layer_map(names, anatomy, self.layer_order, self.stacks)
        return coefficients(depths, alpha, self.beta, self.outside)


@WEIGHTS.register
class Lines(WeightOp):
    """Edit one tuned model by depth.

    Args:
        alpha: coefficient of the first block and of everything outside the blocks.
        beta: growth over the depth; None: 1 - alpha, so that the last block keeps its full update.
        outside, stacks, layer_order: see `Depth`.
        new_rows: a tuned tensor with more rows than the base's (an enlarged vocabulary): refuse, or scale the common
            rows and keep the new ones.
    """

    tuned_models: ClassVar[int | None] = 1
    reproduces: ClassVar[str] = "arXiv:2410.17146, section 4"

    kind: Literal["lines"] = "lines"
    alpha: Number = 0.5
    beta: Number | None = None
    outside: Outside = "alpha"
    stacks: Stacks = "separate"
    layer_order: tuple[tuple[str, ...], ...] = ()
    new_rows: Literal["refuse", "keep"] = "refuse"

    @property
    def depth(self) -> Depth:
        beta = 1.0 - self.alpha if self.beta is None else self.beta
        return Depth(beta=beta, outside=self.outside, stacks=self.stacks, layer_order=self.layer_order)

    def apply(
        self, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Any
    ) -> Iterator[tuple[str, Tensor]]:
        if len(tuned) != 1:
            raise BadInput(f"weights.kind=lines edits one tuned model, {len(tuned)} were given. Merge them first.")
        grown = _grown(base, tuned[0]) if self.new_rows == "keep" else {}
        common = _Rows(tuned[0], grown)
        updates = Updates(base, [common], getattr(anatomy, "ties", None))
        lam = self.depth.scales(updates.names, anatomy, self.alpha)
        for name in updates.base:
            edited = interpolate(base[name], common[name], lam[name]) if name in lam else base[name]
            if name in grown:
                edited = torch.cat([edited, tuned[0][name][grown[name] :].to(edited.dtype)])
            yield name, edited

    def to_mergekit_yaml(self, base: str, tuned: str, dtype: str = "float32") -> str:
        """The same edit as a configuration of mergekit (task arithmetic with a gradient of weights).

        Raises `BadInput` for options that mergekit can't express.
        """
        if self.outside != "alpha" or self.layer_order or self.stacks != "separate" or self.new_rows != "refuse":
            raise BadInput("mergekit knows equal blocks and alpha outside them: drop outside, layer_order and stacks.")
        last = self.alpha + self.depth.beta
        return (
            f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n  - model: {tuned}\n    parameters:\n"
            f"      weight: [{self.alpha!r}, {last!r}]\nparameters:\n  normalize: false\ndtype: {dtype}\n"
        )


def scale_adapter(
    adapter: State, depth: Depth, alpha: float, *, base: State | None = None, anatomy: Any = None
) -> Iterator[tuple[str, Tensor]]:
    """LiNeS on a LoRA adapter's state, without merging: `lora_B` of block l times lam(l), exactly the dense edit.

    Tensors trained whole (modules_to_save, biases) are edited against `base`, names as in the bare model.

    Raises:
        BadInput: a form whose update is not linear in one factor (DoRA), or whole tensors without a base.
    """
    bare = {name: _bare(name) for name in adapter}
    for name in adapter:
        if "lora_magnitude" in name:
            raise BadInput(f"'{name}': DoRA's update is not linear in one factor. Merge the adapter, then use LiNeS.")
    known = list(dict.fromkeys(bare.values()))
    lam = depth.scales(known, anatomy, alpha)
    for name, tensor in adapter.items():
        scale = lam[bare[name]]
        if "lora_A" in name or "lora_embedding_A" in name:
            yield name, tensor
        elif "lora_B" in name or "lora_embedding_B" in name:
            yield name, (tensor.float() * scale).to(tensor.dtype)
        elif base is not None and bare[name] in base:
            yield name, interpolate(base[bare[name]], tensor, scale)
        else:
            raise BadInput(f"'{name}' was trained whole: give the base, so that its update is known.")


def _bare(name: str) -> str:
    """The base tensor that an entry of a PEFT state belongs to."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".base_layer", "")
    for part in (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B"):
        if part in name:
            return name.split(part)[0] + ".weight"
    return name


class _Rows(Mapping[str, Tensor]):
    """A state whose grown tensors show their first rows only."""

    def __init__(self, state: State, rows: Mapping[str, int]):
        self.state, self.rows = state, rows

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.state[name]
        return tensor[: self.rows[name]] if name in self.rows else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def _grown(base: State, tuned: State) -> dict[str, int]:
    """Names whose tuned tensor has more rows and is alike otherwise -> the base's number of rows."""
    return {
        name: base[name].shape[0]
        for name in base
        if name in tuned
        and tuned[name].ndim == base[name].ndim > 0
        and tuned[name].shape[1:] == base[name].shape[1:]
        and tuned[name].shape[0] > base[name].shape[0]
    }
