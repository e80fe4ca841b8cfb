"""The step axis: optimizers and gradient estimators. Importing this package registers the built-in kinds."""

from pegbox.optim import adafactor, adamw, adamw_8bit, mezo, sgd, sparse_adam
from pegbox.optim.base import OPTIM, Problem, Step, StepLog
from pegbox.optim.groups import decays, split_decay

__all__ = [
    "OPTIM",
    "Problem",
    "Step",
    "StepLog",
    "adafactor",
    "adamw",
    "adamw_8bit",
    "decays",
    "mezo",
    "sgd",
    "sparse_adam",
    "split_decay",
]
