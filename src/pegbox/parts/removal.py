"""Taking units out of a model: heads and channels leave every tensor that they own a slice of; what is left is dense.

    q, k, v (gate, up) lose rows, biases with them; o (down) loses columns      the output as with those units at zero

Built on `coupled.py`, which says what a unit owns. With grouped queries a key-value head leaves with all its queries.
Units go by their numbers in the model as it was first; a number that is gone can't be taken out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.coupled import Coupled, moves, structures

__all__ = ["kept_units", "remove_units", "removed_rows"]

_ATTRIBUTE = "_pegbox_kept_units"
_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_SIZES = ("all_head_size", "inner_dim", "split_size")


def kept_units(model: nn.Module) -> dict[str, list[int]]:
    """Original numbers of the units that are left, by structure; structures that are whole are absent."""
    return model.__dict__.get(_ATTRIBUTE, {})


def removed_rows(structure: Coupled, units: Iterable[int], parameter: str) -> Tensor:
    """(n,) sorted positions on its axis that a parameter loses with these units (of the structure as it is now)."""
    kept = [u for u in range(structure.units) if u not in set(units)]
    axis_index = moves(structure, kept)[parameter][1]
    share = next(s for s in structure.shares if s.parameter == parameter)
    everything = torch.arange(int(share.positions.max()) + 1)
    return everything[~torch.isin(everything, axis_index)]


def remove_units(model: nn.Module, removed: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Take units out, in place. `removed`: structure name -> original numbers.

    Returns what is left, as `kept_units`. Raises `BadInput` for unknown structures or units, units that are gone, a
    part of a key-value group, and a structure that would lose everything; then nothing has been changed.
    """
    anatomy = Anatomy.of(model)
    known = {s.name: s for s in structures(anatomy)}
    before = kept_units(model)
    plans = {}
    for name, units in removed.items():
        if name not in known:
            raise BadInput(f"The model has no coupled structure '{name}'.{did_you_mean(name, known)}")
        present = before.get(name, list(range(known[name].units)))
        plans[name] = (present, _places(known[name], present, sorted({int(u) for u in units})))
    left = dict(before)
    for name, (present, gone) in plans.items():
        if gone:
            stay = [place for place in range(len(present)) if place not in gone]
            _shrink(model, anatomy, known[name], stay)
            left[name] = [present[place] for place in stay]
    model.__dict__[_ATTRIBUTE] = left
    return left


def _places(structure: Coupled, present: list[int], units: list[int]) -> set[int]:
    """Where the units stand now; checked."""
    missing = [u for u in units if u not in present]
    if missing:
        raise BadInput(
            f"'{structure.name}' has no {structure.kind} {missing}: they don't exist or were taken out before. It has "
            f"{len(present)}: {present[:8]}{'...' if len(present) > 8 else ''}."
        )
    if len(units) >= len(present):
        raise BadInput(f"'{structure.name}' would lose all of its {len(present)} {structure.kind}; leave at least one.")
    if structure.fixed and units:
        raise BadInput(f"The {structure.kind} of '{structure.name}' can't be taken out: {structure.fixed}.")
    gone = {present.index(u) for u in units}
    per = structure.per_group
    torn = [g for g in range(structure.groups) if 0 < len(gone & set(range(g * per, (g + 1) * per))) < per]
    if torn:
        raise BadInput(
            f"'{structure.name}' shares each key-value head among {per} query heads; they leave together. Take out all "
            f"of group {torn[0]}, or none."
        )
    return gone


@torch.no_grad()
def _shrink(model: nn.Module, anatomy: Anatomy, structure: Coupled, stay: list[int]) -> None:
    for parameter, (axis, index) in moves(structure, stay).items():
        module = model.get_submodule(anatomy.actual(parameter).rpartition(".")[0])
        leaf = parameter.rpartition(".")[2]
        old = getattr(module, leaf)
        if not old.is_floating_point():
            raise BadInput(f"'{parameter}' is packed; take units out before quantizing.")
        new = nn.Parameter(old.index_select(axis, index.to(old.device)).contiguous(), requires_grad=old.requires_grad)
        setattr(module, leaf, new)
        _resize(module, new)
    if structure.kind == "heads":
        _tell_attention(model, anatomy, structure, len(stay))


def _resize(module: nn.Module, weight: Tensor) -> None:
    """A layer's own idea of its size."""
    if weight.ndim != 2:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = weight.shape  # type: ignore[assignment]


def _tell_attention(model: nn.Module, anatomy: Anatomy, structure: Coupled, left: int) -> None:
    """Counts that attention modules keep and reshape by: on it and on what it consists of (BERT's self-attention)."""
    head = structure.share("q").positions.shape[1]
    sizes = {
        **dict.fromkeys(_HEADS, (structure.units, left)),
        **dict.fromkeys(_GROUPS, (structure.groups, left // structure.per_group)),
        **dict.fromkeys(_SIZES, (structure.units * head, left * head)),
    }
    for module in model.get_submodule(anatomy.actual(structure.name)).modules():
        for name, (before, now) in sizes.items():
            if module.__dict__.get(name) == before:
                setattr(module, name, now)
