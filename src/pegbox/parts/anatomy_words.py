"""Selection words: how "attention", "mlp & blocks 0-5", "q_proj", "*.layers.3.*" become module names.

A word is one or more terms joined by " & " (all must hold); a term may be turned round by "not ". Several words are
united; words that are only "not ..." are taken away from the union (from all linears, if nothing else was said).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pegbox.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from pegbox.parts.anatomy import Anatomy, Piece

__all__ = ["explain", "resolve"]

_CATEGORIES = {
    "attention": "attention",
    "mlp": "mlp",
    "mixer": "mixer",
    "router": "router",
    "norm": "norm",
    "norms": "norm",
    "embedding": "embedding",
    "embeddings": "embedding",
    "head": "head",
    "other": "other",
}
_MATRICES = {"attention", "mlp", "mixer", "router"}  # of these categories a word means the matrices only
_ROLES = {"q", "k", "v", "o", "qkv", "kv", "gate", "up", "down", "gate_up", "final_norm"}
_BLOCKS = re.compile(r"^blocks?\s+(-?\d+(?:\s*-\s*-?\d+)?(?:\s*,\s*-?\d+(?:\s*-\s*-?\d+)?)*)$")
_REGEX_SIGNS = re.compile(r"[\\()|^$+{}]")


def resolve(anatomy: Anatomy, words: str | Iterable[str]) -> list[str]:
    """See `Anatomy.resolve`."""
    found, removed, some = set[str](), set[str](), False
    for word, names in _each(anatomy, words):
        if _only_negative(word):
            removed |= _positive(anatomy, word)
        else:
            found, some = found | names, True
    if not some:
        found = {piece.module for piece in _all_linear(anatomy)}
    kept = found - removed
    if not kept:
        raise BadInput(f"Nothing is left of {_listed(words)} after the words with 'not'. {_exists(anatomy)}")
    return list(dict.fromkeys(piece.module for piece in anatomy.pieces if piece.module in kept))


def explain(anatomy: Anatomy, words: str | Iterable[str]) -> str:
    """See `Anatomy.explain`."""
    lines = []
    for word, names in _each(anatomy, words):
        shown = _positive(anatomy, word) if _only_negative(word) else names
        lines.append(f"{word}: {len(shown)} modules ({_shorten(anatomy, shown)})")
    return "\n".join([*lines, f"together {len(resolve(anatomy, words))} modules"])


def _each(anatomy: Anatomy, words: str | Iterable[str]) -> Iterator[tuple[str, set[str]]]:
    listed = [words] if isinstance(words, str) else sorted(words) if isinstance(words, set | frozenset) else list(words)
    if not listed:
        raise BadInput(f"No module was named. {_exists(anatomy)}")
    for word in listed:
        yield word, _meaning(anatomy, word)


def _only_negative(word: str) -> bool:
    return all(term.strip().startswith("not ") for term in word.split(" & "))


def _positive(anatomy: Anatomy, word: str) -> set[str]:
    terms = [_term(anatomy, term.strip().removeprefix("not ")) for term in word.split(" & ")]
    return set().union(*terms)


def _meaning(anatomy: Anatomy, word: str) -> set[str]:
    """The modules that all terms of a word allow."""
    inside: set[str] | None = None
    outside: set[str] = set()
    for term in (part.strip() for part in word.split(" & ")):
        names = _term(anatomy, term.removeprefix("not "))
        if term.startswith("not "):
            outside |= names
        else:
            inside = names if inside is None else inside & names
    if inside is None:
        return outside
    if not inside - outside:
        raise BadInput(f"'{word}' matches no module. {_exists(anatomy)}")
    return inside - outside


def _term(anatomy: Anatomy, term: str) -> set[str]:
    names = {piece.module for piece in _pieces_of(anatomy, term)}
    if not names:
        raise BadInput(f"'{term}' matches no module of this model.{_hint(anatomy, term)} {_exists(anatomy)}")
    return names


def _pieces_of(anatomy: Anatomy, term: str) -> Iterable[Piece]:
    if term == "all":
        return anatomy.pieces
    if term == "all-linear":
        return _all_linear(anatomy)
    if term in _CATEGORIES:
        category = _CATEGORIES[term]
        return [p for p in anatomy.pieces if p.category == category and (category not in _MATRICES or p.is_matrix)]
    if term in _ROLES:
        return [p for p in anatomy.pieces if p.role == term and p.category != "other"]
    if match := _BLOCKS.match(term):
        return _in_blocks(anatomy, match[1])
    return _by_pattern(anatomy, term)


def _all_linear(anatomy: Anatomy) -> list[Piece]:
    return list(anatomy.linears(in_blocks=bool(anatomy.stacks)))


def _in_blocks(anatomy: Anatomy, spans: str) -> list[Piece]:
    chosen = []
    for piece in anatomy.linears():
        assert piece.block is not None
        stack, index = piece.block
        if any(index in span for span in _spans(spans, anatomy.stacks[stack])):
            chosen.append(piece)
    return chosen


def _spans(text: str, size: int) -> Iterator[range]:
    for part in text.split(","):
        match = re.match(r"^\s*(-?\d+)(?:\s*-\s*(-?\d+))?\s*$", part)
        assert match is not None
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        first, last = (n + size if n < 0 else n for n in (first, last))
        yield range(first, last + 1)


def _by_pattern(anatomy: Anatomy, term: str) -> list[Piece]:
    """By name, last part, container, glob or regular expression: linears, unless only other pieces match."""
    matches = _matcher(term)
    found = [piece for piece in anatomy.pieces if matches(piece.module)]
    linear = [piece for piece in found if piece.kind == "linear"]
    return linear or found


def _matcher(term: str) -> Callable[[str], bool]:
    if term.startswith("re:") or _REGEX_SIGNS.search(term):
        try:
            pattern = re.compile(term.removeprefix("re:"))
        except re.error as error:
            raise BadInput(f"'{term}' is not a valid regular expression ({error}).") from None
        return lambda name: pattern.fullmatch(name) is not None
    if any(sign in term for sign in "*?["):
        return lambda name: fnmatchcase(name, term) or fnmatchcase(name, "*." + term)
    return lambda name: name == term or name.endswith("." + term) or f".{name}.".startswith(f".{term}.")


def _hint(anatomy: Anatomy, term: str) -> str:
    """A sentence where the model holds the wanted matrix fused with others, or the block does not exist."""
    part = _role_of(term)
    holders = sorted({p.module.rsplit(".", 1)[-1] for p in anatomy.pieces if part in p.slices})
    if holders:
        return f" This model holds '{part}' fused in '{', '.join(holders)}'; name that."
    if _BLOCKS.match(term):
        return f" Blocks: {', '.join(f'{stack} 0-{size - 1}' for stack, size in anatomy.stacks.items()) or 'none'}."
    return did_you_mean(term, _leaves(anatomy)).split(" Known:")[0]


def _role_of(term: str) -> str:
    """The role that a usual name like "q_proj" stands for, or the term itself."""
    from pegbox.parts.anatomy_registry import ROLES

    leaf = term.rsplit(".", 1)[-1]
    return next((table[leaf] for table in ROLES.values() if leaf in table), term)


def _leaves(anatomy: Anatomy) -> list[str]:
    return list(dict.fromkeys(piece.module.rsplit(".", 1)[-1] for piece in anatomy.pieces))


def _exists(anatomy: Anatomy) -> str:
    """What there is to name."""
    categories = sorted({piece.category for piece in anatomy.pieces})
    roles = sorted({piece.role for piece in anatomy.pieces if piece.role in _ROLES})
    blocks = ", ".join(f"{stack} 0-{size - 1}" for stack, size in anatomy.stacks.items()) or "none"
    return (
        f"There are: categories {', '.join(categories) or 'none'}; roles {', '.join(roles) or 'none'}; "
        f"blocks {blocks}; modules {', '.join(_leaves(anatomy)[:24])}; also 'all-linear' and 'all'."
    )


def _listed(words: str | Iterable[str]) -> str:
    return repr(words) if isinstance(words, str) else ", ".join(repr(word) for word in words)


def _shorten(anatomy: Anatomy, names: set[str]) -> str:
    """Names with their block numbers folded: "model.layers.{0-29}.mlp.up_proj"."""
    folded: dict[str, list[int]] = {}
    for name in dict.fromkeys(piece.module for piece in anatomy.pieces if piece.module in names):
        block = anatomy.block_of(name)
        if block is None:
            folded[name] = []
        else:
            stack, index = block
            rest = name.removeprefix(f"{stack}.{index}")
            folded.setdefault(f"{stack}.{{}}{rest}", []).append(index)
    shown = [key.format("{" + _ranges(at) + "}") if at else key for key, at in folded.items()]
    return ", ".join(shown[:8]) + (f", and {len(shown) - 8} more kinds" if len(shown) > 8 else "")


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
