"""IPv4 by integer arithmetic: what the generator computes with. The checker uses `ipaddress` instead.

mask(p) = 2^32 - 2^(32-p);  network = a & mask;  broadcast = network | ~mask;  usable hosts = 2^(32-p) - 2  (p <= 30)
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Prefix", "Trie", "dotted", "mask_of"]

FULL = 0xFFFFFFFF


def dotted(address: int) -> str:
    """167772161 -> "10.0.0.1"."""
    return ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0))


def mask_of(length: int) -> int:
    """24 -> 0xFFFFFF00."""
    return FULL << (32 - length) & FULL


@dataclass(frozen=True, order=True)
class Prefix:
    """`base` with its first `length` bits fixed; host bits are zero."""

    base: int
    length: int

    @classmethod
    def around(cls, address: int, length: int) -> Prefix:
        """The prefix of this length that holds `address`."""
        return cls(address & mask_of(length), length)

    @property
    def last(self) -> int:
        """The broadcast address."""
        return self.base | (~mask_of(self.length) & FULL)

    @property
    def usable(self) -> int:
        """Host addresses without network and broadcast address (lengths up to 30)."""
        return (1 << (32 - self.length)) - 2

    def holds(self, address: int) -> bool:
        return address & mask_of(self.length) == self.base

    def __str__(self) -> str:
        return f"{dotted(self.base)}/{self.length}"


@dataclass
class Trie:
    """Longest-prefix match by walking the address bit by bit."""

    value: str | None = None
    children: dict[int, Trie] = field(default_factory=dict)

    def insert(self, prefix: Prefix, value: str) -> None:
        node = self
        for depth in range(prefix.length):
            node = node.children.setdefault(prefix.base >> (31 - depth) & 1, Trie())
        node.value = value

    def lookup(self, address: int) -> str | None:
        node: Trie | None = self
        best = self.value
        for depth in range(32):
            node = node.children.get(address >> (31 - depth) & 1) if node is not None else None
            if node is None:
                break
            best = node.value if node.value is not None else best
        return best
