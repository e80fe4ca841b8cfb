"""Attribution patching: all senders' path-patching scores at once, to first order.

    score(sender) ~ mean_i  grad_i . (corrupt slice - clean slice) / p_clean[i]
    grad: of p at the last token, or of the receivers' q, k, v weighed by p's gradient in them, in the sender's slice,
          with all attention outputs held and MLPs and norms free

Nanda, "Attribution patching", 2023, for the receivers of `path_patching`. Two passes and one backward for the direct
effect, one of each more with receivers. It ranks; `path_patching` measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pegbox.analyze.circuits.activations import Edit, capture, last_logits, taken, written
from pegbox.analyze.circuits.heads import Head, HeadView, Site
from pegbox.analyze.circuits.paths import check_paths, probabilities
from pegbox.analyze.circuits.prompts import LAST, Prompts
from pegbox.errors import BadInput

__all__ = ["attribution", "rank_correlation"]


def attribution(
    view: HeadView,
    clean: Prompts,
    corrupt: Prompts,
    *,
    receivers: Iterable[Sequence[int]] = (),
    composition: str | None = None,
    position: str = LAST,
    corrupt_position: str | None = None,
    batch: int = 32,
) -> Tensor:
    """(L, H) float64 estimates of `path_patching`'s scores; the same arguments and errors."""
    chosen = view.check(receivers)
    check_paths(clean, corrupt, chosen, composition, position)
    total = torch.zeros(view.layers, view.heads, dtype=torch.float64)
    for start in range(0, len(clean), batch):
        rows = slice(start, start + batch)
        a, b = clean.take(rows), corrupt.take(rows)
        there = capture(view, b, ("o",), b.at(corrupt_position or position)[:, None])
        total += _batch(view, a, [there["o", n][:, 0] for n in range(view.layers)], chosen, composition or "", position)
    return total / len(clean)


def _batch(
    view: HeadView,
    clean: Prompts,
    corrupt: Sequence[Tensor],
    receivers: Sequence[Head],
    composition: str,
    position: str,
) -> Tensor:
    here = capture(view, clean)
    p_clean = probabilities(here.logits, clean.right())
    if bool((p_clean == 0).any()):
        raise BadInput("The model gives some clean answer probability 0, so no share of it can be scored.")
    at, rows = clean.at(position), torch.arange(len(clean), device=clean.ids.device)
    weights = _receiver_gradients(view, clean, receivers, composition, at) if receivers else {}
    slices = [here["o", n][rows, at].clone().requires_grad_() for n in range(view.layers)]
    seen: list[Tensor] = []

    def hold(layer: int) -> Edit:
        site = view.site("o", layer)
        return lambda x: written(here["o", layer], site, slices[layer][:, None], at[:, None])

    def look(receiver: Head) -> tuple[Site, Edit]:
        site = view.site(composition, receiver.layer, receiver.head)

        def act(x: Tensor) -> Tensor:
            seen.append((taken(x[rows, at], site) * weights[receiver]).sum())
            return x

        return site, act

    with torch.enable_grad():
        edits = [(view.site("o", n), hold(n)) for n in range(view.layers)]
        logits = last_logits(view, clean, [*edits, *(look(r) for r in receivers)])
        value = torch.stack(seen).sum() if receivers else probabilities(logits, clean.right()).sum()
        grads = torch.autograd.grad(value, slices, allow_unused=True)
    found = torch.zeros(view.layers, view.heads, dtype=torch.float64)
    for layer, grad in enumerate(grads):
        if grad is not None:
            change = (grad * (corrupt[layer] - slices[layer].detach())).double() / p_clean[:, None]
            found[layer] = change.unflatten(-1, (view.heads, -1)).sum((0, 2)).cpu()
    return found


def _receiver_gradients(
    view: HeadView, clean: Prompts, receivers: Sequence[Head], composition: str, at: Tensor
) -> dict[Head, Tensor]:
    """d p / d (receiver's slice at its token), (B, w) each; a slice that several receivers share counts once."""
    moves: dict[tuple[int, int], Tensor] = {}
    edits: list[tuple[Site, Edit]] = []
    owner: dict[Head, tuple[int, int]] = {}
    rows = torch.arange(len(at), device=at.device)
    for receiver in receivers:
        part = receiver.head if composition == "q" else view.kv_head(receiver.head)
        key = receiver.layer, part
        if key in moves:
            continue
        owner[receiver] = key
        site = view.site(composition, *receiver)
        width = len(site.columns) if isinstance(site.columns, tuple) else site.columns.stop - site.columns.start
        dtype = next(p.dtype for p in view.model.parameters() if p.is_floating_point())
        moves[key] = torch.zeros(len(at), width, dtype=dtype, device=at.device, requires_grad=True)

        def act(x: Tensor, site: Site = site, move: Tensor = moves[key]) -> Tensor:
            return written(x, site, taken(x[rows, at], site) + move, at)

        edits.append((site, act))
    with torch.enable_grad():
        p = probabilities(last_logits(view, clean, edits), clean.right()).sum()
        found = torch.autograd.grad(p, list(moves.values()), allow_unused=True)
    gradients = {key: torch.zeros_like(moves[key]) if g is None else g for key, g in zip(moves, found)}
    return {r: gradients[owner[r]] if r in owner else torch.zeros_like(next(iter(moves.values()))) for r in receivers}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two sets of scores, ties at their mean rank; NaN where one is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(a.flatten().numpy(), b.flatten().numpy()).statistic)
