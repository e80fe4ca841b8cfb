"""pegbox: every published way to fine-tune a pre-trained model, behind one interface.

    import pegbox
    run = pegbox.train("lift", model="smollm2-135m-q4", data="my.jsonl", out="runs/lift")
    model, tokenizer = pegbox.load("runs/lift")

Names are imported on first use. Importing the package registers pegbox's tuners with PEFT as soon as PEFT is imported
(or at once, if it is already).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pegbox.late import after_import

if TYPE_CHECKING:
    from pegbox.artefact import load_artefact as load
    from pegbox.errors import PegboxError
    from pegbox.parts.allocation import Allocation
    from pegbox.parts.statistics import StatSpec, collect
    from pegbox.recipe import Recipe, load_recipe
    from pegbox.run import Run, open_run, train
    from pegbox.tuners.sparse import SparseConfig, callbacks_for

__version__ = "0.1.0"

_HOMES = {
    "Allocation": "pegbox.parts.allocation",
    "PegboxError": "pegbox.errors",
    "Recipe": "pegbox.recipe",
    "Run": "pegbox.run",
    "SparseConfig": "pegbox.tuners.sparse",
    "StatSpec": "pegbox.parts.statistics",
    "callbacks_for": "pegbox.tuners.sparse",
    "collect": "pegbox.parts.statistics",
    "load": "pegbox.artefact:load_artefact",
    "load_recipe": "pegbox.recipe",
    "open_run": "pegbox.run",
    "train": "pegbox.run",
}

__all__ = [
    "Allocation",
    "PegboxError",
    "Recipe",
    "Run",
    "SparseConfig",
    "StatSpec",
    "__version__",
    "callbacks_for",
    "collect",
    "load",
    "load_recipe",
    "open_run",
    "register",
    "train",
]


def register() -> None:
    """Register pegbox's tuners with PEFT now (imports PEFT). Done by itself once both are imported."""
    importlib.import_module("pegbox.tuners.sparse.model")


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'pegbox' has no attribute '{name}'")
    module, _, attribute = home.partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


after_import("peft", register)
