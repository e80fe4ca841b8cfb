"""Which trainer hosts which objective: one table, built when first asked (importing TRL takes seconds).

    supervised  transformers.Trainer with pegbox's loader and collator; the objective makes the loss
    preference  trl.DPOTrainer                                          the trainer makes the loss
    policy      trl.GRPOTrainer                                         the trainer samples and makes the loss
    sft         trl.SFTTrainer, for use from one's own script

An objective whose host makes the loss says how by `options()`, fields of that trainer's config.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pegbox.engine.evaluation import Evaluating
from pegbox.engine.resume import Resumable
from pegbox.engine.seams import Seams
from pegbox.errors import Unsupported, did_you_mean

__all__ = ["HOSTS", "arguments_class", "trainer_class"]

# host -> (package, trainer, its arguments)
HOSTS = {
    "supervised": ("transformers", "Trainer", "TrainingArguments"),
    "sft": ("trl", "SFTTrainer", "SFTConfig"),
    "preference": ("trl", "DPOTrainer", "DPOConfig"),
    "policy": ("trl", "GRPOTrainer", "GRPOConfig"),
}


def _row(host: str) -> tuple[str, str, str]:
    if host not in HOSTS:
        raise Unsupported(f"No trainer hosts '{host}'.{did_you_mean(host, HOSTS)}")
    return HOSTS[host]


@lru_cache
def trainer_class(host: str) -> type[Any]:
    """The host's trainer with pegbox's mixins before it."""
    import importlib

    package, name, _ = _row(host)
    base = getattr(importlib.import_module(package), name)
    return type(f"Pegbox{name}", (Seams, Evaluating, Resumable, base), {"__doc__": f"{name} with pegbox's seams."})


@lru_cache
def arguments_class(host: str) -> type[Any]:
    """The class of the host's arguments."""
    import importlib

    package, _, name = _row(host)
    return getattr(importlib.import_module(package), name)
