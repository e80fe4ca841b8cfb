"""Desiderata-based component masking: which components of a group carry a quantity.

    component i at its position := m_i * base + (1 - m_i) * source          m in [0, 1]^n, 1 keeps the base's
    loss = - mean logit[target] + lambda * sum(1 - m)

A desideratum is triples (base prompt, source prompt, target): the target is what the answer becomes if the quantity is
taken from the source. Adam, m clamped to [0, 1] before each step; read out is m rounded, the best on validation.
Prakash et al., arXiv:2402.14811, section 4, after Davies et al., arXiv:2307.03637. A component is any columns of a
module's input or output: a head, an MLP, a LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from pegbox.analyze.circuits.activations import Edit, last_logits, taken
from pegbox.analyze.circuits.circuit import Member
from pegbox.analyze.circuits.heads import HeadView, Site
from pegbox.analyze.circuits.passes import Passes, Resumed, Tokens, Whole, resumable
from pegbox.analyze.circuits.prompts import Prompts
from pegbox.errors import BadInput

__all__ = ["Learned", "Part", "Triples", "head_parts", "learn_mask", "mask_loss", "masked_logits", "patched_accuracy"]


@dataclass(frozen=True)
class Part:
    """One component: its site, and the position at which it is masked."""

    site: Site
    position: str


def head_parts(view: HeadView, members: Iterable[Member]) -> list[Part]:
    """Heads at their positions, as components."""
    return [Part(view.site("o", head.layer, head.head), position) for position, head in members]


@dataclass(frozen=True)
class Triples:
    """Base prompts, whose answers are the targets, and as many source prompts."""

    base: Prompts
    source: Prompts

    def __post_init__(self) -> None:
        self.base.right()
        if len(self.base) != len(self.source):
            raise BadInput(f"{len(self.base)} base and {len(self.source)} source prompts: give one source for each.")

    def __len__(self) -> int:
        return len(self.base)

    def take(self, rows: Tensor | slice) -> Triples:
        return Triples(self.base.take(rows), self.source.take(rows))


class _Mixed:
    """A batch of triples, ready for any mask."""

    def __init__(self, view: HeadView, parts: Sequence[Part], triples: Triples, resume: bool):
        self.parts = list(parts)
        base = triples.base
        first = base.columns(list(dict.fromkeys(p.position for p in parts))).min(1).values
        tokens = Tokens.since(first, base.width)
        self.run: Passes = Resumed(view, base, tokens) if resume else Whole(view, base, tokens)
        self.places = [self.run.tokens.index(base.at(part.position)) for part in parts]
        self.source = _seen(view, triples.source, parts)
        self.start = min(part.site.layer for part in parts)

    def logits(self, mask: Tensor) -> Tensor:
        """(B, V); gradients flow into the mask."""
        by_tensor: dict[tuple[int, str], list[int]] = {}
        for i, part in enumerate(self.parts):
            by_tensor.setdefault(part.site.key, []).append(i)
        edits = [(self.parts[found[0]].site, self._mix(found, mask)) for found in by_tensor.values()]
        return self.run.run(1, edits, self.start)[0][:, 0]

    def _mix(self, which: Sequence[int], mask: Tensor) -> Edit:
        def act(x: Tensor) -> Tensor:  # (B, 1, P, W)
            rows = torch.arange(len(x), device=x.device)
            y = x.clone()
            for i in which:
                site, place = self.parts[i].site, self.places[i]
                columns = list(site.columns) if isinstance(site.columns, tuple) else site.columns
                token = y[rows, 0, place].clone()  # written into below; mixing in place would break autograd
                token[..., columns] = mask[i].to(x.dtype) * taken(x[rows, 0, place], site) + (
                    1 - mask[i].to(x.dtype)
                ) * (self.source[i].to(x.dtype))
                y[rows, 0, place] = token
            return y

        return act


@torch.no_grad()
def _seen(view: HeadView, prompts: Prompts, parts: Sequence[Part]) -> list[Tensor]:
    """Every component's values in the source, (B, w), each at the source's own position."""
    found: list[Tensor] = [torch.empty(0)] * len(parts)
    rows = torch.arange(len(prompts), device=prompts.ids.device)

    def look(i: int, part: Part) -> Edit:
        def act(x: Tensor) -> Tensor:
            found[i] = taken(x[rows, prompts.at(part.position)], part.site).clone()
            return x

        return act

    last_logits(view, prompts, [(part.site, look(i, part)) for i, part in enumerate(parts)])
    return found


def _check(parts: Sequence[Part], mask: Tensor | None = None) -> None:
    if not parts:
        raise BadInput("A mask over no components. Give at least one.")
    if mask is not None and (mask.shape != (len(parts),) or bool(((mask < 0) | (mask > 1)).any())):
        raise BadInput(f"A mask has one value in [0, 1] for each of the {len(parts)} components.")


def masked_logits(
    view: HeadView, parts: Sequence[Part], triples: Triples, mask: Tensor, resume: bool | None = None
) -> Tensor:
    """(B, V) last-token logits of the base prompts under a mask."""
    _check(parts, mask.detach())
    fast = resumable(view, triples.base) if resume is None else resume
    return _Mixed(view, parts, triples, fast).logits(mask)


def mask_loss(logits: Tensor, targets: Tensor, mask: Tensor, lam: float) -> Tensor:
    """- mean logit[target] + lam * sum(1 - mask). Raises `BadInput` for a negative lam."""
    if lam < 0:
        raise BadInput(f"lambda weighs how many components are taken from the source; it is not negative, got {lam}.")
    return -logits.gather(-1, targets[:, None]).mean() + lam * (1 - mask).sum()


@torch.no_grad()
def patched_accuracy(
    view: HeadView, parts: Sequence[Part], triples: Triples, mask: Tensor | None = None, *, batch: int = 32,
    resume: bool | None = None,
) -> float:  # fmt: skip
    """Share of targets that are the answer once the components come from the source (those with mask 0, or all)."""
    mask = torch.zeros(len(parts)) if mask is None else mask
    _check(parts, mask)
    fast = resumable(view, triples.base) if resume is None else resume
    right = 0
    for start in range(0, len(triples), batch):
        part = triples.take(slice(start, start + batch))
        logits = _Mixed(view, parts, part, fast).logits(mask.to(part.base.ids.device))
        right += int((logits.argmax(-1) == part.base.right()).sum())
    return right / len(triples)


@dataclass
class Learned:
    """A learned mask.

    Args:
        mask: rounded, (n,): 0 where the component is taken from the source. raw: as learned at the end.
        validation, test: accuracy of the rounded mask. history: the loss of every batch.
    """

    mask: Tensor
    raw: Tensor
    validation: float
    test: float
    history: list[float] = field(default_factory=list)

    @property
    def chosen(self) -> list[int]:
        """Which components are taken from the source: those that carry the quantity, if the accuracy is high."""
        return [i for i, value in enumerate(self.mask.tolist()) if value == 0]


def learn_mask(
    view: HeadView,
    parts: Sequence[Part],
    triples: Triples,
    *,
    lam: float = 0.01,
    lr: float = 0.1,
    epochs: int = 2,
    batch: int = 32,
    split: tuple[float, float] = (0.5, 0.25),
    every: int = 4,
    generator: torch.Generator,
    resume: bool | None = None,
) -> Learned:
    """Learn which components make the answer the target.

    Args:
        split: shares for training and validation; the rest is the test's.
        every: batches between looks at the validation rows; of equal accuracies the mask with more components wins.
    """
    _check(parts)
    if lam < 0:
        raise BadInput(f"lambda weighs how many components are taken from the source; it is not negative, got {lam}.")
    train, validation, test = _split(triples, split, generator)
    fast = resumable(view, triples.base) if resume is None else resume
    mask = torch.ones(len(parts), device=triples.base.ids.device, requires_grad=True)
    adam = torch.optim.Adam([mask], lr=lr)
    best: tuple[float, int, Tensor] | None = None
    history: list[float] = []

    def look() -> None:
        nonlocal best
        rounded = mask.detach().clamp(0, 1).round()
        found = patched_accuracy(view, parts, validation, rounded.cpu(), batch=batch, resume=fast)
        now = (found, int((rounded == 0).sum()), rounded.cpu())
        if best is None or now[:2] > best[:2]:
            best = now

    for _ in range(epochs):
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(order), batch):
            rows = train.take(order[start : start + batch])
            with torch.no_grad():
                mask.clamp_(0, 1)
            mixed = _Mixed(view, parts, rows, fast)
            with torch.enable_grad():
                loss = mask_loss(mixed.logits(mask), rows.base.right(), mask, lam)
                (mask.grad,) = torch.autograd.grad(loss, [mask])
            adam.step()
            history.append(float(loss.detach()))
            if len(history) % every == 0:
                look()
    look()
    assert best is not None
    tested = patched_accuracy(view, parts, test, best[2], batch=batch, resume=fast)
    return Learned(best[2], mask.detach().clamp(0, 1).cpu(), best[0], tested, history)


def _split(triples: Triples, shares: tuple[float, float], generator: torch.Generator) -> list[Triples]:
    order = torch.randperm(len(triples), generator=generator)
    sizes = [int(share * len(triples)) for share in shares]
    ends = [0, sizes[0], sizes[0] + sizes[1], len(triples)]
    parts = [order[a:b] for a, b in pairwise(ends)]
    if any(len(part) == 0 for part in parts):
        raise BadInput(f"{len(triples)} triples do not fill a training, a validation and a test part. Give more.")
    return [triples.take(part) for part in parts]
