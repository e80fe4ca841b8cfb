"""Per-token scores of a language model, worked out in tiles so that two full sets of logits never exist at once.

    logp_i = log softmax(z_i)[y_i]
    KL forward  = sum_v r_v (log r_v - log p_v)      reverse = sum_v p_v (log p_v - log r_v)
    k3          = exp(d) - 1 - d,  d = log r[y] - log p[y]      (its mean over y ~ p is the reverse KL)

z_i = head(h_i) for the valid positions only, p = softmax(z) of the policy, r that of a reference. Gradients with
respect to a row of logits are closed forms: logp: onehot - p; forward KL: p - r; reverse KL: p (log p - log r - KL).
Softmax is always computed in float32 or wider.

A tile is a slice of the valid rows. The gradient of a tile's loss, with respect to its rows and to the head if that
trains, is taken in the forward pass already and only scaled in the backward pass: nothing of width V outlives a tile,
nothing is computed twice. A trained head adds a gradient of its size per tile, so few rows go through it all at once.

What this file does not know: which loss is made of the scores, and how it is reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pegbox.errors import BadInput

__all__ = ["IGNORE", "Scores", "differentiable_twice", "k3", "score", "shift", "tile_rows", "walk", "walk_each"]

IGNORE = -100
TILE = {"cpu": 1 << 22, "other": 1 << 24}  # logits in one tile: small ones stay in reused memory on a CPU
AT_ONCE = 1 << 26  # logits that a trained head may make in one go

# (rows of one tile (n, D), their slice) -> (loss per row (n,), further readings per row without gradient)
Fold = Callable[[Tensor, slice], tuple[Tensor, ...]]


def shift(
    labels: Tensor,
    sequence_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    corrupted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets aligned with the positions that predict them, and which of them count.

    Position t predicts label t + 1, unless that label is -100, belongs to another packed sequence (another sequence
    id, or position ids that start again), or is predicted from padding (attention mask 0 before a row's first token).

    Args:
        labels: (B, T) unshifted, -100 where nothing is to be learnt.
        sequence_ids, position_ids: (B, T) or (1, T), where rows are packed.
        attention_mask: (B, T), 1 on tokens; other shapes say nothing about padding and are left aside.
        corrupted: (B, T) bool, positions whose mask may be 0 although they are no padding.

    Returns:
        (B, T) target ids (0 where they don't count) and the (B, T) bool mask.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    valid = targets != IGNORE
    if sequence_ids is not None:
        valid[:, :-1] &= sequence_ids[:, 1:] == sequence_ids[:, :-1]
    elif position_ids is not None and position_ids.ndim == 2:
        valid[:, :-1] &= position_ids[:, 1:] > position_ids[:, :-1]
    if attention_mask is not None and attention_mask.shape == labels.shape:
        present = attention_mask != 0
        if corrupted is not None:
            present = present | corrupted
        valid &= present.cumsum(-1) > 0
    return targets.masked_fill(~valid, 0), valid


class Scores(NamedTuple):
    """What losses are made of, per valid token, float32 or wider. `kl` and `mean_logp` only where asked for."""

    logp: Tensor  # (n,) log p[y]
    kl: Tensor | None = None  # (n,) full-vocabulary divergence from the reference
    mean_logp: Tensor | None = None  # (n,) mean over v of log p[v]
    ref_logp: Tensor | None = None  # (n,) log r[y], no gradient


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(n,) sums of products along each row, without a temporary of their shape."""
    return torch.einsum("nv,nv->n", a, b)


class _Scores(torch.autograd.Function):
    """(logits, targets, reference logits or None, direction) -> logp, kl, mean_logp, ref_logp; closed forms."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, ref_logits: Tensor | None, direction: str, mean: bool
    ) -> Any:
        logprobs = F.log_softmax(_wide(logits), dim=-1)  # (n, V)
        index = targets[:, None]
        logp, nothing = logprobs.gather(-1, index)[:, 0], logprobs.new_zeros(())
        mean_logp = logprobs.mean(-1) if mean else nothing
        ctx.direction, ctx.dtype, ctx.mean = direction, logits.dtype, mean
        if ref_logits is None:
            ctx.save_for_backward(logprobs, targets)
            return logp, nothing, mean_logp, nothing.clone()
        ref = F.log_softmax(_wide(ref_logits), dim=-1).to(logprobs.dtype)
        ref_logp = ref.gather(-1, index)[:, 0]
        if direction == "forward":
            r = ref.exp()
            kl = _dot(r, ref.sub_(logprobs))
            ctx.save_for_backward(logprobs, targets, r)
        else:
            gap = ref.neg_().add_(logprobs)  # log p - log r
            kl = _dot(logprobs.exp(), gap)
            ctx.save_for_backward(logprobs, targets, gap, kl)
        ctx.mark_non_differentiable(ref_logp)
        return logp, kl, mean_logp, ref_logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor, g_kl: Tensor, g_mean: Tensor, _: Tensor) -> Any:
        logprobs, targets, *rest = ctx.saved_tensors
        factor = -(g_logp + g_mean if ctx.mean else g_logp)[:, None]
        if not rest:
            grad = logprobs.exp().mul_(factor)
        elif ctx.direction == "forward":
            grad = logprobs.exp().mul_(factor + g_kl[:, None]).addcmul_(rest[0], g_kl[:, None], value=-1)
        else:
            gap, kl = rest
            grad = (gap - kl[:, None]).mul_(g_kl[:, None]).add_(factor).mul_(logprobs.exp())
        grad.scatter_add_(-1, targets[:, None], g_logp[:, None])
        if ctx.mean:
            grad += (g_mean / logprobs.shape[-1])[:, None]
        return grad.to(ctx.dtype), None, None, None, None


class _LogProb(torch.autograd.Function):
    """(logits, targets) -> log p[y], with the closed-form backward: g (onehot - p)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logprobs = F.log_softmax(_wide(logits), dim=-1)  # (n, V)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(logprobs, targets)
        return logprobs.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor) -> Any:
        logprobs, targets = ctx.saved_tensors
        grad = logprobs.exp().mul_(-grad_logp[:, None])
        grad.scatter_add_(-1, targets[:, None], grad_logp[:, None])
        return grad.to(ctx.dtype), None


def score(
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None = None,
    *,
    direction: str = "forward",
    mean: bool = False,
) -> Scores:
    """Scores of (n, V) logits for (n,) targets; with `ref_logits` (n, V) also the KL in the given direction."""
    if ref_logits is not None and ref_logits.shape[-1] != logits.shape[-1]:
        raise BadInput(
            f"The policy has {logits.shape[-1]} logits per token, its reference {ref_logits.shape[-1]}: one of them "
            "was resized. Resize the other in the same way (same added tokens, same order)."
        )
    if _TWICE:
        return _plain_scores(logits, targets, ref_logits, direction, mean)
    if ref_logits is None and not mean:
        return Scores(_LogProb.apply(logits, targets))
    logp, kl, mean_logp, ref_logp = _Scores.apply(logits, targets, ref_logits, direction, mean)
    if ref_logits is None:
        return Scores(logp, mean_logp=mean_logp)
    return Scores(logp, kl, mean_logp if mean else None, ref_logp)


_TWICE: list[bool] = []  # not empty: everything is left to autograd


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Inside, scores are plain operations on all rows at once, which can be differentiated again. For small models: the
    closed forms and the tiles, which save memory and time, have first derivatives only."""
    _TWICE.append(True)
    try:
        yield
    finally:
        _TWICE.pop()


def _plain_scores(logits: Tensor, targets: Tensor, ref_logits: Tensor | None, direction: str, mean: bool) -> Scores:
    logprobs = F.log_softmax(_wide(logits), dim=-1)
    logp = logprobs.gather(-1, targets[:, None])[:, 0]
    mean_logp = logprobs.mean(-1) if mean else None
    if ref_logits is None:
        return Scores(logp, mean_logp=mean_logp)
    ref = F.log_softmax(_wide(ref_logits), dim=-1).to(logprobs.dtype)
    kl = (
        (ref.exp() * (ref - logprobs)).sum(-1)
        if direction == "forward"
        else (logprobs.exp() * (logprobs - ref)).sum(-1)
    )
    return Scores(logp, kl, mean_logp, ref.gather(-1, targets[:, None])[:, 0].detach())


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log r[y] - log p[y]: >= 0, and the reverse KL in expectation over y ~ p."""
    d = ref_logp - logp
    return torch.expm1(d) - d


# ---- the walk -------------------------------------------------------------------------------------------------------


def tile_rows(vocabulary: int, device: str = "cpu", trained: bool = False) -> int:
    """Rows of a tile: at most 1024, at least 64, about 16 MiB of float32 logits on a CPU and 64 MiB elsewhere.

    Tiles over a trained head are the larger ones everywhere, as each adds a gradient of the head's size.
    """
    return min(1024, max(64, TILE["cpu" if device == "cpu" and not trained else "other"] // vocabulary))


def walk(
    rows: Tensor, fold: Fold, *, vocabulary: int, parameters: Sequence[Tensor] | None = (), chunk: int | None = None
) -> tuple[Tensor, ...]:
    """Apply `fold` to tiles of `rows`, sum its losses, and join its readings along the rows.

    Args:
        rows: (N, D) head inputs of the valid positions.
        fold: gives a tile's losses (differentiable) and readings (detached), one value per row, or no readings. It must
            treat rows one by one.
        vocabulary: V, for the tile size.
        parameters: everything else that `fold` needs a gradient for, i.e. the head's trained parameters; None if they
            are not known, then all rows go at once.
        chunk: rows of a tile; None chooses.

    Returns:
        The summed loss with its graph, then the readings (N,).
    """
    trained = [p for p in parameters or () if p.requires_grad]
    graph = torch.is_grad_enabled() and (rows.requires_grad or bool(trained) or parameters is None)
    size = chunk or tile_rows(vocabulary, rows.device.type, bool(trained))
    few = chunk is None and bool(trained) and rows.shape[0] * vocabulary <= AT_ONCE
    if _TWICE or rows.shape[0] <= size or (graph and (few or parameters is None)):
        loss, *readings = fold(rows, slice(0, rows.shape[0]))
        return loss.sum(), *readings
    slices = [slice(i, min(i + size, rows.shape[0])) for i in range(0, rows.shape[0], size)]
    if graph:
        return _Tiles.apply(fold, slices, rows, *trained)
    losses, *joined = (torch.cat(column) for column in zip(*(fold(rows[s], s) for s in slices)))
    return losses.sum(), *joined


def walk_each(
    rows: Tensor, fold: Fold, *, vocabulary: int, parameters: Sequence[Tensor] | None = (), chunk: int | None = None
) -> tuple[Tensor, ...]:
    """As `walk`, but the losses stay one per row, with their graph: for what is no sum of them (N,).

    With a frozen head each row's gradient is kept and scaled in the backward pass; over a trained head that doesn't go
    through at once, the backward pass makes each tile's logits again.
    """
    trained = [p for p in parameters or () if p.requires_grad]
    graph = torch.is_grad_enabled() and (rows.requires_grad or bool(trained) or parameters is None)
    size = chunk or tile_rows(vocabulary, rows.device.type, bool(trained))
    few = chunk is None and bool(trained) and rows.shape[0] * vocabulary <= AT_ONCE
    if _TWICE or rows.shape[0] <= size or (graph and (few or parameters is None)):
        return fold(rows, slice(0, rows.shape[0]))
    slices = [slice(i, min(i + size, rows.shape[0])) for i in range(0, rows.shape[0], size)]
    if graph:
        return _EachTile.apply(fold, slices, rows, *trained)
    return tuple(torch.cat(column) for column in zip(*(fold(rows[s], s) for s in slices)))


class _EachTile(torch.autograd.Function):
    """One loss per row over tiles. Without trained parameters the rows' gradients are taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, fold: Fold, slices: list[slice], rows: Tensor, *parameters: Tensor) -> Any:
        ctx.fold, ctx.slices, ctx.again = fold, slices, bool(parameters)
        for_rows = None if ctx.again else torch.empty_like(rows)
        losses, readings = [], []
        for s in slices:
            with torch.set_grad_enabled(not ctx.again):
                tile = rows[s].detach().requires_grad_(not ctx.again)
                loss, *read = fold(tile, s)
                if for_rows is not None:
                    (for_rows[s],) = torch.autograd.grad(loss.sum(), [tile])
            losses.append(loss.detach())
            readings.append(read)
        ctx.save_for_backward(rows if ctx.again else for_rows, *parameters)
        joined = tuple(torch.cat(column) for column in zip(*readings))
        ctx.mark_non_differentiable(*joined)
        return torch.cat(losses), *joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        kept, *parameters = ctx.saved_tensors
        if not ctx.again:
            return None, None, kept * grad[:, None].to(kept.dtype)
        first = torch.empty_like(kept)
        sums: list[Tensor | None] = [None] * len(parameters)
        for s in ctx.slices:
            with torch.enable_grad():
                tile = kept[s].detach().requires_grad_()
                loss = ctx.fold(tile, s)[0]
                grads = torch.autograd.grad(loss, [tile, *parameters], grad[s].to(loss.dtype), allow_unused=True)
            first[s] = 0 if grads[0] is None else grads[0]
            sums = [_added(total, found) for total, found in zip(sums, grads[1:])]
        rest = [None if t is None else t.to(p.dtype) for t, p in zip(sums, parameters)]
        return (None, None, first, *rest)


class _Tiles(torch.autograd.Function):
    """The summed loss over tiles, with the gradient taken tile by tile in the forward pass; backward scales it."""

    @staticmethod
    def forward(ctx: Any, fold: Fold, slices: list[slice], rows: Tensor, *parameters: Tensor) -> Any:
        for_rows = torch.empty_like(rows) if ctx.needs_input_grad[2] else None
        sums: list[Tensor | None] = [None] * len(parameters)
        losses, readings = [], []
        for s in slices:
            with torch.enable_grad():
                tile = rows[s].detach().requires_grad_(for_rows is not None)
                loss, *read = fold(tile, s)
                loss = loss.sum()
                wanted = [*([tile] if for_rows is not None else []), *parameters]
                grads = list(torch.autograd.grad(loss, wanted, allow_unused=True))
            if for_rows is not None:
                first = grads.pop(0)
                for_rows[s] = 0 if first is None else first
            sums = [_added(total, grad) for total, grad in zip(sums, grads)]
            losses.append(loss.detach())
            readings.append(read)
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.save_for_backward(for_rows, *sums)
        joined = tuple(torch.cat(column) for column in zip(*readings))
        ctx.mark_non_differentiable(*joined)
        return torch.stack(losses).sum(), *joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        for_rows, *sums = ctx.saved_tensors
        first = None if for_rows is None else for_rows * grad.to(for_rows.dtype)
        rest = [None if t is None else (t * grad.to(t.dtype)).to(d) for t, d in zip(sums, ctx.dtypes)]
        return (None, None, first, *rest)


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """A running sum in float32 or wider."""
    if grad is None:
        return total
    return _wide(grad) if total is None else total.add_(grad)
