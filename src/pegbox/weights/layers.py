"""Which block a tensor lies in, and how deep that is: the layer map of weight operations.

    depth(name) = index / (L - 1), with L blocks in the tensor's stack; 1 where L = 1; None outside the blocks

The map comes from a model's anatomy, from names alone (a checkpoint without a model), or from the user. Names are
parsed once, by container: `blocks.11.mlp.0.weight` lies in block 11 of `blocks`, whatever numbers follow. What can't be
told from names is refused, never guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from pegbox.errors import BadInput

__all__ = ["BlockOf", "Stacks", "blocks_in", "depth_map", "layer_map"]

BlockOf = Callable[[str], tuple[str, int] | None]
Stacks = Literal["separate", "concatenated"]

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_map(
    names: Sequence[str], anatomy: Any = None, order: Sequence[Sequence[str]] = (), stacks: Stacks = "separate"
) -> dict[str, float | None]:
    """The depth of every name, 0 (first block) to 1 (last), None outside the blocks.

    Args:
        names: tensor names.
        anatomy: the model's `parts.anatomy.Anatomy`, if there is a model.
        order: groups of names, prefixes or globs from shallow to deep, for models that are not made of equal blocks.
        stacks: encoder and decoder each count from 0 (separate), or as one stack (concatenated, in their order).
    """
    if order:
        return depth_map(names, _ordered(names, order), "separate")
    if anatomy is not None and anatomy.stacks:
        return depth_map(names, anatomy.block_of, stacks)
    return depth_map(names, blocks_in(names), stacks)


def depth_map(names: Iterable[str], block_of: BlockOf, stacks: Stacks = "separate") -> dict[str, float | None]:
    """Depths from (stack, index). Raises `BadInput` if there is no block, or if one is missing in between."""
    places = {name: block_of(name) for name in names}
    sizes: dict[str, set[int]] = {}
    for place in places.values():
        if place is not None:
            sizes.setdefault(place[0], set()).add(place[1])
    if not sizes:
        raise BadInput(
            "No block was found in these tensors (looked for equal layers in a numbered list, as 'layers.0.', "
            "'layers.1.'). Give weights.layer_order: groups of name prefixes from shallow to deep."
        )
    for stack, indices in sizes.items():
        if indices != set(range(len(indices))):
            gap = min(set(range(max(indices) + 1)) - indices)
            raise BadInput(f"'{stack}' has no block {gap} but a block {max(indices)}. Give complete states.")
    offsets, total = _offsets({s: len(i) for s, i in sizes.items()}, stacks)
    return {
        name: None if place is None else _depth(place[1] + offsets[place[0]], total.get(place[0], 1))
        for name, place in places.items()
    }


def _depth(index: int, blocks: int) -> float:
    return 1.0 if blocks == 1 else index / (blocks - 1)


def _offsets(sizes: Mapping[str, int], stacks: Stacks) -> tuple[dict[str, int], dict[str, int]]:
    if stacks == "separate":
        return dict.fromkeys(sizes, 0), dict(sizes)
    offsets, at = {}, 0
    for stack, size in sizes.items():
        offsets[stack] = at
        at += size
    return offsets, dict.fromkeys(sizes, at)


def blocks_in(names: Iterable[str]) -> BlockOf:
    """Find the block lists from names: the outermost numbered containers whose members are all alike.

    Raises:
        BadInput: numbered containers exist, but their members differ or have gaps, so that none is a list of blocks.
    """
    members: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _NUMBER.search(name):
            members[name[: match.start(1)]][int(match[1])].add(name[match.end() :])
    stacks = _plausible({prefix: blocks for prefix, blocks in members.items() if _is_stack(blocks)})
    if members and not stacks:
        shown = ", ".join(f"{p}0..{max(b)}" for p, b in sorted(members.items())[:4])
        raise BadInput(
            f"Can't tell the blocks from the names: {shown} are numbered, but their members are not alike, have gaps, "
            "or could each be meant. Give weights.layer_order: groups of name prefixes from shallow to deep."
        )

    def block_of(name: str) -> tuple[str, int] | None:
        match = _NUMBER.search(name)
        if match is None or name[: match.start(1)] not in stacks:
            return None
        return name[: match.start(1)].rstrip("."), int(match[1])

    return block_of


def _plausible(found: Mapping[str, Mapping[int, set[str]]]) -> set[str]:
    """Of several numbered lists: those of more than one member, made of modules (not bare layers, as an MLP head)."""
    if len(found) <= 1:
        return set(found)
    longer = {s for s, blocks in found.items() if len(blocks) > 1}
    modules = {s for s in longer if any("." in suffix for suffix in set.union(*found[s].values()))}
    if modules or len(longer) == 1:
        return modules or longer
    return set()


def _is_stack(blocks: Mapping[int, set[str]]) -> bool:
    """Indices 0..L-1, and at least half of what the members hold is common to all (a few differ in most models)."""
    if set(blocks) != set(range(len(blocks))):
        return False
    common, union = set.intersection(*blocks.values()), set.union(*blocks.values())
    return 2 * len(common) >= len(union)


def _ordered(names: Sequence[str], order: Sequence[Sequence[str]]) -> BlockOf:
    places: dict[str, int] = {}
    for index, group in enumerate(order):
        for pattern in group:
            found = [n for n in names if n == pattern or n.startswith(pattern + ".") or fnmatchcase(n, pattern)]
            if not found:
                raise BadInput(f"weights.layer_order: '{pattern}' matches no tensor. One of them is '{names[0]}'.")
            for name in found:
                if places.setdefault(name, index) != index:
                    raise BadInput(f"weights.layer_order: '{name}' is in group {places[name]} and in group {index}.")
    return lambda name: ("layer_order", places[name]) if name in places else None
