"""The analysis axis: what changed inside a tuned model. Importing this package registers the built-in kinds."""

from pegbox.analyze import circuits, few_shot, interference, path, stragglers, tuco, tuning_scale
from pegbox.analyze.base import ANALYZE, Analysis, Subject

__all__ = [
    "ANALYZE",
    "Analysis",
    "Subject",
    "circuits",
    "few_shot",
    "interference",
    "path",
    "stragglers",
    "tuco",
    "tuning_scale",
]
