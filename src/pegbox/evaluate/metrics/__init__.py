"""The built-in metrics; importing this package registers them."""

from pegbox.evaluate.metrics.generated import F1, Contains, ExactMatch, Number, Verified
from pegbox.evaluate.metrics.likelihood import Accuracy, Loss, MultipleChoice, Perplexity
from pegbox.evaluate.metrics.user import Function, metric_from
from pegbox.evaluate.repair import Repair

__all__ = [
    "F1",
    "Accuracy",
    "Contains",
    "ExactMatch",
    "Function",
    "Loss",
    "MultipleChoice",
    "Number",
    "Perplexity",
    "Repair",
    "Verified",
    "metric_from",
]
