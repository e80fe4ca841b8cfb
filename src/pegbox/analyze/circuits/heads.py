"""Attention heads of a decoder, found through its anatomy: where each head's slice is read and written.

    o: columns [h d : (h+1) d] of the INPUT of o_proj      q, k, v: columns of the projection's output (fused or not)

With grouped queries head h reads key and value slice h // (heads / kv heads). A site stands on the outermost module of
its name, so that an adapter on a projection sees what was written, as its base layer does.

What this file does not know: what is written, and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.anatomy import Anatomy, Attention, Piece

__all__ = ["COMPOSITIONS", "Columns", "Head", "HeadView", "Site", "check_alike", "lora_rank_sites", "mlp_sites"]

Kind = Literal["o", "q", "k", "v"]
COMPOSITIONS = ("q", "k", "v")
Columns = slice | tuple[int, ...]
_WRAPPED = re.compile(r"(\.(base_layer|original_module|_orig_mod))+$")


class Head(NamedTuple):
    """Head `head` of block `layer`, both counted from 0."""

    layer: int
    head: int


@dataclass(frozen=True, eq=False)
class Site:
    """Some columns of a module's input or output, (B, T, W); `layer` tells the block that reaches it."""

    module: nn.Module
    at: Literal["input", "output"]
    columns: Columns
    layer: int
    name: str

    @property
    def key(self) -> tuple[int, str]:
        """The tensor it lies in."""
        return id(self.module), self.at


class HeadView:
    """The heads of one model.

    Args:
        model: a causal language model: bare, quantized, or with adapters.

    Attributes: `layers` L, `heads` H (per block), `kv_heads`, `size` d of a query or key, `value_size` of a slice.

    Raises:
        Unsupported: an encoder-decoder, blocks without one self-attention each, or of different shapes.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy | None = None):
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise Unsupported("Circuits are looked for along one residual stream; an encoder-decoder has two.")
        self.model = model
        self.anatomy = anatomy or Anatomy.of(model)
        if len(self.anatomy.stacks) != 1:
            names = ", ".join(self.anatomy.stacks) or "none"
            raise Unsupported(f"Circuits need one list of blocks; this model has {names}.")
        self.attentions = [_attention(block.name, block.attentions) for block in self.anatomy.blocks]
        first = self.attentions[0]
        self.layers = len(self.attentions)
        self.heads, self.kv_heads, self.size = _sizes(first)
        if any(_sizes(other) != _sizes(first) for other in self.attentions):
            raise Unsupported("The blocks' attentions have different numbers or sizes of heads; scores need one shape.")
        width = self.anatomy.piece(first.matrices["o"]).shape[1]
        if width % self.heads:
            raise Unsupported(f"o_proj takes {width} columns, which {self.heads} heads do not divide.")
        self.width, self.value_size = width, width // self.heads
        stack = next(iter(self.anatomy.stacks))
        self.blocks = [model.get_submodule(self.anatomy.actual(f"{stack}.{i}")) for i in range(self.layers)]
        if self.anatomy.head is None:
            raise Unsupported("Circuits are measured on next-token logits; this model has no output head.")
        self.unembedding = self._module(self.anatomy.head)

    def __repr__(self) -> str:
        return f"HeadView({self.layers} blocks, {self.heads} heads, {self.kv_heads} KV heads of {self.size})"

    def all(self) -> list[Head]:
        """Every head, block by block."""
        return [Head(layer, head) for layer in range(self.layers) for head in range(self.heads)]

    def check(self, heads: Iterable[Iterable[int]]) -> tuple[Head, ...]:
        """The heads as `Head`s, in order. Raises `BadInput` for one out of range or given twice."""
        found = []
        for pair in heads:
            numbers = tuple(pair)
            if len(numbers) != 2:
                raise BadInput(f"A head is [layer, head], got {list(numbers)}.")
            head = Head(int(numbers[0]), int(numbers[1]))
            if not (0 <= head.layer < self.layers and 0 <= head.head < self.heads):
                raise BadInput(
                    f"Head {list(head)} is out of range: layers 0-{self.layers - 1}, heads 0-{self.heads - 1}."
                )
            if head in found:
                raise BadInput(f"Head {list(head)} is given twice.")
            found.append(head)
        return tuple(found)

    def kv_head(self, head: int) -> int:
        """The key and value slice that a head reads."""
        return head // (self.heads // self.kv_heads)

    def site(self, kind: str, layer: int, head: int | None = None) -> Site:
        """Where a head's slice lies, or all heads' of a block.

        Raises `BadInput` for another kind, `Unsupported` for a fused projection whose layout is not known.
        """
        attention = self.attentions[layer]
        columns: Columns
        if kind == "o":
            name, columns, at = attention.matrices["o"], self._slice(head, self.value_size), "input"
        elif kind in COMPOSITIONS:
            name, columns = self._projected(attention, kind, head)
            at = "output"
        else:
            raise BadInput(f"Unknown composition '{kind}'. Known: q, k, v.")
        place: Any = at
        return Site(self._module(name), place, columns, layer, f"{layer}.{'all' if head is None else head}.{kind}")

    def _slice(self, head: int | None, size: int) -> slice:
        return slice(None) if head is None else slice(head * size, (head + 1) * size)

    def _projected(self, attention: Attention, kind: str, head: int | None) -> tuple[str, Columns]:
        part = None if head is None else (head if kind == "q" else self.kv_head(head))
        if kind in attention.matrices:
            size = self.anatomy.piece(attention.matrices[kind]).shape[0]
            return attention.matrices[kind], self._slice(part, size // (self.heads if kind == "q" else self.kv_heads))
        fused = attention.matrices.get("qkv") or (attention.matrices.get("kv") if kind != "q" else None)
        piece: Piece | None = self.anatomy.piece(fused) if fused is not None else None
        if piece is None or kind not in piece.slices:
            raise Unsupported(
                f"{fused or attention.name}: the layout of the fused projection is not known, so '{kind}' of a head "
                "can't be found. Register it with pegbox.parts.anatomy_registry.register."
            )
        rows = piece.rows(kind)
        chosen = rows if part is None else rows[self._slice(part, len(rows) // self._parts(kind))]
        return piece.module, tuple(chosen.tolist())

    def _parts(self, kind: str) -> int:
        return self.heads if kind == "q" else self.kv_heads

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(_WRAPPED.sub("", self.anatomy.actual(name)))


def _attention(block: str, attentions: tuple[Attention, ...]) -> Attention:
    own = [a for a in attentions if not a.cross and "o" in a.matrices]
    if len(own) != 1 or not own[0].heads:
        raise Unsupported(f"{block} has no one self-attention whose heads can be told apart.")
    return own[0]


def _sizes(attention: Attention) -> tuple[int, int, int]:
    heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_size
    if not heads or not kv_heads or not size or heads % kv_heads:
        raise Unsupported(f"{attention.name}: {heads} heads, {kv_heads} KV heads of {size}: not a known layout.")
    return heads, kv_heads, size


def check_alike(ours: HeadView, theirs: HeadView) -> None:
    """Raises `BadInput` unless two models have equal depth, width and heads."""
    for what, a, b in (
        ("blocks", ours.layers, theirs.layers),
        ("heads", ours.heads, theirs.heads),
        ("KV heads", ours.kv_heads, theirs.kv_heads),
        ("columns in a head", ours.value_size, theirs.value_size),
        ("columns in the stream", ours.anatomy.width, theirs.anatomy.width),
    ):
        if a != b:
            raise BadInput(f"One model has {a} {what} and the other {b}. Give two versions of one model.")


# ---- other components that a mask may run over


def mlp_sites(view: HeadView) -> list[Site]:
    """Every block's MLP output. Raises `Unsupported` where a block has no one matrix that ends its MLP."""
    sites = []
    for layer, block in enumerate(view.anatomy.blocks):
        ends = [piece for piece in block.mlp if piece.role == "down" and piece.kind == "linear"]
        if len(ends) != 1:
            raise Unsupported(f"{block.name} has {len(ends)} matrices that end an MLP; a mask needs one.")
        sites.append(Site(view._module(ends[0].module), "output", slice(None), layer, f"{layer}.mlp"))
    return sites


def lora_rank_sites(view: HeadView, adapter: str = "default") -> list[Site]:
    """Every rank of every LoRA in the blocks: a column of what its A matrix returns. Raises `BadInput` without."""
    sites = []
    for layer, block in enumerate(view.blocks):
        for name, module in block.named_modules():
            inner = getattr(module, "lora_A", None)
            if isinstance(inner, nn.ModuleDict) and adapter in inner:
                down = inner[adapter]
                rank = int(cast(Tensor, down.weight).shape[0])
                sites += [Site(down, "output", slice(i, i + 1), layer, f"{layer}.{name}.{i}") for i in range(rank)]
    if not sites:
        raise BadInput(f"The model has no LoRA '{adapter}' in its blocks, so there are no ranks to mask.")
    return sites
