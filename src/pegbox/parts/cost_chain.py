"""Backward costs per tensor from shapes by a simple chain model: every tensor lies on one line from input to loss.

    linear a x b:  through B n a b, own B n a b        its bias:  own B n a        value bias: through + 4 B n^2 D
    norm of D:     B n D each                          tied embedding: own B n D V + D V, and through B n D V at the end

in multiply-adds, tensors in the order of `named_parameters()`; D is the width of the values, so that 4 B n^2 D are the
gradients of both attention products. "Towards Green AI in Fine-tuning Large Language Models via Adaptive
Backpropagation" (arXiv:2309.13192), with the accounting of its official code. Where a value matrix has no bias its
weight carries the attention. In an encoder-decoder, rows of the encoder and the keys and values of cross-attention
count the input's length, the others the output's.

What this model gets wrong: branches. With only a query matrix selected, the gradients of keys and values are not
needed, and they are charged. `cost_trace.py` counts what really happens.
"""

from __future__ import annotations

from torch import nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy, Piece
from pegbox.parts.cost_trace import CostTable

__all__ = ["chain_costs"]


def chain_costs(model: nn.Module, shape: tuple[int, ...]) -> CostTable:
    """The table in multiply-adds.

    Args:
        shape: (B, n), or (B, input n, output n) for an encoder-decoder.

    Raises `BadInput` for a model of other layers than embeddings, linears and norms.
    """
    chain = _Chain(model, shape)
    for name, parameter in model.named_parameters():
        chain.add(name, tuple(parameter.shape))
    return chain.finished()


class _Chain:
    def __init__(self, model: nn.Module, shape: tuple[int, ...]):
        self.anatomy = Anatomy.of(model)
        self.batch, self.source = shape[0], shape[1]
        self.target = shape[-1]
        self.encodes = any("encoder" in stack for stack in self.anatomy.stacks) and len(self.anatomy.stacks) > 1
        self.cross = {
            module: role
            for block in self.anatomy.blocks
            for attention in block.attentions
            if attention.cross
            for role, module in attention.matrices.items()
        }
        head = self.anatomy.head
        ties = self.anatomy.ties.values()
        self.tied = {p for piece in self.anatomy.pieces if piece.module == self.anatomy.embedding for p in ties}
        self.has_head = head is not None and not self.tied
        self.names: list[str] = []
        self.through: list[float] = []
        self.own: list[float] = []
        self.forward = 0.0
        self.at_the_end = 0.0

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        piece = self.anatomy.piece(name)
        first = name == piece.weight
        kind = {"linear": self._linear, "norm": self._norm, "embedding": self._embedding}.get(piece.kind)
        if kind is None:
            raise BadInput(
                f"The chain model has no costs for '{name}' ({piece.kind}); use the traced costs (cost: measured)."
            )
        forward, through, own = kind(piece, name, shape, first)
        self.names.append(name)
        self.through.append(float(through))
        self.own.append(float(own))
        self.forward += forward

    def finished(self) -> CostTable:
        if self.through:
            self.through[-1] += self.at_the_end
        return CostTable(tuple(self.names), self.forward, tuple(self.through), tuple(self.own))

    # ---- kinds of layers: forward, through, own

    def _linear(self, piece: Piece, name: str, shape: tuple[int, ...], first: bool) -> tuple[float, float, float]:
        rows = self.batch * self._length(piece)
        size = 1
        for extent in shape:
            size *= extent
        plain = (rows * size, rows * size, rows * size) if first else (rows * size, 0, rows * size)
        if piece.role not in {"v", "qkv", "kv"} or name != piece.parameters[-1]:
            return plain
        pairs = self.batch * self._pairs(piece) * self._value_width(piece)
        return plain[0] + 2 * pairs, plain[1] + 4 * pairs, plain[2]

    def _norm(self, piece: Piece, name: str, shape: tuple[int, ...], first: bool) -> tuple[float, float, float]:
        cost = self.batch * self._length(piece) * shape[0]
        return (cost, cost, cost) if first else (cost, 0, 0)

    def _embedding(self, piece: Piece, name: str, shape: tuple[int, ...], first: bool) -> tuple[float, float, float]:
        rows = self.batch * (self.source + self.target if self.encodes else self.source)
        if piece.module != self.anatomy.embedding:  # of positions
            return rows * shape[0], 0, shape[0]
        tables = shape[0] * shape[1] * (2 if self.encodes else 1)
        if name not in self.tied:
            return rows * shape[1], 0, tables
        head = self.batch * self.target * shape[0] * shape[1]
        self.at_the_end += head
        return rows * shape[1] + head, 0, head + tables

    # ---- sizes

    def _decodes(self, piece: Piece) -> bool:
        if not self.encodes:
            return True
        return "encoder" not in piece.module.replace("encoder_attn", "") or "decoder." in piece.module

    def _length(self, piece: Piece) -> int:
        """Positions that a layer works on."""
        if not self.encodes:
            return self.source
        reads_source = self.cross.get(piece.module) in {"k", "v", "kv"}
        return self.target if self._decodes(piece) and not reads_source else self.source

    def _pairs(self, piece: Piece) -> int:
        """Pairs of positions of the attention that a value matrix belongs to."""
        queries = self.target if self.encodes and self._decodes(piece) else self.source
        return queries * self._length(piece)

    def _value_width(self, piece: Piece) -> int:
        """All heads together; with grouped queries each value head serves several."""
        for block in self.anatomy.blocks:
            for attention in block.attentions:
                if piece.module in attention.matrices.values() and attention.heads and attention.head_size:
                    return attention.heads * attention.head_size
        return piece.rows("v").numel() if piece.slices else piece.shape[0]
