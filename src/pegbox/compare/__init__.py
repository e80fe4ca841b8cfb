"""`compare`: several recipes on one user's data, under one lock, with the statistics that such a table needs."""

from pegbox.compare.engine import Plan, compare

__all__ = ["Plan", "compare"]
