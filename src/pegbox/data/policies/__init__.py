"""Data policies. Importing this package registers the built-in kinds."""

from pegbox.data.policies import corruption

__all__ = ["corruption"]
