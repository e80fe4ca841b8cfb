"""A pair as one model: each block's output is mixed from the base's and the tuned block's, on one stream.

    x_{l+1} = (1 - a_l) block_base(x_l) + a_l block_tuned(x_l)

Blocks return x + f(x), so this is x_l + f_base + a_l (f_tuned - f_base). It is no interpolation of weights. Embedding,
final norm and head are the tuned model's. One cache holds the keys and values of both: the base's layers stand behind
the tuned model's, so whatever a caller does to the cache (reorder, crop, repeat) is done to both.

What this file does not know: why one would mix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pegbox.errors import BadInput, Unsupported
from pegbox.parts.pairs import ModelPair

__all__ = ["mixed", "shares_of"]


def shares_of(
    share: float | Sequence[float], blocks: int, *, allow_negative: bool = False, name: str = "alpha"
) -> list[float]:
    """One share per block from a number or a list. Raises `BadInput`: not finite, negative, another count."""
    shares = [float(a) for a in share] if isinstance(share, Sequence) else [float(share)] * blocks
    if len(shares) != blocks:
        raise BadInput(f"{name}: {len(shares)} numbers for {blocks} blocks. Give one number, or one for each block.")
    for a in shares:
        if not math.isfinite(a):
            raise BadInput(f"{name} must be finite, got {a}.")
        if a < 0 and not allow_negative:
            raise BadInput(
                f"{name} is {a}; a negative one reverses what was learnt. Set allow_negative if you mean it."
            )
    return shares


@contextmanager
def mixed(pair: ModelPair, share: float | Sequence[float], *, allow_negative: bool = False) -> Iterator[nn.Module]:
    """Inside, the tuned model answers `forward` and `generate` as the mixture; outside it is as before.

    Where every share is 1 nothing is replaced. Caches must be filled inside: one that was filled outside is refused.

    Args:
        share: a in every block, or a list of one per block.
    """
    shares = shares_of(share, len(pair), allow_negative=allow_negative)
    if all(a == 1.0 for a in shares):
        yield pair.tuned
        return
    with ExitStack() as stack:
        for index, block in enumerate(pair.walk.blocks):
            block.forward = _Mixed(pair, index, shares[index])
            stack.callback(block.__dict__.pop, "forward", None)
        yield pair.tuned


class _Mixed:
    """The forward of one block while it is mixed."""

    def __init__(self, pair: ModelPair, index: int, share: float):
        self.pair, self.index, self.share = pair, index, share
        self.tuned = pair.walk.blocks[index].forward
        base = pair.base_blocks[index]
        self.base = self.tuned if pair.shared else base
        self.numbered: list[Any] = [m for m in base.modules() if isinstance(getattr(m, "layer_idx", None), int)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = _cache_in(args, kwargs)
        if cache is not None:
            self._make_room(cache)
        above = self.tuned(*args, **kwargs)
        with self._behind(cache is not None):
            below = self.pair.base_step(self.index, args, kwargs, self.base)
        if isinstance(above, tuple | list):
            return (torch.lerp(below[0], above[0], self.share), *above[1:])
        return torch.lerp(below, above, self.share)

    @contextmanager
    def _behind(self, cached: bool) -> Iterator[None]:
        """The base's block writes behind the tuned model's layers of the cache."""
        shift = len(self.pair) if cached else 0
        try:
            for module in self.numbered:
                module.layer_idx += shift
            yield
        finally:
            for module in self.numbered:
                module.layer_idx -= shift

    def _make_room(self, cache: Any) -> None:
        blocks = len(self.pair)
        if not self.numbered:
            raise Unsupported(
                f"{type(self.pair.walk.blocks[0]).__name__} does not say which layer of a cache it writes to; "
                "call with use_cache=False."
            )
        if self.index or len(cache.layers) > blocks:
            return
        if cache.get_seq_length() > 0:
            raise BadInput("This cache was filled by the tuned model alone. Start the text anew inside the mixture.")
        if cache.layer_class_to_replicate is None:
            cache.layers.extend([copy.deepcopy(layer) for layer in cache.layers])


def _cache_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    from transformers.cache_utils import Cache

    found = (value for value in (*kwargs.values(), *args) if isinstance(value, Cache))
    return next(found, None)
