"""Data policies. Importing this package registers the built-in kinds."""

from pegbox.data.policies import corruption, episodes, layout, mixture

__all__ = ["corruption", "episodes", "layout", "mixture"]
