"""The independent checker of the built-in task. It shares no code with the generator.

It is given the request's fields and a model's text, works the answer out anew (with `ipaddress`, a linear scan over the
table, and a parser that turns configuration text into the state of a device), and compares. Configurations are compared
as states: white space, and the order of statements inside a section, don't count; anything missing, wrong or added
does.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

from pegbox.errors import BadInput

__all__ = ["check", "expected"]

State = dict[tuple[str, ...], frozenset[tuple[str, ...]]]  # section -> its statements

_SECTIONS = ("interface", "vlan")


def check(row: Any, text: str) -> bool:
    """Whether `text` answers the request. `row` is a `Row` of this task, or its `meta`."""
    meta = row if isinstance(row, Mapping) else row.meta
    family, request = meta.get("family"), meta.get("request")
    if family not in ("intent", "subnet", "lpm") or not isinstance(request, Mapping):
        raise BadInput("Only rows of the built-in network task can be checked: `meta` has no known family and request.")
    if family == "intent":
        state = parse_configuration(text)
        return state is not None and state == requested_state(request)
    return _final(text) == expected(meta)


def expected(meta: Mapping[str, Any]) -> str:
    """The answer to a subnet or longest-prefix request, as the checker works it out."""
    request = meta["request"]
    return _subnet_answer(request) if meta["family"] == "subnet" else _route_answer(request)


def parse_configuration(text: str) -> State | None:
    """Sections and their statements, or None if the text is no configuration. A fenced block is unwrapped."""
    fence = re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", text, flags=re.DOTALL)
    sections: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    current: tuple[str, ...] | None = None
    for line in (fence.group(1) if fence else text).splitlines():
        words = tuple(line.split())
        if not words:
            continue
        if words[0] in _SECTIONS:
            current = words
            sections.setdefault(current, set())
        elif words[:2] == ("ip", "route") or current is None:  # routes belong to the device wherever they stand
            sections.setdefault(("device",), set()).add(words)
        else:
            sections[current].add(words)
    return {name: frozenset(statements) for name, statements in sections.items()} if sections else None


def requested_state(request: Mapping[str, Any]) -> State:
    """The device state that a request asks for."""
    match request["kind"]:
        case "address":
            address = ipaddress.ip_interface(request["address"])
            wanted = {("description", request["name"]), ("ip", "address", address.with_prefixlen), ("no", "shutdown")}
            return {("interface", request["port"]): frozenset(wanted)}
        case "route":
            target, hop = ipaddress.ip_network(request["target"]), ipaddress.ip_address(request["hop"])
            return {("device",): frozenset({("ip", "route", target.with_prefixlen, str(hop))})}
        case "vlan":
            gateway = ipaddress.ip_interface(request["gateway"]).with_prefixlen
            number = str(request["vlan"])
            return {
                ("vlan", number): frozenset({("name", request["name"]), ("gateway", gateway)}),
                ("interface", request["port"]): frozenset({("access", "vlan", number)}),
            }
    raise BadInput(f"Unknown kind of intent {request['kind']!r}.")


def _subnet_answer(request: Mapping[str, Any]) -> str:
    net = ipaddress.ip_interface(request["host"]).network
    answers = {
        "network": net.with_prefixlen,
        "broadcast": str(net.broadcast_address),
        "first": str(net.network_address + 1),
        "last": str(net.broadcast_address - 1),
        "hosts": str(net.num_addresses - 2),
        "netmask": str(net.netmask),
    }
    return answers[request["ask"]]


def _route_answer(request: Mapping[str, Any]) -> str:
    target = ipaddress.ip_address(request["target"])
    matching = [(ipaddress.ip_network(p), hop) for p, hop in request["table"] if target in ipaddress.ip_network(p)]
    return max(matching, key=lambda m: m[0].prefixlen)[1] if matching else "no route"


def _final(text: str) -> str:
    """The answer in a short text: what follows the last "answer:" if there is one; case, quotes, full stop ignored."""
    said = re.split(r"answer\s*:", text, flags=re.IGNORECASE)[-1]
    return " ".join(said.split()).strip("`'\" ").removesuffix(".").lower()
