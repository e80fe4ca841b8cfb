"""The sparse tuner: k entries of each target tensor train, in one layer for every sparse method.

Importing the package is light; `SparseConfig` and the layer come with PEFT when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegbox.tuners.sparse.tuner import SparseTuner

if TYPE_CHECKING:
    from pegbox.tuners.sparse.config import SparseConfig
    from pegbox.tuners.sparse.export import export_delta
    from pegbox.tuners.sparse.layer import SparseLayer
    from pegbox.tuners.sparse.merge import merge_modules
    from pegbox.tuners.sparse.model import SparseModel, sparse_layers
    from pegbox.tuners.sparse.refresh import MaskRefresh, callbacks_for

__all__ = [
    "MaskRefresh",
    "SparseConfig",
    "SparseLayer",
    "SparseModel",
    "SparseTuner",
    "callbacks_for",
    "export_delta",
    "merge_modules",
    "sparse_layers",
]

_LATE = {
    "MaskRefresh": "refresh",
    "SparseConfig": "config",
    "SparseLayer": "layer",
    "SparseModel": "model",
    "callbacks_for": "refresh",
    "export_delta": "export",
    "merge_modules": "merge",
    "sparse_layers": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    importlib.import_module(f"{__name__}.model")  # registers the method with PEFT
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
