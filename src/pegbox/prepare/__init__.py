"""Preparations of a base. Importing this package registers the built-in kinds."""

from pegbox.prepare import add_token, corda, nf4, permute, prune
from pegbox.prepare.base import PREPARE, Preparation

__all__ = ["PREPARE", "Preparation", "add_token", "corda", "nf4", "permute", "prune"]
