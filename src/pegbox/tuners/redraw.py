"""A selection of whole tensors that is made again while training: drawn by the seed, or weighed on the model as it is.

Between selections only the chosen tensors require a gradient while the model runs, so that frozen ones cost nothing;
between steps all of them do, so that the optimizer, checkpoints and resumption always see one list of tensors. Tensors
that enter start without optimizer state, tensors that stay keep theirs, tensors that leave lose theirs (or keep it for
when they come back, where the selector says `keep_state`). The n-th draw of a selector that looks at nothing depends on
the run's seed and its step alone, so a resumed run repeats it; what a selector weighed is written into the checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.allocation import Allocation, Frozen, Whole
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context, seed_of

__all__ = ["Redraw"]

Attach = Callable[[nn.Module, Allocation], Any]


class Redraw:
    """The engine's schedule of a selector over whole tensors.

    Args:
        attach: puts an allocation into effect on the model. allocation: the one in effect now.

    Raises `Unsupported` for selectors that look at weights where nothing can be gathered while training, and with
    several processes (their reducers are built for one set of tensors).
    """

    def __init__(self, selector: Any, ctx: Context, allocation: Allocation, attach: Attach):
        if selector.needs_weights and ctx.gather is None:
            raise Unsupported(
                f"select '{selector.kind}' looks at weights; here whole tensors are drawn again by seed only."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized() and _world() > 1:
            raise Unsupported("A changing set of tensors needs one process; leave out select.schedule.")
        self.selector, self.every, self.seed, self.gather = selector, selector.schedule.every, ctx.seed, ctx.gather
        self.model, self.attach = ctx.model, attach
        self.last = 0
        self.told: list[dict[str, Any]] = []  # the facts of every selection made, with its step
        self._weighed: list[tuple[int, list[str], dict[str, Any]]] = []
        self._open_to_all = False
        self._open(allocation)
        self.handles = [
            self.model.register_forward_pre_hook(self._before_forward),
            register_optimizer_step_pre_hook(self._before_step),
        ]
        weakref.finalize(self.model, self.handles[1].remove)

    def refresh(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Select again before the update that follows `step` finished ones.

        Raises `BadInput` in the middle of an accumulation: gradients of tensors that leave would be lost.
        """
        if any(p.grad is not None for p in self.model.parameters()):
            raise BadInput(
                f"The selection was to change at step {step} while gradients were being accumulated. Change it between "
                "steps, after the optimizer's zero_grad(set_to_none=True)."
            )
        before = set(self.active)
        self._put(step, self._choose(step, optimizer))
        if getattr(self.selector, "keep_state", False):
            return
        for name, parameter in self.model.named_parameters():
            if name in before and name not in self.active:
                optimizer.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        weighed = [{"step": step, "names": names, "facts": facts} for step, names, facts in self._weighed]
        return {"last": self.last, "weighed": weighed} if weighed else {"last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Repeat the selections so far: what each of them touched belongs to the update."""
        if self.selector.needs_weights:
            for entry in state.get("weighed", []):
                names = {name: Whole() for name in entry["names"]}
                self._put(int(entry["step"]), Allocation(names, facts=entry["facts"]))
            return
        for step in range(self.every, int(state["last"]) + 1, self.every):
            self._put(step, self._choose(step))

    def _choose(self, step: int, optimizer: Any = None) -> Allocation:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "redraw", step))
        weights = dict(self.model.named_parameters())
        wanted = self.selector.statistics() if self.selector.needs_weights else None
        stats = None
        if wanted is not None:
            assert self.gather is not None
            with self._everything_open():
                stats = self.gather(wanted, optimizer)
        chosen: Allocation = self.selector.select(Anatomy.of(self.model), weights, stats, generator)
        return chosen

    def _put(self, step: int, chosen: Allocation) -> None:
        self.attach(self.model, chosen)
        self.last = step
        self._open(chosen)
        if self.selector.needs_weights:
            self._weighed.append((step, sorted(self.active), chosen.facts))
        if chosen.facts:
            self.told.append({"step": step, **chosen.facts})

    def _open(self, allocation: Allocation) -> None:
        self.active = {name for name, choice in allocation.items() if not isinstance(choice, Frozen)}
        self._require(all_of_them=True)

    def _require(self, all_of_them: bool) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(all_of_them or name in self.active)

    @contextmanager
    def _everything_open(self) -> Iterator[None]:
        """Passes inside decide for themselves which tensors require a gradient."""
        self._open_to_all = True
        try:
            yield
        finally:
            self._open_to_all = False

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if model.training and torch.is_grad_enabled() and not self._open_to_all:
            self._require(all_of_them=False)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._open_to_all:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in self.model.parameters()):
            self._require(all_of_them=True)


def _world() -> int:
    return torch.distributed.get_world_size()
