"""AdamW on scattered entries of any model, without wrapping it: the vector of what trains is the leaf.

    M = {|P0| < theta} for every parameter P;   v = P[M];   grad v = (dL/dP)[M], and dL/dP is dropped at once
    AdamW on v (with lambda U V^T of one matrix's nuclear norm added);   P[M] = v;   P[~M] never changes
    after `progressive_iter` updates:  M <- M and {|P| < theta};  what leaves keeps its value

"SaRA" (arXiv:2409.06633). `sara_adamw(model)` is a `torch.optim.Optimizer`: the one line to change in anybody's loop,
for any tensors (convolutions, norms, biases, embeddings, tied weights), with gradients and moments of size |M|, and the
forward the model's own. It does not attach an adapter; in a recipe the same is `select: smallest` over
the sparse tuner. Its files are in `parts/values.py`. Beside the official code: decision 0122.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.context import seed_of
from pegbox.parts.deltas import Delta, Piece
from pegbox.parts.indexsets import check_index, difference, everything
from pegbox.parts.optimstate import drop, remap, replace
from pegbox.parts.penalties import nuclear_norm
from pegbox.parts.thresholds import below, quantile_threshold

__all__ = ["Leaf", "SparseAdamW", "default_rate", "sara_adamw", "smallest_entries"]

_OWNED = "_pegbox_leaf"


def default_rate(theta: float) -> float:
    """The learning rate that goes with a threshold: 1e-3 exp(-350 theta)."""
    return 1e-3 * math.exp(-350 * theta)


@dataclass
class Leaf:
    """What trains of one parameter.

    index: (k,) sorted flat positions. base: (k,) what was there before. values: the leaf, float32 or wider. left,
    learnt, before: positions that trained once, what they learnt, and what was there before.
    """

    name: str
    parameter: nn.Parameter
    index: Tensor
    base: Tensor
    values: nn.Parameter
    left: Tensor
    learnt: Tensor
    before: Tensor

    def collect(self, parameter: Tensor) -> None:
        """Take the entries' gradient, and drop the rest: a hook for after it has been accumulated."""
        assert parameter.grad is not None
        kept = parameter.grad.detach().reshape(-1)[self.index.long()].to(self.values.dtype)
        parameter.grad = None
        if self.values.grad is None:
            self.values.grad = kept
        else:
            self.values.grad += kept

    @torch.no_grad()
    def write(self) -> None:
        """Put the leaf's values into the parameter."""
        self.parameter.view(-1).scatter_(0, self.index.long(), self.values.to(self.parameter.dtype))


class SparseAdamW(torch.optim.AdamW):
    """AdamW over the leaves of `chosen` entries; see the module's docstring.

    Args:
        named: parameters by name (or a module). A parameter given twice is refused, as is one that already has a leaf.
        chosen: name -> (k,) sorted positions; a parameter without entries is frozen.
        theta: the threshold, for the second stage.
        lambda_rank: weight of the nuclear norm of one random matrix per update, both sides longer than `min_side`;
            every `rank_every`-th update.
        progressive_iter: updates after which entries that have reached `theta` stop training; None: never.
        reset_state: start the moments anew then.
        max_grad_norm: clip the leaves' gradients in `step` (clipping a module's parameters misses them).
        seed: of the draws of matrices.
        options: AdamW's.
    """

    def __init__(
        self,
        named: nn.Module | Iterable[tuple[str, nn.Parameter]],
        chosen: Mapping[str, Tensor],
        *,
        theta: float = math.inf,
        lambda_rank: float = 0.0,
        progressive_iter: int | None = None,
        reset_state: bool = False,
        max_grad_norm: float | None = None,
        min_side: int = 64,
        rank_every: int = 1,
        conv: Literal["exclude", "flatten"] = "exclude",
        seed: int = 0,
        **options: Any,
    ):
        if not (lambda_rank >= 0 and math.isfinite(lambda_rank)):
            raise BadInput(f"lambda_rank is {lambda_rank}; it must be 0 or more.")
        if progressive_iter is not None and progressive_iter < 1:
            raise BadInput(f"progressive_iter is {progressive_iter}; give the number of updates, from 1, or None.")
        self.theta, self.lambda_rank, self.progressive_iter = theta, lambda_rank, progressive_iter
        self.reset_state, self.max_grad_norm, self.seed = reset_state, max_grad_norm, seed
        self.min_side, self.rank_every, self.conv = min_side, rank_every, conv
        self.updates = 0
        self.leaves = _leaves(_unique(named), chosen)
        self._hooks = {
            name: leaf.parameter.register_post_accumulate_grad_hook(leaf.collect) for name, leaf in self.leaves.items()
        }
        super().__init__([leaf.values for leaf in self.leaves.values()], **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.updates == self.progressive_iter:
            self.next_stage()
        self._add_rank_gradient()
        trained = [leaf.values for leaf in self.leaves.values() if leaf.values.grad is not None]
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        super().step()
        for leaf in self.leaves.values():
            if leaf.values.grad is not None:
                leaf.write()
                leaf.values.grad = None  # whoever zeroes the model's gradients does not know of the leaves
        self.updates += 1
        return loss

    @torch.no_grad()
    def next_stage(self) -> None:
        """Entries that have reached the threshold stop training and keep their value."""
        for leaf in self.leaves.values():
            self._shrink(leaf, leaf.index[leaf.values.abs() < self.theta])

    def _shrink(self, leaf: Leaf, index: Tensor) -> None:
        keep = torch.isin(leaf.index, index)
        old, grad = leaf.values, leaf.values.grad
        new = nn.Parameter(old.detach()[keep])
        new.grad = None if grad is None else grad[keep]
        leaf.left = torch.cat([leaf.left, leaf.index[~keep]])
        leaf.learnt = torch.cat([leaf.learnt, old.detach()[~keep]])
        leaf.before = torch.cat([leaf.before, leaf.base[~keep]])
        leaf.index, leaf.base, leaf.values = leaf.index[keep], leaf.base[keep], new
        replace(self, old, new)
        if self.reset_state:
            drop(self, new)
        else:
            remap(self, new, keep.nonzero().flatten(), old.shape)

    def matrices(self) -> dict[str, Leaf]:
        """The leaves that the nuclear norm may act on."""
        able = {n: x for n, x in self.leaves.items() if x.parameter.ndim == 2 or self.conv == "flatten"}
        return {n: x for n, x in able.items() if x.index.numel() and min(_matrix(x.parameter)) > self.min_side}

    def _add_rank_gradient(self) -> None:
        if not self.lambda_rank or self.updates % self.rank_every:
            return
        able = self.matrices()
        if not able:
            raise BadInput(f"lambda_rank: no matrix that trains has both sides above {self.min_side}. Lower min_side.")
        draw = torch.Generator().manual_seed(seed_of(self.seed, "nuclear_norm", self.updates))
        leaf = list(able.values())[int(torch.randint(len(able), (), generator=draw))]
        shape = _matrix(leaf.parameter)
        flat = torch.zeros(shape[0] * shape[1], dtype=leaf.values.dtype, device=leaf.values.device)
        flat[leaf.index.long()] = leaf.values.detach()
        slope = nuclear_norm(flat.view(shape))[1].reshape(-1)[leaf.index.long()].to(leaf.values.dtype)
        if leaf.values.grad is None:
            leaf.values.grad = slope.mul_(self.lambda_rank)
        else:
            leaf.values.grad.add_(slope, alpha=self.lambda_rank)

    # ---- what is left, and going on from it

    @torch.no_grad()
    def delta(self) -> Delta:
        """Every entry that ever trained, at the value it has reached (pieces of mode "set")."""
        return Delta(
            {n: self._piece(x, torch.cat([x.left, x.index]), self._reached(x)) for n, x in self.leaves.items()}
        )

    @torch.no_grad()
    def base(self) -> Delta:
        """The same entries as they were before."""
        return Delta(
            {
                n: self._piece(x, torch.cat([x.left, x.index]), torch.cat([x.before, x.base]))
                for n, x in self.leaves.items()
            }
        )

    def _reached(self, leaf: Leaf) -> Tensor:
        return torch.cat([leaf.learnt, leaf.values.detach()]).to(leaf.parameter.dtype)

    def _piece(self, leaf: Leaf, index: Tensor, values: Tensor) -> Piece:
        order = index.argsort()
        return Piece(tuple(leaf.parameter.shape), values[order].cpu(), index[order].cpu(), "set")

    def release(self) -> None:
        """Let the model go: no hooks, every parameter trains or not as the caller sets it."""
        for name, leaf in self.leaves.items():
            self._hooks.pop(name).remove()
            delattr(leaf.parameter, _OWNED)

    def state_dict(self) -> dict[str, Any]:
        leaves = {
            n: {"index": x.index, "values": x.values.detach(), "left": x.left, "learnt": x.learnt}
            for n, x in self.leaves.items()
        }
        return {**super().state_dict(), "leaves": leaves, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `BadInput` for the state of other entries."""
        state = dict(state_dict)
        saved, self.updates = state.pop("leaves"), state.pop("updates")
        if saved.keys() != self.leaves.keys():
            raise BadInput("The optimizer's state is of other parameters than those that train now.")
        for name, leaf in self.leaves.items():
            index = saved[name]["index"].to(leaf.index)
            if difference(index, leaf.index).numel() or index.numel() + len(saved[name]["left"]) != len(leaf.index):
                raise BadInput(f"The optimizer's state for '{name}' belongs to other entries. Use the same threshold.")
            if index.numel() != leaf.index.numel():
                leaf.values.copy_(_spread(saved[name], leaf))
                self._shrink(leaf, index)
            leaf.values.copy_(saved[name]["values"])
            leaf.write()
        super().load_state_dict(state)


def _spread(saved: Mapping[str, Tensor], leaf: Leaf) -> Tensor:
    """The values of all entries that ever trained, in the order of the leaf's index."""
    index = torch.cat([saved["left"], saved["index"]])
    return torch.cat([saved["learnt"], saved["values"]])[index.argsort()].to(leaf.values)


def sara_adamw(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    threshold: float | None = None,
    *,
    density: float | None = None,
    lr: float | None = None,
    lambda_rank: float = 5e-4,
    progressive_iter: int | None = None,
    total_steps: int | None = None,
    exclude_zeros: bool = False,
    weight_decay: float = 1e-2,
    **options: Any,
) -> SparseAdamW:
    """The optimizer of SaRA over the smallest weights of `model`; use it where AdamW was.

    Args:
        model: a module, or its named parameters; integer and packed ones are left out with a warning.
        threshold: theta, or `density`: the share of all weights that lies below it.
        lr: default: 1e-3 exp(-350 theta).
        lambda_rank, progressive_iter, options: as `SparseAdamW`. The paper: 5e-4, and half of all updates.
        total_steps: to be warned of a second stage that never begins.
        exclude_zeros: leave out exact zeros.
    """
    named = _unique(model)
    floating = {n: p for n, p in named.items() if p.is_floating_point()}
    if len(floating) < len(named):
        other = [n for n in named if n not in floating]
        warnings.warn(
            f"{len(other)} parameters are not floating ('{other[0]}', ...) and stay as they are.", stacklevel=2
        )
    chosen, theta = smallest_entries(floating, threshold, density, exclude_zeros=exclude_zeros)
    if progressive_iter is not None and total_steps is not None and progressive_iter >= total_steps:
        warnings.warn(
            f"progressive_iter is {progressive_iter} of {total_steps} updates: the second stage never begins.",
            stacklevel=2,
        )
    if lr is None:
        lr = default_rate(theta if math.isfinite(theta) else 0.0)
    return SparseAdamW(
        floating.items(),
        chosen,
        theta=theta,
        lr=lr,
        lambda_rank=lambda_rank,
        progressive_iter=progressive_iter,
        weight_decay=weight_decay,
        **options,
    )


def smallest_entries(
    named: Mapping[str, Tensor], theta: float | None, density: float | None, *, exclude_zeros: bool = False
) -> tuple[dict[str, Tensor], float]:
    """(name -> (k,) positions below the threshold, the threshold). Raises `BadInput`."""
    if (theta is None) == (density is None):
        raise BadInput("Give the threshold in exactly one way: threshold, or density.")
    if density is not None and not 0 < density <= 1:
        raise BadInput(f"density is {density}; it must lie in (0, 1].")
    if theta is None:
        assert density is not None
        theta = quantile_threshold(named, density, exclude_zeros=exclude_zeros)
    elif not (theta > 0 and math.isfinite(theta)):
        raise BadInput(f"threshold is {theta}; it must be a number above 0.")
    chosen = {n: below(p, theta, exclude_zeros=exclude_zeros, where=f"'{n}'") for n, p in named.items()}
    if not any(index.numel() for index in chosen.values()):
        raise BadInput(f"No weight is below the threshold {theta:g}, so nothing would train. Raise it.")
    return chosen, theta


def _unique(named: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    pairs = list(named.named_parameters() if isinstance(named, nn.Module) else named)
    seen: dict[int, str] = {}
    for name, p in pairs:
        if id(p) in seen:
            raise BadInput(f"'{name}' and '{seen[id(p)]}' are one tensor; give it once.")
        seen[id(p)] = name
    return dict(pairs)


def _leaves(named: Mapping[str, nn.Parameter], chosen: Mapping[str, Tensor]) -> dict[str, Leaf]:
    leaves = {}
    for name, p in named.items():
        index = chosen.get(name)
        if index is None or not index.numel():
            p.requires_grad_(False)  # it costs no gradient
            continue
        if hasattr(p, _OWNED):
            raise BadInput(f"'{name}' already trains as leaves of another optimizer. Call its release() first.")
        check_index(index, p.numel(), name)
        if not p.is_contiguous():
            raise BadInput(f"'{name}' is not contiguous in memory, so entries can't be written into it.")
        index = index.to(p.device)
        base = p.detach().reshape(-1)[index.long()]
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        nothing, none = index[:0], base[:0]
        leaves[name] = Leaf(name, p, index, base, nn.Parameter(base.to(wide, copy=True)), nothing, none.to(wide), none)
        p.requires_grad_(True)
        setattr(p, _OWNED, True)
    if not leaves:
        raise BadInput("No entry was chosen, so nothing would train.")
    return leaves


def _matrix(p: Tensor) -> tuple[int, int]:
    return (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (p.numel(), 1)


def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All entries of all parameters."""
    return {name: everything(p.numel(), p.device) for name, p in named.items()}
