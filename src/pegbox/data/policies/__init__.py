"""Data policies. Importing this package registers the built-in kinds."""

from pegbox.data import bayesian_scheduler
from pegbox.data.policies import corruption, episodes, layout, mixture, multi_source, views

__all__ = ["bayesian_scheduler", "corruption", "episodes", "layout", "mixture", "multi_source", "views"]
