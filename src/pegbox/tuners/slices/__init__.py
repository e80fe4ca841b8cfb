"""The slices tuner: whole rows and columns of matrices train as dense blocks (S2FT), and what can be done with them.

Importing the package is light; `SlicesConfig` and the layer come with PEFT when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegbox.tuners.slices.tuner import SlicesTuner

if TYPE_CHECKING:
    from pegbox.tuners.slices.config import SlicesConfig
    from pegbox.tuners.slices.export import export_slices, to_full_weights
    from pegbox.tuners.slices.layer import SliceLayer
    from pegbox.tuners.slices.model import SlicesModel, slice_layers
    from pegbox.tuners.slices.serving import ParallelAdapters, gathered_product, scattered_product
    from pegbox.tuners.slices.switch import Switcher

__all__ = [
    "ParallelAdapters",
    "SliceLayer",
    "SlicesConfig",
    "SlicesModel",
    "SlicesTuner",
    "Switcher",
    "export_slices",
    "gathered_product",
    "scattered_product",
    "slice_layers",
    "to_full_weights",
]

_LATE = {
    "ParallelAdapters": "serving",
    "SliceLayer": "layer",
    "SlicesConfig": "config",
    "SlicesModel": "model",
    "Switcher": "switch",
    "export_slices": "export",
    "gathered_product": "serving",
    "scattered_product": "serving",
    "slice_layers": "model",
    "to_full_weights": "export",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    importlib.import_module(f"{__name__}.model")  # registers the method with PEFT
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
