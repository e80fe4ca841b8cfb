"""Train, validation and test, by hash: a row's place depends on its content (or group) and the seed, nothing else.

    u(key) = sha256(seed, key) / 2^64;   test if u < t, validation if u < t + v, else train

so adding rows never moves others. A key is a connected component of rows that share a group or are exact duplicates:
neither ever straddles a split. Shares are therefore met on average, not exactly; a share asked for is never left empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from pegbox.data.rows import Row, base_id
from pegbox.errors import BadInput

__all__ = ["keys_of", "split_rows", "without_duplicates_of"]


def split_rows(rows: Sequence[Row], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[Row]]:
    """Rows by split name, in their order. `shares` e.g. {"test": 0.1, "validation": 0.05}; the rest is "train".

    Raises:
        BadInput: shares outside [0, 1) or summing to 1 or more, or fewer separate keys than splits.
    """
    wanted = {name: share for name, share in shares.items() if share > 0}
    if any(not 0 <= share < 1 for share in shares.values()) or sum(wanted.values()) >= 1:
        raise BadInput(f"Split shares must lie in [0, 1) and sum to less than 1, got {dict(shares)}.")
    keys = keys_of(rows)
    places = {key: _place(_unit(seed, key), wanted) for key in set(keys)}
    _fill_empty(places, wanted, seed)
    out: dict[str, list[Row]] = {name: [] for name in ["train", *shares]}
    for row, key in zip(rows, keys):
        out[places[key]].append(row)
    return out


def keys_of(rows: Sequence[Row]) -> list[str]:
    """Per row, the name of its component over shared groups and equal contents."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    nodes = []
    for row in rows:
        content, group = "row:" + base_id(row.id), f"group:{row.group}"
        a, b = root(content), root(group if row.group else content)
        parent[max(a, b)] = min(a, b)  # the component is named after its least member, whatever the order
        nodes.append(content)
    return [root(node) for node in nodes]


def without_duplicates_of(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """`rows` less those that also stand, word for word, in `others`."""
    seen = {base_id(row.id) for row in others}
    return [row for row in rows if base_id(row.id) not in seen]


def _unit(seed: int, key: str) -> float:
    digest = hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _place(u: float, shares: Mapping[str, float]) -> str:
    for name in sorted(shares):
        if u < shares[name]:
            return name
        u -= shares[name]
    return "train"


def _fill_empty(places: dict[str, str], shares: Mapping[str, float], seed: int) -> None:
    """Give every asked-for split at least one key, taken from the split with the most."""
    names = [*sorted(shares), "train"]
    if len(places) < len(names):
        raise BadInput(
            f"{len(places)} separate rows or groups can't fill the splits {', '.join(names)}. Give more data, or a "
            "file for each split."
        )
    order = sorted(places, key=lambda key: (_unit(seed, key), key))
    for name in names:
        counts = {n: sum(1 for p in places.values() if p == n) for n in names}
        if counts[name] == 0:
            donor = max(names, key=lambda n: counts[n])
            places[next(key for key in order if places[key] == donor)] = name
