"""The fine-tuning component turned up or down while the model runs (TuCo's FTC scaling).

    x_{l+1} = x_l + PTC_l + alpha FTC_l = (1 - alpha) block_base(x_l) + alpha block_tuned(x_l)

alpha 1 is the tuned model, 0 its shell (embedding, final norm, head) around the base's blocks, above 1 exaggerates what
was learnt. Nuti et al., arXiv:2506.23423, section 5. Needs a tuned model and its base (an adapter is both); costs two
passes a block. The choice of alpha is `pegbox.analyze.tuning_scale`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pegbox.decode.base import DECODE, DecodeContext, Decoder, Decoding, module_of
from pegbox.errors import BadInput
from pegbox.parts.mixing import mixed, shares_of
from pegbox.parts.pairs import ModelPair

__all__ = ["Scaled", "ScaledDecoding"]

Number = Annotated[float, Field(allow_inf_nan=False)]


@DECODE.register
class Scaled(Decoder):
    """Answers of a tuned model with its tuning scaled.

    Args:
        alpha: the scale in every block, or a list of one per block.
        allow_negative: let alpha be below 0.
    """

    kind: Literal["scaled"] = "scaled"
    alpha: Number | list[Number] = 1.0
    allow_negative: bool = False

    scores: ClassVar[bool] = True
    needs_tuned: ClassVar[bool] = True
    reproduces: ClassVar[str] = "arXiv:2506.23423, section 5"

    def bind(self, ctx: DecodeContext) -> Decoding:
        if ctx.base is None:
            raise BadInput("decode 'scaled' scales what tuning added, and this model is the base itself. Give a run.")
        base = module_of(ctx.base)
        pair = ModelPair(ctx.model, None if base is ctx.model else base)
        shares_of(self.alpha, len(pair), allow_negative=self.allow_negative)
        return ScaledDecoding(self, pair, ctx.tokenizer)


class ScaledDecoding(Decoding):
    """The tuned model, whose own `generate` and `forward` run scaled."""

    decoder: Scaled

    def __init__(self, decoder: Scaled, pair: ModelPair, tokenizer: Any = None):
        super().__init__(decoder, pair.tuned, tokenizer, [] if pair.base is None else [pair.base])
        self.__dict__["pair"] = pair

    def plain(self) -> bool:
        return True

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """In evaluation mode, with every block scaled."""
        with (
            super().as_evaluated(),
            mixed(self.__dict__["pair"], self.decoder.alpha, allow_negative=self.decoder.allow_negative),
        ):
            yield

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, V) log-probabilities of the scaled model."""
        logits = self.host(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits.log_softmax(-1)
