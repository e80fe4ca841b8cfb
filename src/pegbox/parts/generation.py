"""Answers from a model: local and batched, streamed for chat, from an OpenAI-compatible endpoint, or from a script.

All of them are `Responder`s: called with message lists and a token limit, they return one answer per list, in order.
A list holds chat messages for the tokenizer's template; or one message of role "raw", whose text goes to the model as
it is (completion rows, base models).

Local generation left-pads, sorts by length, computes what all prompts begin with once, keeps a KV cache, and stops at
every token that ends a turn. It works under PEFT and inside training: modes are put back module by module, and no
global random state moves. The decoding loop itself is transformers' `generate`.
"""

from __future__ import annotations

import copy
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, RunFailed
from pegbox.parts.context import seed_of

__all__ = [
    "GREEDY",
    "Endpoint",
    "LocalModel",
    "Messages",
    "Responder",
    "Sampling",
    "Scripted",
    "as_evaluated",
    "encode_prompt",
    "generate",
    "stop_ids",
    "stream",
]

Messages = list[dict[str, Any]]


class Responder(Protocol):
    """Anything that answers message lists."""

    def __call__(self, messages: Sequence[Messages], max_new_tokens: int = 128, /) -> list[str]: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy. `top_k` 0 and `top_p` 1 leave all tokens in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
        ):
            if not ok:
                raise BadInput(f"Sampling: {name} must be {allowed}, got {getattr(self, name)}.")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `generate`. Each is given, so that no default of a checkpoint's own gets in."""
        common: dict[str, Any] = {"repetition_penalty": self.repetition_penalty, "num_beams": 1}
        if self.temperature == 0:
            return {**common, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **common,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


GREEDY = Sampling()


# --- prompts and stops ----------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any, messages: Messages, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Token ids of a message list up to where the answer begins. Raises `BadInput` without a template."""
    if not messages:
        raise BadInput("An empty message list can't be answered. Give at least one message.")
    if len(messages) == 1 and messages[0].get("role") == "raw":
        return list(tokenizer(messages[0]["content"])["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(
            "The tokenizer has no chat template. Give one (--template FILE), or prompt with one message of role 'raw'."
        )
    text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_ids(tokenizer: Any, model: nn.Module | None = None) -> list[int]:
    """All tokens that end an answer: the tokenizer's eos, the generation config's, and the template's end of turn."""
    found: set[int] = set()
    config = getattr(model, "generation_config", None)
    for ids in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or [])
    end = _end_of_turn(tokenizer)
    return sorted(found | ({end} if end is not None else set()))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the template puts right behind an assistant's content, if it does."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "Zq7"
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # a template that wants other roles or fields: the other stops remain
        return None
    behind = text.rpartition(mark)[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    return ids[0] if ids and ids[0] in set(tokenizer.all_special_ids) | set(_added_ids(tokenizer)) else None


def _added_ids(tokenizer: Any) -> list[int]:
    return [i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special]


# --- a local model --------------------------------------------------------------------------------------------------


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def generate(
    model: nn.Module,
    tokenizer: Any,
    messages: Sequence[Messages],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] | None = None,
    max_prompt: int | None = None,
    tools: Sequence[list[dict[str, Any]] | None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One answer per message list, in order, without special tokens.

    Args:
        batch_size: prompts at a time; similar lengths go together.
        stop: ids that end an answer; default `stop_ids(tokenizer, model)`.
        max_prompt: longer prompts lose their beginning; default: what the model's context leaves.
        tools: tool schemas per list, for the template.
        on_batch: called with (answers done, answers in all) after each batch.

    Sampling is seeded and leaves torch's global random state as it was.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise BadInput(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}.")
    inner = _unwrapped(model)
    limit = _prompt_limit(inner, max_new_tokens) if max_prompt is None else max_prompt
    given = tools if tools is not None else [None] * len(messages)
    prompts = [encode_prompt(tokenizer, m, t)[-limit:] for m, t in zip(messages, given, strict=True)]
    sides = [_sides(inner, m, limit) for m in messages]
    ends = list(stop) if stop is not None else stop_ids(tokenizer, inner)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: memory runs out early or never
    answers = [""] * len(prompts)
    with as_evaluated(model), torch.no_grad():
        shared, name, cache = _shared_prefix(inner, prompts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            extra: dict[str, Any] = {name: _repeated(cache, len(batch))} if shared else {}
            if any(sides):
                extra["sides"] = [sides[i] for i in chosen]
            ids = _decode_batch(
                inner, tokenizer, batch, max_new_tokens, sampling, ends, offset=start, shared=shared, **extra
            )
            for i, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                answers[i] = text
            if on_batch is not None:
                on_batch(start + len(chosen), len(order))
    return answers


def stream(
    model: nn.Module,
    tokenizer: Any,
    messages: Messages,
    *,
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> Iterator[str]:
    """Pieces of one answer as they come. Closing the iterator stops the model at its next token."""
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    class Closed(StoppingCriteria):
        flag = threading.Event()

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), self.flag.is_set(), device=input_ids.device)

    inner = _unwrapped(model)
    limit = _prompt_limit(inner, max_new_tokens)
    prompt, side = encode_prompt(tokenizer, messages, tools)[-limit:], _sides(inner, messages, limit)
    ends = list(stop) if stop is not None else stop_ids(tokenizer, inner)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed, errors = Closed(), []
    closed.flag = threading.Event()

    def work() -> None:
        try:
            with as_evaluated(model), torch.no_grad():
                extra: dict[str, Any] = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([closed])}
                if side:
                    extra["sides"] = [side]
                _decode_batch(inner, tokenizer, [prompt], max_new_tokens, sampling, ends, **extra)
        except Exception as error:
            errors.append(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        closed.flag.set()
        thread.join()
    if errors:
        raise RunFailed(f"Generation failed: {errors[0]}") from errors[0]


def _decode_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    ends: list[int],
    offset: int = 0,
    shared: int = 0,
    **extra: Any,
) -> Tensor:
    """(B, <= max_new_tokens) new ids. Padding stands behind the `shared` first tokens; answers start together."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    width = max(len(p) for p in prompts)
    device = next(model.parameters()).device
    gaps = [width - len(p) for p in prompts]
    ids = torch.tensor([p[:shared] + [pad] * gap + p[shared:] for p, gap in zip(prompts, gaps)], device=device)
    mask = torch.ones_like(ids)
    for i, gap in enumerate(gaps):
        mask[i, shared : shared + gap] = 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=sampling.temperature > 0):
        if sampling.temperature > 0:
            torch.manual_seed(seed_of(sampling.seed, "generate", offset))
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            max_length=None,
            eos_token_id=ends or None,
            pad_token_id=pad,
            use_cache=True,
            **sampling.arguments(),
            **extra,
        )
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return out[:, 1:] if encoder_decoder else out[:, width:]


_WORTH_SHARING = 16  # tokens
_NOTHING_SHARED = (0, "", None)


def _shared_prefix(model: Any, prompts: list[list[int]]) -> tuple[int, str, Any]:
    """How many first tokens all prompts have in common, and their KV cache under its argument's name; 0 if no help.

    Only for decoders whose cache is a plain one: sliding windows, recurrent states and prompt tuning keep their own.
    """
    if len(prompts) < 2 or getattr(model.config, "is_encoder_decoder", False):
        return _NOTHING_SHARED
    if not getattr(model, "shares_prefix", True):  # a decoder over several models fills several caches
        return _NOTHING_SHARED
    if any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values()):
        return _NOTHING_SHARED
    first, last = min(prompts), max(prompts)  # what these two share, all share
    bound = min(map(len, prompts)) - 1  # every prompt keeps a token of its own
    shared = next((i for i in range(bound) if first[i] != last[i]), bound)
    if shared < _WORTH_SHARING:
        return _NOTHING_SHARED
    from transformers.cache_utils import DynamicCache, DynamicLayer

    ids = torch.tensor([first[:shared]], device=next(model.parameters()).device)
    out = model(input_ids=ids, use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"  # newer and older transformers
    cache = out[name]
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    return (shared, name, cache) if plain else _NOTHING_SHARED


def _repeated(cache: Any, rows: int) -> Any:
    """A copy of a cache of one row, for `rows` rows."""
    fresh = copy.deepcopy(cache)
    fresh.batch_repeat_interleave(rows)
    return fresh


def _sides(model: Any, messages: Messages, limit: int) -> dict[str, list[int]]:
    """Prompts of the models beside the one that generates, where these read another form of it."""
    make = getattr(model, "member_prompts", None)
    return {name: ids[-limit:] for name, ids in make(messages).items()} if make is not None else {}


def _unwrapped(model: Any) -> Any:
    """The model under data-parallel and compile wrappers, which have no `generate`."""
    while not hasattr(model, "generate"):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise BadInput(f"{type(model).__name__} can't generate text. Use a model with a language-model head.")
        model = inner
    return model


def _prompt_limit(model: Any, max_new_tokens: int) -> int:
    own = getattr(model, "context_length", None)  # a decoder over several models knows the shortest
    context = own or getattr(model.config, "max_position_embeddings", None) or 1_000_000
    if max_new_tokens >= context:
        raise BadInput(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in a context of {context} tokens.")
    return context - max_new_tokens


# --- responders -----------------------------------------------------------------------------------------------------


@dataclass
class LocalModel:
    """A model and its tokenizer as a `Responder`, with fixed settings."""

    model: nn.Module
    tokenizer: Any
    batch_size: int = 16
    sampling: Sampling = GREEDY

    def __call__(self, messages: Sequence[Messages], max_new_tokens: int = 128, /) -> list[str]:
        return generate(
            self.model,
            self.tokenizer,
            messages,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            sampling=self.sampling,
        )


@dataclass
class Scripted:
    """A fake: answers by a table from the last message's text, by a function of the messages, or by a default."""

    answers: Mapping[str, str] | Callable[[Messages], str]
    default: str | None = None
    asked: list[Messages] = field(default_factory=list)

    def __call__(self, messages: Sequence[Messages], max_new_tokens: int = 128, /) -> list[str]:
        self.asked.extend(messages)
        return [self._answer(m) for m in messages]

    def _answer(self, messages: Messages) -> str:
        if callable(self.answers):
            return self.answers(messages)
        text = messages[-1]["content"]
        answer = self.answers.get(text, self.default)
        if answer is None:
            raise BadInput(f"The script has no answer to {text!r}, and no default.")
        return answer


@dataclass
class Endpoint:
    """An OpenAI-compatible server. The key is read by the caller, kept in memory only, and never shown.

    Args:
        url: the API's root, e.g. "http://localhost:8000/v1".
        retries: on connection errors, time-outs and the states 408, 429 and 5xx; the wait doubles from `wait` seconds.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    sampling: Sampling = GREEDY
    timeout: float = 120.0
    retries: int = 3
    wait: float = 1.0
    workers: int = 4

    def __call__(self, messages: Sequence[Messages], max_new_tokens: int = 128, /) -> list[str]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda m: self._one(m, max_new_tokens), messages))

    def _one(self, messages: Messages, max_new_tokens: int) -> str:
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
        }
        if messages[0].get("role") == "raw":
            return str(self._post("/completions", {**common, "prompt": messages[0]["content"]})["choices"][0]["text"])
        choice = self._post("/chat/completions", {**common, "messages": messages})["choices"][0]
        return choice["message"]["content"] or ""

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(self.url.rstrip("/") + path, json.dumps(body).encode(), headers)
        pause = threading.Event()
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                passing = error.code in (408, 429) or error.code >= 500
                reason = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                passing, reason = True, str(getattr(error, "reason", error))
            except json.JSONDecodeError as error:
                passing, reason = False, f"the reply is not JSON ({error})"
            if not passing or attempt == self.retries:
                break
            pause.wait(self.wait * 2**attempt)
        raise RunFailed(f"The endpoint {self.url} did not answer after {attempt + 1} attempt(s): {reason}")
