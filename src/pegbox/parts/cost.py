"""What a training step will cost, before a weight is loaded: counts from the meta device, and FLOPs per tensor.

    peak = weights + buffers + gradients + optimizer state + what autograd saves + the working set of the loss

Everything but the last is counted, not guessed: the model runs forward and backward on the meta device, where tensors
have shapes and no content, and the optimizer steps there too. The loss is taken as the engine computes it: tile by tile
where the output embedding is frozen, with all logits where it trains. Measuring a real run is `metering.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.metering import (
    measuring_flops,
    optimizer_state_bytes,
    parameter_counts,
    saved_bytes,
    tensor_bytes,
)

__all__ = ["Estimate", "TensorFlops", "estimate", "tensor_flops"]

TILE = 1 << 24  # logits in one tile of the loss
BYTES_PER_TILE = 3 * 4 * TILE  # logits, their softmax and their gradient, float32


@dataclass
class Estimate:
    """Counts for one optimizer step; bytes are per process.

    Args:
        saved_bytes: peak of what autograd saves in one micro-batch; working_bytes: the loss's own, beyond that.
        forward_flops, step_flops: of one micro-batch's forward; of all forwards and backwards of a step.
        notes: what could not be counted, and what was assumed.
    """

    trainable_parameters: int = 0
    total_parameters: int = 0
    weight_bytes: int = 0
    buffer_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_state_bytes: int = 0
    saved_bytes: int = 0
    working_bytes: int = 0
    forward_flops: int = 0
    step_flops: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """An upper bound of what a process holds at once."""
        held = self.weight_bytes + self.buffer_bytes + self.gradient_bytes + self.optimizer_state_bytes
        return held + self.saved_bytes + self.working_bytes

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def estimate(
    model: nn.Module,
    shape: tuple[int, int],
    *,
    view: Any = None,
    step: Any = None,
    accumulation: int = 1,
) -> Estimate:
    """Estimate a step of `model`, which lies on the meta device with its tuner attached.

    Args:
        shape: (B, T) of one micro-batch of token ids.
        view: a `ModelView` of a causal model; without one the model's own logits are the loss's input.
        step: the recipe's step; None counts no optimizer state.
        accumulation: micro-batches per optimizer step.

    Raises:
        BadInput: a model that is not on the meta device.
    """
    strays = [n for n, p in model.named_parameters() if p.device.type != "meta"]
    if strays:
        raise BadInput(
            f"estimate needs a model on the meta device; '{strays[0]}' is not. Build it under torch.device('meta')."
        )
    found = Estimate()
    found.trainable_parameters, found.total_parameters = parameter_counts(model)
    found.weight_bytes = sum(tensor_bytes(p) for p in model.parameters())
    found.buffer_bytes = sum(tensor_bytes(b) for b in model.buffers())
    with_backward = step is None or step.needs_backward
    _count_passes(found, model, shape, view, with_backward)
    passes = accumulation if with_backward else accumulation * int(getattr(step, "forwards", 2))
    found.step_flops *= passes
    if with_backward:
        found.gradient_bytes = sum(tensor_bytes(p) for p in model.parameters() if p.requires_grad)
    if step is not None:
        _count_optimizer(found, model, step)
    return found


def _count_passes(found: Estimate, model: nn.Module, shape: tuple[int, int], view: Any, backward: bool) -> None:
    """Run a micro-batch on the meta device and fill in FLOPs and saved bytes."""
    model.train()
    grad = nullcontext() if backward else torch.no_grad()
    with _fused_attention(model) as extra, measuring_flops() as flops, saved_bytes(model) as saved, grad:
        batch = {"input_ids": torch.zeros(shape, dtype=torch.long, device="meta"), **extra(shape)}
        loss = _loss(found, model, batch, view, backward)
        found.forward_flops = flops.total
        if backward:
            loss.backward()
    found.step_flops, found.saved_bytes = flops.total, saved.peak
    for p in model.parameters():
        p.grad = None


def _loss(found: Estimate, model: nn.Module, batch: dict[str, Tensor], view: Any, backward: bool) -> Tensor:
    if view is None:
        out = model(**batch)
        return (out.logits if hasattr(out, "logits") else out[0]).float().sum()
    head = view.head_module
    rows = _head_inputs(model, head, batch).flatten(0, 1)  # (B T, D)
    head_trains = any(p.requires_grad for p in head.parameters())
    targets = torch.zeros(rows.shape[0], dtype=torch.long, device="meta")
    if head_trains and backward:
        return nn.functional.cross_entropy(head(rows).float(), targets)
    return _tiled_loss(found, head, rows, targets, backward)


def _head_inputs(model: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, D) what goes into the output embedding; the model's own forward makes logits of no position."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][:, :0], *args[1:])

    hook = head.register_forward_pre_hook(catch)
    try:
        model(**batch)
    finally:
        hook.remove()
    return caught[0]


def _tiled_loss(found: Estimate, head: nn.Module, rows: Tensor, targets: Tensor, backward: bool) -> Tensor:
    """Loss under a frozen head: the rows' gradient is taken in the forward, and no logits outlive a tile."""
    inner = rows.detach().requires_grad_(backward)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # what lives in a tile is working set
        logits = head(inner)
        found.working_bytes = min(BYTES_PER_TILE, 3 * 4 * logits.numel())
        loss = nn.functional.cross_entropy(logits.float(), targets)
        if not backward:
            return loss
        (gradient,) = torch.autograd.grad(loss, inner)
    return (rows * gradient).sum()


class _Attention(torch.autograd.Function):
    """A fused attention as far as counts go: keeps query, key, value, output and a number per row, (B, H, T, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.transpose(-1, -2)) @ v
        ctx.save_for_backward(q, k, v, out, out.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        scores = q @ k.transpose(-1, -2)
        g_v, g_scores = scores.transpose(-1, -2) @ grad, grad @ v.transpose(-1, -2)
        return g_scores @ k, g_scores.transpose(-1, -2) @ q, g_v


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface over `_Attention`."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _Attention.apply(query, key, value).transpose(1, 2), None


@contextmanager
def _fused_attention(model: nn.Module) -> Iterator[Callable[[tuple[int, int]], dict[str, Tensor]]]:
    """Have a model with fused attention count as such, and give the inputs that spare it looking at values.

    On the meta device torch takes the unfused path, which would save all pairs of positions; and transformers asks the
    mask's content, which there is none of. An attention that is not fused gets a mask of full size instead.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if config is None or before in {None, "eager"}:
        yield lambda shape: {"attention_mask": torch.zeros(shape[0], 1, shape[1], shape[1], device="meta")}
        return
    from transformers import AttentionInterface

    AttentionInterface.register("pegbox_counting", _attention)
    config._attn_implementation = "pegbox_counting"
    try:
        yield lambda shape: {}
    finally:
        config._attn_implementation = before


def _count_optimizer(found: Estimate, model: nn.Module, step: Any) -> None:
    """Step the recipe's optimizer once on the meta device and count its state."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = step.optimizer([{"params": list(trained.items())}])
    if not step.needs_backward:
        return  # the step moves the weights itself; its optimizer is never given a gradient
    for p in trained.values():
        p.grad = torch.empty_like(p)
    try:
        optimizer.step()
        found.optimizer_state_bytes = optimizer_state_bytes(optimizer)
    except Exception as error:  # an optimizer of compiled kernels has none for the meta device
        found.optimizer_state_bytes = sum(8 * p.numel() for p in trained.values())
        found.notes.append(
            f"optim '{step.kind}' can't run without data ({type(error).__name__}); two float32 "
            "states per weight assumed"
        )
    for p in trained.values():
        p.grad = None


class TensorFlops(NamedTuple):
    """FLOPs of one weight matrix for N rows of input: y = W x, dL/dx = W^T g, dL/dW = g x^T; each 2 N |W|."""

    forward: int
    input_gradient: int
    weight_gradient: int


def tensor_flops(model: nn.Module, rows: int) -> dict[str, TensorFlops]:
    """Analytic FLOPs per weight matrix of the model's linear layers, by parameter name.

    Args:
        rows: inputs per layer, N = B T for a transformer on B sequences of T tokens.

    The input gradient is counted as if everything below trained; a matrix that does not train costs no weight gradient
    when it runs, but the count is given so that a selector can weigh it.
    """
    counts = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and isinstance(weight, Tensor) and weight.ndim == 2:
            one = 2 * rows * weight.numel()
            counts[f"{name}.weight"] = TensorFlops(one, one, one)
    return counts
