"""Decoding: how an answer is drawn, from one model or from several that step together. The axis, and the token loop.

A `Decoder` is the recipe's block. `bind` ties it to live models and gives a `Decoding`: a module with `generate` and,
where the decoder defines the probability of a whole text, `forward`. So everything that asks a model (evaluation,
`pegbox generate`, `pegbox chat`, transformers' own callers) asks a decoding in the same way.

    generate(...) -> host.generate(custom_generate=...) -> begin(prompt) -> Session -> scores(answer) -> token -> ...

transformers' `generate` does all the preparation (lengths, stop conditions, processors, expanding rows); the loop here
takes its place where tokens are drawn, so that temperature, top-k, top-p and penalties act on the decoder's own scores.

What this file does not know: any decoder, or how models keep their caches (`pegbox.decode.pairs` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported, did_you_mean
from pegbox.parts.component import Axis, Component
from pegbox.parts.generation import Messages, as_evaluated

__all__ = ["DECODE", "Call", "DecodeContext", "Decoder", "Decoding", "Session", "draw", "extended", "module_of"]


@dataclass
class DecodeContext:
    """What a decoder is bound to.

    Args:
        model: the run's own model, a transformers model or PEFT's wrapper of one; it hosts `generate`.
        tokenizer: its tokenizer.
        models: further models by role, loaded on first use: a module, or an object with `active()` (a context in which
            the role's view of a shared model holds) and `tokenizer`.
        base: the run's model as it was before tuning, in the same form, for decoders that `needs_tuned`; else None.
        options: Python objects that a configuration can't hold (a reward callable), by the field they stand for.
    """

    model: nn.Module
    tokenizer: Any = None
    models: Mapping[str, Any] = field(default_factory=dict)
    base: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def role(self, name: str) -> Any:
        """The model of a role. Raises `BadInput` where none has it."""
        try:
            return self.models[name]
        except KeyError:
            raise BadInput(
                f"No model has the role '{name}'.{did_you_mean(name, self.models)} "
                f"Name it in the recipe (models: {{{name}: runs/a}}) or with --role {name}=..."
            ) from None

    def before(self, name: str) -> Any:
        """A role's model as it was before tuning: the role "<name>.base", or its own with the adapter off."""
        from pegbox.decode.pairs import View
        from pegbox.parts.adapters import is_adapted

        try:
            return self.models[f"{name}.base"]
        except KeyError:
            module = module_of(self.role(name))
            if is_adapted(module):
                return View(module, adapter=False, tokenizer=getattr(self.role(name), "tokenizer", None))
        raise BadInput(
            f"What '{name}' was tuned from is not known, so its delta has no reference. Name a model of the same size "
            "as `reference`, or give a run, which knows its base."
        )


class Session:
    """One call of `generate`: the state behind the answers of one batch."""

    def scores(self, answer: Tensor) -> Tensor:
        """(B, V) scores of the next token, in float32 or finer, before any processor.

        Args:
            answer: (B, G) every token drawn so far, padding behind the end of a finished row. G grows by one each call.
        """
        raise NotImplementedError


class Decoding(nn.Module):
    """A decoder on live models. Holds its host as a submodule; the others are the roles', and are not its parameters.

    Args:
        host: the transformers model (or a role's) whose `generate` prepares. others: the models beside it, for their
            modes.
    """

    shares_prefix = False  # a prefix computed once by the host alone would be missing in the others' caches

    def __init__(self, decoder: Decoder, host: nn.Module, tokenizer: Any = None, others: Iterable[nn.Module] = ()):
        super().__init__()
        self.decoder, self.tokenizer = decoder, tokenizer
        self.host = module_of(host)
        beside = [module_of(m) for m in others]
        self.__dict__["others"] = [m for m in beside if m is not self.host]  # past nn.Module's registration, on purpose
        if getattr(self.config, "is_encoder_decoder", False):
            raise Unsupported(f"decode '{decoder.kind}' works on decoders; {type(host).__name__} has an encoder.")

    # ---- what a decoder fills in

    def begin(
        self,
        prompt: Tensor,
        mask: Tensor,
        *,
        repeats: int = 1,
        cached: bool = True,
        sides: Sequence[dict[str, list[int]]] | None = None,
    ) -> Session:
        """Start answering. `prompt`, `mask`: (B, P), left-padded.

        Args:
            repeats: every so many rows are copies of one prompt, side by side (several answers to each).
            cached: False: compute the whole sequence anew for each token (`use_cache=False`).
            sides: what `member_prompts` made of each prompt.
        """
        raise NotImplementedError

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, V) normalised log-probabilities of a whole text under this decoder, where its class `scores`."""
        raise NotImplementedError

    def member_prompts(self, messages: Messages) -> dict[str, list[int]]:
        """Prompt ids of members that want another form than the host's, by role; {} where all share it."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What it counted since it was bound: calls, tokens, acceptance, divergence."""
        return {}

    # ---- what callers use

    @property
    def config(self) -> Any:
        return self.host.config

    @property
    def generation_config(self) -> Any:
        return getattr(self.host, "generation_config", None)

    @property
    def context_length(self) -> int | None:
        """Tokens that every model can read, prompt and answer together; None: the host's own."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.host.parameters()).device

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *, streamer: Any = None, **arguments: Any) -> Any:
        """As transformers' `generate`. `sides`: prompts of members by role, one dict per row (`member_prompts`)."""
        sides = arguments.pop("sides", None)
        with self.as_evaluated():
            if self.plain():
                with self.host_view():
                    return _inner(self.host).generate(inputs, streamer=streamer, **arguments)

            def loop(
                model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
                **rest: Any,
            ) -> Any:  # fmt: skip
                _check_call(self.decoder.kind, generation_config, rest, input_ids)
                call = Call(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
                mask = rest.get("attention_mask")
                mask = torch.ones_like(input_ids) if mask is None else mask
                if bool((mask[:, -1] == 0).any()):
                    raise BadInput("Prompts must be padded on the left; the last position of a row is padding.")
                repeats = max(int(generation_config.num_return_sequences or 1), 1)
                cached = bool(rest.get("use_cache", True))
                return self.answer(call, mask, repeats=repeats, cached=cached, **({"sides": sides} if sides else {}))

            return _inner(self.host).generate(inputs, streamer=streamer, custom_generate=loop, **arguments)

    def plain(self) -> bool:
        """Whether the host alone gives the answer, so that its own `generate` is used."""
        return False

    def host_view(self) -> AbstractContextManager[Any]:
        """The context in which the host answers alone."""
        return nullcontext()

    def log_likelihood(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """(B,) sums over each answer's tokens of their log-probability under this decoder, given its prompt."""
        if not all(prompts) or not all(answers):
            raise BadInput("Each prompt and each answer needs at least one token.")
        whole = [p + a for p, a in zip(prompts, answers, strict=True)]
        width = max(map(len, whole))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in whole], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=self.device)
        with torch.no_grad():
            logits = self(input_ids=ids, attention_mask=mask).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        places = torch.arange(1, width, device=self.device)
        begin = torch.tensor([len(p) for p in prompts], device=self.device)[:, None]
        return (found * ((places >= begin) & (mask[:, 1:] == 1))).sum(-1)

    def answer(self, call: Call, mask: Tensor, **options: Any) -> Any:
        """The loop: one token at a time. Override for methods that draw several at once."""
        session = self.begin(call.prompt, mask, **options)
        while not call.finished:
            raw = session.scores(call.answer)
            call.add(*call.choose(raw), raw)
        return call.result()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """A causal model's output, whose logits are this decoder's log-probabilities."""
        from transformers.modeling_outputs import CausalLMOutput

        if not type(self.decoder).scores:
            raise Unsupported(
                f"decode '{self.decoder.kind}' draws answers but gives no probability of a whole text; "
                "measure it on generated answers."
            )
        with self.as_evaluated():
            return CausalLMOutput(logits=self.logits(input_ids, attention_mask))

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Every model in evaluation mode for a while; afterwards each module in the mode it was in."""
        with ExitStack() as stack:
            for model in [self.host, *self.__dict__["others"]]:
                stack.enter_context(as_evaluated(model))
            yield


class Decoder(Component):
    """How an answer is drawn. Options are its fields; it holds no model."""

    scores: ClassVar[bool] = False  # whether `Decoding.logits` exists, so that likelihoods can be measured under it
    needs_tuned: ClassVar[bool] = False  # works on a tuned model and its base; on the first role where none is made

    def roles(self) -> tuple[str, ...]:
        """The roles it needs in the recipe's `models:`."""
        return ()

    def bind(self, ctx: DecodeContext) -> Decoding:
        """The decoder on live models. Raises `BadInput` where they don't fit each other."""
        raise NotImplementedError


DECODE: Axis[Decoder] = Axis("decode", Decoder, "pegbox.decode")


# ---- one call of generate -------------------------------------------------------------------------------------------


class Call:
    """What `generate` prepared, and what has been drawn so far: (B, P) prompt, (B, G) answer."""

    def __init__(self, prompt: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any = None):
        self.prompt, self.processors, self.criteria, self.config = prompt, processors, criteria, config
        self.streamer = streamer
        self.ids = prompt
        self.live = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
        self.finished = prompt.shape[1] >= config.max_length
        pad = config._pad_token_tensor
        self.pad = int(pad) if pad is not None else 0
        self.kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}

    @property
    def answer(self) -> Tensor:
        """(B, G) the tokens drawn so far."""
        return self.ids[:, self.prompt.shape[1] :]

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return int(self.config.max_length) - self.ids.shape[1]

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) tokens by the call's processors and its mode, and the (B, V) processed scores."""
        processed = self.processors(self.ids, scores)
        return draw(processed, bool(self.config.do_sample)), processed

    def add(self, tokens: Tensor, processed: Tensor | None = None, raw: Tensor | None = None) -> None:
        """Append one token per row; finished rows get padding."""
        tokens = torch.where(self.live, tokens, torch.full_like(tokens, self.pad))
        self.ids = torch.cat([self.ids, tokens[:, None]], -1)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        if self.config.return_dict_in_generate:
            for name, value in (("scores", processed), ("logits", raw)):
                if getattr(self.config, f"output_{name}") and value is not None:
                    self.kept[name].append(value)
        self.live = self.live & ~self.criteria(self.ids, processed)
        self.finished = not bool(self.live.any())

    def result(self) -> Any:
        """(B, P + G) ids, or transformers' output object where one was asked for."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        kept: dict[str, Any] = {name: tuple(values) or None for name, values in self.kept.items()}
        made: Any = self.ids
        return GenerateDecoderOnlyOutput(sequences=made, **kept)


def draw(scores: Tensor, sample: bool, generator: torch.Generator | None = None) -> Tensor:
    """(B,) token ids from (B, V) scores: the largest, or one drawn by their softmax."""
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)


def extended(mask: Tensor, more: int) -> Tensor:
    """(B, P) mask with `more` ones behind it."""
    return torch.cat([mask, mask.new_ones(len(mask), more)], -1)


def module_of(model: Any) -> nn.Module:
    """The live module behind a role, or the module itself."""
    return model.model if hasattr(model, "active") else model


def _inner(model: Any) -> Any:
    """The transformers model below PEFT's wrapper: its `generate` only prepares here, no forward is run by it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_call(kind: str, config: Any, rest: Mapping[str, Any], prompt: Tensor) -> None:
    if (config.num_beams or 1) > 1:
        raise Unsupported(
            f"decode '{kind}' draws one token after another; num_beams must be 1, got {config.num_beams}."
        )
    cache = rest.get("cache", rest.get("past_key_values"))
    if cache is not None and cache.get_seq_length():
        raise BadInput(f"decode '{kind}' fills its models' caches itself; call generate without a cache.")
    if prompt.shape[1] == 0:
        raise BadInput("An empty prompt can't be answered. Give at least one token (a begin token will do).")
