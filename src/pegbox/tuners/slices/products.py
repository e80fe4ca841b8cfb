"""A linear layer of which some columns or rows train: their gradient alone, and nothing saved for the rest.

    columns a:e    y = x W^T + b,   dD = g^T x[..., a:e],   dx = g W       saved: x[..., a:e]
    rows a:e       y = x W^T + b,   dD = g[..., a:e]^T x,   dx = g W       saved: x (its neighbours' too)

S2FT's partial back-propagation (arXiv:2412.06289). W holds the tuned block already; beside a base that can't be written
to, `added` computes x[..., a:e] D^T or x D^T by itself. An index list in place of a range gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Block", "Holder", "InPlaceLinear", "added"]


@dataclass(frozen=True)
class Block:
    """Which positions of a stored weight train.

    Args:
        axis: of the stored weight. rows: whether that axis runs over outputs. transposed: the weight is (in, out).
        at: (n,) int64 current positions. start: of the range they are, or None.
    """

    axis: int
    rows: bool
    transposed: bool
    at: Tensor
    start: int | None

    @classmethod
    def of(cls, axis: int, transposed: bool, at: Tensor, ranges: bool = True) -> Block:
        """The block at these positions; `ranges`: take a range where they are one."""
        n = at.numel()
        is_range = ranges and n > 0 and not at.is_meta and bool((at == at[0] + torch.arange(n, device=at.device)).all())
        return cls(axis, (axis == 0) is not transposed, transposed, at, int(at[0]) if is_range else None)

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """A copy of these positions alone (a view would keep all of the tensor alive)."""
        if self.start is None:
            return tensor.index_select(dim, self.at)
        return tensor.narrow(dim, self.start, self.at.numel()).clone(memory_format=torch.contiguous_format)

    def put_(self, tensor: Tensor, values: Tensor) -> None:
        """Write values over these positions of the stored weight."""
        if self.start is None:
            tensor.index_copy_(self.axis, self.at, values)
        else:
            tensor.narrow(self.axis, self.start, self.at.numel()).copy_(values)

    def logical(self, weight: Tensor) -> Tensor:
        """A stored weight or block as (out, in)."""
        return weight.t() if self.transposed else weight

    def gradient(self, g: Tensor, kept: Tensor) -> Tensor:
        """The block's gradient, stored as the block is, from the output's gradient and what was saved."""
        g2 = self.take(g, -1) if self.rows else g
        g2, x2 = g2.reshape(-1, g2.shape[-1]), kept.reshape(-1, kept.shape[-1]).to(g.dtype)
        return x2.t() @ g2 if self.transposed else g2.t() @ x2


class Holder(Protocol):
    """What a layer lends to one forward and its backward."""

    block: Block

    def first_weight(self) -> Tensor:
        """The stored weight, in the forward."""

    def weight(self) -> Tensor:
        """The stored weight as it was in the forward, in the backward; raises if it can't be had back."""


class InPlaceLinear(torch.autograd.Function):
    """x (..., in), bias (out,) or None, the block's values as stored -> (..., out); W comes from the holder."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, holder: Holder, values: Tensor) -> Tensor:
        ctx.holder, ctx.x_dtype = holder, x.dtype
        if ctx.needs_input_grad[3]:
            ctx.save_for_backward(x if holder.block.rows else holder.block.take(x, -1))
        return F.linear(x, holder.block.logical(holder.first_weight()), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        block = ctx.holder.block
        weight = ctx.holder.weight()
        gx = gb = gv = None
        if ctx.needs_input_grad[0]:
            gx = g.matmul(block.logical(weight).to(g.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            gb = g.reshape(-1, g.shape[-1]).sum(0)
        if ctx.needs_input_grad[3]:
            gv = block.gradient(g, ctx.saved_tensors[0])
        return gx, gb, None, gv


def added(y: Tensor, x: Tensor, change: Tensor, block: Block) -> Tensor:
    """y + x[..., I] D^T (columns), or y with x D^T added at outputs I (rows), computed in D's dtype.

    Autograd saves x[..., I] (or x) and D, and nothing else.
    """
    d = block.logical(change)
    if not block.rows:
        return y + F.linear(block.take(x, -1).to(change.dtype), d).to(y.dtype)
    z = F.linear(x.to(change.dtype), d).to(y.dtype)
    return y.index_add(-1, block.at, z)
