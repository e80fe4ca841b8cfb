"""Objectives: what is minimised. Importing this package registers the built-in kinds."""

from pegbox.objectives import asft, classification, policy, preference, token
from pegbox.objectives.base import OBJECTIVE, Objective

__all__ = ["OBJECTIVE", "Objective", "asft", "classification", "policy", "preference", "token"]
