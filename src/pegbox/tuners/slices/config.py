"""The PEFT config of the slices tuner: plain, JSON-able fields, checked when it is made.

`SlicesConfig(select={"kind": "units", "ratios": {"d": 0.03}})` goes straight into `peft.get_peft_model`. A saved config
has `allocation = "stored"`: the rows and columns come from the adapter's file, by their original numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.allocation import Allocation
from pegbox.parts.slices import KIND
from pegbox.tuners.registration import add_peft_type
from pegbox.tuners.sparse.config import select_component

__all__ = ["NAME", "SlicesConfig"]

NAME = KIND.lower()
_CHOICES = {
    "coordinates": ("delta", "absolute"),
    "execution": ("auto", "in_place", "bypass"),
    "layout": ("auto", "contiguous", "gather"),
    "allocation": ("select", "stored"),
    "bias": ("none",),
}


@dataclass
class SlicesConfig(PeftConfig):
    """Rows or columns of each target matrix train, as one dense float32 block.

    Args:
        select: the selector's block; ignored when an allocation is given or stored.
        coordinates: "delta" (differences D, zero at the start) or "absolute" (the values are the weights themselves).
        execution: "in_place" (the block is written into the base weight: its forward is the base's own), "bypass" (a
            second, small product beside the base's), or "auto": in place where that is right.
        layout: "gather" (by index), "contiguous" (units are re-ordered so that every block is a range), or "auto": a
            range where it happens to be one, without re-ordering anything.
        seed: of the selector's random draws.
        target_modules: words for modules; filled in by the selection.
        slices, base: filled in: module -> (axis, its length), and a mark of the base.
    """

    select: dict[str, Any] = field(default_factory=lambda: {"kind": "units"})
    coordinates: str = "delta"
    execution: str = "auto"
    layout: str = "auto"
    seed: int = 0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    allocation: str = "select"
    slices: dict[str, list[int]] = field(default_factory=dict)
    base: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(KIND)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise BadInput(f"slices: {name} = {value!r}.{did_you_mean(str(value), allowed)}")
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        if self.allocation == "select":
            self.select = select_component(self.select).model_dump(mode="json")

    def with_allocation(self, allocation: Allocation) -> SlicesConfig:
        """A copy that attaches exactly this allocation instead of selecting."""
        copy = dataclasses.replace(self)
        copy.__dict__["_given"] = allocation
        return copy

    def take_allocation(self) -> Allocation | None:
        """The allocation given beforehand, once."""
        return self.__dict__.pop("_given", None)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: original numbers are in the adapter's file, and loading never re-orders a model."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(values["target_modules"], set):
            values["target_modules"] = sorted(values["target_modules"])
        layout = "auto" if self.layout == "contiguous" else self.layout
        return {**values, "allocation": "stored", "layout": layout}
