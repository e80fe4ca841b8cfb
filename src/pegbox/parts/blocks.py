"""The walk through a model: what lies before the blocks, one block at a time, what lies after.

    begin: batch -> hidden (B, T, D) at the first block, and every block's other arguments (masks, positions, ...)
    step:  hidden -> block_i(hidden, its arguments)          finish: hidden after the last block -> the model's output

So a method can hold one block's statistics at a time, run two models in step, or act between blocks. The arguments are
noted in one pass in which the blocks hand their input through, the first one excepted: what it returns beside the
hidden state (T5's position bias) belongs to the others' arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy

__all__ = ["BlockWalk", "Walk"]

_HIDDEN = "hidden_states"


@dataclass
class Walk:
    """One batch on its way. `hidden`: the input of block `at`, (B, T, D). `calls`: each block's arguments."""

    inputs: dict[str, Any]
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    rest: tuple[Any, ...] | None  # what a block returns beside the hidden state; None: it returns a tensor alone
    at: int = 0


class _Reached(Exception):
    """Thrown at the last block, to leave the model's forward."""


class BlockWalk:
    """Walks one list of blocks of a model.

    Args:
        stack: which list, where the model has several (see `Anatomy.stacks`).

    Raises `BadInput` for a model without blocks, or with several and none named.
    """

    def __init__(self, model: nn.Module, stack: str | None = None, anatomy: Anatomy | None = None):
        anatomy = anatomy or Anatomy.of(model)
        if stack is None and len(anatomy.stacks) != 1:
            raise BadInput(f"The walk needs one list of blocks; this model has {', '.join(anatomy.stacks) or 'none'}.")
        self.model = model
        self.stack = stack if stack is not None else next(iter(anatomy.stacks))
        if self.stack not in anatomy.stacks:
            raise BadInput(f"The model has no blocks '{self.stack}'. Known: {', '.join(anatomy.stacks)}.")
        size = anatomy.stacks[self.stack]
        self.blocks = [model.get_submodule(anatomy.actual(f"{self.stack}.{i}")) for i in range(size)]

    def __len__(self) -> int:
        return len(self.blocks)

    def begin(self, inputs: Mapping[str, Any]) -> Walk:
        """Run what lies before the blocks (and the first of them, to see what it returns)."""
        given = {**inputs, **({"use_cache": False} if "input_ids" in inputs else {})}
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        seen: dict[str, Any] = {}
        original = self.blocks[0].forward

        def first(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            output = original(*args, **kwargs)
            seen["rest"] = tuple(output[1:]) if isinstance(output, tuple | list) else None
            if len(self.blocks) == 1:
                raise _Reached
            return _packed(_hidden(args, kwargs), seen["rest"])

        def handed_through(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if len(calls) == len(self.blocks):
                raise _Reached
            return _packed(_hidden(args, kwargs), seen["rest"])

        with _forwards(self.blocks, [first, *[handed_through] * (len(self.blocks) - 1)]):
            try:
                self.model(**given)
            except _Reached:
                pass
            else:
                raise BadInput(f"The forward of {type(self.model).__name__} does not run through '{self.stack}'.")
        return Walk(dict(given), _hidden(*calls[0]), calls, seen["rest"])

    def step(self, walk: Walk) -> Tensor:
        """Run the next block; returns the hidden state after it."""
        args, kwargs = walk.calls[walk.at]
        args, kwargs = _with_hidden(args, kwargs, walk.hidden)
        output = self.blocks[walk.at](*args, **kwargs)
        walk.hidden = output[0] if isinstance(output, tuple | list) else output
        walk.at += 1
        return walk.hidden

    def finish(self, walk: Walk) -> Any:
        """Run what lies after the blocks on `walk.hidden`; returns the model's output."""

        def handed_through(*args: Any, **kwargs: Any) -> Any:
            return _packed(_hidden(args, kwargs), walk.rest)

        def last(*args: Any, **kwargs: Any) -> Any:
            return _packed(walk.hidden, walk.rest)

        with _forwards(self.blocks, [*[handed_through] * (len(self.blocks) - 1), last]):
            return self.model(**walk.inputs)

    def run(self, inputs: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
        """(i, hidden after block i) for every block of one batch, without gradients."""
        with torch.no_grad():
            walk = self.begin(inputs)
            for i in range(len(self)):
                yield i, self.step(walk)


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs[_HIDDEN]


def _with_hidden(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, _HIDDEN: hidden})


def _packed(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:
    return hidden if rest is None else (hidden, *rest)


@contextmanager
def _forwards(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Blocks with other forwards for a while."""
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
