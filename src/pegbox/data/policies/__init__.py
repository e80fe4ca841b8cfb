"""Data policies. Importing this package registers the built-in kinds."""

from pegbox.data.policies import corruption, episodes, layout, mixture, multi_source, views

__all__ = ["corruption", "episodes", "layout", "mixture", "multi_source", "views"]
