"""How sensitive a loss is to every weight: sums over batches of squared (or absolute) gradients, streamed.

    s = sum over batches of g^2     batch_sq: g of a batch's loss;  per_sample_sq: of each row;  abs: |g| of a batch

g^2 is, up to a factor, the first-order change of the loss when the weight moves by one gradient step. Unlike the pass
of `statistics`, this one is for all kinds of parameters (norms, biases, convolutions) and needs them to be floating. A
gradient is added to its float32 sum and freed as soon as it arrives, so that there is never a second copy of them all.
Source of the default: He et al., arXiv:2303.08566.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy

__all__ = ["ParameterSpec", "sensitivity"]

Loss = Callable[[nn.Module, Any], Tensor]
Reduce = Literal["batch_sq", "per_sample_sq", "abs"]


@dataclass(frozen=True)
class ParameterSpec:
    """Asks a recipe's runner (or `collect`) for the sensitivity of parameters: {"sensitivity": {name: sums}}.

    Args:
        names: the parameters, or what names them once the model's anatomy is known; None: all.
        reduce: what is summed. batches: at most so many, of batch_size rows; None: all that there are.
        deterministic: without dropout and stochastic depth; else in train mode, as the official code does.
        head_std: a head whose weight is all zeros lets no gradient through; for this pass it is drawn N(0, head_std^2).
    """

    names: tuple[str, ...] | Callable[[Anatomy], Sequence[str]] | None = None
    reduce: Reduce = "batch_sq"
    batches: int | None = 16
    batch_size: int = 8
    deterministic: bool = True
    head_std: float = 0.02
    needs_loss: bool = True


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    criterion: Loss,
    reduce: Reduce = "batch_sq",
    *,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    deterministic: bool = True,
    head_std: float = 0.02,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Sums over batches, per parameter, in float32 (float64 for float64 weights).

    Args:
        batches: whatever `criterion` takes; for "per_sample_sq" mappings or sequences of tensors with B rows each.
        criterion: (model, batch) -> scalar, the mean over the batch.
        names: which parameters; default all. limit: at most so many batches.

    The model comes back as it was, bit for bit: weights, buffers, modes, flags, gradients; no random state is drawn on.

    Raises `BadInput` for no batch, packed weights, a loss that is not finite, and sums that are all 0.
    """
    named = dict(model.named_parameters())
    wanted = {name: _checked(name, named) for name in (named if names is None else names)}
    sums = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in wanted.items()}
    devices = list({p.device for p in wanted.values() if p.device.type != "cpu"})
    seen = 0
    with torch.random.fork_rng(devices=devices), _borrowed(model, wanted, sums, reduce, deterministic):
        torch.manual_seed(seed)
        _draw_dead_heads(model, head_std)
        for number, batch in enumerate(batches):
            if limit is not None and number >= limit:
                break
            for unit in _rows(batch) if reduce == "per_sample_sq" else (batch,):
                with torch.enable_grad():
                    loss = criterion(model, unit)
                if not bool(torch.isfinite(loss)):
                    raise BadInput(f"The loss of calibration batch {number} is {float(loss)}; look at its rows.")
                loss.backward()
            seen += 1
    if not seen:
        raise BadInput("No calibration batch was given. Sensitivities need at least one.")
    if not any(bool(s.any()) for s in sums.values()):
        raise BadInput(
            "Every sensitivity is 0: no gradient reaches the weights. Is the head zero, or does the loss not depend on "
            "the model?"
        )
    return sums


def _checked(name: str, named: Mapping[str, nn.Parameter]) -> nn.Parameter:
    if name not in named:
        raise BadInput(f"The model has no parameter '{name}' to measure.")
    if not named[name].is_floating_point() or hasattr(named[name], "quant_state"):
        raise BadInput(
            f"'{name}' is stored as {named[name].dtype} and has no gradient of its own. Measure on a dequantized copy "
            "(load the base in fp32 or bf16), or pass scores that were measured on one."
        )
    return named[name]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _borrowed(
    model: nn.Module, wanted: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], reduce: str, deterministic: bool
) -> Iterator[None]:
    """The wanted parameters have gradients, which go into the sums as they arrive; everything is put back after."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    buffers = [] if deterministic else [(b, b.detach().clone()) for b in model.buffers()]
    heads = [(p, p.detach().clone()) for p in _dead_heads(model)]
    handles = []
    model.train(not deterministic)
    try:
        for parameter in flags:
            parameter.grad = None
            parameter.requires_grad_(False)
        for name, parameter in wanted.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(_adder(sums[name], reduce)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for tensor, before in [*buffers, *heads]:
                tensor.copy_(before)
        for parameter, (flag, grad) in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _adder(total: Tensor, reduce: str) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.detach().to(total.dtype)
        if reduce == "abs":
            total.add_(gradient.abs())
        else:
            total.addcmul_(gradient, gradient)
        parameter.grad = None

    return add


def _dead_heads(model: nn.Module) -> list[nn.Parameter]:
    """Weights of heads that are all zeros."""
    found = []
    for piece in Anatomy.of(model).pieces:
        weight = dict(model.named_parameters()).get(piece.weight) if piece.category == "head" else None
        if weight is not None and not weight.is_meta and not bool(weight.detach().any()):
            found.append(weight)
    return found


def _draw_dead_heads(model: nn.Module, std: float) -> None:
    with torch.no_grad():
        for weight in _dead_heads(model):
            weight.normal_(0.0, std)


def _rows(batch: Any) -> Iterator[Any]:
    """A batch row by row, each as a batch of one."""
    tensors = [t for t in (batch.values() if isinstance(batch, Mapping) else batch) if isinstance(t, Tensor) and t.ndim]
    if not tensors:
        raise BadInput("A calibration batch holds no tensor to take rows from.")
    count = tensors[0].shape[0]
    for i in range(count):
        cut = lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) and t.ndim and t.shape[0] == count else t  # noqa: E731
        yield {k: cut(v) for k, v in batch.items()} if isinstance(batch, Mapping) else type(batch)(map(cut, batch))
