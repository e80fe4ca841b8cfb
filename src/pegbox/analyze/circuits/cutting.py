"""Attention knockout: one token no longer sees another, from some block upward, in all heads.

    score(query token, key token) := the lowest number, in blocks l, l + 1, ...        accuracy as a function of l

Prakash et al., arXiv:2402.14811, appendix, after Geva et al., arXiv:2304.14767. It shows in which blocks information
crosses. The mask is given to the model whole and replaced at the blocks; a model whose blocks take none is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.analyze.circuits.activations import edited, evaluating
from pegbox.analyze.circuits.heads import HeadView, Site
from pegbox.analyze.circuits.prompts import Prompts
from pegbox.errors import BadInput, Unsupported

__all__ = ["causal_mask", "knocked_logits", "knockout"]


def causal_mask(prompts: Prompts, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) 0 where a token sees another, the lowest number elsewhere; padding sees itself."""
    width = prompts.width
    sees = torch.ones(width, width, dtype=torch.bool, device=prompts.ids.device).tril()
    sees = (sees & prompts.mask[:, None, :]) | torch.eye(width, dtype=torch.bool, device=prompts.ids.device)
    mask = torch.zeros(sees.shape, dtype=dtype, device=prompts.ids.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def knocked_logits(view: HeadView, prompts: Prompts, query: Tensor, key: Tensor, start: int) -> Tensor:
    """(B, V) last-token logits where each row's `query` (B,) does not see its `key` (B,) from block `start` on."""
    if not 0 <= start <= view.layers:
        raise BadInput(f"Block {start} is out of range; the model has {view.layers} blocks.")
    if bool((key > query).any()) or bool((key == query).any()):
        raise BadInput("A token sees earlier ones; the key to knock out must stand before the query.")
    dtype = next(p.dtype for p in view.model.parameters() if p.is_floating_point())
    mask = causal_mask(prompts, dtype)
    blocked = mask.clone()
    blocked[torch.arange(len(query)), 0, query, key] = torch.finfo(dtype).min
    head = Site(view.unembedding, "input", slice(None), view.layers, "head")
    with (
        torch.no_grad(),
        evaluating(view.model),
        _replaced(view.blocks[start:], mask, blocked),
        edited([(head, lambda x: x[:, -1:])]),
    ):
        out = view.model(input_ids=prompts.ids, attention_mask=mask, position_ids=prompts.places, use_cache=False)
    logits: Tensor = out.logits[:, -1]
    return logits


@contextmanager
def _replaced(blocks: Sequence[nn.Module], mask: Tensor, other: Tensor) -> Iterator[None]:
    def swap(value: Any) -> Any:
        return other if isinstance(value, Tensor) and value.shape == mask.shape and value.dtype == mask.dtype else value

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}
        if not any(value is other for value in [*new[0], *new[1].values()]):
            raise Unsupported(
                f"{type(block).__name__} takes no attention mask of (rows, 1, tokens, tokens), so no score can be "
                "knocked out. Load the model with attn_implementation='eager' or 'sdpa'."
            )
        return new

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def knockout(
    view: HeadView, prompts: Prompts, query: str, key: str | None, *, layers: Sequence[int] | None = None,
    batch: int = 32, generator: torch.Generator | None = None,
) -> dict[int, float]:  # fmt: skip
    """Accuracy by the block from which on `query` does not see `key`.

    Args:
        key: a position, or None: a token before the query drawn for each row, as the control (needs a generator).
        layers: starts to try; default all.
    """
    starts = range(view.layers) if layers is None else layers
    right = dict.fromkeys(starts, 0)
    for part in prompts.batches(batch):
        asked = part.at(query)
        keys = part.at(key) if key is not None else _drawn(part, asked, generator)
        for start in starts:
            logits = knocked_logits(view, part, asked, keys, start)
            right[start] += int((logits.argmax(-1) == part.right()).sum())
    return {start: count / len(prompts) for start, count in right.items()}


def _drawn(part: Prompts, query: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        raise BadInput("A random key needs a generator.")
    first = (~part.mask).sum(1)
    if bool((query <= first).any()):
        raise BadInput("The query is a row's first token, so there is no earlier one to knock out.")
    share = torch.rand(len(part), generator=generator).to(query.device)
    return first + (share * (query - first)).long()
