"""Objectives: what is minimised. Importing this package registers the built-in kinds."""

from pegbox.objectives import asft, classification, multitask, policy, preference, prior_terms, token, views
from pegbox.objectives.base import OBJECTIVE, Objective

__all__ = [
    "OBJECTIVE",
    "Objective",
    "asft",
    "classification",
    "multitask",
    "policy",
    "preference",
    "prior_terms",
    "token",
    "views",
]
