"""Coupled structures: heads and channels, the slices of every tensor that one of them owns, and re-ordering them.

    h = concat_u h_u,   h_u made by rows of W1 (q, k, v; gate, up) and read by columns of W2 (o; down)

Re-ordering the units of h in W1's rows and W2's columns together leaves the function unchanged; leaving units out of
both makes a smaller dense model. Units are query heads or MLP channels; with grouped queries a key-value head is a
*group* of query heads and moves with them. Biases of W1 and other parameters per unit (sinks, wide norms of queries)
move along; inside a head nothing moves (rotary positions).

What this file does not know: how units are chosen, or what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported, did_you_mean
from pegbox.parts.anatomy import Anatomy, Attention, Block, Piece

__all__ = [
    "Coupled",
    "Moves",
    "Reordering",
    "Share",
    "block_order",
    "grouped_order",
    "inverse",
    "move_",
    "moves",
    "reorder",
    "reordering_of",
    "restore",
    "structures",
]

Kind = Literal["heads", "channels"]
Moves = dict[str, tuple[int, Tensor]]  # parameter -> (stored axis, which position comes to each place)
_ATTRIBUTE = "_pegbox_reordered"
_PROBE = 8  # tokens on which a re-ordered model is compared with what it was


@dataclass(frozen=True)
class Share:
    """What units own of one parameter.

    Args:
        parameter: its name in the bare model. module: the module it belongs to.
        role: q | k | v | o | gate | up | down | other; `bias` says that it is that matrix's bias.
        axis: of the stored tensor. positions: (units, n) int64, or (groups, n): where each one's slices lie on it.
        per: whether a row of `positions` is a unit's or a group's.
    """

    parameter: str
    module: str
    role: str
    axis: int
    positions: Tensor
    per: Literal["unit", "group"] = "unit"
    bias: bool = False

    def of(self, chosen: Iterable[int]) -> Tensor:
        """(n,) int64 positions of the chosen units (or groups), in their order."""
        return self.positions[torch.as_tensor(list(chosen), dtype=torch.long)].reshape(-1)

    def owners(self, positions: Tensor) -> list[int]:
        """The units (or groups) that own any of these positions, in order of first appearance."""
        owner = torch.full((int(self.positions.max()) + 1,), -1, dtype=torch.long)
        owner[self.positions.reshape(-1)] = torch.arange(len(self.positions)).repeat_interleave(self.positions.shape[1])
        inside = positions.long().cpu()
        inside = inside[inside < len(owner)]
        return [u for u in dict.fromkeys(owner[inside].tolist()) if u >= 0]


@dataclass(frozen=True)
class Coupled:
    """One attention's heads, or one MLP's channels.

    Args:
        name: of the attention or MLP in the model. block: (stack, index).
        units: query heads or channels. groups: key-value heads (= units where each query has its own, and for
            channels); a group's units are neighbours.
        shares: everything the units own, weights first.
        fixed: why their order can't be changed; empty if it can.
    """

    name: str
    kind: Kind
    block: tuple[str, int]
    units: int
    groups: int
    shares: tuple[Share, ...]
    fixed: str = ""

    @property
    def per_group(self) -> int:
        """Units in a group."""
        return self.units // self.groups

    def has(self, role: str) -> bool:
        """Whether there is a weight of this role."""
        return any(s.role == role and not s.bias for s in self.shares)

    def share(self, role: str) -> Share:
        """What units own of the weight of this role. Raises `BadInput`."""
        for share in self.shares:
            if share.role == role and not share.bias:
                return share
        raise BadInput(f"'{self.name}' has no matrix '{role}'.{did_you_mean(role, {s.role for s in self.shares})}")

    def count(self, role: str) -> int:
        """How many things of this role can be chosen: groups for k and v, units otherwise."""
        return len(self.share(role).positions)


# ---- finding them


def structures(anatomy: Anatomy, kinds: Sequence[Kind] = ("heads", "channels")) -> tuple[Coupled, ...]:
    """All coupled structures of a model, in its order.

    Raises `BadInput` for heads that don't divide their matrices or their key-value heads. Attentions and MLPs of
    another make (latent attention, fused experts, mixers) have none and are left out.
    """
    found: list[Coupled] = []
    for block in anatomy.blocks:
        if "heads" in kinds:
            heads = (_heads(anatomy, block, attention) for attention in block.attentions)
            found += [structure for structure in heads if structure is not None]
        if "channels" in kinds:
            found += _channels(anatomy, block)
    return tuple(_with_fixed(anatomy, found))


def _heads(anatomy: Anatomy, block: Block, attention: Attention) -> Coupled | None:
    roles = attention.matrices
    if "o" not in roles or not ({"q", "k", "v"} <= set(roles) or "qkv" in roles) or not attention.heads:
        return None
    heads, groups = attention.heads, attention.kv_heads or attention.heads
    if heads % groups:
        raise BadInput(f"'{attention.name}': {heads} query heads can't be divided among {groups} key-value heads.")
    first: list[Share] = []
    for role, number in (("q", heads), ("k", groups), ("v", groups)):
        piece, rows = _rows(anatomy, roles, role, "qkv")
        if rows is None or rows.numel() % number:
            size = "unknown sizes" if rows is None else f"{rows.numel()} rows"
            raise BadInput(f"'{piece.module}': {size} can't be divided into {number} heads.")
        first += _outputs(piece, role, rows.view(number, -1), "unit" if role == "q" else "group")
    o = anatomy.piece(roles["o"])
    value = next(s for s in first if s.role == "v").positions.shape[1]
    query = next(s for s in first if s.role == "q").positions.shape[1]
    if o.shape[1] != heads * value or query != next(s for s in first if s.role == "k").positions.shape[1]:
        return None  # an output gate beside the queries, or latent values: not these heads
    shares = (*first, _inputs(o, "o", heads), *_beside(block, attention, heads, groups, query))
    return Coupled(attention.name, "heads", (block.stack, block.index), heads, groups, _sorted(shares))


def _channels(anatomy: Anatomy, block: Block) -> list[Coupled]:
    groups: dict[str, dict[str, str]] = {}
    for piece in block.mlp:
        if piece.kind == "linear" and piece.role:
            groups.setdefault(piece.group, {}).setdefault(piece.role, piece.module)
    whole = {name: roles for name, roles in groups.items() if _is_mlp(roles)}
    loose = [pair for name, roles in groups.items() if name not in whole for pair in roles.items()]
    if len({role for role, _ in loose}) == len(loose) and _is_mlp(dict(loose)):
        whole[f"{block.name} mlp"] = dict(loose)  # up and down under different parents, as in BERT
    return [s for s in (_mlp(anatomy, block, name, roles) for name, roles in whole.items()) if s is not None]


def _is_mlp(roles: Mapping[str, str]) -> bool:
    return "down" in roles and ("up" in roles or "gate_up" in roles)


def _mlp(anatomy: Anatomy, block: Block, name: str, roles: Mapping[str, str]) -> Coupled | None:
    down = anatomy.piece(roles["down"])
    units = down.shape[1]
    first: list[Share] = []
    for role in ("up", "gate"):
        if role not in roles and "gate_up" not in roles:
            continue
        piece, rows = _rows(anatomy, roles, role, "gate_up")
        if rows is None or rows.numel() != units:
            return None
        first += _outputs(piece, role, rows.view(units, 1), "unit")
    extra = [
        Share(p.parameters[i], p.module, "other", 0, torch.arange(units)[:, None])
        for p in block.pieces
        if p.kind == "norm" and p.module.startswith(name + ".") and p.shape == (units,)
        for i in range(len(p.parameters))
    ]
    shares = _sorted((*first, _inputs(down, "down", units), *extra))
    return Coupled(name, "channels", (block.stack, block.index), units, units, shares)


def _rows(anatomy: Anatomy, roles: Mapping[str, str], role: str, fused: str) -> tuple[Piece, Tensor | None]:
    """The matrix that holds a role and its output rows in it; None where a fused one's sizes are not known."""
    if role in roles:
        piece = anatomy.piece(roles[role])
        return piece, torch.arange(piece.shape[0])
    piece = anatomy.piece(roles[fused])
    return piece, piece.rows(role) if role in piece.slices else None


def _outputs(piece: Piece, role: str, positions: Tensor, per: Literal["unit", "group"]) -> list[Share]:
    """Rows of a W1 and of its bias."""
    weight = Share(piece.weight, piece.module, role, piece.out_axis, positions, per)
    biases = [Share(name, piece.module, role, 0, positions, per, True) for name in piece.parameters[1:]]
    return [weight, *biases]


def _inputs(piece: Piece, role: str, units: int) -> Share:
    """Columns of a W2; its bias is no unit's."""
    return Share(piece.weight, piece.module, role, 1 - piece.out_axis, torch.arange(piece.shape[1]).view(units, -1))


def _beside(block: Block, attention: Attention, heads: int, groups: int, size: int) -> Iterable[Share]:
    """Parameters per head that are no matrix: norms over all queries or keys, sinks, tables of biases."""
    for piece in block.pieces:
        if not f"{piece.module}.".startswith(attention.name + "."):
            continue
        leaf = piece.module.rsplit(".", 1)[-1].lower()
        if piece.kind == "norm" and leaf[:1] in ("q", "k"):
            per: Literal["unit", "group"] = "group" if leaf.startswith("k") else "unit"
            number = groups if per == "group" else heads
            if piece.shape == (number * size,) and number > 1:
                positions = torch.arange(number * size).view(number, size)
                yield from (Share(name, piece.module, "other", 0, positions, per) for name in piece.parameters)
        elif piece.kind == "loose" and list(piece.shape).count(heads) == 1 and heads > 1:
            axis = list(piece.shape).index(heads)
            yield Share(piece.weight, piece.module, "other", axis, torch.arange(heads)[:, None])


def _sorted(shares: Iterable[Share]) -> tuple[Share, ...]:
    return tuple(sorted(shares, key=lambda s: (s.bias, s.role == "other")))


def _with_fixed(anatomy: Anatomy, found: list[Coupled]) -> Iterable[Coupled]:
    """Heads of a stack whose blocks share a table of position biases per head (T5) keep their order."""
    tables = {
        p.block[0]: p.shape[-1]
        for p in anatomy.pieces
        if p.block is not None and p.kind == "embedding" and "bias" in p.module.rsplit(".", 1)[-1]
    }
    for structure in found:
        if structure.kind == "heads" and tables.get(structure.block[0]) == structure.units:
            yield replace(structure, fixed="all blocks share one table of position biases per head")
        else:
            yield structure


# ---- orders


def block_order(first: Sequence[int], second: Sequence[int], units: int) -> list[int]:
    """first only ++ both ++ second only ++ rest: `first` becomes a range from 0, `second` a range inside the order."""
    one, two = set(first), set(second)
    only = [u for u in first if u not in two]
    both = [u for u in first if u in two]
    other = [u for u in second if u not in one]
    return [*only, *both, *other, *(u for u in range(units) if u not in one | two)]


def grouped_order(groups: Sequence[int], units: Sequence[int], count: int, per_group: int) -> list[int]:
    """As `block_order` for units that move in groups: chosen groups first, chosen units side by side where possible.

    Units of a group chosen in part stand at the end of the first such group and at the start of the others.
    """
    if per_group == 1:
        return block_order(groups, units, count)
    holders = list(dict.fromkeys(unit // per_group for unit in units))
    order: list[int] = []
    chosen, first = set(units), True
    for group in block_order(groups, holders, count // per_group):
        members = range(group * per_group, (group + 1) * per_group)
        inside = [u for u in units if u in members]
        outside = [u for u in members if u not in chosen]
        order += [*outside, *inside] if first and inside else [*inside, *outside]
        first = first and not inside
    return order


def moves(structure: Coupled, order: Sequence[int]) -> Moves:
    """What comes to each place of every tensor when the units stand in `order`.

    `order` may leave units out: then the tensors get smaller. Units of a group stand together, as many of each.
    Raises `BadInput` for units that don't exist, stand twice, or tear a group apart.
    """
    wanted = [int(u) for u in order]
    if len(set(wanted)) != len(wanted) or not all(0 <= u < structure.units for u in wanted) or not wanted:
        raise BadInput(f"'{structure.name}' has {structure.units} {structure.kind}; each can stand once in an order.")
    groups = _group_order(structure, wanted)
    found: dict[str, tuple[int, Tensor, Tensor]] = {}
    for share in structure.shares:
        chosen = wanted if share.per == "unit" else groups
        length = int(share.positions.max()) + 1
        axis, index, gone = found.get(share.parameter, (share.axis, torch.arange(0), torch.arange(0)))
        if len(index) < length:
            index = torch.cat([index, torch.arange(len(index), length)])
        index[share.positions[: len(chosen)].reshape(-1)] = share.of(chosen)
        gone = torch.cat([gone, share.positions[len(chosen) :].reshape(-1)])
        found[share.parameter] = (axis, index, gone)
    return {name: (axis, _without(index, gone)) for name, (axis, index, gone) in found.items()}


def _without(index: Tensor, gone: Tensor) -> Tensor:
    keep = torch.ones(len(index), dtype=torch.bool)
    keep[gone] = False
    return index[keep]


def _group_order(structure: Coupled, order: list[int]) -> list[int]:
    per = structure.per_group
    groups = list(dict.fromkeys(u // per for u in order))
    each = len(order) // len(groups)
    runs = [{u // per for u in order[i : i + each]} for i in range(0, len(order), each)]
    if len(order) % len(groups) or any(len(run) != 1 for run in runs):
        raise BadInput(
            f"'{structure.name}' has {per} query heads to each of {structure.groups} key-value heads: an order keeps "
            "the heads of a group side by side, as many of each group."
        )
    return groups


# ---- on tensors


def inverse(found: Moves) -> Moves:
    """The moves that undo complete ones."""
    return {name: (axis, index.argsort()) for name, (axis, index) in found.items()}


@torch.no_grad()
def move_(tensors: Mapping[str, Tensor], found: Moves) -> None:
    """Carry out complete moves in place. Raises `BadInput` for packed tensors, before anything is moved."""
    _check_floating(tensors, found)
    for name, (axis, index) in found.items():
        tensor = tensors[name].detach()
        tensor.copy_(tensor.index_select(axis, index.to(tensor.device)))


def _check_floating(tensors: Mapping[str, Tensor], found: Moves) -> None:
    for name in found:
        if not tensors[name].is_floating_point():
            raise BadInput(
                f"'{name}' is stored as {tensors[name].dtype}; the units of a packed (quantized) matrix can't be "
                "re-ordered. Use indices (layout: gather), or re-order before quantizing."
            )


@dataclass
class Reordering:
    """What was moved in a model: parameter -> (axis, index), and the order of the units by structure."""

    moves: Moves
    orders: dict[str, Tensor]

    def place(self, parameter: str, axis: int) -> Tensor | None:
        """Where each original position of an axis stands now; None if that axis was not moved."""
        at = self.moves.get(parameter)
        return None if at is None or at[0] != axis else at[1].argsort()


def reordering_of(model: nn.Module) -> Reordering | None:
    """How the units of this (bare) model were re-ordered, or None."""
    return model.__dict__.get(_ATTRIBUTE)


def reorder(
    model: nn.Module, orders: Mapping[str, Sequence[int] | Tensor], anatomy: Anatomy | None = None
) -> Reordering:
    """Re-order units of a model in place; `orders` by structure name, absent ones stay.

    Raises:
        BadInput: a model that is re-ordered already, unknown structures, packed weights.
        Unsupported: an order that the model does not allow, e.g. where positions depend on a head's number.
    """
    if reordering_of(model) is not None:
        raise BadInput(
            "The units of this model are re-ordered already; a model can't be permuted twice. Undo it first."
        )
    anatomy = anatomy or Anatomy.of(model)
    known = {s.name: s for s in structures(anatomy)}
    found: Moves = {}
    kept: dict[str, Tensor] = {}
    for name, order in orders.items():
        if name not in known:
            raise BadInput(f"The model has no coupled structure '{name}'.{did_you_mean(name, known)}")
        whole = torch.as_tensor(order, dtype=torch.long)
        if len(whole) != known[name].units:
            raise BadInput(
                f"'{name}': an order of all {known[name].units} {known[name].kind} is needed, not {len(whole)}."
            )
        if torch.equal(whole, torch.arange(len(whole))):
            continue
        _check_movable(model, known[name])
        found |= moves(known[name], whole.tolist())
        kept[name] = whole
    tensors = _tensors(model, anatomy, found)
    _check_floating(tensors, found)
    before = _answer(model)
    move_(tensors, found)
    model.__dict__[_ATTRIBUTE] = done = Reordering(found, kept)
    after = _answer(model)
    if before is not None and after is not None and not _alike(before, after):
        restore(model, anatomy)
        raise Unsupported(
            f"Re-ordering units changed what {type(model).__name__} computes, so something in it goes by a unit's "
            "number; it was undone. Use indices (layout: gather)."
        )
    return done


def restore(model: nn.Module, anatomy: Anatomy | None = None) -> None:
    """Undo `reorder`, bit for bit; nothing if there is nothing to undo."""
    done = reordering_of(model)
    if done is None:
        return
    move_(_tensors(model, anatomy or Anatomy.of(model), done.moves), inverse(done.moves))
    del model.__dict__[_ATTRIBUTE]


def _tensors(model: nn.Module, anatomy: Anatomy, names: Iterable[str]) -> dict[str, Tensor]:
    actual = dict(model.named_parameters())
    return {name: actual[anatomy.actual(anatomy.ties.get(name, name))] for name in names}


@torch.no_grad()
def _answer(model: nn.Module) -> Tensor | None:
    """Logits on a few tokens, or None for a model that is not asked by token ids alone."""
    config = getattr(model, "config", None)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding) or getattr(config, "is_encoder_decoder", False):
        return None
    if embedding.weight.is_meta:
        return None
    ids = torch.arange(_PROBE, device=embedding.weight.device)[None] % embedding.num_embeddings
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = model(input_ids=ids)
    except (TypeError, ValueError):
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found[0]


def _alike(before: Tensor, after: Tensor) -> bool:
    """Equal up to the rounding of sums in another order."""
    tolerance = 1e-3 if before.dtype in (torch.float32, torch.float64) else 0.05
    return float((before - after).abs().max()) <= tolerance * float(before.abs().max())


def _check_movable(model: nn.Module, structure: Coupled) -> None:
    config = getattr(model, "config", None)
    reason = structure.fixed
    if structure.kind == "heads" and (
        getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt")
    ):
        reason = "a head's slope over distances (ALiBi) goes by its number"
    if reason:
        raise Unsupported(
            f"The heads of '{structure.name}' can't be re-ordered: {reason}. Use indices (layout: gather)."
        )
