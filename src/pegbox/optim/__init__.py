"""The step axis: optimizers and gradient estimators. Importing this package registers the built-in kinds."""

from pegbox.optim import adafactor, adamw, adamw_8bit, aged_adamw, episodic, mezo, sgd, sparse_adam, sparse_sm3
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
    "aged_adamw",
    "decays",
    "episodic",
    "mezo",
    "sgd",
    "sparse_adam",
    "sparse_sm3",
    "split_decay",
]
