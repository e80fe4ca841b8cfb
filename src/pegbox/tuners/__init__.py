"""Tuners: in what form an update lives. Importing the package registers the built-in kinds; PEFT is not imported."""

from pegbox.tuners import bayesian_lora, full, lowrank_sparse, slices, sparse
from pegbox.tuners.axis import TUNER
from pegbox.tuners.base import Tuner

__all__ = ["TUNER", "Tuner", "bayesian_lora", "full", "lowrank_sparse", "slices", "sparse"]
