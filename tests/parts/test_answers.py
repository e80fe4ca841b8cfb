"""Answers: each comparison on cases that decide it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pegbox.errors import BadInput
from pegbox.parts.answers import (
    CHECKERS,
    boxed,
    check,
    checker_for,
    contains,
    exact_match,
    final_answer,
    last_number,
    normalise,
    numbers_equal,
    prefix_match,
    register_checker,
    sets_equal,
    squad_f1,
    to_number,
)


def test_normalise_is_squads():
    assert normalise("The  Eiffel-Tower, an icon!") == "eiffeltower icon"
    assert normalise("A theater") == "theater"


@pytest.mark.parametrize(
    ("said", "golds", "right"),
    [
        ("The cat.", "cat", True),
        ("Les Miserables", "Les Misérables", False),
        ("b", ["a b c", "B"], True),
        ("", "x", False),
    ],
)
def test_exact_match(said, golds, right):
    assert exact_match(said, golds) is right


def test_prefix_match_is_looser_but_never_on_nothing():
    assert prefix_match("19981", "1998")
    assert not exact_match("19981", "1998")
    assert not prefix_match("anything", "the")


def test_contains_is_by_whole_words():
    assert contains("It is Paris, of course", "paris")
    assert not contains("Parisian", "paris")


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_bounded_and_one_on_itself(a, b):
    assert 0 <= squad_f1(a, b) <= 1
    assert squad_f1(a, a) == 1
    if "no answer" not in (a, b):
        assert squad_f1(a, b) == squad_f1(b, a)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_numbers_are_read_as_python_writes_them(x):
    assert to_number(str(x)) == x


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", 1234.5),
        ("$3", 3),
        ("12%", 0.12),
        ("-4.", -4),
        ("ten", None),
        ("nan", None),
        (True, None),
        ("", None),
    ],
)
def test_to_number(text, value):
    assert to_number(text) == value


def test_numbers_by_final_answer_then_last_number():
    assert numbers_equal("2 + 2 = 4\n#### 1,000 apples", 1000)
    assert numbers_equal(r"first 3, so \boxed{7} and then 9", 7)
    assert numbers_equal("between 3 and 5.", 5)
    assert not numbers_equal("none", 5)
    assert numbers_equal("101", 100, relative=0.01)
    assert not numbers_equal("102", 100, relative=0.01)
    with pytest.raises(BadInput, match="not a number"):
        numbers_equal("1", "one")


def test_final_answer_and_boxed():
    assert final_answer("#### 3\n#### 4") == "4"
    assert boxed(r"\boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert boxed(r"\boxed{open") is None
    assert final_answer("nothing") is None
    assert last_number("from 1e3 to -2.5e-1") == -0.25


def test_sets():
    assert sets_equal("b, the A and c", ["a", "b", "C"])
    assert not sets_equal("a, b", "a; b; c")


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        ("it is 4", 4, True),
        ("3.09", {"number": 3.0, "tolerance": 0.1}, True),
        ("3.2", {"number": 3.0, "tolerance": 0.1}, False),
        ("y; x", {"set": ["x", "y"]}, True),
        ("No", ["no", "nope"], True),
        ("true", True, True),
        ("he said Paris", {"contains": "paris"}, True),
        ("Paris!", {"text": "paris"}, True),
    ],
)
def test_check(said, expected, right):
    assert check(said, expected) is right


@pytest.mark.parametrize("block", [{}, {"numbr": 3}, {"number": 3, "tolerence": 1}, {"set": [], "text": ""}])
def test_a_block_that_cannot_be_checked_is_refused(block):
    with pytest.raises(BadInput, match="can't be checked"):
        check("3", block)


def row(**fields):
    return SimpleNamespace(**{"id": "r", "task": "", "source": "", "meta": {}, "answer": None, **fields})


def test_checkers_by_meta_task_and_source(monkeypatch):
    monkeypatch.setattr("pegbox.parts.answers.CHECKERS", dict(CHECKERS))
    register_checker("yes", lambda row, answer: answer == "yes")
    for found in (row(meta={"checker": "yes"}), row(task="yes"), row(task="yes/part"), row(source="yes:3")):
        assert checker_for(found)(found, "yes") is True
    with pytest.raises(BadInput, match="registered already"):
        register_checker("yes", lambda row, answer: True)
    with pytest.raises(BadInput, match="Did you mean 'yes'"):
        checker_for(row(meta={"checker": "yess"}))
    with pytest.raises(BadInput, match="no 'answer'"):
        checker_for(row())(row(), "x")


def test_the_built_in_tasks_checker_is_imported_when_needed():
    from pegbox.data.network import rows

    for made in rows("test", 6, 0):
        reply = made.messages[-1]["content"]
        assert checker_for(made)(made, reply)
        assert not checker_for(made)(made, reply + " 9.9.9.9/32 extra")
