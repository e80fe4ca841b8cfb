"""The slices tuner as a recipe's `tuner:` block; `layer.py` does the work, a selector chooses the rows and columns."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from pegbox.errors import Corrupt
from pegbox.parts.allocation import Allocation
from pegbox.parts.context import Context
from pegbox.tuners.axis import TUNER
from pegbox.tuners.base import Tuner

__all__ = ["SlicesTuner"]


@TUNER.register
class SlicesTuner(Tuner):
    """Rows and columns of matrices train as dense float32 blocks; the base stays what it is.

    Args: as `SlicesConfig`. The rows and columns come from the recipe's `select:`; without one, `select` here is used.
    """

    kind: Literal["slices"] = "slices"

    reproduces: ClassVar[str] = "arXiv:2412.06289"
    takes: ClassVar[frozenset[str]] = frozenset({"units"})
    holds_vectors: ClassVar[bool] = False
    rewrites_base: ClassVar[bool] = True  # in place, between forwards; `reference` and saving put it back
    merge: ClassVar[Literal["exact", "lossy", "no"]] = "exact"

    coordinates: Literal["delta", "absolute"] = "delta"
    execution: Literal["auto", "in_place", "bypass"] = "auto"
    layout: Literal["auto", "contiguous", "gather"] = "auto"
    select: dict[str, Any] | None = None
    seed: int | None = None  # default: the run's

    @property
    def needs_floating_base(self) -> bool:  # type: ignore[override]
        """Writing blocks, absolute coordinates and re-ordering all need the base's own numbers."""
        return self.execution == "in_place" or self.coordinates == "absolute" or self.layout == "contiguous"

    @property
    def needs_unsharded_base(self) -> bool:  # type: ignore[override]
        """Beside the base nothing is asked of it."""
        return self.execution != "bypass"

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """Differences add up; values in absolute coordinates do not."""
        return self.coordinates == "delta"

    def config(self, **changes: Any) -> Any:
        """The PEFT config of this block (imports PEFT)."""
        from pegbox.tuners.slices import SlicesConfig

        fields: dict[str, Any] = {
            "coordinates": self.coordinates,
            "execution": self.execution,
            "layout": self.layout,
            "seed": self.seed or 0,
        }
        if self.select is not None:
            fields["select"] = self.select
        return SlicesConfig(**{**fields, **changes})

    def attach(self, model: nn.Module, allocation: Allocation | None, ctx: Context) -> nn.Module:
        from pegbox.tuners.peft_methods import attach_peft, task_type_of

        seed = self.seed if self.seed is not None else ctx.seed
        config = self.config(seed=seed, task_type=task_type_of(model))
        if allocation is not None:
            config = config.with_allocation(allocation)
        return attach_peft(model, config)

    def reference(self, model: Any) -> AbstractContextManager[Any]:
        return model.disable_adapter()

    def save(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        from pegbox.tuners.peft_methods import save_peft
        from pegbox.tuners.slices.model import slice_layers

        name = str(model.active_adapter)
        layers = [layer for layer in slice_layers(model).values() if name in layer.slice_values]
        counts = {"blocks": len(layers), "trained": sum(layer.slice_values[name].numel() for layer in layers)}
        return {**save_peft(model, folder), **counts}

    def load(self, model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
        from pegbox.tuners.peft_files import read_adapter_config
        from pegbox.tuners.peft_methods import load_peft
        from pegbox.tuners.slices.model import NAME

        kind = str(read_adapter_config(folder).get("peft_type", "")).lower()
        if kind != NAME:
            raise Corrupt(f"{folder} holds a '{kind}' adapter, not one of rows and columns.")
        return load_peft(model, folder, trainable=trainable)
