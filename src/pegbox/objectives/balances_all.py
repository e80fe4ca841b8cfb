"""Importing this module registers the built-in balances."""

from pegbox.objectives import balances, balances_learned

__all__ = ["balances", "balances_learned"]
