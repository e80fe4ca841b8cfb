"""The built-in task: requests of network operations, generated from a seed, answers computed and checked twice.

Three families: `intent` (a request in words -> device configuration), `subnet` (IPv4 subnet arithmetic), `lpm`
(longest-prefix match in a routing table). Row i depends on the seed, the split, the families and i alone, so a larger
set begins with the smaller one. Every row belongs to one /16 network, and a network belongs to one split for all seeds,
so no test network was ever trained on.

    rows(split, n, seed) -> list[Row]          check(row, text) -> bool          FAMILIES

Answers are computed here by integer arithmetic and a trie; `check` judges with the standard library's `ipaddress`, a
linear scan and a configuration parser (checker.py), and shares no code with the generator.
"""

from pegbox.data.network.checker import check, expected
from pegbox.data.network.generator import FAMILIES, SPLITS, network_of_split, rows

__all__ = ["FAMILIES", "SPLITS", "check", "expected", "network_of_split", "rows"]
