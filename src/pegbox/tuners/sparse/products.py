"""Products with a weight of which only k entries train: the gradient of these entries alone, and sparse products.

    y = f(x, W),   dv = (dL/dW)[index],   dx = g W        (W is never saved by autograd: it may be rewritten in between)

For a linear layer dv is a sampled product, (g^T x)[index], that never makes the dense gradient. Pure functions and
autograd functions; which weight holds at which moment is the caller's business (`Holder`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

__all__ = [
    "Bypass",
    "Holder",
    "Kept",
    "Operation",
    "csr_pattern",
    "operation_of",
    "sampled_product",
    "shared_columns_product",
]


class Holder(Protocol):
    """What a layer lends to one forward and its backward."""

    operation: Operation
    module: nn.Module

    def first_weight(self) -> Tensor:
        """The weight, in the forward."""

    def weight(self) -> Tensor:
        """The weight as it was in the forward, in the backward; raises if it can't be had back."""

    def kept_gradient(self, which: int, g: Tensor, x: Tensor) -> Tensor:
        """(k,) the gradient of the `which`-th adapter's values."""

    def observe(self, which: int, g: Tensor, x: Tensor) -> None:
        """Told of every backward in which the `which`-th adapter's values train."""


def csr_pattern(index: Tensor, shape: tuple[int, int], values: Tensor) -> Tensor:
    """A CSR matrix of `shape` with `values` (k,) at the sorted flat `index` (k,); shares the values' memory (16-bit
    values are widened: sparse products are not there in 16 bits)."""
    rows, columns = shape
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    wide = index.long()
    starts = torch.arange(rows + 1, device=index.device) * columns
    small = rows < 2**31 and index.numel() < 2**31
    dtype = torch.int32 if small else torch.int64
    crow = torch.searchsorted(wide, starts).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(crow, (wide % columns).to(dtype), values, size=shape, check_invariants=False)


def sampled_product(pattern: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(a b) at the entries of `pattern`: a (m, N), b (N, n) -> (k,), in the pattern's dtype."""
    dtype = pattern.dtype
    return torch.sparse.sampled_addmm(pattern, a.to(dtype), b.to(dtype), beta=0.0).values()


class Operation:
    """What a layer computes from a weight, with the two halves of its backward."""

    sparse_product = False  # has a product with a sparse matrix (needed to bypass a packed weight)

    def forward(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def input_gradient(self, module: nn.Module, g: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def dense_gradient(self, module: nn.Module, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.reshape(-1, g.shape[-1]).sum(0)


class LinearOperation(Operation):
    """x W^T + b (`nn.Linear`: W is (out, in)), or x W + b where `transposed` (`Conv1D`: W is (in, out))."""

    sparse_product = True

    def __init__(self, transposed: bool):
        self.transposed = transposed

    def forward(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def input_gradient(self, module: nn.Module, g: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        return g.matmul(weight.t() if self.transposed else weight)

    def sides(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with dL/dW = a b: a (rows of W, N), b (N, columns of W)."""
        g2, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        return (x2.t(), g2) if self.transposed else (g2.t(), x2)

    def dense_gradient(self, module: nn.Module, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        a, b = self.sides(g, x.to(g.dtype))
        return a @ b


class Conv2dOperation(Operation):
    """A convolution with zero padding."""

    def forward(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)

    def input_gradient(self, module: Any, g: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        return conv2d_input(x_shape, weight, g, module.stride, module.padding, module.dilation, module.groups)

    def dense_gradient(self, module: Any, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        return conv2d_weight(x.to(g.dtype), shape, g, module.stride, module.padding, module.dilation, module.groups)

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.sum((0, 2, 3)) if g.ndim == 4 else g.sum((1, 2))


class EmbeddingOperation(Operation):
    """Rows of the weight by token id; ids have no gradient."""

    def forward(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight, module.padding_idx)

    def dense_gradient(self, module: Any, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        ids, g2 = x.reshape(-1), g.reshape(-1, g.shape[-1])
        if module.padding_idx is not None:  # as in F.embedding: the padding row gets no gradient
            g2 = g2.masked_fill((ids == module.padding_idx).unsqueeze(1), 0)
        return g2.new_zeros(shape).index_add_(0, ids, g2)


def operation_of(module: nn.Module) -> Operation | None:
    """The operation of a layer of known kind; None for any other (it is then called with a built weight)."""
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return LinearOperation(transposed=False)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return LinearOperation(transposed=True)
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward:
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return Conv2dOperation() if plain else None
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return EmbeddingOperation() if plain else None
    return None


class Kept(torch.autograd.Function):
    """A layer's forward on the tuned weight, with the gradient of the kept entries of each active adapter.

    Only x is saved, and only where values train. Autocast acts in the forward as on the layer itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, holder: Holder, *values: Tensor) -> Tensor:
        y = holder.operation.forward(holder.module, x, holder.first_weight(), bias)
        ctx.holder, ctx.x_shape, ctx.x_dtype = holder, x.shape, x.dtype
        if any(ctx.needs_input_grad[3:]):
            ctx.save_for_backward(x)  # read exactly once in backward: checkpointing allows no more
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        holder, operation = ctx.holder, ctx.holder.operation
        weight = holder.weight()
        gx = gb = None
        if ctx.needs_input_grad[0]:
            gx = operation.input_gradient(holder.module, g, ctx.x_shape, weight.to(g.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            gb = operation.bias_gradient(g)
        x = ctx.saved_tensors[0] if any(ctx.needs_input_grad[3:]) else None
        needed = ctx.needs_input_grad[3:]
        kept = [holder.kept_gradient(i, g, x) if wanted else None for i, wanted in enumerate(needed)]
        for i in (i for i, wanted in enumerate(needed) if wanted):
            holder.observe(i, g, x)
        return gx, gb, None, *kept


class Bypass(torch.autograd.Function):
    """x D^T (or x D where transposed) for a sparse D with values `values` (k,): beside a base that stays untouched."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        index: Tensor,
        shape: tuple[int, int],
        transposed: bool,
        check: Callable[[], None],
        observe: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        ctx.observe = observe
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, index)
        ctx.shape, ctx.transposed, ctx.x_meta, ctx.check = shape, transposed, (x.shape, x.dtype), check
        return _sparse_times(csr_pattern(index, shape, values.detach()), x, forward=not transposed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ctx.check()  # a fused optimizer writes without autograd's notice
        x, values, index = ctx.saved_tensors
        matrix = csr_pattern(index, ctx.shape, values.detach())
        gx = gv = None
        if ctx.needs_input_grad[0]:
            gx = _sparse_times(matrix, g, forward=ctx.transposed).to(ctx.x_meta[1]).view(ctx.x_meta[0])
        if ctx.needs_input_grad[1]:
            gv = sampled_product(matrix, *LinearOperation(ctx.transposed).sides(g, x)).to(values.dtype)
            if ctx.observe is not None:
                ctx.observe(g, x)
        return gx, gv, None, None, None, None, None


def shared_columns_product(
    x: Tensor, values: Tensor, columns: Tensor, transposed: bool, check: Callable[[], None]
) -> Tensor:
    """x[..., columns] theta^T: a sparse update whose rows all have the same columns is a small dense product.

    Shapes: x (..., in); values (out * k,), row by row (transposed: column by column); columns (k,). Saves (..., k).
    """
    theta = values.view(columns.numel(), -1) if transposed else values.view(-1, columns.numel()).t()
    y = x.index_select(-1, columns.long()) @ theta.to(x.dtype)
    if y.requires_grad:
        y.register_hook(lambda _: check())  # a fused optimizer writes without autograd's notice
    return y


def _sparse_times(matrix: Tensor, x: Tensor, forward: bool) -> Tensor:
    """x M^T (`forward`) or x M for a CSR matrix M and x (..., D), computed in M's dtype, returned in x's."""
    flat = x.reshape(-1, x.shape[-1]).to(matrix.dtype)
    left = matrix if forward else matrix.t().to_sparse_csr()
    with torch.autocast(x.device.type, enabled=False):  # sparse products are not there in 16 bits
        return (left @ flat.t()).t().reshape(*x.shape[:-1], left.shape[0]).to(x.dtype)
