"""Reading and writing activations through plain hooks, which are gone after the pass, whatever happens in it.

    edits: what a module takes or returns, (B, T, W), is replaced by a function of it
    Patch: some columns at some tokens := given values (a copy is written into, never the tensor itself)

`capture` keeps the tokens it is asked for; logits are made at the last token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.analyze.circuits.heads import HeadView, Site
from pegbox.analyze.circuits.prompts import Prompts

__all__ = ["Cache", "Edit", "Patch", "accuracy", "capture", "edited", "evaluating", "last_logits", "written"]

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Patch:
    """What is written where.

    Args:
        site: columns of a module's input or output.
        values: (B, w) where `tokens` is (B,), (B, P, w) where it is (B, P), (B, T, w) where it is None (every token).
    """

    site: Site
    values: Tensor
    tokens: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return written(x, self.site, self.values, self.tokens)


def written(x: Tensor, site: Site, values: Tensor, tokens: Tensor | None = None) -> Tensor:
    """A copy of `x` (B, T, W) with the site's columns replaced at some tokens; gradients flow through both."""
    values = values.to(x.dtype)
    y = x.clone()
    if tokens is None:
        y[..., _index(site)] = values
        return y
    rows = torch.arange(len(x), device=x.device)
    if tokens.ndim == 2:
        rows = rows[:, None]
    part = x[rows, tokens].clone()
    part[..., _index(site)] = values
    y[rows, tokens] = part
    return y


def _index(site: Site) -> Any:
    return list(site.columns) if isinstance(site.columns, tuple) else site.columns


def taken(x: Tensor, site: Site) -> Tensor:
    """The site's columns of (..., W)."""
    return x[..., _index(site)]


# ---- hooks


@contextmanager
def edited(edits: Sequence[tuple[Site, Edit]]) -> Iterator[None]:
    """Edits in force for a while; several at one place act in order, each on the whole tensor (B, T, W)."""
    with ExitStack() as stack:
        for site, edit in edits:
            handle = _before(site.module, edit) if site.at == "input" else _after(site.module, edit)
            stack.callback(handle.remove)
        yield


def _before(module: nn.Module, edit: Edit) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (edit(args[0]), *args[1:])

    return module.register_forward_pre_hook(hook)


def _after(module: nn.Module, edit: Edit) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return module.register_forward_hook(hook)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- passes


def last_logits(view: HeadView, prompts: Prompts, edits: Sequence[Any] = ()) -> Tensor:
    """(B, V) logits at the last token of one pass.

    Args:
        edits: `Patch`es, or (site, function) pairs.
    """
    pairs = [(e.site, e) if isinstance(e, Patch) else e for e in edits]
    head = Site(view.unembedding, "input", slice(None), view.layers, "head")
    with evaluating(view.model), edited([*pairs, (head, lambda x: x[:, -1:])]):
        logits: Tensor = view.model(**prompts.inputs(), use_cache=False).logits
    return logits[:, -1]


@torch.no_grad()
def accuracy(
    view: HeadView, prompts: Prompts, edits: Callable[[Prompts], Sequence[Any]] | None = None, batch: int = 32
) -> float:
    """Share of prompts whose answer has the highest logit of the whole vocabulary.

    Args:
        edits: what is in force for each batch of prompts.
    """
    right = 0
    for part in prompts.batches(batch):
        logits = last_logits(view, part, edits(part) if edits is not None else ())
        right += int((logits.argmax(-1) == part.right()).sum())
    return right / len(prompts)


# ---- what was seen


class Cache:
    """Activations of one set of prompts: `cache[kind, layer]` is (B, P, W).

    Args:
        tokens: (B, P) the columns kept; None: all of them.
    """

    def __init__(self, values: Mapping[tuple[str, int], Tensor], logits: Tensor, tokens: Tensor | None):
        self.values, self.logits, self.tokens = dict(values), logits, tokens

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        return self.values[key]

    @property
    def nbytes(self) -> int:
        return sum(v.numel() * v.element_size() for v in self.values.values())

    def head(self, view: HeadView, kind: str, layer: int, head: int) -> Tensor:
        """(B, P, w) one head's slice."""
        return taken(self.values[kind, layer], view.site(kind, layer, head))


@torch.no_grad()
def capture(
    view: HeadView, prompts: Prompts, kinds: Sequence[str] = ("o",), tokens: Tensor | None = None,
    edits: Sequence[Any] = (), layers: Sequence[int] | None = None,
) -> Cache:  # fmt: skip
    """One pass, keeping what the kinds ("o", "q", "k", "v") of all blocks (or of `layers`) hold at some tokens.

    A whole tensor is kept for each: of a fused projection all of its columns.
    """
    found: dict[tuple[str, int], Tensor] = {}
    rows = torch.arange(len(prompts), device=prompts.ids.device)[:, None]

    def keep(kind: str, layer: int) -> Edit:
        def look(x: Tensor) -> Tensor:
            found[kind, layer] = x.detach().clone() if tokens is None else x.detach()[rows, tokens]
            return x

        return look

    wanted = range(view.layers) if layers is None else layers
    watched = [(view.site(kind, layer), keep(kind, layer)) for kind in kinds for layer in wanted]
    logits = last_logits(view, prompts, [*edits, *watched])
    return Cache(found, logits, tokens)
