"""Selectors: which weights may move. Importing the package registers the built-in kinds."""

from pegbox.select import low_rank_magnitude, magnitude, random
from pegbox.select.base import SELECT, Schedule, Selector

__all__ = ["SELECT", "Schedule", "Selector", "low_rank_magnitude", "magnitude", "random"]
