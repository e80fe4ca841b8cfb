"""The generator of the built-in task: which network, which request, which words.

A family is a function (draw, network) -> (request fields, question, answer text, answer value); it is entered in
`_FAMILIES` and known by its name everywhere. Request fields are plain JSON in `row.meta["request"]`: all that the
independent checker is given.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from pegbox.data.network.addresses import Prefix, Trie, dotted, mask_of
from pegbox.data.rows import Row, content_of, row_id
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.context import seed_of

__all__ = ["FAMILIES", "SPLITS", "network_of_split", "rows"]

SYSTEM = "Answer with the configuration or the value only."
VERSION = 1  # raised whenever the rows of a seed change
SPLITS = {"test": 0.2, "validation": 0.1, "train": 0.7}  # shares of the networks

Made = tuple[dict[str, Any], str, str, Any]  # request fields, question, answer text, answer value
Draw = random.Random


def rows(split: str, n: int, seed: int = 0, families: Sequence[str] = ()) -> list[Row]:
    """`n` different rows, the families taking turns.

    Args:
        split: train, validation or test; each has networks of its own, for every seed.
        families: a subset of `FAMILIES`, all by default.

    Raises:
        BadInput: an unknown split or family, or n < 1.
    """
    chosen = tuple(families) or FAMILIES
    if split not in SPLITS:
        raise BadInput(f"network: unknown split '{split}'.{did_you_mean(split, SPLITS)}")
    for family in chosen:
        if family not in _FAMILIES:
            raise BadInput(f"network: unknown family '{family}'.{did_you_mean(family, _FAMILIES)}")
    if n < 1:
        raise BadInput(f"network: the number of rows must be at least 1, got {n}.")
    seen: set[str] = set()
    return [_row(split, i, seed, chosen[i % len(chosen)], seen) for i in range(n)]


@cache
def network_of_split(split: str) -> tuple[Prefix, ...]:
    """The /16 networks that belong to `split`."""
    return tuple(net for net in _networks() if _split_of(net) == split)


def _networks() -> Iterator[Prefix]:
    """Every /16 of the private and shared ranges: 10/8, 100.64/10, 172.16/12, 192.168/16."""
    for base, length in ((0x0A000000, 8), (0x64400000, 10), (0xAC100000, 12), (0xC0A80000, 16)):
        for i in range(1 << (16 - length)):
            yield Prefix(base + (i << 16), 16)


def _split_of(network: Prefix) -> str:
    """By hash of the network alone: no seed can move a network to another split."""
    u = int.from_bytes(hashlib.sha256(f"network {network}".encode()).digest()[:8], "big") / 2**64
    for split, share in SPLITS.items():
        if u < share:
            return split
        u -= share
    return "train"


def _row(split: str, i: int, seed: int, family: str, seen: set[str]) -> Row:
    for attempt in range(10_000):
        draw = random.Random(seed_of(seed, "network", VERSION, split, family, i, attempt))
        network = draw.choice(network_of_split(split))
        request, question, reply, answer = _FAMILIES[family](draw, network)
        row = Row(
            id="",
            kind="chat",
            messages=[
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply},
            ],
            answer=answer,
            group=f"network {network}",
            task=family,
            source=f"network:{split}, seed {seed}, row {i + 1}",
            meta={
                "checker": "network",
                "family": family,
                "network": str(network),
                "request": request,
                "generator": VERSION,
            },
        )
        identity = row_id(content_of(row))
        if identity not in seen:
            seen.add(identity)
            return Row(**{**row.__dict__, "id": identity})
    raise BadInput(f"network: no further different row of family '{family}' was found; ask for fewer rows.")


# ---- intent: a request in words -> configuration

_NAMES = (
    "uplink",
    "backup",
    "storage",
    "guests",
    "voice",
    "sales",
    "lab",
    "cameras",
    "printers",
    "servers",
    "core",
    "dmz",
)


def _intent(draw: Draw, network: Prefix) -> Made:
    kind = draw.choice(("address", "route", "vlan"))
    request, question, lines = {"address": _address, "route": _route, "vlan": _vlan}[kind](draw, network)
    text = "\n".join(lines)
    return {"kind": kind, **request}, question, text, text


def _address(draw: Draw, network: Prefix) -> tuple[dict[str, Any], str, list[str]]:
    subnet = _subnet(draw, network, 24, 30)
    address = f"{dotted(subnet.base + draw.randint(1, min(subnet.usable, 254)))}/{subnet.length}"
    port, name = f"eth{draw.randint(0, 47)}", draw.choice(_NAMES)
    question = draw.choice(
        (
            "Give interface {port} the address {address} and the description {name}.",
            "Interface {port}, described as {name}, needs the address {address}.",
            "Set {address} on {port}; its description is {name}.",
            "Please bring up {port} ({name}) with address {address}.",
        )
    ).format(port=port, address=address, name=name)
    lines = [f"interface {port}", f" description {name}", f" ip address {address}", " no shutdown"]
    return {"port": port, "address": address, "name": name}, question, lines


def _route(draw: Draw, network: Prefix) -> tuple[dict[str, Any], str, list[str]]:
    target = _subnet(draw, network, 20, 28)
    hop = dotted(network.base + draw.randint(1, 65534))
    question = draw.choice(
        (
            "Send traffic for {target} to next hop {hop}.",
            "Add a static route to {target} through {hop}.",
            "{target} must be reached through {hop}.",
            "Please route {target} via {hop}.",
        )
    ).format(target=target, hop=hop)
    return {"target": str(target), "hop": hop}, question, [f"ip route {target} {hop}"]


def _vlan(draw: Draw, network: Prefix) -> tuple[dict[str, Any], str, list[str]]:
    vlan, name, port = draw.randint(2, 4094), draw.choice(_NAMES), f"eth{draw.randint(0, 47)}"
    gateway = f"{dotted(_subnet(draw, network, 24, 24).base + 1)}/24"
    question = draw.choice(
        (
            "Put port {port} into VLAN {vlan} named {name} with gateway {gateway}.",
            "Create VLAN {vlan} called {name}, gateway {gateway}, and make {port} an access port in it.",
            "{port} belongs to VLAN {vlan} ({name}); the gateway is {gateway}.",
            "Please set up VLAN {vlan}, name {name}, gateway {gateway}, on port {port}.",
        )
    ).format(port=port, vlan=vlan, name=name, gateway=gateway)
    lines = [
        f"vlan {vlan}",
        f" name {name}",
        f" gateway {gateway}",
        f"interface {port}",
        f" access vlan {vlan}",
    ]
    return {"vlan": vlan, "name": name, "port": port, "gateway": gateway}, question, lines


# ---- subnet: arithmetic on one prefix


def _subnets(draw: Draw, network: Prefix) -> Made:
    subnet = _subnet(draw, network, 20, 30)
    host = f"{dotted(draw.randint(subnet.base + 1, subnet.last - 1))}/{subnet.length}"
    ask = draw.choice(tuple(_QUESTIONS))
    value = {
        "network": str(subnet),
        "broadcast": dotted(subnet.last),
        "first": dotted(subnet.base + 1),
        "last": dotted(subnet.last - 1),
        "hosts": str(subnet.usable),
        "netmask": dotted(mask_of(subnet.length)),
    }[ask]
    return {"ask": ask, "host": host}, draw.choice(_QUESTIONS[ask]).format(host=host), value, value


_QUESTIONS = {
    "network": ("Which network does {host} belong to?", "Give the network of {host} in CIDR notation."),
    "broadcast": ("What is the broadcast address of the network of {host}?", "Give the broadcast address for {host}."),
    "first": ("What is the first usable address in the network of {host}?", "Give the first host address for {host}."),
    "last": ("What is the last usable address in the network of {host}?", "Give the last host address for {host}."),
    "hosts": ("How many usable addresses does the network of {host} have?", "Count the usable hosts for {host}."),
    "netmask": ("What is the netmask of {host}, in dotted form?", "Write the dotted netmask for {host}."),
}


# ---- lpm: longest-prefix match


def _lpm(draw: Draw, network: Prefix) -> Made:
    table = _table(draw, network)
    trie = Trie()
    for prefix, hop in table:
        trie.insert(prefix, hop)
    target = _target(draw, network, table)
    answer = trie.lookup(target) or "no route"
    lines = "\n".join(f"{prefix} via {hop}" for prefix, hop in table)
    question = draw.choice(
        (
            "Routing table:\n{lines}\nWhich next hop takes a packet to {target}?",
            "Given these routes:\n{lines}\nName the next hop for {target}.",
            "{lines}\nBy longest-prefix match, where does {target} go?",
        )
    ).format(lines=lines, target=dotted(target))
    request = {"table": [[str(p), hop] for p, hop in table], "target": dotted(target)}
    return request, question, answer, answer


def _table(draw: Draw, network: Prefix) -> list[tuple[Prefix, str]]:
    """Two to four different prefixes of one network, often nested; one time in three a default route beside them."""
    prefixes: list[Prefix] = [_subnet(draw, network, 17, 20)]
    count = draw.randint(2, 4)
    while len(prefixes) < count:
        outer = draw.choice(prefixes) if draw.random() < 0.7 else network
        candidate = _subnet(draw, outer, min(outer.length + 1, 27), min(outer.length + 6, 28))
        if candidate not in prefixes:
            prefixes.append(candidate)
    if draw.random() < 1 / 3:
        prefixes.append(Prefix(0, 0))
    draw.shuffle(prefixes)
    hops = draw.sample(range(1, 10), len(prefixes))
    return [(prefix, f"r{hop}") for prefix, hop in zip(prefixes, hops)]


def _target(draw: Draw, network: Prefix, table: list[tuple[Prefix, str]]) -> int:
    """Mostly an address inside some route; one time in eight any address of the network."""
    inside = [prefix for prefix, _ in table if prefix.length]
    prefix = network if draw.random() < 1 / 8 else draw.choice(inside)
    return draw.randint(prefix.base + 1, prefix.last - 1)


def _subnet(draw: Draw, outer: Prefix, shortest: int, longest: int) -> Prefix:
    """A prefix inside `outer`, its length drawn between the two (both included)."""
    length = draw.randint(max(shortest, outer.length), max(longest, outer.length))
    return Prefix.around(draw.randint(outer.base, outer.last), length)


_FAMILIES: dict[str, Callable[[Draw, Prefix], Made]] = {"intent": _intent, "subnet": _subnets, "lpm": _lpm}
FAMILIES = tuple(_FAMILIES)
