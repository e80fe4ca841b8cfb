"""How much of a forward pass comes from tuning: the exact decomposition of the residual stream (TuCo).

    PTC_l = f_base(x_l, l)      FTC_l = f_tuned(x_l, l) - f_base(x_l, l)      x_{l+1} = x_l + PTC_l + FTC_l
    TuCo  = |sum_l FTC_l|_1 / (|sum_l PTC_l|_1 + |sum_l FTC_l|_1)             at the last token, in [0, 1]

f is a whole block (attention and MLP together), always on the tuned model's stream. Norms are of the sums over blocks,
not sums of norms. Nuti et al., arXiv:2506.23423, sections 3 and 4. Works on any pair that `parts.pairs` can walk. What
it does not do: say which weights moved, or change the model (`pegbox.decode.scaled` does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.pairs import ModelPair

__all__ = ["Contribution", "bound", "last_positions", "share", "tuning_contribution"]

Norm = float


@dataclass(frozen=True)
class Contribution:
    """What one pass over a batch says. B rows, T tokens, L blocks, D width; values in float64, on the CPU.

    Args:
        tuco: (B,) at the last token. preco: (B,) 1 - tuco.
        curve: (B, L) beta_l at the last token: the share of tuning in the first l blocks, l = 1..L.
        base_sum, tuned_sum: (B, D) sums of PTC and of FTC over blocks, last token. start, end: (B, D) x_0, x_L there.
        block_norms: (B, L, 2) norms of PTC_l and FTC_l at the last token.
        all_tokens: (B, L) beta_l with norms over all tokens (what the bound speaks of), or None.
        per_token: (B, T) TuCo read at every position, NaN at padding, or None.
        output: (B,) share of |x_L - x_L of the plain base| beside |x_L of the plain base|, or None.
    """

    tuco: Tensor
    preco: Tensor
    curve: Tensor
    base_sum: Tensor
    tuned_sum: Tensor
    start: Tensor
    end: Tensor
    block_norms: Tensor
    all_tokens: Tensor | None = None
    per_token: Tensor | None = None
    output: Tensor | None = None

    @property
    def beta(self) -> Tensor:
        """(B,) max_l beta_l, over all tokens where these were kept, else at the last token."""
        curve = self.curve if self.all_tokens is None else self.all_tokens
        return curve.amax(-1)


@torch.no_grad()
def tuning_contribution(
    pair: ModelPair, batch: Mapping[str, Any], *, norm: Norm = 1.0, tokens: bool = False, output: bool = False
) -> Contribution:
    """TuCo of every row of a batch, in one pass through the pair.

    Args:
        batch: `input_ids` (B, T), padded on either side under `attention_mask` (or without padding).
        norm: of the sums; the definition's is 1.
        tokens: also sum at every position, for `per_token` and `all_tokens` (two streams of memory instead of none).
        output: also run the plain base, for `output` (a third forward).

    Raises:
        BadInput: no token, or a row of padding alone; a norm that is none.
    """
    if not norm >= 1.0:
        raise BadInput(f"norm must be a number of 1 or more, got {norm}.")
    inputs, last = _inputs(pair.tuned, batch)
    with pair.as_evaluated():
        return _walked(pair, inputs, last, norm, tokens, output)


def _walked(
    pair: ModelPair, inputs: Mapping[str, Any], last: Tensor, norm: Norm, tokens: bool, output: bool
) -> Contribution:
    walk = pair.begin(inputs)
    rows = torch.arange(len(last), device=walk.hidden.device)
    last = last.to(walk.hidden.device)

    def at_last(x: Tensor) -> Tensor:
        return x[rows, last].double()

    start = at_last(walk.hidden)
    sums = {"base": torch.zeros_like(start), "tuned": torch.zeros_like(start)}
    everywhere = _Everywhere(walk.hidden, _mask(inputs, walk.hidden), norm) if tokens else None
    curve, norms = [], []
    for _ in range(len(pair)):
        x, below, above = pair.step(walk)
        base_part, tuned_part = at_last(below) - at_last(x), at_last(above) - at_last(below)
        sums["base"] += base_part
        sums["tuned"] += tuned_part
        curve.append(share(sums["base"], sums["tuned"], norm))
        norms.append(torch.stack([_size(base_part, norm), _size(tuned_part, norm)], -1))
        if everywhere is not None:
            everywhere.add(x, below, above)
        del x, below, above  # before the next block makes its own
    end = at_last(walk.hidden)
    tuco = curve[-1]
    return Contribution(
        tuco=tuco.cpu(),
        preco=(1 - tuco).cpu(),
        curve=torch.stack(curve, -1).cpu(),
        base_sum=sums["base"].cpu(),
        tuned_sum=sums["tuned"].cpu(),
        start=start.cpu(),
        end=end.cpu(),
        block_norms=torch.stack(norms, 1).cpu(),
        all_tokens=None if everywhere is None else torch.stack(everywhere.curve, -1).cpu(),
        per_token=None if everywhere is None else everywhere.per_token().cpu(),
        output=_output(pair, inputs, end, rows, last, norm).cpu() if output else None,
    )


class _Everywhere:
    """Sums of PTC and FTC at every position, (B, T, D) each."""

    def __init__(self, start: Tensor, mask: Tensor, norm: Norm):
        dtype = torch.promote_types(start.dtype, torch.float32)
        self.base, self.tuned = torch.zeros_like(start, dtype=dtype), torch.zeros_like(start, dtype=dtype)
        self.mask, self.norm = mask, norm
        self.curve: list[Tensor] = []

    def add(self, x: Tensor, below: Tensor, above: Tensor) -> None:
        self.base += below.to(self.base.dtype)
        self.base -= x.to(self.base.dtype)
        self.tuned += above.to(self.base.dtype)
        self.tuned -= below.to(self.base.dtype)
        inside = self.mask[..., None]
        self.curve.append(share((self.base * inside).flatten(1), (self.tuned * inside).flatten(1), self.norm))

    def per_token(self) -> Tensor:
        """(B, T) with NaN at padding."""
        return share(self.base, self.tuned, self.norm).masked_fill(~self.mask, math.nan)


def share(base: Tensor, tuned: Tensor, norm: Norm = 1.0) -> Tensor:
    """|tuned| / (|base| + |tuned|) over the last axis, in float64; 0 where both are zero."""
    a, b = _size(base, norm), _size(tuned, norm)
    whole = a + b
    return torch.where(whole > 0, b / whole, torch.zeros_like(whole))


def _size(vectors: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(vectors, norm, dim=-1, dtype=torch.float64)


def bound(blocks: int, largest: float, lipschitz: float, beta: float) -> float:
    """The discrete Groenwall bound on |x_L - x_L of the base|_1 (section 4 of the paper).

    L sup|PTC|_1 (1 + Lip)^L beta / (1 - beta); infinite at beta = 1.

    Args:
        largest: sup over the stream of |PTC_l|_1. lipschitz: of the base's blocks f, in L1. beta: max_l beta_l.
    """
    if not 0 <= beta <= 1:
        raise BadInput(f"beta is a share, between 0 and 1; got {beta}.")
    if beta == 1:
        return math.inf
    return float(blocks * largest * (1 + lipschitz) ** blocks * beta / (1 - beta))


def _output(pair: ModelPair, inputs: Mapping[str, Any], end: Tensor, rows: Tensor, last: Tensor, norm: Norm) -> Tensor:
    plain = pair.base_end(inputs).to(end.device)[rows, last].double()
    return share(plain, end - plain, norm)


# ---- positions


def last_positions(mask: Tensor) -> Tensor:
    """(B,) the last position of each row that is not padding. Raises `BadInput` for rows of padding alone."""
    if mask.ndim != 2 or mask.shape[1] == 0:
        raise BadInput("An empty prompt has no last token. Give at least one token a row.")
    empty = (mask == 0).all(-1)
    if bool(empty.any()):
        raise BadInput(f"Row {int(empty.nonzero()[0])} of the batch is padding alone; leave it out.")
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places * (mask != 0)).argmax(-1)


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """What goes into the forward, with positions counted from each row's first token, and the last positions."""
    from pegbox.parts.view import SIDE_KEYS

    inputs = {k: v for k, v in batch.items() if k not in SIDE_KEYS and v is not None}
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if ids is None or ids.shape[1] == 0:
        raise BadInput("An empty prompt has no last token. Give at least one token a row.")
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs, last_positions(torch.ones(ids.shape[:2], dtype=torch.long))
    if mask.ndim == 2 and bool((mask == 0).any()) and "position_ids" not in inputs and _takes_positions(model):
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs, last_positions(mask)


def _takes_positions(model: nn.Module) -> bool:
    import inspect

    inner: Any = getattr(model, "get_base_model", lambda: model)()
    return "position_ids" in inspect.signature(inner.forward).parameters


def _mask(inputs: Mapping[str, Any], hidden: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.to(hidden.device).bool()
