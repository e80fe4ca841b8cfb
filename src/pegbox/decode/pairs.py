"""Models that step together: each member with its own prompt, mask and KV cache, or one model seen in two ways.

A `Member` is a causal model in one role (a model of its own, or one PEFT model with an adapter on or off). `begin`
gives a `Track`: its state over one batch of prompts. A track is asked for next-token logits after the answer so far and
feeds its model only what the cache does not hold yet, so members may lag behind each other, be fed blocks, and be taken
back.

    track.logits(answer, keep=1)    (B, keep, V): after answer[:, :G-keep+1], ..., answer[:, :G]
    track.keep(length)              the cache holds the prompt and `length` tokens of the answer
    track.fork(rows)                another track over copies of some rows, for rollouts

What this file does not do: combine logits, or draw tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.decode.base import extended, module_of
from pegbox.errors import BadInput, Unsupported
from pegbox.parts.adapters import adapter_off, adapter_on, is_adapted

__all__ = ["Cast", "Member", "Track", "View", "check_tokenizers", "shared_width"]


class View:
    """One PEFT model seen in one way: its adapter off (`adapter=False`), or the named one on.

    What the pool gives for a role, for those who hold the model themselves.
    """

    def __init__(self, model: nn.Module, adapter: str | bool = True, tokenizer: Any = None):
        if adapter is not True and not is_adapted(model):
            raise BadInput(f"{type(model).__name__} carries no adapter to be switched; wrap it with peft first.")
        self.model, self.adapter, self.tokenizer = model, adapter, tokenizer

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The view holds inside; exactly undone on leaving."""
        with self._scope():
            yield self.model

    def _scope(self) -> AbstractContextManager[None]:
        if self.adapter is False:
            return adapter_off(self.model)
        return adapter_on(self.model, self.adapter) if isinstance(self.adapter, str) else nullcontext()


class Member:
    """A causal model in one role.

    Args:
        model: a module, a `View`, or a role of the pool. name: the role, for messages.

    `calls` and `tokens` count forwards and the positions fed (rows times columns) since it was made.
    """

    def __init__(self, model: Any, name: str):
        self.source, self.name, self.module = model, name, module_of(model)
        self.calls = self.tokens = 0
        self.width: int | None = None  # logits beyond the shared vocabulary are cut
        config: Any = self.module.config
        if getattr(config, "is_encoder_decoder", False):
            raise Unsupported(
                f"The model '{name}' has an encoder; members of a decoder must be causal language models."
            )
        if any(c.is_prompt_learning for c in getattr(self.module, "peft_config", {}).values()):
            raise Unsupported(f"The model '{name}' has a prompt adapter, whose virtual tokens can't step with others.")
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        accepted = set(inspect.signature(_base_of(self.module).forward).parameters)
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self._accepted = accepted

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def vocabulary(self) -> int:
        """How many logits it gives."""
        head: Any = _base_of(self.module)
        head = head.get_output_embeddings()
        return int(getattr(head, "out_features", 0) or head.weight.shape[0])

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The role's view of the model."""
        if hasattr(self.source, "active"):
            with self.source.active() as model:
                yield model
        else:
            yield self.module

    def same_as(self, other: Member) -> bool:
        """Whether both answer alike: the same module in the same view."""
        if self.module is not other.module:
            return False
        ours, theirs = (_view_of(m.source) for m in (self, other))
        return ours == theirs

    def forward(self, ids: Tensor, mask: Tensor | None, *, keep: int = 0, cache: Any = None, grow: bool = False) -> Any:
        """One forward: ((B, keep or T, V) logits in float32 or finer on `ids`' device, cache)."""
        self.calls, self.tokens = self.calls + 1, self.tokens + ids.numel()
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if mask is not None:
            inputs["attention_mask"] = mask.to(self.device)
            if "position_ids" in self._accepted:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                inputs["position_ids"] = positions[:, -ids.shape[1] :].to(self.device)
        if keep and "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = keep
        if cache is not None:
            inputs[self._cache_name] = cache
        with self.active() as model:
            out = model(**inputs, use_cache=grow or cache is not None)
        logits = out.logits[:, -keep:, : self.width]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.to(ids.device), getattr(out, self._cache_name, None)

    def begin(self, prompt: Tensor, mask: Tensor, *, repeats: int = 1, cached: bool = True) -> Track:
        """Its state over (B, P) left-padded prompts. Raises `BadInput` where a prompt leaves its context no room."""
        longest = int(mask.sum(-1).max())
        if self.context is not None and longest >= self.context:
            raise BadInput(
                f"A prompt of {longest} tokens leaves the model '{self.name}' no room: its context is {self.context}. "
                "Shorten the prompt."
            )
        return Track(self, prompt, mask, repeats=repeats, cached=cached)


class Track:
    """A member's state over one batch. See the file's header."""

    def __init__(self, member: Member, prompt: Tensor, mask: Tensor, *, repeats: int = 1, cached: bool = True):
        self.member, self.prompt, self.mask = member, prompt, mask
        self.padded = bool((mask == 0).any())
        self.cached, self.cache, self.length = cached, None, 0  # length: positions in the cache
        if repeats > 1 and cached and prompt.shape[1] > 1:
            self._fill(prompt[::repeats, :-1], mask[::repeats, :-1])
            rows = torch.arange(len(prompt) // repeats, device=prompt.device).repeat_interleave(repeats)
            self.cache = _picked(self.cache, rows)

    @property
    def answered(self) -> int:
        """How many tokens of the answer the cache holds."""
        return max(self.length - self.prompt.shape[1], 0)

    def logits(self, answer: Tensor, keep: int = 1) -> Tensor:
        """(B, keep, V) logits after the prompt and answer[:, :G-keep+1], ..., answer[:, :G]; answer (B, G)."""
        fed = torch.cat([self.prompt, answer], -1)[:, self.length :]
        if fed.shape[1] < keep:
            raise ValueError(
                f"{keep} rows of logits need {keep} new tokens, and {fed.shape[1]} are new; take back first"
            )
        mask = extended(self.mask, answer.shape[1]) if self.padded else None
        if not self.cached:
            return self.member.forward(fed, mask, keep=keep)[0]
        logits, self.cache = self.member.forward(fed, mask, keep=keep, cache=self.cache, grow=True)
        self.length += fed.shape[1]
        return logits

    def keep(self, length: int) -> None:
        """Take the cache back to the prompt and `length` tokens of the answer; nothing where it holds no more."""
        gone = self.length - self.prompt.shape[1] - length
        if gone <= 0 or self.cache is None:
            return
        if not all(getattr(layer, "is_croppable", True) for layer in self.cache.layers) or _slides(self.cache):
            raise Unsupported(
                f"The cache of '{self.member.name}' (sliding windows or recurrent states) can't be taken back; decode "
                "without blocks (block_size 0)."
            )
        self.cache.crop(-gone)
        self.length -= gone

    def fork(self, rows: Tensor) -> Track:
        """A track over copies of `rows` (N,), which may repeat; what it does leaves this one untouched."""
        other = copy.copy(self)
        other.prompt, other.mask = self.prompt[rows], self.mask[rows]
        other.cache = None if self.cache is None else _picked(self.cache, rows)
        return other

    def _fill(self, ids: Tensor, mask: Tensor) -> None:
        given = mask if self.padded else None
        _, self.cache = self.member.forward(ids, given, keep=1, cache=self.cache, grow=True)
        self.length = ids.shape[1]


class Cast:
    """The members of a decoder, each once: one model in one view with one form of prompt is one member."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.forms: list[str | None] = []  # how a member's prompt looks; None: the host's

    def add(self, model: Any, name: str, form: str | None = None) -> int:
        """The position of the member, new or known."""
        member = Member(model, name)
        for i, (other, known) in enumerate(zip(self.members, self.forms)):
            if member.same_as(other) and form == known:
                return i
        self.members.append(member)
        self.forms.append(form)
        return len(self.members) - 1


def _picked(cache: Any, rows: Tensor) -> Any:
    """A copy of a cache that holds `rows` of it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
        fresh: Any = copy.copy(cache)
        layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
        fresh.layers = layers
        for layer in layers:
            if layer.keys is not None:
                layer.keys, layer.values = (t.index_select(0, rows.to(t.device)) for t in (layer.keys, layer.values))
        return fresh
    fresh = copy.deepcopy(cache)
    fresh.batch_select_indices(rows)
    return fresh


def _slides(cache: Any) -> bool:
    return any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _view_of(source: Any) -> Any:
    """What tells two views of one module apart; a module by itself is its own view."""
    if isinstance(source, View):
        return source.adapter
    scope = getattr(source, "_scope", None)
    return True if scope is None or scope is nullcontext else scope


# ---- do they speak the same language? -------------------------------------------------------------------------------


def check_tokenizers(first: Any, other: Any, names: tuple[str, str]) -> None:
    """Raise `BadInput` with the first token that is another id to one of them; unknown tokenizers are not compared."""
    if first is None or other is None or first is other:
        return
    ours, theirs = first.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    token = min(
        (t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t)), key=lambda t: (_rank(ours, theirs, t), t)
    )
    raise BadInput(
        f"'{names[0]}' and '{names[1]}' have different tokenizers: {token!r} is {ours.get(token)} to the first and "
        f"{theirs.get(token)} to the second. Models that step together must share one tokenizer."
    )


def _rank(ours: dict[str, int], theirs: dict[str, int], token: str) -> int:
    return min(v for v in (ours.get(token), theirs.get(token)) if v is not None)


def shared_width(members: Sequence[Member], tokenizer: Any = None) -> int:
    """The shared vocabulary: the fewest logits of any member; what is cut must lie behind all the tokenizer's ids."""
    narrow = min(members, key=lambda m: m.vocabulary)
    width = narrow.vocabulary
    used = max(tokenizer.get_vocab().values()) + 1 if tokenizer is not None else None
    if used is not None and used > width:
        raise BadInput(
            f"The model '{narrow.name}' gives {width} logits, and the tokenizer uses {used} ids: its vocabulary is "
            "smaller than what the others speak."
        )
    if used is None and any(m.vocabulary != width for m in members):
        sizes = ", ".join(f"{m.name} {m.vocabulary}" for m in members)
        raise BadInput(f"The models' vocabularies differ ({sizes}), and no tokenizer says which ids are in use.")
    for member in members:
        member.width = width
    return width
