"""Path patching: how much of the answer's probability goes through one head, directly or through given receivers.

    run A: the clean prompt; from the sender's token on every head gives its clean output, the sender its corrupt one;
           MLPs and norms recompute; the receivers' q, k or v are recorded
    run B: the clean prompt with the receivers' recorded q, k or v in place, everything else free (no receivers: B = A)
    score(sender) = mean_i (p_B[i] - p_clean[i]) / p_clean[i]

Prakash et al., arXiv:2402.14811, section 3, after Wang et al., arXiv:2211.00593. In run A nothing but the sender's own
token can differ from the clean prompt, so only that token is computed, from the sender's block on; run B needs the
tokens from the receivers' on. A sender in or above the last receiver's block has no path to it and scores 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pegbox.analyze.circuits.activations import Edit, taken, written
from pegbox.analyze.circuits.heads import COMPOSITIONS, Head, HeadView, Site
from pegbox.analyze.circuits.passes import First, Passes, Resumed, Tokens, Whole, clean_outputs, resumable
from pegbox.analyze.circuits.prompts import LAST, Prompts
from pegbox.errors import BadInput, did_you_mean

__all__ = ["PathScores", "check_paths", "path_patching", "probabilities", "top_heads"]


@dataclass
class PathScores:
    """Scores (L, H) float64, the clean probabilities (B,), and how many passes they took."""

    scores: Tensor
    clean: Tensor
    forwards: int
    senders: list[Head] = field(default_factory=list)

    def top(self, k: int) -> list[Head]:
        return top_heads(self.scores, k)


def top_heads(scores: Tensor, k: int) -> list[Head]:
    """The k heads with the most negative scores. Raises `BadInput` for more heads than there are."""
    if not 0 < k <= scores.numel():
        raise BadInput(f"A group of {k} heads: give between 1 and {scores.numel()}, the number of heads.")
    order = torch.sort(scores.flatten(), stable=True).indices[:k]
    return [Head(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order]


def probabilities(logits: Tensor, answers: Tensor) -> Tensor:
    """(B, ...) probability of each row's answer from logits (B, ..., V), float64."""
    index = answers.view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits.gather(-1, index)[..., 0] - logits.logsumexp(-1)).double().exp()


def path_patching(
    view: HeadView,
    clean: Prompts,
    corrupt: Prompts,
    *,
    receivers: Iterable[Sequence[int]] = (),
    composition: str | None = None,
    position: str = LAST,
    corrupt_position: str | None = None,
    senders: Iterable[Sequence[int]] | None = None,
    tokens: int = 4096,
    batch: int = 100,
    resume: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PathScores:
    """Scores of all senders at one position (others NaN, where `senders` are given).

    Args:
        clean, corrupt: as many prompts each, with the position; the clean ones with answers.
        receivers: heads whose `composition` ("q", "k", "v") at the position is patched; none: the direct effect.
        corrupt_position: the corrupt prompts' corresponding position, if it has another name.
        tokens: of one pass, at most. batch: prompts at a time.
        resume: False runs whole prompts through all blocks; None: where resuming is seen to give the same.
        progress: called with (prompts done, prompts).

    Raises:
        BadInput: unequal numbers of prompts, heads out of range, another composition, no path (a direct effect of a
            position before the last), an answer of probability 0.
    """
    chosen = view.check(receivers)
    check_paths(clean, corrupt, chosen, composition, position)
    wanted = view.check(senders) if senders is not None else tuple(view.all())
    resumed = resumable(view, clean) if resume is None else resume
    total = torch.zeros(view.layers, view.heads, dtype=torch.float64)
    kept, forwards = [], 0
    for start in range(0, len(clean), batch):
        rows = slice(start, start + batch)
        one = _Batch(view, clean.take(rows), corrupt.take(rows), chosen, composition or "", position, resumed)
        one.corrupt_at(corrupt_position or position)
        total += one.scores(wanted, tokens).cpu()
        kept.append(one.clean_p.cpu())
        forwards += one.forwards
        if progress is not None:
            progress(min(start + batch, len(clean)), len(clean))
    scores = total / len(clean)
    if senders is not None:
        mask = torch.full_like(scores, float("nan"))
        for layer, head in wanted:
            mask[layer, head] = scores[layer, head]
        scores = mask
    return PathScores(scores, torch.cat(kept), forwards, list(wanted))


def check_paths(
    clean: Prompts, corrupt: Prompts, receivers: Sequence[Head], composition: str | None, position: str
) -> None:
    """Raises `BadInput` for prompts, receivers and positions that name no path (see `path_patching`)."""
    if len(clean) != len(corrupt):
        raise BadInput(f"{len(clean)} clean and {len(corrupt)} corrupt prompts: give one corrupt prompt for each.")
    clean.right()
    if receivers and composition not in COMPOSITIONS:
        raise BadInput(f"Unknown composition '{composition}'.{did_you_mean(str(composition), COMPOSITIONS)}")
    if not receivers and composition is not None:
        raise BadInput(f"Composition '{composition}' without receivers. Give receivers, or leave it out.")
    if not receivers and not bool((clean.at(position) == clean.width - 1).all()):
        raise BadInput(f"Position '{position}' has no direct path to the last token's logits. Give receivers.")


class _Batch:
    """Some prompts: their clean passes, and the two runs."""

    def __init__(
        self, view: HeadView, clean: Prompts, corrupt: Prompts, receivers: Sequence[Head], composition: str,
        position: str, resumed: bool,
    ):  # fmt: skip
        self.view, self.corrupt, self.receivers, self.composition = view, corrupt, receivers, composition
        self.at = clean.at(position)
        sender, after = Tokens.only(self.at[:, None]), Tokens.since(self.at, clean.width)
        self.forwards = 2  # the clean and the corrupt prompts' own
        with torch.no_grad():
            outputs = clean_outputs(view, clean, None if not resumed else self.at[:, None])
            if resumed:
                first = First(view, clean, after)
                logits = first.logits
                self.alone: Passes = Resumed(view, clean, sender, first=first, keys=False)
                self.free: Passes = Resumed(view, clean, after, first=first)
                self.outputs = {layer: x[:, 0] for layer, x in outputs.items()}
                self.forwards += 1
            else:
                rows = torch.arange(len(clean), device=self.at.device)
                self.outputs = {layer: x[rows, self.at] for layer, x in outputs.items()}
                self.alone = Whole(view, clean, sender, held=outputs)
                self.free = Whole(view, clean, Tokens.only(self.at[:, None]))
                logits = self.free.run(1, {})[0][:, 0]
        self.last = bool((self.at == clean.width - 1).all())
        self.place = self.free.tokens.index(self.at)
        self.answers = clean.right()
        self.clean_p = probabilities(logits, self.answers)
        if bool((self.clean_p == 0).any()):
            raise BadInput("The model gives some clean answer probability 0, so no share of it can be scored.")

    def corrupt_at(self, position: str) -> None:
        columns = self.corrupt.at(position)[:, None]
        self.corrupted = {n: x[:, 0] for n, x in clean_outputs(self.view, self.corrupt, columns).items()}

    @torch.no_grad()
    def scores(self, senders: Sequence[Head], tokens: int) -> Tensor:
        """(L, H) sums over the prompts."""
        found = torch.zeros(self.view.layers, self.view.heads, dtype=torch.float64)
        last = max((r.layer for r in self.receivers), default=self.view.layers)
        for layer in range(self.view.layers):
            heads = [head for at, head in senders if at == layer]
            if not heads or (self.receivers and layer >= last):
                continue
            room = (
                self.alone.room(tokens) if not self.receivers else min(p.room(tokens) for p in (self.alone, self.free))
            )
            for start in range(0, len(heads), room):
                part = heads[start : start + room]
                p = self._patched(layer, part)
                found[layer, part] = ((p - self.clean_p[:, None]) / self.clean_p[:, None]).sum(0).cpu()
        self.forwards += self.alone.forwards + self.free.forwards
        return found

    def _patched(self, layer: int, heads: Sequence[int]) -> Tensor:
        """(B, S) the answers' probability for each sender of one block."""
        above = [r for r in self.receivers if r.layer > layer]
        sites = {r.layer: self.view.site(self.composition, r.layer) for r in above}
        frozen = self._frozen(layer, heads)
        logits, seen = self.alone.run(len(heads), frozen, layer, list(sites.values()), logits=not above)
        if not above:
            return probabilities(logits, self.answers)
        recorded = dict(zip(sites, seen))
        edits: list[tuple[Site, Edit]] = []
        for receiver in above:
            site = self.view.site(self.composition, receiver.layer, receiver.head)
            edits.append((site, self._received(site, recorded[receiver.layer][:, :, 0])))
        logits, _ = self.free.run(len(heads), edits, min(sites))
        return probabilities(logits, self.answers)

    def _frozen(self, layer: int, heads: Sequence[int]) -> dict[tuple[str, int], Edit]:
        """What every o_proj from the sender's block on takes at the sender's token."""

        def clean(at: int) -> Edit:
            return lambda x: self.outputs[at][:, None, None].expand_as(x)

        def sender(x: Tensor) -> Tensor:
            value = self.outputs[layer][:, None, None].repeat(1, len(heads), 1, 1)
            for i, head in enumerate(heads):
                site = self.view.site("o", layer, head)
                value[:, i, 0] = written(value[:, i], site, taken(self.corrupted[layer], site)[:, None])[:, 0]
            return value

        return {("o", at): sender if at == layer else clean(at) for at in range(layer, self.view.layers)}

    def _received(self, site: Site, recorded: Tensor) -> Edit:
        """Write one receiver's slice, (B, S, W) recorded, at its token."""
        rows = torch.arange(len(recorded), device=recorded.device)

        def act(x: Tensor) -> Tensor:
            y = x.clone()
            part = x[rows, :, self.place].clone()
            index = list(site.columns) if isinstance(site.columns, tuple) else site.columns
            part[..., index] = taken(recorded, site)
            y[rows, :, self.place] = part
            return y

        return act
