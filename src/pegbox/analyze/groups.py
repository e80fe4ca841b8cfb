"""Parameters grouped into layers: blocks, parts of blocks, or single tensors, for any model.

A model with a list of equal blocks is grouped by the anatomy; any other by the modules that own parameters, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy

__all__ = ["Grain", "layers_of"]

Grain = Literal["block", "part", "tensor"]


def layers_of(
    model: nn.Module, grain: Grain = "block", given: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """Layer name -> names of its floating parameters (tied ones once), from shallow to deep.

    Args:
        grain: "block" (a block is a layer; what lies outside is grouped by module), "part" (a block's attention, MLP
            and norms apart), "tensor".
        given: layers of one's own, as words of the anatomy, name prefixes or globs.
    """
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    if given is not None:
        return {layer: _meant(words, names, model) for layer, words in given.items()}
    if grain == "tensor":
        return {name: [name] for name in names}
    anatomy = _anatomy(model)
    if anatomy is None:
        return _by_owner(names)
    category = {name: piece.category for piece in anatomy.pieces for name in piece.parameters}
    layers: dict[str, list[str]] = {}
    for name in names:
        place = anatomy.block_of(name)
        if place is None:
            key = name.rpartition(".")[0] or name
        else:
            key = f"{place[0]}.{place[1]}"
            if grain == "part":
                key += f" {category.get(name, 'other')}"
        layers.setdefault(key, []).append(name)
    return layers


def _anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy of a model that has a list of blocks, else None."""
    try:
        anatomy = Anatomy.of(model)
    except BadInput:
        return None
    return anatomy if anatomy.stacks else None


def _by_owner(names: Sequence[str]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers


def _meant(words: Sequence[str], names: Sequence[str], model: nn.Module) -> list[str]:
    from fnmatch import fnmatchcase

    found: dict[str, None] = {}
    for word in [words] if isinstance(words, str) else words:
        hit = [n for n in names if n == word or n.startswith(f"{word}.") or fnmatchcase(n, word)]
        if not hit:
            anatomy = _anatomy(model)
            hit = [n for n in anatomy.parameters([word]) if n in names] if anatomy is not None else []
        if not hit:
            raise BadInput(f"'{word}' matches no parameter. One of them is '{names[0]}'.")
        found |= dict.fromkeys(hit)
    return list(found)
