"""Selectors: which weights may move. Importing the package registers the built-in kinds."""

from pegbox.select import (
    change,
    decomposed,
    half,
    knapsack,
    low_rank_magnitude,
    magnitude,
    per_neuron,
    random,
    regrow,
    sensitivity,
    smallest,
    units,
    whole,
)
from pegbox.select.base import SELECT, Schedule, Selector

__all__ = [
    "SELECT",
    "Schedule",
    "Selector",
    "change",
    "decomposed",
    "half",
    "knapsack",
    "low_rank_magnitude",
    "magnitude",
    "per_neuron",
    "random",
    "regrow",
    "sensitivity",
    "smallest",
    "units",
    "whole",
]
