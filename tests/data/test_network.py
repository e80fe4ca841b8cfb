"""The built-in task: computed answers, an independent judge, networks that never cross splits."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pegbox.data import network
from pegbox.data.network.addresses import Prefix, Trie, dotted, mask_of
from pegbox.data.network.checker import parse_configuration
from pegbox.errors import BadInput

addresses = st.integers(0, 2**32 - 1)


@given(addresses, st.integers(0, 30))
def test_arithmetic_agrees_with_ipaddress(address, length):
    ours, theirs = Prefix.around(address, length), ipaddress.ip_network((address, length), strict=False)
    assert str(ours) == str(theirs)
    assert dotted(ours.last) == str(theirs.broadcast_address)
    assert dotted(mask_of(length)) == str(theirs.netmask)
    assert ours.usable == theirs.num_addresses - 2


@given(st.lists(st.tuples(addresses, st.integers(0, 28)), max_size=8), addresses)
def test_trie_agrees_with_a_linear_scan(table, target):
    prefixes = {Prefix.around(a, n): f"r{i}" for i, (a, n) in enumerate(table)}
    trie = Trie()
    for prefix, hop in prefixes.items():
        trie.insert(prefix, hop)
    holding = [p for p in prefixes if p.holds(target)]
    best = prefixes[max(holding, key=lambda p: p.length)] if holding else None
    assert trie.lookup(target) == best


@pytest.mark.parametrize("split", network.SPLITS)
def test_every_answer_passes_the_independent_checker(split):
    for row in network.rows(split, 600, seed=3):
        assert network.check(row, row.messages[-1]["content"]), row
        assert network.check(row.meta, row.messages[-1]["content"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2))
def test_any_changed_character_fails(seed, family):
    (row,) = network.rows("train", 1, seed, [network.FAMILIES[family]])
    text = row.messages[-1]["content"]
    for i in [i for i, c in enumerate(text) if c.isdigit()]:
        other = str((int(text[i]) + 1) % 10)
        assert not network.check(row, text[:i] + other + text[i + 1 :])


def test_rows_bring_their_checker():
    from pegbox.parts.answers import checker_for

    (row,) = network.rows("test", 1)
    assert checker_for(row)(row, row.messages[-1]["content"])
    assert not checker_for(row)(row, "no")


def test_a_changed_request_flips_the_verdict():
    for row in network.rows("test", 60, seed=1, families=["lpm"]):
        request = row.meta["request"]
        table = [[prefix, "r99"] for prefix, _ in request["table"]]
        changed = row.meta | {"request": request | {"table": table}}
        assert network.check(changed, row.answer) == (row.answer == "no route")


def test_white_space_is_normalised_and_nothing_else():
    row = next(r for r in network.rows("train", 30, 0, ["intent"]) if r.meta["request"]["kind"] == "address")
    text = row.messages[-1]["content"]
    lines = text.splitlines()
    assert network.check(row, "  " + text.replace("\n ", "\n\n\t  ") + "\n")
    assert network.check(row, f"```\n{text}\n```")
    assert network.check(row, "\n".join([lines[0], *reversed(lines[1:])]))
    assert not network.check(row, text + "\n mtu 9000")
    assert not network.check(row, "\n".join(lines[:-1]))
    assert not network.check(row, "Here is the configuration:\n" + text)
    assert not network.check(row, "")


def test_short_answers_may_be_introduced():
    (row,) = network.rows("train", 1, 0, ["subnet"])
    assert network.check(row, f"Answer: {row.answer}.")
    assert not network.check(row, f"{row.answer} or {row.answer}")
    assert not network.check(row, "")


def test_no_network_is_in_two_splits_whatever_the_seeds():
    nets = {split: {r.group for s in range(5) for r in network.rows(split, 300, s)} for split in network.SPLITS}
    assert not nets["train"] & nets["test"]
    assert not nets["train"] & nets["validation"]
    assert not nets["validation"] & nets["test"]
    assert sum(len(network.network_of_split(split)) for split in network.SPLITS) == 256 + 64 + 16 + 1


def test_addresses_in_a_row_lie_in_its_network():
    for row in network.rows("test", 300, 0):
        net = ipaddress.ip_network(row.meta["network"])
        request = row.meta["request"]
        found = [request[k] for k in ("address", "target", "hop", "gateway", "host") if k in request]
        found += [p for p, _ in request.get("table", []) if p != "0.0.0.0/0"]
        assert found
        assert all(ipaddress.ip_interface(a).ip in net for a in found)


def test_a_larger_set_begins_with_the_smaller_and_a_seed_repeats():
    small, large = network.rows("train", 50, 7), network.rows("train", 200, 7)
    assert large[:50] == small
    assert [dataclasses.asdict(r) for r in large] == [dataclasses.asdict(r) for r in network.rows("train", 200, 7)]
    assert network.rows("train", 50, 8) != small


def test_rows_differ_and_families_take_turns():
    rows = network.rows("train", 3000, 0)
    assert len({r.id for r in rows}) == 3000
    assert Counter(r.task for r in rows) == {"intent": 1000, "subnet": 1000, "lpm": 1000}
    assert {r.task for r in network.rows("train", 10, 0, ["lpm"])} == {"lpm"}
    assert all(json.dumps(r.meta) for r in rows)


def test_unanswerable_tables_occur_and_no_hop_dominates():
    answers = Counter(r.answer for r in network.rows("test", 2000, 0, ["lpm"]))
    assert 0.05 <= answers["no route"] / 2000 <= 0.15
    assert max(n for a, n in answers.items() if a != "no route") / 2000 < 0.2


def test_a_prefix_is_not_always_the_answer_of_the_first_or_last_line():
    rows = network.rows("test", 900, 0, ["lpm"])
    for position in (0, -1):
        hits = sum(r.meta["request"]["table"][position][1] == r.answer for r in rows)
        assert hits / len(rows) < 0.5


def test_bad_requests_are_refused():
    with pytest.raises(BadInput, match=r"unknown split 'tset'.*test"):
        network.rows("tset", 1)
    with pytest.raises(BadInput, match=r"unknown family 'intend'.*intent"):
        network.rows("test", 1, 0, ["intend"])
    with pytest.raises(BadInput, match="at least 1"):
        network.rows("test", 0)
    with pytest.raises(BadInput, match="built-in network task"):
        network.check({}, "x")


def test_parser_separates_device_and_section_statements():
    text = "vlan 5\n name a\nip route 10.0.0.0/8 10.0.0.1\ninterface eth1\n access vlan 5"
    assert parse_configuration(text) == {
        ("vlan", "5"): frozenset({("name", "a")}),
        ("device",): frozenset({("ip", "route", "10.0.0.0/8", "10.0.0.1")}),
        ("interface", "eth1"): frozenset({("access", "vlan", "5")}),
    }
    assert parse_configuration(" \n") is None
