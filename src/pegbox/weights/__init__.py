"""The weights axis: what is done to weights after training. Importing this package registers the built-in kinds."""

from pegbox.weights import half_reset, interpolate, lines, merges, sparsify
from pegbox.weights.base import WEIGHTS, WeightOp

__all__ = ["WEIGHTS", "WeightOp", "half_reset", "interpolate", "lines", "merges", "sparsify"]
