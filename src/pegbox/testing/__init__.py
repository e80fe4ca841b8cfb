"""Fakes and batteries for pegbox's own tests and for those of third-party parts. No downloads.

A battery is a class of tests; derive from it, name your component, and pytest runs the whole battery on it:

    class TestMine(SelectorBattery):
        component = MySelector(budget={"density": 0.1})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegbox.testing.fakes import tiny_batch, tiny_llama, tiny_tokenizer

if TYPE_CHECKING:
    from pegbox.testing.batteries import (
        AnalysisBattery,
        DecoderBattery,
        ObjectiveBattery,
        PolicyBattery,
        PreparationBattery,
        SelectorBattery,
        StepBattery,
        TunerBattery,
        WeightOpBattery,
    )

__all__ = [
    "AnalysisBattery",
    "DecoderBattery",
    "ObjectiveBattery",
    "PolicyBattery",
    "PreparationBattery",
    "SelectorBattery",
    "StepBattery",
    "TunerBattery",
    "WeightOpBattery",
    "tiny_batch",
    "tiny_llama",
    "tiny_tokenizer",
]


def __getattr__(name: str) -> Any:
    """The batteries need pytest, the fakes do not: they are imported when one is asked for."""
    if not name.endswith("Battery"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pegbox.testing import batteries

    return getattr(batteries, name)
