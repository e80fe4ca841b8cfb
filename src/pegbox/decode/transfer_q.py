"""Value-guided decoding: each candidate token scored by the reward of what an aligned model would say after it.

    pi(z | s) = pi_ref(z | s) exp(Q(s, z) / alpha) over the k likeliest tokens;   Q from rollouts of a baseline model

"Transfer Q Star: Principled Decoding for LLM Alignment", arXiv:2405.20495. Beside direct and indirect transfer the
class holds what it is compared with, one option apart: `partial` (ARGS: the reward of the text so far and the
candidate), `rollout_ref` (Controlled Decoding by Monte Carlo: the reference's own rollouts), and any value function of
the user's (`custom`). The reference and the baseline are two models; naming one twice is what the official code does.

What this file does not do: train a value function, or draw whole answers and choose (`pegbox.decode.best_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pegbox.decode.base import DECODE, Call, DecodeContext, Decoder, Decoding, Session
from pegbox.decode.pairs import Cast, Track, check_tokenizers, shared_width
from pegbox.decode.rewards import Reward, finished, reward_of
from pegbox.decode.rollouts import Rollouts
from pegbox.decode.values import divergence, estimate, policy, standardised
from pegbox.errors import BadInput
from pegbox.parts.functions import function_at, is_function_path
from pegbox.parts.generation import Messages, stop_ids

__all__ = ["TransferQ", "TransferQDecoding", "TransferQSession"]

Values = Callable[[list[list[int]], list[list[int]], list[list[int]]], Any]  # prompts, prefixes, candidates -> B x k


@DECODE.register
class TransferQ(Decoder):
    """Steer a reference model towards a reward, token by token.

    Args:
        value: where Q comes from: "transfer" (rollouts of the baseline, aligned for this reward), "transfer_indirect"
            (aligned for another, weighted), "rollout_ref" (the reference's rollouts), "partial" (no rollout), "custom".
        alpha: KL weight: large keeps to the reference, small to the values (the official code's weight is 1 / alpha).
        k: candidates per token, the reference's likeliest; the policy is normalised over them.
        reward: a role (a sequence classifier with one output) or "file.py:function" of (prompts, completions).
        baseline: the role that rolls out. reference: the role that is steered; default: the run's own model.
        rollouts: n per candidate; default 1, and 4 for indirect transfer. horizon: H, tokens per rollout.
        rollout_temperature: 0 is greedy; default greedy for one rollout, 1 for several.
        beta, baseline_reward, estimator: of indirect transfer: the KL weight and the reward that the baseline was
            aligned with, and "self" (consistent, default) or "none" (unnormalised).
        standardise: values to mean 0, deviation 1 over each prompt's candidates.
        token_budget: cached positions that rollouts may take at once.
        source: "file.py:function" of (prompt ids, answer ids, candidate ids) giving B x k values, for value: custom.
    """

    kind: Literal["transfer_q"] = "transfer_q"
    value: Literal["transfer", "transfer_indirect", "rollout_ref", "partial", "custom"] = "transfer"
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    k: Annotated[int, Field(ge=1)] = 10
    reward: str = "reward"
    baseline: str = "baseline"
    reference: str | None = None
    rollouts: Annotated[int, Field(ge=1)] | None = None
    horizon: Annotated[int, Field(ge=0)] = 20
    rollout_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    baseline_reward: str | None = None
    estimator: Literal["self", "none"] | None = None
    standardise: bool = False
    token_budget: Annotated[int, Field(ge=1)] = 65_536
    source: str | None = None

    scores: ClassVar[bool] = False
    reproduces: ClassVar[str] = "arXiv:2405.20495, algorithm 1"

    @model_validator(mode="after")
    def _whole(self) -> TransferQ:
        indirect = self.value == "transfer_indirect"
        if indirect and (self.beta is None or self.baseline_reward is None):
            missing = "beta" if self.beta is None else "baseline_reward"
            raise BadInput(f"Indirect transfer needs decode.{missing}: what the baseline was aligned with.")
        if indirect and self.samples == 1 and self.estimator != "none":
            raise BadInput(
                "With one rollout the self-normalised weight cancels, and indirect transfer becomes direct. Give "
                "decode.rollouts >= 2, or decode.estimator: none."
            )
        for name in ("beta", "baseline_reward", "estimator"):
            if not indirect and getattr(self, name) is not None:
                raise BadInput(f"decode.{name} belongs to value: transfer_indirect; leave it out of '{self.value}'.")
        if (self.value == "custom") != (self.source is not None):
            raise BadInput("decode.source (file.py:function) and value: custom go together; give both, or neither.")
        if self.samples > 1 and self.rollout_temperature == 0:
            raise BadInput(f"{self.samples} greedy rollouts are {self.samples} times the same; raise the temperature.")
        return self

    @property
    def samples(self) -> int:
        """n, rollouts per candidate."""
        return self.rollouts or (4 if self.value == "transfer_indirect" else 1)

    @property
    def rolls(self) -> bool:
        """Whether a model is asked what would follow."""
        return self.value not in ("partial", "custom") and self.horizon > 0

    def roles(self) -> tuple[str, ...]:
        named = [self.reference]
        if self.value in ("transfer", "transfer_indirect"):
            named.append(self.baseline)
        if self.value != "custom":
            named += [r for r in (self.reward, self.baseline_reward) if r is not None and not is_function_path(r)]
        return tuple(dict.fromkeys(r for r in named if r is not None))

    def bind(self, ctx: DecodeContext) -> TransferQDecoding:
        """`ctx.options` may hold "reward", "baseline_reward" (a `Reward`, a callable, a classifier) and "source"."""
        return TransferQDecoding(self, ctx)


class TransferQDecoding(Decoding):
    """`TransferQ` on live models."""

    decoder: TransferQ

    def __init__(self, decoder: TransferQ, ctx: DecodeContext):
        cast = Cast()
        own = ctx.role(decoder.reference) if decoder.reference is not None else ctx.model
        self._reference = cast.add(own, "reference")
        self._rolling = self._reference
        if decoder.value in ("transfer", "transfer_indirect"):
            baseline = ctx.role(decoder.baseline)
            names = ("reference", decoder.baseline)
            check_tokenizers(ctx.tokenizer, getattr(baseline, "tokenizer", None), names)
            self._rolling = cast.add(baseline, decoder.baseline)
        self.members = cast.members
        self.source: Values | None = ctx.options.get("source")
        if decoder.source is not None and self.source is None:
            self.source = function_at(decoder.source)
        self.rewards: list[Reward] = []
        for name in ("reward", "baseline_reward") if decoder.value != "custom" else ():
            text = getattr(decoder, name)
            if text is not None:
                self.rewards.append(reward_of(text, ctx.options.get(name), ctx.role, ctx.tokenizer))
        self.totals = {"tokens": 0, "divergence": 0.0}
        host = self.members[self._reference].module
        super().__init__(decoder, host, ctx.tokenizer, [m.module for m in self.members])
        self.vocabulary = shared_width(self.members, ctx.tokenizer)
        if decoder.k > self.vocabulary:
            raise BadInput(f"decode.k is {decoder.k}, and the vocabulary has {self.vocabulary} tokens.")
        self.ends = frozenset(stop_ids(ctx.tokenizer, self.host)) if ctx.tokenizer is not None else frozenset()
        heat = decoder.rollout_temperature
        self.rollouts = Rollouts(
            horizon=decoder.horizon if decoder.rolls else 0,
            samples=decoder.samples,
            temperature=heat if heat is not None else float(decoder.samples > 1),
            budget=decoder.token_budget,
        )

    @property
    def context_length(self) -> int | None:
        known = [m.context for m in self.members if m.context is not None]
        return min(known) - self.rollouts.horizon if known else None

    def begin(
        self,
        prompt: Tensor,
        mask: Tensor,
        *,
        repeats: int = 1,
        cached: bool = True,
        sides: Sequence[dict[str, list[int]]] | None = None,
    ) -> TransferQSession:
        tracks = [m.begin(prompt, mask, repeats=repeats, cached=cached) for m in self.members]
        own = [row[keep.bool()].tolist() for row, keep in zip(prompt, mask)]
        asked = [own for _ in self.rewards]
        for i in range(len(self.rewards)):
            if sides and f"reward {i}" in sides[0]:
                each = len(prompt) // len(sides)
                asked[i] = [side[f"reward {i}"] for side in sides for _ in range(each)]
        return TransferQSession(self, tracks, own, asked)

    def answer(self, call: Call, mask: Tensor, **options: Any) -> Any:
        ends = call.config._eos_token_tensor
        self.ends = frozenset(ends.reshape(-1).tolist()) if ends is not None else frozenset()
        longest = int(mask.sum(-1).max()) + call.room
        for i, member in enumerate(self.members):
            whole = longest + (self.rollouts.horizon if i == self._rolling else 0)
            if member.context is not None and whole > member.context:
                raise BadInput(
                    f"Prompt, max_new_tokens and rollout take {whole} tokens, and the context of '{member.name}' is "
                    f"{member.context}. Shorten the prompt, max_new_tokens or decode.horizon."
                )
        return super().answer(call, mask, **options)

    def member_prompts(self, messages: Messages) -> dict[str, list[int]]:
        made = {f"reward {i}": reward.prompt_ids(messages) for i, reward in enumerate(self.rewards)}
        return {name: ids for name, ids in made.items() if ids is not None}

    def summary(self) -> dict[str, Any]:
        """Forwards and tokens by member, rewards scored, and the mean KL to the reference per drawn token (nats)."""
        found: dict[str, Any] = {"calls": {m.name: m.calls for m in self.members}}
        found["tokens"] = {m.name: m.tokens for m in self.members}
        found["rewards"] = sum(reward.rows for reward in self.rewards)
        drawn = int(self.totals["tokens"])
        return found | {"drawn": drawn, "divergence": self.totals["divergence"] / max(drawn, 1)}


@dataclass
class TransferQSession(Session):
    """One batch: the members' tracks, the prompts' ids, and the prompts as each reward reads them."""

    decoding: TransferQDecoding
    tracks: list[Track]
    prompts: list[list[int]]
    asked: list[list[list[int]]]

    def scores(self, answer: Tensor) -> Tensor:
        """(B, V): log pi_ref + Q / alpha on the candidates, -inf elsewhere."""
        decoding, decoder = self.decoding, self.decoding.decoder
        logits = self.tracks[decoding._reference].logits(answer)[:, -1]
        chosen, candidates = logits.topk(decoder.k, -1)
        log_probs = chosen - logits.logsumexp(-1, keepdim=True)
        live = [not over for over in finished(answer.tolist(), decoding.ends)]
        guided = log_probs
        if decoder.k > 1 and any(live):
            values = self.values(answer, candidates, live).to(log_probs)
            guided = policy(log_probs, standardised(values) if decoder.standardise else values, decoder.alpha)
        kept = torch.tensor(live, device=answer.device)
        decoding.totals["tokens"] += int(kept.sum())
        decoding.totals["divergence"] += float(divergence(guided, log_probs)[kept].sum())
        return torch.full_like(logits, -torch.inf).scatter(-1, candidates, guided)

    def values(self, answer: Tensor, candidates: Tensor, live: list[bool]) -> Tensor:
        """(B, k) values of the candidates; 0 in rows that have ended."""
        decoding, said = self.decoding, answer.tolist()
        if decoding.source is not None:
            found = torch.as_tensor(decoding.source(self.prompts, said, candidates.tolist()))
            if found.shape != candidates.shape or not torch.isfinite(found).all():
                raise BadInput(
                    f"decode.source must give finite values of shape {tuple(candidates.shape)}, got "
                    f"{tuple(found.shape)}."
                )
            return found.to(answer.device)
        track = self.tracks[decoding._rolling]
        tails = decoding.rollouts.roll(track, answer, candidates, live, decoding.ends)
        rewards = [self._scored(i, said, tails, live) for i in range(len(decoding.rewards))]
        if len(rewards) == 1:
            return estimate(rewards[0]).to(answer.device)
        how = decoding.decoder.estimator or "self"
        return estimate(rewards[0], rewards[1], decoding.decoder.beta, how).to(answer.device)

    def _scored(self, which: int, said: list[list[int]], tails: list[Any], live: list[bool]) -> Tensor:
        """(B, k, n) rewards of the rollouts by one reward; equal texts are scored once."""
        reward, asked = self.decoding.rewards[which], self.asked[which]
        texts = [(b, tuple(tail)) for b, row in enumerate(tails) if live[b] for each in row for tail in each]
        unique = list(dict.fromkeys(texts))
        values = reward([asked[b] for b, _ in unique], [said[b] + list(tail) for b, tail in unique])
        known = dict(zip(unique, values.tolist()))
        flat = [[[known.get((b, tuple(tail)), 0.0) for tail in each] for each in row] for b, row in enumerate(tails)]
        return torch.tensor(flat, dtype=torch.float64)
