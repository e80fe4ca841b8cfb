"""The best of n sampled answers by a reward: the sequence-level yardstick of value-guided decoding.

    y* = argmax_i r(x, y_i),   y_1, ..., y_n ~ pi(. | x)

Each prompt is read once and its cache copied. Its KL to the model sampled from is at most log n - (n - 1) / n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pegbox.decode.base import DECODE, Call, DecodeContext, Decoder, Decoding, Session, draw
from pegbox.decode.pairs import Member, check_tokenizers, shared_width
from pegbox.decode.rewards import finished, reward_of
from pegbox.errors import BadInput
from pegbox.parts.functions import is_function_path
from pegbox.parts.generation import Messages

__all__ = ["BestOf", "BestOfDecoding"]


@DECODE.register
class BestOf(Decoder):
    """Sample n answers and keep the one with the highest reward.

    Args:
        n: answers per prompt. of: the role that is sampled; default: the run's own model.
        reward: a role (a sequence classifier with one output) or "file.py:function" of (prompts, completions).
        temperature: of the samples; other processors of the call act too.
    """

    kind: Literal["best_of"] = "best_of"
    n: Annotated[int, Field(ge=1)] = 16
    of: str | None = None
    reward: str = "reward"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    scores: ClassVar[bool] = False

    def roles(self) -> tuple[str, ...]:
        named = [self.of, None if is_function_path(self.reward) else self.reward]
        return tuple(dict.fromkeys(r for r in named if r is not None))

    def bind(self, ctx: DecodeContext) -> BestOfDecoding:
        """`ctx.options` may hold "reward"."""
        return BestOfDecoding(self, ctx)


class BestOfDecoding(Decoding):
    """`BestOf` on a live model."""

    decoder: BestOf

    def __init__(self, decoder: BestOf, ctx: DecodeContext):
        model = ctx.role(decoder.of) if decoder.of is not None else ctx.model
        self.member = Member(model, decoder.of or "model")
        check_tokenizers(ctx.tokenizer, getattr(model, "tokenizer", None), ("model", self.member.name))
        shared_width([self.member], ctx.tokenizer)
        self.reward = reward_of(decoder.reward, ctx.options.get("reward"), ctx.role, ctx.tokenizer)
        super().__init__(decoder, self.member.module, ctx.tokenizer)

    def begin(
        self,
        prompt: Tensor,
        mask: Tensor,
        *,
        repeats: int = 1,
        cached: bool = True,
        sides: Sequence[dict[str, list[int]]] | None = None,
    ) -> Session:
        raise BadInput("Best-of-n draws whole answers, so it has no scores of a next token; call generate.")

    def answer(self, call: Call, mask: Tensor, **options: Any) -> Any:
        n, rows = self.decoder.n, len(call.prompt)
        repeats, cached, sides = options.get("repeats", 1), options.get("cached", True), options.get("sides")
        prompt, mask = call.prompt.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        track = self.member.begin(prompt, mask, repeats=n * repeats, cached=cached)
        inner = Call(prompt, call.processors, call.criteria, call.config)
        while not inner.finished:
            scores = call.processors(inner.ids, track.logits(inner.answer)[:, -1]) / self.decoder.temperature
            inner.add(draw(scores, True))
        best = self._best(call, inner.answer, mask, sides)
        chosen = inner.answer[torch.arange(rows, device=best.device) * n + best]
        for column in chosen.T:
            call.add(column)
            if call.finished:
                break
        return call.result()

    def _best(self, call: Call, answers: Tensor, mask: Tensor, sides: Any) -> Tensor:
        """(B,) which of its n answers each row keeps."""
        ends = call.config._eos_token_tensor
        stops = frozenset(ends.reshape(-1).tolist()) if ends is not None else frozenset()
        own = [row[keep.bool()].tolist() for row, keep in zip(call.prompt, mask[:: self.decoder.n])]
        if sides:
            own = [side["reward"] for side in sides for _ in range(len(own) // len(sides))]
        said = [_cut(row, stops) for row in answers.tolist()]
        asked = [prompt for prompt in own for _ in range(self.decoder.n)]
        values = self.reward(asked, said).view(len(own), self.decoder.n)
        return values.argmax(-1).to(answers.device)

    def member_prompts(self, messages: Messages) -> dict[str, list[int]]:
        ids = self.reward.prompt_ids(messages)
        return {} if ids is None else {"reward": ids}

    def summary(self) -> dict[str, Any]:
        """Forwards, tokens, rewards scored, and the bound on the KL of best-of-n (nats per answer)."""
        n = self.decoder.n
        bound = math.log(n) - (n - 1) / n
        return {"calls": self.member.calls, "tokens": self.member.tokens, "rewards": self.reward.rows, "bound": bound}


def _cut(row: list[int], stops: frozenset[int]) -> list[int]:
    """Up to and with the first end token."""
    return row[: row.index(next(t for t in row if t in stops)) + 1] if finished([row], stops)[0] else row
