"""The weights axis: what is done to weights after training. Importing this package registers the built-in kinds."""

from pegbox.weights import interpolate, lines, merges
from pegbox.weights.base import WEIGHTS, WeightOp

__all__ = ["WEIGHTS", "WeightOp", "interpolate", "lines", "merges"]
