"""Bugs made by changing one place of a right Python function, with the exact reason of each.

    mutants(code) -> every single change by these operators, in the order of the source:
    off_by_one      an integer n -> n + 1, range(n) -> range(n - 1)
    wrong_operator  < and <=, > and >=, == and !=, + and -, * and +, // and %, `and` and `or`
    wrong_init      a number or truth value that a name starts with
    swapped_args    the first two arguments of a call
    missing_return  `return x` -> `x`

The reason says which line, what is wrong there and what it should be. Code is written the way `ast.unparse` writes it,
the right one too, so that a repair differs in the bug alone. Whether a mutant is wrong at all only its tests can tell.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pegbox.errors import BadInput

__all__ = ["OPERATORS", "Mutant", "canonical", "mutants"]


@dataclass(frozen=True)
class Mutant:
    """A buggy function, the operator that made it, the line (from 1) and the reason."""

    code: str
    operator: str
    line: int
    rationale: str


_SWAPPED: dict[type[ast.AST], type[Any]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def canonical(code: str) -> str:
    """The code as `ast.unparse` writes it. Raises `BadInput` for what does not parse."""
    try:
        return ast.unparse(ast.parse(code))
    except SyntaxError as error:
        raise BadInput(
            f"The function does not parse (line {error.lineno}: {error.msg}). Give right Python code."
        ) from None


def mutants(code: str) -> list[Mutant]:
    """Every mutant, each different from the code and from the others."""
    right = canonical(code)
    tree = ast.parse(right)
    found: dict[str, Mutant] = {}
    for position, here in enumerate(ast.walk(tree)):
        for operator, change in OPERATORS.items():
            if not change(copy.deepcopy(here)):
                continue
            fresh = copy.deepcopy(tree)
            node = next(n for i, n in enumerate(ast.walk(fresh)) if i == position)
            change(node)
            wrong = ast.unparse(fresh)
            if wrong != right and wrong not in found:
                found[wrong] = _explained(right, wrong, operator)
    return sorted(found.values(), key=lambda m: (m.line, list(OPERATORS).index(m.operator), m.code))


def _explained(right: str, wrong: str, operator: str) -> Mutant:
    pairs = zip(right.splitlines(), wrong.splitlines(), strict=True)
    line, (good, bad) = next((i, pair) for i, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
    said = f"Line {line}, `{bad.strip()}`, is wrong: {_WORDS[operator]}. It should be `{good.strip()}`."
    return Mutant(wrong, operator, line, said)


# --- operators: change a node in place, and say whether they did ----------------------------------------------------


def _off_by_one(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
        at = 0 if len(node.args) == 1 else 1
        node.args[at] = ast.BinOp(node.args[at], ast.Sub(), ast.Constant(1))
        return True
    return False


def _wrong_operator(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
        node.ops[0] = cast(ast.cmpop, _SWAPPED[type(node.ops[0])]())
        return True
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPPED:
        node.op = _SWAPPED[type(node.op)]()
        return True
    return False


def _wrong_init(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
        return False
    value = node.value.value
    if not isinstance(value, int | float):
        return False
    node.value = ast.Constant(not value if isinstance(value, bool) else 0 if value else 1)
    return True


def _swapped_args(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or len(node.args) < 2:
        return False
    node.args[0], node.args[1] = node.args[1], node.args[0]
    return True


def _missing_return(node: ast.AST) -> bool:
    for name in ("body", "orelse"):
        block = getattr(node, name, None)
        if isinstance(block, list) and block and isinstance(block[-1], ast.Return) and block[-1].value is not None:
            block[-1] = ast.Expr(block[-1].value)
            return True
    return False


OPERATORS: dict[str, Callable[[ast.AST], bool]] = {
    "off_by_one": _off_by_one,
    "wrong_operator": _wrong_operator,
    "wrong_init": _wrong_init,
    "swapped_args": _swapped_args,
    "missing_return": _missing_return,
}
_WORDS = {
    "off_by_one": "a number is off by one",
    "wrong_operator": "the operator is not the one that is needed",
    "wrong_init": "the name starts with the wrong value",
    "swapped_args": "two arguments are swapped",
    "missing_return": "the value is computed but not returned",
}
