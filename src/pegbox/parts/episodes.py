"""Episodes: from shared weights theta, a few gradient steps on one task give weights phi of its own.

    phi_0 = theta,   phi_{k+1} = phi_k - lr_in grad L_support(phi_k),   k < K

Theta is never written: `swapped` puts phi in the parameters' places for as long as a pass runs, so theta and the base
are what they were, bit for bit, also after an exception, and nothing outlives an episode. Layers with a prior
(`priors`) take the divergence's part of a step implicitly where explicit descent would diverge (lr strength / variance
>= 1).

Finn et al., arXiv:1703.03400 (MAML); Nichol et al., arXiv:1803.02999 (first order, Reptile); Ravi and Beatson, ICLR
2019. What this file does not know: objectives, optimizers, where batches come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.priors import PriorLayer, prior_layers

__all__ = ["Inner", "adapt", "swapped"]

Values = dict[str, Tensor]


class Inner(BaseModel):
    """How a task is learnt.

    Args:
        steps: K; 0 leaves theta as it is.
        lr: of plain descent.
        scale: "tensor" divides each tensor's gradient by its norm, so that lr is the distance every tensor moves.
        rule: towards a prior explicitly, implicitly, or ("auto") implicitly where explicit steps would diverge.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: Annotated[int, Field(ge=0)] = 5
    lr: Annotated[float, Field(gt=0)] = 1e-2
    scale: Literal["none", "tensor"] = "none"
    rule: Literal["auto", "explicit", "implicit"] = "auto"


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters of these names are these tensors, in every place where a parameter is held."""
    wanted = {id(p): values[name] for name, p in model.named_parameters() if name in values}
    places = [
        (module._parameters, leaf, p)
        for module in model.modules()
        for leaf, p in module._parameters.items()
        if p is not None and id(p) in wanted
    ]
    try:
        for table, leaf, p in places:
            table[leaf] = wanted[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for table, leaf, p in places:
            table[leaf] = p


def adapt(
    model: nn.Module,
    theta: Mapping[str, Tensor],
    losses: Sequence[Callable[[], Tensor]],
    inner: Inner,
    *,
    second_order: bool = False,
    start: Mapping[str, Tensor] | None = None,
    seen: Callable[[int, float], None] | None = None,
) -> Values:
    """phi after K steps on a task.

    Args:
        theta: the trained parameters by name; untouched.
        losses: parts of the task's loss (micro-batches), each with its graph, made anew for every step.
        second_order: keep the graph from theta to phi.
        start: begin there instead of at theta (a phi that is carried on).
        seen: told of (step, loss).
    """
    begin = theta if start is None else start
    if second_order:
        phi = {name: p + 0 for name, p in begin.items()}
    else:
        phi = {name: p.detach().clone().requires_grad_() for name, p in begin.items()}
    for step in range(inner.steps):
        with swapped(model, phi):
            grads, loss = _gradients(phi, losses, second_order)
            moves = _moves(model, phi, grads, inner, second_order)
        if second_order:
            phi = {name: phi[name] + moves[name] for name in phi}
        else:
            with torch.no_grad():
                for name, move in moves.items():
                    phi[name].add_(move)
        if seen is not None:
            seen(step, loss)
    return phi


def _gradients(
    phi: Values, losses: Sequence[Callable[[], Tensor]], second_order: bool
) -> tuple[dict[str, Tensor], float]:
    total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in phi.items()}
    value = 0.0
    for make in losses:
        loss = make()
        grads = torch.autograd.grad(loss, list(phi.values()), create_graph=second_order, allow_unused=True)
        for name, grad in zip(phi, grads, strict=True):
            if grad is not None:
                total[name] = total[name] + grad
        value += float(loss.detach())
    return total, value


def _moves(model: nn.Module, phi: Values, grads: Values, inner: Inner, second_order: bool) -> Values:
    rates = {name: _rate(grad, inner) for name, grad in grads.items()}
    names = {id(p): name for name, p in phi.items()}
    moves: Values = {}
    for layer in prior_layers(model):
        own = {key: names[id(p)] for key, p in layer.gaussian().items() if id(p) in names}
        if own and _implicit(layer, inner, [rates[name] for name in own.values()]):
            if second_order:
                raise BadInput(
                    "Second order goes through explicit steps only: lower optim.inner.lr or the weight of the term "
                    "towards the prior, or use order: 1."
                )
            found = layer.implicit({k: grads[n] for k, n in own.items()}, {k: rates[n] for k, n in own.items()})
            moves.update({own[key]: move for key, move in found.items()})
    return {name: moves.get(name, -rates[name] * grads[name]) for name in phi}


def _rate(grad: Tensor, inner: Inner) -> float | Tensor:
    if inner.scale == "none":
        return inner.lr
    norm = grad.norm()
    return torch.where(norm > 0, inner.lr / norm.clamp(min=1e-30), torch.zeros_like(norm))


def _implicit(layer: PriorLayer, inner: Inner, rates: Sequence[float | Tensor]) -> bool:
    """Whether this layer's step is implicit. Raises `BadInput` for explicit steps that would diverge."""
    strength = layer.prior.strength if layer.prior is not None else 0.0
    if strength == 0:
        return False
    if inner.rule == "implicit":
        return True
    fastest = max(float(rate) for rate in rates)
    pull = fastest * strength * layer.stiffness()
    stable = pull < 1
    if inner.rule == "explicit" and not stable:
        raise BadInput(
            f"Explicit inner steps would diverge: lr x strength / variance = {pull:.3g}"
            " must stay below 1. Lower optim.inner.lr or the term's weight, or use rule: auto (implicit steps)."
        )
    return not stable
