"""`asft`: Anchored Supervised Fine-Tuning, and the three losses it is compared with.

    mode      per token
    sft       ce                    ce = -log p[y]
    dft       sg(p[y]) ce           a lower bound's gap closed: weights p instead of 1
    sft+kl    ce + lam KL
    asft      sg(p[y]) ce + lam KL  the KL to the base bounds how far those weights drift

Arithmetic from the view of reward-weighted regression: for any auxiliary q, E_ref[(pi/pi_ref) R] is bounded below by
E_ref[(q/pi_ref) R (1 + log(pi/q))] with gap u - 1 - log u >= 0, u = pi/q. SFT takes q = pi_ref, so its gap grows as the
policy moves; DFT takes q = sg(pi), so its gap is 0, but nothing holds its weights w = pi/pi_ref: their effective sample
size (sum w)^2 / sum w^2 falls. Both are logged, with the divergence.

Paper: arXiv:2509.23753 (DFT: arXiv:2508.05629). Gradient of a row of logits: p[y] (p - onehot) + lam (p - r), with the
forward KL.
Composes with every tuner and data policy. The anchor needs the base's answers: the tuner switched off where it can be,
else a frozen copy. This file adds the presets and the readings; the walk over tokens is that of `token`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pegbox.objectives.base import OBJECTIVE, Objective
from pegbox.objectives.references import ReferenceDtype
from pegbox.objectives.terms import KLToReference
from pegbox.objectives.token import Tokens, TokensState
from pegbox.objectives.token_losses import Dft, Sft
from pegbox.parts.context import Context
from pegbox.parts.view import Batch, ModelView

__all__ = ["Asft", "bound_gap", "effective_sample_size"]


def bound_gap(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """w - 1 - log w with w = p[y] / r[y]: how far SFT's lower bound lies below the objective, per token; >= 0."""
    log_w = logp - ref_logp
    return log_w.expm1() - log_w


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over all weights, from their logarithms; between 1 and their number (0 if there are none)."""
    if not log_w.numel():
        return log_w.new_zeros(())
    w = (log_w - log_w.max()).exp()
    return w.sum().square() / w.square().sum()


@OBJECTIVE.register
class Asft(Objective):
    """SFT or DFT, anchored to the base or not.

    Args:
        mode: see the table above.
        lam: the anchor's factor; published values 0.05 and 0.1, with the forward direction.
        kl: forward is KL(base || policy), as the released code computes; reverse is the paper's text; k3 estimates the
            reverse from the target tokens alone. `lam` does not transfer between them.
        normalize: "tokens" of the whole optimizer batch, or "micro" as the official trainer divides.
        anchor: the reference: "base", or a role under `models:`.
        reference_dtype: of a frozen copy, where one is needed.
        cache_reference: keep log r[y] per sample (k3 only), so that the base is run once per sample.
        chunk: rows of logits in one tile; None chooses.
    """

    reproduces: ClassVar[str] = "arXiv:2509.23753"

    kind: Literal["asft"] = "asft"
    mode: Literal["sft", "dft", "sft+kl", "asft"] = "asft"
    lam: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    kl: Literal["forward", "reverse", "k3"] = "forward"
    normalize: Literal["tokens", "micro"] = "tokens"
    anchor: str = "base"
    reference_dtype: ReferenceDtype = "same"
    cache_reference: bool = False
    chunk: Annotated[int, Field(ge=1)] | None = None

    def model_post_init(self, context: Any, /) -> None:
        _ = self.tokens  # what can't be combined is refused here, before a model is loaded

    @cached_property
    def tokens(self) -> Tokens:
        """The same as a `tokens` objective."""
        anchor = KLToReference(
            weight=self.lam, direction=self.kl, of=self.anchor, dtype=self.reference_dtype, cache=self.cache_reference
        )
        return Tokens(
            token=Dft() if self.mode in ("dft", "asft") else Sft(),
            terms=(anchor,) if self.mode in ("sft+kl", "asft") else (),
            normalize=self.normalize,
            chunk=self.chunk,
        )

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether the base is run beside the policy."""
        return self.tokens.needs_reference

    def setup(self, ctx: Context) -> TokensState:
        return self.tokens.setup(ctx)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return self.tokens.count(batch)

    def reference(self, state: TokensState | None, view: ModelView, batch: Batch) -> list[Any]:
        return self.tokens.reference(state, view, batch)

    def losses(
        self, state: TokensState | None, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        scored = self.tokens.per_token(view, batch, ref)
        yield from self.tokens.reduce(scored, totals)
        if scored.ref_logp is not None:
            by = self.tokens.divisor(scored, totals) / totals["micro"].to(scored.loss)
            log_w = scored.logp - scored.ref_logp
            yield "_bound_gap", bound_gap(scored.logp, scored.ref_logp).sum() / by
            yield "_ess", effective_sample_size(log_w)  # of a micro-batch's tokens
            yield "_kl_reverse_k3", (-log_w).expm1().add(log_w).sum() / by
