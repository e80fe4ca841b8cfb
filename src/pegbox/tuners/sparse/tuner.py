"""The sparse tuner as a recipe's `tuner:` block; `layer.py` does the work, a selector chooses the entries."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from pegbox.errors import Corrupt
from pegbox.parts.allocation import Allocation
from pegbox.parts.context import Context
from pegbox.tuners.axis import TUNER
from pegbox.tuners.base import Tuner

__all__ = ["SparseTuner"]


@TUNER.register
class SparseTuner(Tuner):
    """k entries of each target tensor train as float32 values; the base stays what it is.

    Args: as `SparseConfig`. The entries come from the recipe's `select:`; without one, `select` here is used.
    """

    kind: Literal["sparse"] = "sparse"

    takes: ClassVar[frozenset[str]] = frozenset({"entries", "whole", "units", "tuner"})
    rewrites_base: ClassVar[bool] = True  # in place, between forwards; `reference` and saving put it back
    merge: ClassVar[Literal["exact", "lossy", "no"]] = "exact"
    moves: ClassVar[frozenset[str]] = frozenset({"slots"})

    coordinates: Literal["absolute", "delta"] = "delta"
    execution: Literal["auto", "in_place", "scatter", "bypass", "lean"] = "auto"
    gradient: Literal["sampled", "dense"] = "sampled"
    values: Literal["float32", "bfloat16"] = "float32"
    tensors: tuple[Literal["weight", "bias"], ...] = Field(default=("weight",), min_length=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    select: dict[str, Any] | None = None
    seed: int | None = None  # default: the run's

    @property
    def needs_floating_base(self) -> bool:  # type: ignore[override]
        """Writing entries, building weights and absolute coordinates all need the base's own numbers."""
        return self.execution in {"in_place", "scatter"} or self.coordinates == "absolute"

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """Differences add up; values in absolute coordinates do not."""
        return self.coordinates == "delta"

    @property
    def holds_vectors(self) -> bool:  # type: ignore[override]
        """A bypass is a second product beside the base's; a norm or a bias has none."""
        return self.execution != "bypass"

    def config(self, **changes: Any) -> Any:
        """The PEFT config of this block (imports PEFT)."""
        from pegbox.tuners.sparse import SparseConfig

        fields: dict[str, Any] = {
            "coordinates": self.coordinates,
            "execution": self.execution,
            "gradient": self.gradient,
            "values": self.values,
            "tensors": list(self.tensors),
            "target_modules": _plain(self.target_modules),
            "exclude_modules": _plain(self.exclude_modules),
            "layers_to_transform": _plain(self.layers_to_transform),
            "seed": self.seed or 0,
        }
        if self.select is not None:
            fields["select"] = self.select
        return SparseConfig(**{**fields, **changes})

    def attach(self, model: nn.Module, allocation: Allocation | None, ctx: Context) -> nn.Module:
        from pegbox.tuners.peft_methods import attach_peft, task_type_of

        seed = self.seed if self.seed is not None else ctx.seed
        config = self.config(seed=seed, task_type=task_type_of(model))
        if allocation is not None:
            config = config.with_allocation(allocation)
        return attach_peft(model, config)

    def schedules(self, selector: Any, ctx: Context) -> list[Any]:
        schedule = getattr(selector, "schedule", None)
        if schedule is None or not (schedule.moves or getattr(schedule, "every", None)):
            return []
        from pegbox.tuners.sparse.refresh import MaskRefresh

        return [MaskRefresh(selector, seed=ctx.seed, total=lambda: ctx.total_steps, model=ctx.model)]

    def reference(self, model: Any) -> AbstractContextManager[Any]:
        return model.disable_adapter()

    def save(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        from pegbox.tuners.peft_methods import save_peft
        from pegbox.tuners.sparse.model import sparse_layers

        saved = save_peft(model, folder)
        name = str(model.active_adapter)
        layers = sparse_layers(model).values()
        counts = [
            (layer.slot(name, t).index.numel(), layer.touched(name, t))
            for layer in layers
            for t in ("weight", "bias")
            if name in layer._of(t, "values")
        ]
        return {**saved, "trained": sum(c[0] for c in counts), "touched": sum(c[1] for c in counts)}

    def load(self, model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
        from pegbox.tuners.peft_files import read_adapter_config
        from pegbox.tuners.peft_methods import load_peft
        from pegbox.tuners.sparse.model import NAME

        kind = str(read_adapter_config(folder).get("peft_type", "")).lower()
        if kind != NAME:
            raise Corrupt(f"{folder} holds a '{kind}' adapter, not a sparse one.")
        return load_peft(model, folder, trainable=trainable)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
