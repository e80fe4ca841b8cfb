"""What a training step costs for every choice of trained tensors, from one forward pass without a graph.

    T_fp     = sum over products P of f(P)
    T_bp(m)  = sum over products P = A B, over X in {A, B}, of f(P) [X depends on a selected tensor]

A product's backward is one product of the same size per operand that needs a gradient, and an operand needs one exactly
if some selected tensor is upstream of it. So the pass notes for every operand which tensors it depends on (followed by
storage, so views and in-place work count), and every T_bp(m) is then a sum. It holds for any architecture: branches,
ties, experts as they were chosen, convolutions. FLOPs are those of `metering.py`, 2 per multiply-add; norms, biases and
other elementwise work count 0. Fused attention's backward works the scores out again and is one operation: 5/2 of its
forward if any of q, k, v needs it. (Where its additive mask needs a gradient, as T5's position bias does, torch takes
the unfused products instead.)

A budget is spent along the backward path, so the same terms are also given as a table in the order of first use:

    T_bp(m) <= sum_{k >= e} through_k + sum_k m_k own_k,     e the selected tensor nearest the input

with equality if everything from e on is selected. What this file does not know: any method, any price of memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pegbox.errors import BadInput
from pegbox.parts.cost import TensorFlops, _fused_attention
from pegbox.parts.metering import flop_formulas

__all__ = ["CostTable", "StepCost", "trace", "trace_shapes"]

_FUSED = "scaled_dot_product"


@dataclass(frozen=True)
class CostTable:
    """Backward costs along the path, tensors in forward order (nearest the input first).

    Args:
        names: the tensors. forward: T_fp. through: cost of passing the gradient on at each; own: of its own gradient.
        full: T_bp with everything selected; the sum of the two where it is not given.
    """

    names: tuple[str, ...]
    forward: float
    through: tuple[float, ...]
    own: tuple[float, ...]
    full: float = -1.0

    def __post_init__(self) -> None:
        if self.full < 0:
            object.__setattr__(self, "full", sum(self.through) + sum(self.own))

    def backward(self, selected: Iterable[str]) -> float:
        """T_bp of a selection; 0 if it is empty."""
        chosen = set(selected)
        places = [i for i, name in enumerate(self.names) if name in chosen]
        if not places:
            return 0
        return sum(self.through[places[0] :]) + sum(self.own[i] for i in places)

    def share(self, selected: Iterable[str]) -> float:
        """rho: forward and backward of a selection over those of full training."""
        return (self.forward + self.backward(selected)) / (self.forward + self.full)

    def floor(self) -> float:
        """The forward pass's own share: no rho can be lower."""
        return self.forward / (self.forward + self.full)


@dataclass(frozen=True)
class StepCost:
    """The exact cost of a step for any selection.

    Args:
        names: floating parameters that were used, in order of first use. forward: FLOPs.
        terms: mask -> FLOPs of backward products that happen if any tensor of the mask is selected; bit i is names[i].
        fused: masks of q, k, v and additive mask of fused attentions -> FLOPs of their forwards.
        products: per tensor, FLOPs of the forward products that it is an operand of, and of both their gradients.
    """

    names: tuple[str, ...]
    forward: int
    terms: Mapping[int, int]
    fused: Mapping[tuple[int, int, int, int], int] = field(default_factory=dict)
    products: Mapping[str, TensorFlops] = field(default_factory=dict)

    @cached_property
    def _bit(self) -> dict[str, int]:
        return {name: 1 << i for i, name in enumerate(self.names)}

    @cached_property
    def full(self) -> int:
        """Backward FLOPs of full training."""
        return self.backward(self.names)

    def backward(self, selected: Iterable[str]) -> int:
        """Backward FLOPs if exactly these train; names that were never used cost nothing."""
        chosen = 0
        for name in selected:
            chosen |= self._bit.get(name, 0)
        plain = sum(flops for mask, flops in self.terms.items() if mask & chosen)
        return plain + sum(_attention_backward(flops, masks, chosen) for masks, flops in self.fused.items())

    def share(self, selected: Iterable[str]) -> float:
        """Forward and backward of a selection over those of full training."""
        return (self.forward + self.backward(selected)) / (self.forward + self.full)

    def table(self) -> CostTable:
        """The costs along the path (see the header)."""
        own, through = [0] * len(self.names), [0] * len(self.names)
        for mask, flops in self.terms.items():
            nearest_loss = mask.bit_length() - 1
            alone = mask.bit_count() == 1
            (own if alone else through)[nearest_loss] += flops
        for (q, k, v, _), flops in self.fused.items():
            if q | k | v:
                through[(q | k | v).bit_length() - 1] += flops * 5 // 2
        return CostTable(self.names, self.forward, tuple(through), tuple(own), self.full)


def _attention_backward(flops: int, masks: tuple[int, int, int, int], chosen: int) -> int:
    q, k, v, bias = masks
    if not bias & chosen:
        return flops * 5 // 2 if (q | k | v) & chosen else 0
    products = (q, k, q | k | bias, v)  # scores = q k^T, out = weights v; each half of the forward
    return sum(flops // 2 for mask in products if mask & chosen)


class _Tracer(TorchDispatchMode):
    """Follows which parameters each storage depends on, and adds up products."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.formulas = flop_formulas()
        self.names = [name for name, p in parameters.items() if p.is_floating_point()]
        self.depends = {_storage(parameters[name]): 1 << i for i, name in enumerate(self.names)}
        self.parameter_keys = dict(self.depends)
        self.first: dict[int, int] = {}  # bit -> when it was first used
        self.forward, self.touched, self.last = 0, 0, 0
        self.terms: Counter[int] = Counter()
        self.attentions: Counter[tuple[int, int, int, int]] = Counter()
        self.held: list[Any] | None = None  # outputs, where keeping them costs nothing
        self.uses: dict[int, list[int]] = {}  # bit -> forward, input gradient, weight gradient

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(getattr(func, "_overloadpacket", None))
        if formula is None and hasattr(func, "decompose") and func is not torch.ops.prim.device.default:
            with self:
                inner = func.decompose(*args, **kwargs)
            if inner is not NotImplemented:
                return inner
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        masks = [self._mask(t) for t in inputs]
        out = func(*args, **kwargs)
        if formula is not None:
            self._product(func, int(formula(*args, **kwargs, out_val=out)), inputs, masks)
        self._follow(func, inputs, masks, out)
        if self.held is not None:
            self.held.append(out)
        return out

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention as one operation, for a model on the meta device: (B, H, T, d) of each, out (B, H, T, d_v)."""
        pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        with torch.utils._python_dispatch._disable_current_modes():
            out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        inputs = [q, k, v]
        masks = [self._mask(t) for t in inputs]
        self._product(_FUSED, 2 * pairs * (q.shape[-1] + v.shape[-1]), inputs, masks)
        self.depends[_storage(out)] = masks[0] | masks[1] | masks[2]
        return out

    def _mask(self, tensor: Tensor) -> int:
        mask = self.depends.get(_storage(tensor), 0) if tensor.is_floating_point() else 0
        bit = self.parameter_keys.get(_storage(tensor), 0)
        if bit:
            self.first.setdefault(bit, len(self.first))
        return mask

    def _follow(self, func: Any, inputs: list[Tensor], masks: list[int], out: Any) -> None:
        joint = 0
        for mask in masks:
            joint |= mask
        shared = {_storage(t) for t in inputs}
        if "lift_fresh" in str(func):  # a new constant, maybe where a freed tensor lay
            joint, shared = 0, set()
        self.touched |= joint
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = _storage(tensor)
                value = joint if tensor.is_floating_point() else 0
                self.depends[key] = self.depends.get(key, 0) | value if key in shared else value

    def _product(self, func: Any, flops: int, inputs: list[Tensor], masks: list[int]) -> None:
        self.forward += flops
        self.last = flops
        name = str(func)
        if _FUSED in name:
            bias = 0
            for mask in masks[3:]:
                bias |= mask
            self.attentions[masks[0], masks[1], masks[2], bias] += flops
            return
        operands = slice(0, 2) if "convolution" in name else slice(-2, None)
        for tensor, mask, other in zip(inputs[operands], masks[operands], reversed(masks[operands])):
            self._term(mask, flops)
            bit = self.parameter_keys.get(_storage(tensor), 0)
            if bit:
                uses = self.uses.setdefault(bit, [0, 0, 0])
                uses[0] += flops
                uses[1] += flops if other else 0
                uses[2] += flops

    def _term(self, mask: int, flops: int) -> None:
        if mask:
            self.terms[mask] += flops

    def result(self) -> StepCost:
        """Bits renumbered by first use."""
        order = sorted(self.first, key=self.first.__getitem__)
        place = {bit: 1 << i for i, bit in enumerate(order)}
        names = {bit: self.names[bit.bit_length() - 1] for bit in order}

        def moved(mask: int) -> int:
            return sum(place[bit] for bit in _bits(mask))

        terms: Counter[int] = Counter()
        for mask, flops in self.terms.items():
            terms[moved(mask)] += flops
        fused: Counter[tuple[int, int, int, int]] = Counter()
        for (q, k, v, bias), flops in self.attentions.items():
            fused[moved(q), moved(k), moved(v), moved(bias)] += flops
        products = {names[bit]: TensorFlops(*uses) for bit, uses in self.uses.items()}
        return StepCost(tuple(names.values()), self.forward, dict(terms), dict(fused), products)


def trace(model: nn.Module, run: Callable[[], Any], *, checkpointing: bool = False) -> StepCost:
    """Trace `run`, which runs `model` forward up to the loss (or the logits); no graph is built.

    Args:
        checkpointing: the step will use gradient checkpointing: a block's forward is run again in backward if anything
            in it or before it trains.

    The model runs in training mode, as the step will (dropout decides which attention torch takes). Modes, buffers and
    random states come back as they were.
    """
    from pegbox.parts.anatomy import Anatomy

    tracer = _Tracer(dict(model.named_parameters()))
    anatomy = Anatomy.of(model) if checkpointing else None
    blocks = [model.get_submodule(anatomy.actual(block.name)) for block in anatomy.blocks] if anatomy else []
    with (
        _as_in_training(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        _recomputed(tracer, blocks),
        tracer,
    ):
        run()
    return tracer.result()


def trace_shapes(
    model: nn.Module, inputs: Mapping[str, Any] | tuple[int, int], *, checkpointing: bool = False
) -> StepCost:
    """As `trace`, from shapes alone: the model's forward on the meta device, logits at every position.

    Args:
        inputs: the model's keyword inputs (only their shapes count), or (B, T) of token ids.

    Raises `BadInput` for a model whose path depends on values (experts chosen by a router): trace a real batch.
    """
    from torch.func import functional_call

    shapes = {"input_ids": torch.empty(inputs, dtype=torch.long)} if isinstance(inputs, tuple) else dict(inputs)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(t, device="meta") for name, t in held.items()}
    ids = next((shapes[k] for k in ("input_ids", "inputs_embeds") if k in shapes), None)
    given = {k: torch.empty_like(v, device="meta") for k, v in shapes.items() if _is_input(k, v)}
    tracer = _Tracer({name: meta[name] for name, _ in model.named_parameters()})
    tracer.held = []
    with _as_in_training(model), torch.no_grad(), _attention_of(model, tracer) as mask, tracer:
        extra = mask((ids.shape[0], ids.shape[1])) if ids is not None else {}
        try:
            functional_call(model, meta, (), {**extra, **given}, tie_weights=True)
        except (NotImplementedError, RuntimeError) as error:
            raise BadInput(
                f"{type(model).__name__} can't run on shapes alone ({type(error).__name__}: {error}). Trace it on a "
                "real batch instead."
            ) from error
    return tracer.result()


def _is_input(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key not in {"labels", "attention_mask", "decoder_attention_mask"}


@contextmanager
def _attention_of(model: nn.Module, tracer: _Tracer) -> Iterator[Callable[[tuple[int, int]], dict[str, Tensor]]]:
    """The model's attention as one operation where it is fused; else as it is, with a mask of full size."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) in {None, "eager"}:
        with _fused_attention(model) as extra:
            yield extra if not getattr(config, "is_encoder_decoder", False) else lambda shape: {}
        return
    from transformers import AttentionInterface

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return tracer.fused(query, key, value).transpose(1, 2), None

    before = config._attn_implementation  # type: ignore[union-attr]
    AttentionInterface.register("pegbox_tracing", attention)
    config._attn_implementation = "pegbox_tracing"  # type: ignore[union-attr]
    try:
        yield lambda shape: {}
    finally:
        config._attn_implementation = before  # type: ignore[union-attr]


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode; modes and buffers (running statistics) are as before when it ends."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            if not buffer.is_meta and not torch.equal(buffer, before):
                buffer.copy_(before)


@contextmanager
def _recomputed(tracer: _Tracer, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Each block's forward once more, as a term of everything that it depends on; torch stops recomputing at the last
    product, whose operands are what was wanted."""
    open_: list[tuple[int, int]] = []

    def enter(module: nn.Module, args: Any) -> None:
        open_.append((tracer.forward, tracer.touched))
        tracer.touched = 0

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        forward, touched = open_.pop()
        tracer._term(tracer.touched, max(0, tracer.forward - forward - tracer.last))
        tracer.touched |= touched

    handles = [b.register_forward_pre_hook(enter) for b in blocks] + [b.register_forward_hook(leave) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a layout without a storage of its own
        return -id(tensor)
