"""A selection of whole tensors that is drawn again while training.

Between draws only the drawn tensors require a gradient while the model runs, so that frozen ones cost nothing; between
steps all of them do, so that the optimizer, checkpoints and resumption always see one list of tensors. Tensors that
leave lose their optimizer state, tensors that enter start without one, tensors that stay keep theirs. The n-th draw
depends on the run's seed and its step alone, so a resumed run makes the same ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pegbox.errors import Unsupported
from pegbox.parts.allocation import Allocation, Frozen
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context, seed_of

__all__ = ["Redraw"]

Attach = Callable[[nn.Module, Allocation], Any]


class Redraw:
    """The engine's schedule of a selector over whole tensors.

    Args:
        attach: puts an allocation into effect on the model. allocation: the one in effect now.

    Raises `Unsupported` for selectors that look at weights, and with several processes (their reducers are built for
    one set of tensors).
    """

    def __init__(self, selector: Any, ctx: Context, allocation: Allocation, attach: Attach):
        if selector.needs_weights:
            raise Unsupported(f"select '{selector.kind}' looks at weights; whole tensors are drawn again by seed only.")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _world() > 1:
            raise Unsupported("A changing set of tensors needs one process; leave out select.schedule.every.")
        self.selector, self.every, self.seed = selector, selector.schedule.every, ctx.seed
        self.model, self.attach = ctx.model, attach
        self.last = 0
        self._open(allocation)
        self.handles = [
            self.model.register_forward_pre_hook(self._before_forward),
            register_optimizer_step_pre_hook(self._before_step),
        ]
        weakref.finalize(self.model, self.handles[1].remove)

    def refresh(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Draw again before the update that follows `step` finished ones."""
        before = set(self.active)
        self._draw(step)
        for name, parameter in self.model.named_parameters():
            if name in before and name not in self.active:
                optimizer.state.pop(parameter, None)

    def state_dict(self) -> dict[str, int]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Repeat the draws so far: what each of them touched belongs to the update."""
        for step in range(self.every, int(state["last"]) + 1, self.every):
            self._draw(step)

    def _draw(self, step: int) -> None:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "redraw", step))
        weights = dict(self.model.named_parameters())
        chosen = self.selector.select(Anatomy.of(self.model), weights, None, generator)
        self.attach(self.model, chosen)
        self.last = step
        self._open(chosen)

    def _open(self, allocation: Allocation) -> None:
        self.active = {name for name, choice in allocation.items() if not isinstance(choice, Frozen)}
        self._require(all_of_them=True)

    def _require(self, all_of_them: bool) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(all_of_them or name in self.active)

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self._require(all_of_them=False)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in self.model.parameters()):
            self._require(all_of_them=True)


def _world() -> int:
    return torch.distributed.get_world_size()
