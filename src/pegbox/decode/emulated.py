"""Emulated fine-tuning: what tuning taught one model, added to another while it decodes.

    s = log p_anchor + sum_i w_i (log p_tuned,i - log p_reference,i);   the next token is drawn from softmax(s)

"An Emulator for Fine-Tuning Large Language Models using Small Language Models", arXiv:2310.12962. Up-scaling: a large
anchor and a small pair. Down-scaling: a small anchor and a large pair. Interpolation: several deltas. The optional
filter bounds the up-scaling weight to the tuned model's likely tokens; the optional block is exact speculative decoding
with the tuned model as draft (the same distribution, fewer calls of the anchor).

In a batch a block is as long as the shortest accepted run among its unfinished rows: a row that would have accepted
more draws the rest again, which leaves its distribution as it is because the other rows' luck says nothing about it.

What this file does not do: train, or prepare `generate` (`pegbox.decode.base`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pegbox.decode.base import DECODE, Call, DecodeContext, Decoder, Decoding, Session
from pegbox.decode.combine import check_weights, combine, residual, verify
from pegbox.decode.pairs import Cast, Track, check_tokenizers, shared_width
from pegbox.decode.prompts import frame, padded
from pegbox.errors import BadInput, did_you_mean
from pegbox.parts.generation import Messages

__all__ = ["Delta", "Emulated", "EmulatedDecoding", "EmulatedSession"]

ANCHOR = "anchor"


class Delta(BaseModel):
    """One behaviour: a tuned model against what it was tuned from.

    Args:
        tuned, reference: roles; `reference` left out is the tuned run's own base.
        weight: lambda; negative takes the behaviour away.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tuned: str = "tuned"
    reference: str | None = None
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0


@DECODE.register
class Emulated(Decoder):
    """Decode from an anchor plus weighted deltas of tuned models.

    Args:
        anchor: the role whose pre-training is used; default: the run's own model.
        deltas: the behaviours. Two with the weights lambda and 1 - lambda interpolate between them.
        top_p: the filter of the up-scaling weights: mass of the tuned model's likely tokens; None: no filter.
        block_size: tokens drafted by the tuned model and checked at once; None: one token at a time.
        draft: the role that drafts; default: the first delta's tuned model.
        prompts: role (or "anchor") -> how its prompt looks where it is not the host's: "template" (its own tokenizer's
            chat template), "raw" (the messages' text), or a text with {prompt}.
    """

    kind: Literal["emulated"] = "emulated"
    anchor: str | None = None
    deltas: Annotated[list[Delta], Field(min_length=1)] = Field(default_factory=lambda: [Delta()])
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    block_size: Annotated[int, Field(ge=1)] | None = None
    draft: str | None = None
    prompts: dict[str, str] = Field(default_factory=dict)

    scores: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2310.12962, equation 4"

    @model_validator(mode="after")
    def _whole(self) -> Emulated:
        check_weights(self.weights, len(self.deltas), self.top_p)
        unknown = [name for name in self.prompts if name not in {ANCHOR, *self.roles()}]
        if unknown:
            raise BadInput(f"decode.prompts names '{unknown[0]}'.{did_you_mean(unknown[0], {ANCHOR, *self.roles()})}")
        if self.draft is not None and self.block_size is None:
            raise BadInput("decode.draft has no meaning without decode.block_size; give both, or neither.")
        return self

    @property
    def weights(self) -> list[float]:
        return [delta.weight for delta in self.deltas]

    def roles(self) -> tuple[str, ...]:
        named = [self.anchor, self.draft, *(r for d in self.deltas for r in (d.tuned, d.reference))]
        return tuple(dict.fromkeys(r for r in named if r is not None))

    def bind(self, ctx: DecodeContext) -> EmulatedDecoding:
        """Raises `BadInput` where tokenizers or vocabularies differ, or a delta has no reference."""
        return EmulatedDecoding(self, ctx)

    def at(self, *weights: float) -> Emulated:
        """The same decoder with other weights, one per delta."""
        check_weights(weights, len(self.deltas), self.top_p)
        deltas = [d.model_copy(update={"weight": float(w)}) for d, w in zip(self.deltas, weights)]
        return self.model_copy(update={"deltas": deltas})


class EmulatedDecoding(Decoding):
    """`Emulated` on live models. Members that answer alike (one model, one view, one prompt) run once."""

    decoder: Emulated

    def __init__(self, decoder: Emulated, ctx: DecodeContext):
        cast, forms = Cast(), decoder.prompts
        own = ctx.role(decoder.anchor) if decoder.anchor is not None else ctx.model
        self._tokenizers = {ANCHOR: ctx.tokenizer}
        self.anchor = cast.add(own, ANCHOR, forms.get(ANCHOR, forms.get(decoder.anchor or "")))
        self.pairs: list[tuple[int, int]] = []  # positions of (tuned, reference), for the deltas with a weight
        self._weights = [w for w in decoder.weights if w]
        for delta in decoder.deltas:
            tuned, name = self._role(ctx, delta.tuned), delta.reference or f"{delta.tuned}.base"
            reference = self._role(ctx, name, None if delta.reference else ctx.before(delta.tuned))
            if delta.weight:
                # a reference reads what its tuned model reads, unless it has a form of its own
                form = forms.get(delta.tuned)
                first = cast.add(tuned, delta.tuned, form)
                self.pairs.append((first, cast.add(reference, name, forms.get(name, form))))
        self.drafting = self.pairs[0][0] if self.pairs else self.anchor
        if decoder.draft is not None:
            self.drafting = cast.add(self._role(ctx, decoder.draft), decoder.draft, forms.get(decoder.draft))
        self.members, self.forms = cast.members, cast.forms
        self.counts = {"rounds": 0, "drafted": 0, "tested": 0, "accepted": 0}
        super().__init__(decoder, self.members[self.anchor].module, ctx.tokenizer, [m.module for m in self.members])
        self.vocabulary = shared_width(self.members, ctx.tokenizer)

    def _role(self, ctx: DecodeContext, name: str, model: Any = None) -> Any:
        """A role's model, once it is known that it speaks the anchor's tokens."""
        model = ctx.role(name) if model is None else model
        self._tokenizers[name] = getattr(model, "tokenizer", None) or ctx.tokenizer
        check_tokenizers(ctx.tokenizer, self._tokenizers[name], (ANCHOR, name))
        return model

    @property
    def context_length(self) -> int | None:
        return min((m.context for m in self.members if m.context is not None), default=None)

    # ---- answering

    def begin(
        self,
        prompt: Tensor,
        mask: Tensor,
        *,
        repeats: int = 1,
        cached: bool = True,
        sides: Sequence[dict[str, list[int]]] | None = None,
    ) -> EmulatedSession:
        tracks = []
        for member, form in zip(self.members, self.forms):
            ids, own = (prompt, mask) if form is None else self._own_prompts(member.name, sides, len(prompt), prompt)
            tracks.append(member.begin(ids, own, repeats=repeats, cached=cached))
        return EmulatedSession(self, tracks)

    def _own_prompts(
        self, name: str, sides: Sequence[dict[str, list[int]]] | None, rows: int, prompt: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not sides:
            raise BadInput(
                f"'{name}' reads a prompt of its own form, which can't be made from token ids. Ask through "
                "pegbox.parts.generation, or hand generate(sides=[decoding.member_prompts(messages), ...])."
            )
        each = rows // len(sides)
        return padded([side[name] for side in sides for _ in range(each)], prompt.device)

    def answer(self, call: Call, mask: Tensor, **options: Any) -> Any:
        if self.decoder.block_size is None:
            return super().answer(call, mask, **options)
        session = self.begin(call.prompt, mask, **options)
        while not call.finished:
            self._round(session, call, min(self.decoder.block_size, call.room - 1))
        return call.result()

    def _round(self, session: EmulatedSession, call: Call, block: int) -> None:
        """Draft `block` tokens, check them at once, keep the accepted ones and draw one more."""
        sample, before = bool(call.config.do_sample), call.answer.shape[1]
        drafted, q = session.draft(call, block, sample)
        scores = session.check(torch.cat([call.answer, drafted], -1), block)
        p = [_warped(call, drafted[:, :j], scores[:, j], sample) for j in range(block)]
        kept = _accepted(p, q, drafted, sample)  # (B,)
        self._count(call, kept, block)
        common = int(torch.where(call.live, kept, torch.full_like(kept, block)).min()) if block else 0
        for j in range(common):
            call.add(drafted[:, j], p[j].log(), scores[:, j])
            if call.finished:
                return
        if common < block:
            again = _pick(residual(p[common], q[common]), sample)
            call.add(torch.where(kept > common, drafted[:, common], again), p[common].log(), scores[:, common])
        else:
            raw = session.last(call.answer)
            target = _warped(call, drafted[:, :0], raw, sample)
            call.add(_pick(target, sample), target.log(), raw)
        session.take_back(before + common)

    def _count(self, call: Call, kept: Tensor, block: int) -> None:
        accepted = kept[call.live]
        self.counts["rounds"] += 1
        self.counts["drafted"] += block * len(accepted)
        self.counts["accepted"] += int(accepted.sum())
        self.counts["tested"] += int((accepted + 1).clamp(max=block).sum())

    def plain(self) -> bool:
        return not self._weights and self.forms[self.anchor] is None

    def host_view(self) -> AbstractContextManager[Any]:
        return self.members[self.anchor].active()

    # ---- scoring

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if any(form is not None for form in self.forms):
            raise BadInput("Members with prompts of their own have no common text to score; leave decode.prompts out.")
        return self.combined([m.forward(input_ids, attention_mask)[0] for m in self.members])

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        """The members' logits, in their order, as (..., V) log-probabilities."""
        tuned, references = ([logits[pair[i]] for pair in self.pairs] for i in (0, 1))
        return combine(logits[self.anchor], tuned, references, self._weights, self.decoder.top_p)

    def member_prompts(self, messages: Messages) -> dict[str, list[int]]:
        forms = {m.name: form for m, form in zip(self.members, self.forms) if form is not None}
        return {name: frame(self._tokenizers[name], messages, form) for name, form in forms.items()}

    def summary(self) -> dict[str, Any]:
        """Forwards and tokens by member; with blocks, the acceptance rate (accepted over tested drafts)."""
        found: dict[str, Any] = {"calls": {m.name: m.calls for m in self.members}}
        found["tokens"] = {m.name: m.tokens for m in self.members}
        if self.counts["tested"]:
            found |= {**self.counts, "acceptance": self.counts["accepted"] / self.counts["tested"]}
        return found


@dataclass
class EmulatedSession(Session):
    """One batch: the members' tracks, in the members' order."""

    decoding: EmulatedDecoding
    tracks: list[Track]

    def scores(self, answer: Tensor) -> Tensor:
        """(B, V) the combination's log-probabilities after the answer."""
        return self.decoding.combined([track.logits(answer)[:, -1] for track in self.tracks])

    # ---- blocks

    def draft(self, call: Call, block: int, sample: bool) -> tuple[Tensor, list[Tensor]]:
        """(B, k) tokens drawn from the drafting member, and the k distributions (B, V) that they were drawn from."""
        self._rows: list[Tensor] = []  # the drafting member's logits, one (B, V) per drafted position
        tokens, q = call.answer[:, :0], []
        for _ in range(block):
            logits = self.tracks[self.decoding.drafting].logits(torch.cat([call.answer, tokens], -1))[:, -1]
            self._rows.append(logits)
            q.append(_warped(call, tokens, logits.log_softmax(-1), sample))
            tokens = torch.cat([tokens, _pick(q[-1], sample)[:, None]], -1)
        return tokens, q

    def check(self, answer: Tensor, block: int) -> Tensor:
        """(B, k, V) log-probabilities of the combination at the drafted positions: one call of each other member."""
        drafting = self.decoding.drafting
        self._block = {i: t.logits(answer, block + 1) for i, t in enumerate(self.tracks) if i != drafting}
        if not block:
            return answer.new_zeros(len(answer), 0, self.decoding.vocabulary, dtype=torch.float32)
        own = torch.stack(self._rows, 1)
        return self.decoding.combined(
            [own if i == drafting else self._block[i][:, :block] for i in range(len(self.tracks))]
        )

    def last(self, answer: Tensor) -> Tensor:
        """(B, V) the combination after a whole accepted block; the drafting member takes one more step."""
        drafting = self.decoding.drafting
        used = {self.decoding.anchor, *(i for pair in self.decoding.pairs for i in pair)}
        own = self.tracks[drafting].logits(answer)[:, -1] if drafting in used else answer  # else it is not looked at
        return self.decoding.combined(
            [own if i == drafting else self._block[i][:, -1] for i in range(len(self.tracks))]
        )

    def take_back(self, length: int) -> None:
        """Every cache holds the prompt and `length` tokens of the answer, or fewer."""
        for track in self.tracks:
            track.keep(length)


def _warped(call: Call, drafted: Tensor, scores: Tensor, sample: bool) -> Tensor:
    """(B, V) the distribution that a token is drawn from after the call's processors: one-hot where it is greedy."""
    processed = call.processors(torch.cat([call.ids, drafted], -1), scores)
    if sample:
        return processed.softmax(-1)
    return torch.nn.functional.one_hot(processed.argmax(-1), processed.shape[-1]).to(processed.dtype)


def _pick(distribution: Tensor, sample: bool) -> Tensor:
    """(B,) tokens drawn from (B, V) probabilities, or the most probable ones."""
    return torch.multinomial(distribution, 1).squeeze(-1) if sample else distribution.argmax(-1)


def _accepted(p: list[Tensor], q: list[Tensor], drafted: Tensor, sample: bool) -> Tensor:
    """(B,) how many drafted tokens each row accepts before its first rejection."""
    if not p:
        return drafted.new_zeros(len(drafted))
    shape, target = drafted.shape, torch.stack(p, 1)
    uniforms = (
        torch.rand(shape, device=drafted.device, dtype=target.dtype) if sample else torch.full_like(target[..., 0], 0.5)
    )
    return verify(target, torch.stack(q, 1), drafted, uniforms).long().cumprod(-1).sum(-1)
