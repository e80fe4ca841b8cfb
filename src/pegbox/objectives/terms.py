"""Terms that an objective adds to its token loss.

    kl_to_reference   lam * KL(reference || policy), its reverse, or the k3 estimate, per token
    l1_to_start       lam / N * sum |w - w0|, once per optimizer step; LT-SFT (arXiv:2110.07560, section 3.2)
    l2_to_start       lam * sum (w - w0)^2 over all that trains, or over what a selection leaves out, once per optimizer
                      step; the soft form of HFT (arXiv:2404.18466, section 4)
    nuclear_norm      lam * sum of the singular values of one trained matrix per step; SaRA (arXiv:2409.06633)

Token terms act per token, inside the tile that holds its logits. Weight terms act on parameters; the objective divides
them by the number of micro-batches of a step, so that they don't depend on accumulation.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.objectives.references import Reference, ReferenceDtype, reference_of
from pegbox.parts.allocation import Entries, Frozen, Units
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.component import AXES, Axis, Component
from pegbox.parts.context import Context, seed_of
from pegbox.parts.indexsets import from_units, matrix_shape
from pegbox.parts.parameterinfo import info_of
from pegbox.parts.penalties import l1_distance, l2_distance, nuclear_norm
from pegbox.parts.tokens import Scores, k3
from pegbox.parts.view import Batch, ModelView

__all__ = [
    "TERM",
    "KLToReference",
    "L1ToStart",
    "L2ToStart",
    "NuclearNorm",
    "Starts",
    "Term",
    "TokenTerm",
    "WeightTerm",
    "matrix_of",
]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Term(Component):
    """Something added to the loss, with a factor."""

    weight: Weight = 0.1

    on_weights: ClassVar[bool] = False  # acts on the weights themselves, not on tokens

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model is run."""
        return False

    def setup(self, ctx: Context) -> Any:
        """State with state_dict/load_state_dict, or None."""
        return None


class TokenTerm(Term):
    """A term per token."""

    def reference(self, state: Any, view: ModelView, batch: Batch) -> Any:
        """What is needed of the reference; under no_grad."""
        return None

    def compare(self, ref: Any, part: slice) -> tuple[Tensor, str] | None:
        """The reference's (n, V) logits in a tile and the direction of the divergence; None where not needed."""
        return None

    def per_token(self, scores: Scores, ref: Any, part: slice) -> Tensor:
        """(n,) values in a tile, not yet multiplied by `weight`. `scores` hold what `compare` asked for."""
        raise NotImplementedError

    def ref_logp(self, scores: Scores, ref: Any, part: slice) -> Tensor | None:
        """(n,) the reference's log-probability of the targets, if known."""
        return None


class WeightTerm(Term):
    """A term over parameters."""

    on_weights: ClassVar[bool] = True

    def penalty(self, state: Any, model: nn.Module) -> Tensor:
        """The whole term, `weight` included."""
        raise NotImplementedError


TERM: Axis[Term] = Axis("objective.terms", Term, "pegbox.objectives.terms")


@TERM.register
class KLToReference(TokenTerm):
    """Holds the policy near a reference, token by token.

    Args:
        weight: lambda; it does not transfer between directions.
        direction: forward KL(reference || policy); reverse KL(policy || reference); k3, the estimate of the reverse
            from the target token alone (cheap).
        of: the reference: "base" (the tuner switched off, or a frozen copy), or a role under `models:`.
        dtype: of a frozen copy.
        cache: keep log r[y] per sample, so that each sample's reference is run once (k3, unpacked, unchanged inputs).
    """

    kind: Literal["kl_to_reference"] = "kl_to_reference"
    direction: Literal["forward", "reverse", "k3"] = "forward"
    of: str = "base"
    dtype: ReferenceDtype = "same"
    cache: bool = False

    def model_post_init(self, context: Any, /) -> None:
        if self.cache and self.direction != "k3":
            raise BadInput(
                f"objective.terms.cache: direction '{self.direction}' needs the reference's whole vocabulary; "
                "only direction 'k3' can be cached."
            )

    @property
    def needs_reference(self) -> bool:
        return self.weight > 0

    @property
    def full_kl(self) -> bool:
        """Whether the divergence runs over the whole vocabulary."""
        return self.direction != "k3"

    def setup(self, ctx: Context) -> Reference | None:
        return reference_of(ctx, self.of, self.dtype, self.cache) if self.needs_reference else None

    def reference(self, state: Any, view: ModelView, batch: Batch) -> Any:
        if not self.needs_reference:
            return None
        return state.rows(view, batch) if self.full_kl else state.logp(view, batch)

    def compare(self, ref: Any, part: slice) -> tuple[Tensor, str] | None:
        return (ref.tile(part), self.direction) if self.full_kl else None

    def per_token(self, scores: Scores, ref: Any, part: slice) -> Tensor:
        if not self.full_kl:
            return k3(scores.logp, ref[part].to(scores.logp))
        assert scores.kl is not None
        return scores.kl

    def ref_logp(self, scores: Scores, ref: Any, part: slice) -> Tensor | None:
        return scores.ref_logp if self.full_kl else ref[part].to(scores.logp)


@dataclass
class Starts:
    """Where the trained weights began, by name; N is what a mean divides by.

    covered: of tensors that are covered in part, (k,) flat positions; their start then holds these entries alone.
    """

    tensors: dict[str, Tensor]
    count: int
    covered: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in state.items():
            self.tensors[name].copy_(tensor)


def _starts(model: nn.Module, exclude: Sequence[str], over: str) -> Starts:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kept = {n: p.detach().clone() for n, p in named.items() if not any(fnmatch.fnmatch(n, e) for e in exclude)}
    if not kept:
        raise BadInput(f"A term towards the start covers no trained weight (excluded: {list(exclude)}).")
    counted = model.parameters() if over == "all" else [named[n] for n in kept]
    return Starts(kept, sum(p.numel() for p in counted))


def _pairs(state: Starts, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    named = {n.replace("_orig_mod.", "").removeprefix("module."): p for n, p in model.named_parameters()}
    missing = [n for n in state.tensors if n not in named]
    if missing:
        raise BadInput(f"The weight '{missing[0]}' is no longer in the model that a term towards the start covers.")
    entries = state.covered
    weights = [named[n].flatten()[entries[n]] if n in entries else named[n] for n in state.tensors]
    return weights, list(state.tensors.values())


def _complement(index: Tensor, count: int) -> Tensor:
    """The sorted flat positions that are not in `index`."""
    out = torch.ones(count, dtype=torch.bool)
    out[index.cpu().long()] = False
    return out.nonzero().flatten()


@TERM.register
class L1ToStart(WeightTerm):
    """lam / N * sum |w - w0| over the trained weights.

    Args:
        over: what N counts: "all" the model's parameters, frozen ones too (the paper), or the "trained" ones covered.
        exclude: name patterns (fnmatch) of trained weights to leave out, e.g. "*lm_head*".
    """

    kind: Literal["l1_to_start"] = "l1_to_start"
    reproduces: ClassVar[str] = "arXiv:2110.07560"
    over: Literal["all", "trained"] = "all"
    exclude: tuple[str, ...] = ()

    def setup(self, ctx: Context) -> Starts:
        return _starts(ctx.model, self.exclude, self.over)

    def penalty(self, state: Any, model: nn.Module) -> Tensor:
        return l1_distance(*_pairs(state, model)) * (self.weight / state.count)


@TERM.register
class L2ToStart(WeightTerm):
    """lam * sum (w - w0)^2 over the trained weights, or over those that a selection leaves out.

    With `outside: {kind: half}` everything trains and the half that half fine-tuning would freeze is drawn to its old
    values; freezing is the limit of a large weight. The draw is the one that `select: {kind: half}` would make in the
    same round of the same run.

    Args:
        exclude: name patterns of trained weights to leave out.
        outside: a `select:` block; the term covers what trains and is not selected by it.
    """

    kind: Literal["l2_to_start"] = "l2_to_start"
    reproduces: ClassVar[str] = "arXiv:2404.18466"
    exclude: tuple[str, ...] = ()
    outside: dict[str, Any] | None = None

    def model_post_init(self, context: Any, /) -> None:
        if self.outside is None:
            return
        selector = AXES["select"].validate(self.outside)
        schedule = getattr(selector, "schedule", None)
        if selector.statistics() is not None or (schedule is not None and schedule.moves):
            raise BadInput(
                f"objective.terms.l2_to_start.outside: '{selector.kind}' needs statistics or moves while training; the "
                "term takes a selection that follows from weights and seed once, such as half."
            )

    def setup(self, ctx: Context) -> Starts:
        starts = _starts(ctx.model, self.exclude, "trained")
        return starts if self.outside is None else self._outside(starts, ctx)

    def _outside(self, starts: Starts, ctx: Context) -> Starts:
        """The starts of what the selection leaves out."""
        anatomy = Anatomy.of(ctx.model)
        weights = dict(ctx.model.named_parameters())
        generator = ctx.generator("select", ctx.round)
        chosen = AXES["select"].validate(self.outside).select(anatomy, weights, None, generator)
        picked = {anatomy.ties.get(name, name): choice for name, choice in chosen.items()}
        kept: dict[str, Tensor] = {}
        covered: dict[str, Tensor] = {}
        for name, start in starts.tensors.items():
            match picked.get(name, Frozen()):
                case Frozen():
                    kept[name] = start
                case Entries(index=index):
                    covered[name] = _complement(index, start.numel()).to(start.device)
                case Units(axis=axis, index=index):
                    positions = from_units(axis, index, tuple(start.shape))
                    covered[name] = _complement(positions, start.numel()).to(start.device)
            if name in covered:
                kept[name] = start.flatten()[covered[name]]
        if not kept:
            raise BadInput(
                "objective.terms.l2_to_start: the selection `outside` leaves no trained weight to hold. Lower its "
                "ratio, or train more (tuner: full without a selection)."
            )
        return Starts(kept, sum(t.numel() for t in kept.values()), covered)

    def penalty(self, state: Any, model: nn.Module) -> Tensor:
        return l2_distance(*_pairs(state, model)) * self.weight


@dataclass
class NuclearState:
    """When and where randomness comes from; the decomposition of the running step, which its micro-batches share."""

    ctx: Context
    last: tuple[Any, ...] = ()
    norms: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing outlives a step."""


@TERM.register
class NuclearNorm(WeightTerm):
    """lam * (sum of the singular values) of what trains of a matrix, zeros where nothing trains.

    Its gradient at the trained entries is lam * U V^T there. It draws updates of scattered entries towards low rank.

    Args:
        weight: lambda.
        of: "weights" as they are at the trained entries (the paper), or their "change" from the pretrained ones.
        matrices: "one" of the eligible, drawn anew for every step, or "all" of them.
        min_side: a matrix is eligible if its shorter side is longer than this.
        conv: take convolutions as matrices (out, rest), or not at all.
        every: only at every n-th step; each costs a singular value decomposition.
    """

    kind: Literal["nuclear_norm"] = "nuclear_norm"
    reproduces: ClassVar[str] = "arXiv:2409.06633"
    weight: Weight = 5e-4
    of: Literal["weights", "change"] = "weights"
    matrices: Literal["one", "all"] = "one"
    min_side: Annotated[int, Field(ge=0)] = 64
    conv: Literal["exclude", "flatten"] = "exclude"
    every: Annotated[int, Field(ge=1)] = 1

    def setup(self, ctx: Context) -> NuclearState:
        self._eligible(ctx.model)
        return NuclearState(ctx)

    def penalty(self, state: NuclearState, model: nn.Module) -> Tensor:
        step = state.ctx.step()
        chosen = self._eligible(model)
        if step % self.every:
            return next(iter(chosen.values())).new_zeros(())
        if self.matrices == "one":
            names = sorted(chosen)
            draw = torch.Generator().manual_seed(seed_of(state.ctx.seed, "nuclear_norm", step))
            name = names[int(torch.randint(len(names), (), generator=draw))]
            chosen = {name: chosen[name]}
        key = (step, *(x for p in chosen.values() for x in (id(p), p._version, _writes(p))))
        if key != state.last:
            state.last, state.norms = key, [self._norm(p) for p in chosen.values()]
        total = sum(
            value.to(p) + (slope.to(p) * (p - p.detach())).sum()  # the value, with this gradient
            for p, (value, slope) in zip(chosen.values(), state.norms, strict=True)
        )
        return total * self.weight  # type: ignore[return-value]

    def _norm(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The norm, and a subgradient of it in the shape of the parameter."""
        value, slope = nuclear_norm(matrix_of(p, self.of))
        info = info_of(p)
        kept = slope.reshape(-1) if info is None else slope.reshape(-1)[info.index().long()]
        return value, kept.view(p.shape)

    def _eligible(self, model: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            info = info_of(p)
            shape = tuple(p.shape) if info is None else info.shape
            flat = len(shape) == 2 or (len(shape) > 2 and self.conv == "flatten")
            if p.requires_grad and p.numel() and flat and min(matrix_shape(shape)) > self.min_side:
                if info is None and self.of == "change":
                    raise BadInput(
                        f"objective.terms: nuclear_norm of the change needs differences, and '{name}' trains as it is."
                        " Use of: weights."
                    )
                found[name] = p
        if not found:
            raise BadInput(
                f"objective.terms: nuclear_norm finds no trained matrix with both sides above {self.min_side}. Lower"
                " min_side, or set conv: flatten."
            )
        return found


def matrix_of(p: Tensor, of: str = "weights") -> Tensor:
    """A trained parameter as a matrix (m, n): a sparse tuner's values at their entries, zeros elsewhere."""
    info = info_of(p)
    if info is None:
        return p.detach().reshape(matrix_shape(tuple(p.shape)))
    values = p.detach().reshape(-1)
    if of == "weights" and info.coordinates == "delta":
        values = values + info.reference()
    if of == "change" and info.coordinates == "absolute":
        values = values - info.reference()
    shape = matrix_shape(info.shape)
    flat = torch.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    return flat.index_put_((info.index().long(),), values).view(shape)


def _writes(p: Tensor) -> int:
    info = info_of(p)
    return -1 if info is None else info.writes
