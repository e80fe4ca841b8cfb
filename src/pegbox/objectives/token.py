"""`tokens`: a token loss, weighted and reduced, plus terms. Most objectives on language are this one with options.

    loss = sum_i w_i (l_i + sum_j lam_j t_ij) / N  +  sum_k lam_k penalty_k

l_i is the token loss (`token_losses`), t_ij are token terms (`terms`), w_i the row's weight, N the number of valid
tokens in the whole optimizer batch ("tokens"), or each micro-batch's own number with equal weight per micro-batch
("micro", for comparison with published numbers). Everything per token is worked out in one walk over tiles of logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard

import torch
from pydantic import Field
from torch import Tensor

from pegbox.errors import BadInput
from pegbox.objectives.base import OBJECTIVE, Objective
from pegbox.objectives.references import head_parameters
from pegbox.objectives.terms import TERM, Term, TokenTerm, WeightTerm
from pegbox.objectives.token_losses import TOKEN, Sft, TokenLoss
from pegbox.parts.context import Context
from pegbox.parts.tokens import score, shift, walk, walk_each
from pegbox.parts.view import Batch, ModelView

__all__ = ["PerToken", "Tokens", "TokensState", "row_weights", "sample_means", "samples_of", "valid_tokens"]

RARE = 0.01  # tokens less likely than this are counted: DFT hardly learns them


@dataclass
class TokensState:
    """The states of an objective's terms, in their order."""

    terms: list[Any]

    def state_dict(self) -> dict[str, Any]:
        return {str(i): s.state_dict() for i, s in enumerate(self.terms) if s is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            self.terms[int(key)].load_state_dict(value)


@dataclass
class PerToken:
    """What the walk gives: the summed loss, with its graph, and (n,) readings, valid tokens in row-major order."""

    loss: Tensor  # scalar, the rows' weights included; or (n,), one per token
    logp: Tensor
    terms: list[Tensor]
    ref_logp: Tensor | None
    weights: Tensor | None
    sample: Tensor | None  # which entry of the batch's sample_ids each token belongs to
    samples: int


def valid_tokens(batch: Batch) -> Tensor:
    """(B, T) bool: which positions predict a label that counts. Raises `BadInput` without labels."""
    if batch.get("labels") is None:
        raise BadInput("The batch has no `labels`: a token loss needs target ids, with -100 where nothing is learnt.")
    sequence, position = batch.get("sequence_ids"), batch.get("position_ids")
    return shift(batch["labels"], sequence, position, batch.get("attention_mask"), batch.get("corrupted_ids"))[1]


def row_weights(batch: Batch, valid: Tensor) -> Tensor | None:
    """(n,) the weight of each valid token's sample; None where the batch has none."""
    weights = batch.get("sample_weight")
    return None if weights is None else weights.to(valid.device)[samples_of(batch, valid)]


def sample_means(values: Tensor, sample: Tensor, count: int) -> Tensor:
    """(S,) the mean of (n,) values over each of `count` samples; 0 where a sample has none. `sample`: (n,)."""
    total = values.new_zeros(count).index_add_(0, sample, values)
    return total / values.new_zeros(count).index_add_(0, sample, torch.ones_like(values)).clamp(min=1)


def samples_of(batch: Batch, valid: Tensor) -> Tensor:
    """(n,) which entry of `sample_ids` each valid token belongs to: its row, or its packed sequence."""
    rows = batch.get("sequence_ids")
    if rows is None:
        rows = torch.arange(valid.shape[0], device=valid.device)[:, None].expand(valid.shape)
    return rows.to(valid.device)[valid]


@OBJECTIVE.register
class Tokens(Objective):
    """A token loss with terms.

    Args:
        token: the loss per token.
        terms: what is added.
        normalize: what the sum is divided by.
        chunk: rows of logits in one tile; None chooses.
    """

    kind: Literal["tokens"] = "tokens"
    token: Annotated[TokenLoss, TOKEN] = Field(default_factory=Sft)
    terms: tuple[Annotated[Term, TERM], ...] = ()
    normalize: Literal["tokens", "micro"] = "tokens"
    chunk: Annotated[int, Field(ge=1)] | None = None

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether any term runs a reference model."""
        return any(term.needs_reference for term in self.terms)

    def setup(self, ctx: Context) -> TokensState:
        return TokensState([term.setup(ctx) for term in self.terms])

    def count(self, batch: Batch) -> dict[str, Tensor]:
        tokens = valid_tokens(batch).sum().double()
        return {"tokens": tokens, "micro": torch.ones_like(tokens)}

    def reference(self, state: TokensState | None, view: ModelView, batch: Batch) -> list[Any]:
        states = self._states(state)
        return [
            term.reference(s, view, batch) if isinstance(term, TokenTerm) else None
            for term, s in zip(self.terms, states)
        ]

    def losses(
        self, state: TokensState | None, view: ModelView, batch: Batch, totals: Mapping[str, Tensor], ref: Any
    ) -> Iterator[tuple[str, Tensor]]:
        yield from self.reduce(self.per_token(view, batch, ref), totals)
        yield from self.penalties(state, view, totals)

    # ---- in parts, for objectives that are made of this one ----

    def per_token(self, view: ModelView, batch: Batch, ref: Any, *, each: bool = False) -> PerToken:
        """Walk over the valid tokens: one forward of the model, each tile's logits once. `each`: losses stay apart."""
        targets, valid = view.targets(batch)
        hidden = view.hidden(batch)
        valid = valid.to(hidden.device)
        rows, wanted = hidden[valid], targets.to(hidden.device)[valid]
        terms = [(t, r) for t, r in zip(self.terms, ref or [None] * len(self.terms)) if _acts(t)]

        weights = row_weights(batch, valid)

        def fold(tile: Tensor, part: slice) -> tuple[Tensor, ...]:
            loss, *readings = self._fold(view.head(tile), wanted[part], terms, part)
            return loss if weights is None else loss * weights[part].to(loss), *readings

        vocabulary, trained = int(getattr(view, "vocabulary", 1 << 15)), head_parameters(view)
        over = walk_each if each else walk
        loss, logp, *rest = over(rows, fold, vocabulary=vocabulary, parameters=trained, chunk=self.chunk)
        values, ref_logp = rest[: len(terms)], rest[len(terms)] if len(rest) > len(terms) else None
        samples = 0 if batch.get("sample_ids") is None else len(batch["sample_ids"])
        sample = samples_of(batch, valid) if samples else None
        return PerToken(loss, logp, values, ref_logp, weights, sample, samples)

    def _fold(
        self, logits: Tensor, targets: Tensor, terms: list[tuple[TokenTerm, Any]], part: slice
    ) -> tuple[Tensor, ...]:
        """One tile: loss per token, then log p[y], each term's value, and log r[y] of the first term that knows it."""
        compared = [term.compare(ref, part) for term, ref in terms]
        first = next((i for i, c in enumerate(compared) if c is not None), None)
        mean = self.token.needs_mean
        shared = compared[first] if first is not None else None
        ref_logits, direction = shared if shared is not None else (None, "forward")
        scores = score(logits, targets, ref_logits, direction=direction, mean=mean)
        loss, values, known = self.token.per_token(scores), [], None
        for i, (term, ref) in enumerate(terms):
            other = compared[i]
            own = scores if other is None or i == first else score(logits, targets, other[0], direction=other[1])
            value = term.per_token(own, ref, part)
            loss = loss + term.weight * value
            values.append(value.detach())
            known = known if known is not None else term.ref_logp(own, ref, part)
        return (loss, scores.logp.detach(), *values, *(() if known is None else (known.detach(),)))

    def reduce(self, tokens: PerToken, totals: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The loss and its readings. Readings are means over micro-batches of what adds up to the step's value."""
        by = self.divisor(tokens, totals)
        yield "tokens", tokens.loss / by
        by = by / totals["micro"].to(by)
        if self.token.kind != "sft" or tokens.terms:
            yield "_ce", -_sum(tokens.logp, tokens.weights) / by
        if self.token.kind != "sft":
            p = tokens.logp.exp()
            yield "_p", p.sum() / by
            yield "_rare", (p < RARE).sum() / by
        for term, value in zip((t for t in self.terms if _acts(t)), tokens.terms):
            yield f"_{term.kind}", value.sum() / by
        if tokens.sample is not None:
            yield "_sample_ce", sample_means(-tokens.logp, tokens.sample, tokens.samples)

    def divisor(self, tokens: PerToken, totals: Mapping[str, Tensor]) -> Tensor:
        """What a sum over this micro-batch is divided by. A step without any valid token divides by 1 and warns."""
        like, here = tokens.loss, tokens.logp.shape[0]
        if not float(totals["tokens"]):
            warnings.warn("No label of this step counts (all are -100): its loss is 0.", stacklevel=2)
        if self.normalize == "micro":
            return totals["micro"].to(like) * max(1, here)
        return totals["tokens"].to(like).clamp(min=1)

    def penalties(
        self, state: TokensState | None, view: ModelView, totals: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Weight terms, spread evenly over the step's micro-batches."""
        for term, s in zip(self.terms, self._states(state)):
            if isinstance(term, WeightTerm) and term.weight > 0:
                penalty = term.penalty(s, view.model)
                yield term.kind, penalty / totals["micro"].to(penalty)

    def _states(self, state: TokensState | None) -> list[Any]:
        return state.terms if state is not None else [None] * len(self.terms)


def _acts(term: Term) -> TypeGuard[TokenTerm]:
    return isinstance(term, TokenTerm) and term.weight > 0


def _sum(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.sum() if weights is None else (values * weights.to(values)).sum()
