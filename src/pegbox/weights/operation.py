"""A merge is one typed function; its recipe component derives from the signature.

    theta = theta_0 + lam * merged(tau_1 .. tau_K)

The function takes the task vectors (lazily) and its options by keyword, and returns a `Merged`; `@merge("name")` makes
of it a `WeightOp` with these options as validated fields, beside the scaler lam: a constant, or LiNeS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor

from pegbox.weights.base import WEIGHTS, WeightOp
from pegbox.weights.lines import Depth, derived_alpha
from pegbox.weights.updates import Merged, Updates

__all__ = ["Constant", "LinesScaler", "MergeOp", "merge"]

Number = Annotated[float, Field(allow_inf_nan=False)]
MergeFunction = Callable[..., Merged]


class Constant(BaseModel):
    """lam is the same for every tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constant"] = "constant"
    value: Number = 1.0

    def scales(self, updates: Updates, merged: Merged, anatomy: Any) -> dict[str, float]:
        return dict.fromkeys(updates.names, self.value)


class LinesScaler(Depth):
    """lam grows with depth. alpha None: derived from the sizes of the updates (see `lines.derived_alpha`)."""

    kind: Literal["lines"] = "lines"
    alpha: Number | None = None

    def scales(self, updates: Updates, merged: Merged, anatomy: Any) -> dict[str, float]:  # type: ignore[override]
        alpha = derived_alpha(updates, merged) if self.alpha is None else self.alpha
        return super().scales(updates.names, anatomy, alpha)


Scaler = Annotated[Constant | LinesScaler, Field(discriminator="kind")]


class MergeOp(WeightOp):
    """What all merges share: the scaler, and adding the merged update to the base."""

    tuned_models: ClassVar[int | None] = None
    function: ClassVar[MergeFunction]

    scaler: Scaler = Constant()

    def apply(
        self, base: Mapping[str, Tensor], tuned: list[Mapping[str, Tensor]], anatomy: Any
    ) -> Iterator[tuple[str, Tensor]]:
        updates = Updates(base, tuned, getattr(anatomy, "ties", None))
        merged = type(self).function(updates, **self.options())
        lam = self.scaler.scales(updates, merged, anatomy)
        for name in updates.base:
            tensor = base[name]
            if lam.get(name, 0.0) == 0.0:
                yield name, tensor
                continue
            update = merged.update(name)
            yield name, tensor.to(update.dtype).add(update, alpha=lam[name]).to(tensor.dtype)

    def options(self) -> dict[str, Any]:
        """The function's own options."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in ("kind", "scaler")}


def merge(kind: str, paper: str = "") -> Callable[[MergeFunction], MergeFunction]:
    """Decorator: register `function(updates, *, option=default, ...) -> Merged` as the weight operation `kind`."""

    def register(function: MergeFunction) -> MergeFunction:
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {"kind": (Literal[kind], kind)} | {
            name: (hints[name], ... if p.default is inspect.Parameter.empty else p.default)
            for name, p in inspect.signature(function).parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        title = "".join(word.title() for word in kind.split("_"))
        made = create_model(
            title,
            __base__=MergeOp,
            __module__=function.__module__,
            __doc__=function.__doc__,
            **fields,
        )
        made.function = staticmethod(function)
        made.reproduces = paper
        WEIGHTS.register(made)
        return function

    return register
