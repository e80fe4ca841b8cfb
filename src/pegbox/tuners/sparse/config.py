"""The PEFT config of the sparse tuner: plain, JSON-able fields, checked when it is made.

`SparseConfig(select={"kind": "magnitude", "budget": {"density": 0.01}})` goes straight into `peft.get_peft_model`. A
saved config has `allocation = "stored"`: the index sets come from the adapter's file, and nothing is selected again.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.allocation import Allocation
from pegbox.parts.component import AXES, Component
from pegbox.tuners.registration import add_peft_type

__all__ = ["DEFAULT_SELECT", "NAME", "SparseConfig", "select_component"]

NAME = "pegbox_sparse"
DEFAULT_SELECT = {"kind": "magnitude", "budget": {"density": 0.01}}
_CHOICES = {
    "coordinates": ("absolute", "delta"),
    "execution": ("auto", "in_place", "scatter", "bypass", "lean"),
    "values": ("float32", "bfloat16"),
    "gradient": ("sampled", "dense"),
    "allocation": ("select", "stored"),
    "bias": ("none",),
}


@dataclass
class SparseConfig(PeftConfig):
    """A sparse update: k entries of each target tensor train, as float32 values.

    Args:
        select: the selector's block (kind and options); ignored when an allocation is given or stored.
        coordinates: "absolute" (the values are the weights, decay pulls to 0) or "delta" (differences, decay pulls to
            the pretrained weights).
        execution: "in_place" (entries written into the base weight), "scatter" (a weight built per call), "bypass"
            (base output plus a sparse product), or "auto": the first of these that is right for each layer. "lean":
            for each call the cheaper of the last two, and nothing is kept but positions and values.
        gradient: "sampled" (only the kept entries are computed) or "dense" (the full gradient, then the entries).
        scale: what the values are multiplied by before they are added (delta coordinates; the set can't move then).
        values: what the values (and their optimizer state) are held in; bfloat16 halves both and rounds small steps.
        seed: of the selector's random draws.
        tensors: which tensors of a target module: "weight", "bias".
        target_modules: words ("all-linear", "attention", "mlp"), name suffixes, or a regular expression.
    """

    select: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_SELECT))
    coordinates: str = "delta"
    execution: str = "auto"
    gradient: str = "sampled"
    values: str = "float32"
    scale: float = 1.0
    seed: int = 0
    tensors: list[str] = field(default_factory=lambda: ["weight"])
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"  # PEFT's own field; biases are chosen by `tensors`
    sites: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # from an allocation: module -> its modules
    held_tensors: list[str] | None = None  # what the adapter has entries of, once that is known
    allocation: str = "select"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(NAME.upper())
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise BadInput(f"sparse: {name} = {value!r}.{did_you_mean(str(value), allowed)}")
        if not self.scale > 0 or (self.scale != 1.0 and self.coordinates != "delta"):
            raise BadInput(f"sparse: scale = {self.scale}; it is above 0, and 1 in absolute coordinates.")
        if not self.tensors or not set(self.tensors) <= {"weight", "bias"}:
            raise BadInput(f"sparse: tensors = {self.tensors!r}; choose from weight, bias.")
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        if self.allocation == "select":
            self.select = select_component(self.select).model_dump(mode="json")

    def with_allocation(self, allocation: Allocation) -> SparseConfig:
        """A copy that attaches exactly this allocation instead of selecting."""
        copy = dataclasses.replace(self)
        copy.__dict__["_given"] = allocation
        return copy

    def take_allocation(self) -> Allocation | None:
        """The allocation given beforehand, once."""
        return self.__dict__.pop("_given", None)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the index sets are then in the adapter's file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(values["target_modules"], set):
            values["target_modules"] = sorted(values["target_modules"])
        return {**values, "allocation": "stored"}


def select_component(block: Any) -> Component:
    """The selector of a block, through the axis (imported by name: axes don't import each other)."""
    if "select" not in AXES:
        importlib.import_module("pegbox.select.base")
    return AXES["select"].validate(block)
