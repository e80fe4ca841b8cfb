"""Cross-model activation patching: a fine-tuned model's activations in its base, to see where the gain sits.

    output: the chosen heads' slices at their positions := the tuned model's, same prompt
    input (q, k, v): the chosen heads' q at their position, or k / v before it := the tuned model's, while all heads'
        outputs before the first such position stay at the base's own, so that the read-out alone changes

Prakash et al., arXiv:2402.14811, section 5. The two models have one shape; one model with its adapters on and off is
such a pair (see `parts/pairs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pegbox.analyze.circuits.activations import Cache, Patch, capture, last_logits, taken
from pegbox.analyze.circuits.circuit import Member
from pegbox.analyze.circuits.heads import HeadView, check_alike
from pegbox.analyze.circuits.prompts import Prompts
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.pairs import ModelPair

__all__ = ["MODES", "cross_accuracy", "cross_logits", "gap_closed"]

MODES: dict[str, tuple[str, ...]] = {"output": (), "q": ("q",), "k": ("k",), "v": ("v",), "kv": ("k", "v")}


def cross_logits(
    view: HeadView, prompts: Prompts, donor: Cache, members: Sequence[Member], mode: str = "output",
    own: Cache | None = None,
) -> Tensor:  # fmt: skip
    """(B, V) logits of a model with another's activations at some heads.

    Args:
        donor: the other model's activations on the same prompts, all tokens kept: "o", or the mode's kinds.
        own: this model's own "o", which the input modes hold; captured if it is left out.
    """
    kinds = _kinds(mode)
    view.check(dict.fromkeys(head for _, head in members))
    if mode == "output":
        return last_logits(view, prompts, [_at(view, prompts, donor, "o", member) for member in members])
    own = own or capture(view, prompts, ("o",))
    first = torch.stack([prompts.at(position) for position, _ in members]).min(0).values
    edits: list[Patch] = [_Before(view.site("o", n), own["o", n], first) for n in range(view.layers)]
    for kind in kinds:
        for member in members:
            edits.append((_at if kind == "q" else _before)(view, prompts, donor, kind, member))
    return last_logits(view, prompts, edits)


def _kinds(mode: str) -> tuple[str, ...]:
    if mode not in MODES:
        raise BadInput(f"Unknown mode '{mode}' of cross-model patching.{did_you_mean(mode, MODES)}")
    return MODES[mode]


def _at(view: HeadView, prompts: Prompts, donor: Cache, kind: str, member: Member) -> Patch:
    position, head = member
    tokens = prompts.at(position)
    site = view.site(kind, head.layer, head.head)
    rows = torch.arange(len(prompts), device=tokens.device)
    return Patch(site, taken(donor[kind, head.layer][rows, tokens], site), tokens)


class _Before(Patch):
    """Every token before each row's own."""

    def __call__(self, x: Tensor) -> Tensor:
        assert self.tokens is not None
        every = torch.arange(x.shape[1], device=x.device)
        inside = (every < self.tokens[:, None])[..., None]
        new = torch.where(inside, self.values.to(x.dtype), taken(x, self.site))
        return Patch(self.site, new)(x)


def _before(view: HeadView, prompts: Prompts, donor: Cache, kind: str, member: Member) -> Patch:
    position, head = member
    site = view.site(kind, head.layer, head.head)
    return _Before(site, taken(donor[kind, head.layer], site), prompts.at(position))


@torch.no_grad()
def cross_accuracy(
    pair: ModelPair, prompts: Prompts, cases: Mapping[str, Sequence[Member]], mode: str = "output", batch: int = 32
) -> dict[str, float]:
    """Accuracy of the base with the tuned model's activations at each case's heads (an empty case: the base itself).

    Raises `BadInput` for models of unequal depth, width or heads, another mode, and heads out of range.
    """
    kinds = _kinds(mode) or ("o",)
    tuned = HeadView(pair.tuned)
    with pair.as_base() as model:
        base = HeadView(model)
    check_alike(base, tuned)
    right = dict.fromkeys(cases, 0)
    for part in prompts.batches(batch):
        there = part.to(next(pair.tuned.parameters()).device)
        donor = _moved(capture(tuned, there, kinds), part.ids.device)
        with pair.as_base():
            own = capture(base, part, ("o",)) if mode != "output" else None
            for name, members in cases.items():
                logits = cross_logits(base, part, donor, members, mode, own) if members else last_logits(base, part)
                right[name] += int((logits.argmax(-1) == part.right()).sum())
    return {name: count / len(prompts) for name, count in right.items()}


def _moved(cache: Cache, device: torch.device) -> Cache:
    return Cache({k: v.to(device) for k, v in cache.values.items()}, cache.logits, cache.tokens)


def gap_closed(base: float, tuned: float, patched: float) -> float:
    """(patched - base) / (tuned - base); NaN where tuning changed nothing."""
    return (patched - base) / (tuned - base) if tuned != base else float("nan")
