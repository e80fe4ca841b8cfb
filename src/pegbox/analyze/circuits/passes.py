"""Many variants of one set of prompts at once: edits at a few tokens, everything else as in a pass already made.

    run(S variants) -> (B, S, V) last-token logits; an edit sees (B, S, P, W): variants, and P tokens that may change

`Resumed` begins at a block, on those tokens alone: the others' keys and values are kept, and the variants stand side by
side as queries of one sequence, hidden from one another by the mask, so that keys are never copied. `Whole` repeats
the prompts and runs them through; it needs no cache and serves any decoder. Both give the same numbers, and `passes`
tries `Resumed` on a row before it trusts it.

What may be left out: tokens before the first edited one see nothing of it. Tokens between edited ones must be `held`:
their heads' outputs are given, so that nothing reaches them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.analyze.circuits.activations import Edit, capture, edited, evaluating, last_logits
from pegbox.analyze.circuits.heads import HeadView, Site
from pegbox.analyze.circuits.prompts import Prompts

__all__ = ["Edits", "First", "Passes", "Resumed", "Tokens", "Whole", "passes", "resumable"]

Edits = Mapping[tuple[str, int], Edit]  # (kind, layer) -> a function of (B, S, P, W)
QUERIES = 256  # of one sequence: beyond it the variants' masked scores of one another cost more than a further pass


@dataclass(frozen=True)
class Tokens:
    """The tokens that may change: (B, P) columns, the last of them each row's last token; False in `real` where a row
    has fewer, which stand in front and count for nothing."""

    columns: Tensor
    real: Tensor

    @classmethod
    def only(cls, columns: Tensor) -> Tokens:
        return cls(columns, torch.ones_like(columns, dtype=torch.bool))

    @classmethod
    def since(cls, first: Tensor, width: int) -> Tokens:
        """Every column from `first` (B,) on."""
        count = width - int(first.min())
        columns = torch.arange(width - count, width, device=first.device).expand(len(first), count)
        return cls(columns.clone(), columns >= first[:, None])

    @property
    def count(self) -> int:
        return int(self.columns.shape[1])

    def index(self, columns: Tensor) -> Tensor:
        """(B,) or (B, K) where given columns stand among the tokens."""
        wanted = columns if columns.ndim == 2 else columns[:, None]
        place = (self.columns[:, None, :] == wanted[..., None]).int().argmax(-1)
        return place if columns.ndim == 2 else place[:, 0]


class Passes:
    """See the file. `held`: layer -> (B or 1, T, W) what o_proj takes at every token outside `tokens`."""

    forwards = 0  # passes made, for whoever counts

    def __init__(self, view: HeadView, prompts: Prompts, tokens: Tokens, held: Mapping[int, Tensor] | None = None):
        self.view, self.prompts, self.tokens, self.held = view, prompts, tokens, held

    def run(
        self,
        variants: int,
        edits: Edits | Sequence[tuple[Site, Edit]],
        start: int = 0,
        watch: Sequence[Site] = (),
        logits: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """((B, S, V) logits, per watched site (B, S, P, W) as it was computed).

        Args:
            start: the first block in which anything differs.
            logits: False where only what is watched counts; then the logits are those of one variant at most.
        """
        raise NotImplementedError

    def room(self, tokens: int) -> int:
        """Variants in one pass that stay below a number of tokens."""
        raise NotImplementedError

    def _pairs(self, edits: Edits | Sequence[tuple[Site, Edit]]) -> list[tuple[Site, Edit]]:
        if isinstance(edits, Mapping):
            return [(self.view.site(kind, layer), edit) for (kind, layer), edit in edits.items()]
        return list(edits)


class Whole(Passes):
    """The prompts repeated, every block and token."""

    def run(
        self,
        variants: int,
        edits: Edits | Sequence[tuple[Site, Edit]],
        start: int = 0,
        watch: Sequence[Site] = (),
        logits: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        rows = torch.arange(len(self.prompts), device=self.prompts.ids.device).repeat_interleave(variants)
        repeated = self.prompts.take(rows) if variants > 1 else self.prompts
        at = self.tokens.columns[rows]
        line = torch.arange(len(rows), device=at.device)[:, None]
        seen: list[Tensor] = [torch.empty(0)] * len(watch)

        def local(x: Tensor) -> Tensor:
            return x[line, at].unflatten(0, (-1, variants))

        def edit_at(edit: Edit) -> Edit:
            def act(x: Tensor) -> Tensor:
                y = x.clone()
                real = self.tokens.real[rows]
                new = edit(local(x)).flatten(0, 1).to(x.dtype)
                y[line, at] = torch.where(real[..., None], new, x[line, at])
                return y

            return act

        def hold(layer: int) -> Edit:
            outside = torch.ones(len(rows), repeated.width, dtype=torch.bool, device=at.device)
            outside[line, at] = ~self.tokens.real[rows]

            def act(x: Tensor) -> Tensor:
                assert self.held is not None
                given = self.held[layer]
                return torch.where(outside[..., None], given if len(given) == 1 else given[rows], x).to(x.dtype)

            return act

        def look(i: int) -> Edit:
            def act(x: Tensor) -> Tensor:
                seen[i] = local(x)
                return x

            return act

        self.forwards += 1
        holding = [(self.view.site("o", layer), hold(layer)) for layer in (self.held or {})]
        acting = [(site, edit_at(edit)) for site, edit in self._pairs(edits)]
        out = last_logits(self.view, repeated, [*holding, *acting, *((s, look(i)) for i, s in enumerate(watch))])
        return out.unflatten(0, (-1, variants)), seen

    def room(self, tokens: int) -> int:
        return max(1, tokens // (len(self.prompts) * self.prompts.width))


class Resumed(Passes):
    """From a block on, the changing tokens alone.

    Args:
        first: a pass over these prompts (see `begin`); `keys`: False where every block's o_proj is edited at every
            token, so that nothing is attended to.
    """

    def __init__(
        self, view: HeadView, prompts: Prompts, tokens: Tokens, held: Mapping[int, Tensor] | None = None,
        first: First | None = None, keys: bool = True,
    ):  # fmt: skip
        super().__init__(view, prompts, tokens, held)
        self.first = first or First(view, prompts, tokens, held)
        self.keys = keys

    def run(
        self,
        variants: int,
        edits: Edits | Sequence[tuple[Site, Edit]],
        start: int = 0,
        watch: Sequence[Site] = (),
        logits: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        count = self.tokens.count
        seen: list[Tensor] = [torch.empty(0)] * len(watch)

        def edit_at(edit: Edit) -> Edit:
            return lambda x: edit(x.unflatten(1, (variants, count))).flatten(1, 2).to(x.dtype).contiguous()

        def look(i: int) -> Edit:
            def act(x: Tensor) -> Tensor:
                seen[i] = x.unflatten(1, (variants, count))
                return x

            return act

        head = Site(self.view.unembedding, "input", slice(None), self.view.layers, "head")
        acting = [(site, edit_at(edit)) for site, edit in self._pairs(edits) if site.layer >= start]
        acting += [(site, look(i)) for i, site in enumerate(watch)]
        stream = self.first.stream(start, self.tokens.columns).repeat(1, variants, 1)
        self.forwards += 1
        with (
            evaluating(self.view.model),
            _beginning(self.view.blocks, start, stream, self.first.packed),
            edited([*acting, (head, lambda x: x[:, count - 1 :: count] if logits else x[:, -1:])]),
        ):
            out: Tensor = self.view.model(**self._inputs(variants, stream.dtype)).logits
        return out, seen

    def room(self, tokens: int) -> int:
        return max(1, min(tokens // (len(self.prompts) * self.tokens.count), QUERIES // self.tokens.count))

    def _inputs(self, variants: int, dtype: torch.dtype) -> dict[str, Any]:
        columns = self.tokens.columns
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        given: dict[str, Any] = {
            "input_ids": self.prompts.ids[rows, columns].repeat(1, variants),
            "position_ids": self.prompts.places[rows, columns].repeat(1, variants),
            "attention_mask": self._mask(variants, dtype),
            "use_cache": self.keys,
        }
        if self.keys:
            given[_cache_name(self.view.model)] = _held_cache(self.first.keys_and_values)
        return given

    def _mask(self, variants: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, S P, T + S P) 0 where a query sees a key, the lowest number elsewhere."""
        columns, real = self.tokens.columns, self.tokens.real
        batch, count = columns.shape
        sees = columns[:, :, None] >= columns[:, None, :]  # itself included
        sees = (sees & real[:, None, :]) | torch.eye(count, dtype=torch.bool, device=columns.device)
        own = (
            torch.eye(variants, dtype=torch.bool, device=columns.device)[None, :, None, :, None]
            & sees[:, None, :, None]
        )
        own = own.reshape(batch, variants * count, variants * count)
        if self.keys:
            kept = self.prompts.mask.clone()
            rows = torch.arange(batch, device=columns.device)[:, None]
            kept[rows, columns] = kept[rows, columns] & ~real
            every = torch.arange(self.prompts.width, device=columns.device)
            before = kept[:, None, :] & (every <= columns[..., None])
            own = torch.cat([before.repeat(1, variants, 1), own], -1)
        mask = torch.zeros(own.shape, dtype=dtype, device=columns.device)
        return mask.masked_fill(~own, torch.finfo(dtype).min)[:, None]


class First:
    """A whole pass: keys and values of every token, the stream before every block at some tokens, and the logits."""

    @torch.no_grad()
    def __init__(self, view: HeadView, prompts: Prompts, tokens: Tokens, held: Mapping[int, Tensor] | None = None):
        self.columns = tokens.columns
        self.streams: list[Tensor] = [torch.empty(0)] * view.layers
        self.packed: list[tuple[Any, ...] | None] = [None] * view.layers
        rows = torch.arange(len(prompts), device=prompts.ids.device)[:, None]
        handles = []
        try:
            for layer, block in enumerate(view.blocks):
                handles.append(block.register_forward_pre_hook(self._before(layer, rows), with_kwargs=True))
                handles.append(block.register_forward_hook(self._after(layer)))
            holding = [(view.site("o", n), _held(values)) for n, values in (held or {}).items()]
            head = Site(view.unembedding, "input", slice(None), view.layers, "head")
            with evaluating(view.model), edited([*holding, (head, lambda x: x[:, -1:])]):
                out = view.model(**prompts.inputs(), use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        self.logits: Tensor = out.logits[:, -1]
        cache = out["cache" if "cache" in out else "past_key_values"]  # newer and older transformers
        self.keys_and_values = [(layer.keys, layer.values) for layer in cache.layers]

    def _before(self, layer: int, rows: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.streams[layer] = hidden[rows, self.columns]

        return hook

    def _after(self, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.packed[layer] = tuple(output[1:]) if isinstance(output, tuple | list) else None

        return hook

    def stream(self, layer: int, columns: Tensor) -> Tensor:
        """(B, P, D) before a block, at columns among those that were kept."""
        if columns is self.columns:
            return self.streams[layer]
        place = Tokens.only(self.columns).index(columns)
        return self.streams[layer].gather(1, place[..., None].expand(-1, -1, self.streams[layer].shape[-1]))


def _held(values: Tensor) -> Edit:
    return lambda x: values.to(x.dtype).expand_as(x).contiguous()


@contextmanager
def _beginning(
    blocks: Sequence[nn.Module], start: int, stream: Tensor, packed: Sequence[tuple[Any, ...] | None]
) -> Iterator[None]:
    """Blocks before `start` return what they are given; block `start` is given `stream`."""

    def through(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if rest is None else (hidden, *rest)

        return forward

    def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((stream, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": stream})

    handle = blocks[start].register_forward_pre_hook(given, with_kwargs=True)
    try:
        for layer in range(start):
            blocks[layer].forward = through(packed[layer])
        yield
    finally:
        handle.remove()
        for layer in range(start):
            blocks[layer].__dict__.pop("forward", None)


def _cache_name(model: nn.Module) -> str:
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


def _held_cache(keys_and_values: Sequence[tuple[Tensor, Tensor]]) -> Any:
    from transformers import DynamicCache

    class Held(DynamicCache):  # what was kept, with the new tokens behind it; nothing is stored
        def __init__(self) -> None:
            super().__init__()
            self.kept = keys_and_values

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            keys, values = self.kept[layer_idx]
            return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return int(self.kept[layer_idx][0].shape[-2])

    return Held()


# ---- which of them


@torch.no_grad()
def resumable(view: HeadView, prompts: Prompts) -> bool:
    """Whether resuming gives what a whole pass gives, tried on one row with a head silenced at its last two tokens."""
    row = prompts.take(slice(0, 1))
    first = (row.at("last") - 1).clamp(min=int((~row.mask).sum()))
    window = getattr(getattr(view.model, "config", None), "sliding_window", None)
    if isinstance(window, int) and window < prompts.width:
        return False
    tokens = Tokens.since(first, row.width)
    start = view.layers // 2

    def silence(x: Tensor) -> Tensor:
        scale = torch.ones_like(x)
        scale[:, 0, :, : view.value_size] = 0
        return x * scale

    edits: dict[tuple[str, int], Edit] = {("o", start): silence}
    whole = Whole(view, row, tokens).run(2, edits)[0]
    try:
        short = Resumed(view, row, tokens).run(2, edits, start)[0]
    except Exception:  # any decoder may lack a cache, its positions or a given mask, each in its own way
        return False
    if short.shape != whole.shape:
        return False
    size = (
        1e-3 * whole.float().abs().max() if whole.dtype in (torch.float32, torch.float64) else 0.1 * whole.float().std()
    )
    return bool((short - whole).abs().max() <= size)


def passes(
    view: HeadView, prompts: Prompts, tokens: Tokens, held: Mapping[int, Tensor] | None = None, resume: bool = True
) -> Passes:
    """`Resumed` where it may be, `Whole` otherwise."""
    return Resumed(view, prompts, tokens, held) if resume else Whole(view, prompts, tokens, held)


def clean_outputs(view: HeadView, prompts: Prompts, tokens: Tensor | None) -> dict[int, Tensor]:
    """layer -> (B, P, W) what every o_proj takes at some tokens (None: all), unpatched."""
    cache = capture(view, prompts, ("o",), tokens)
    return {layer: cache["o", layer] for layer in range(view.layers)}
