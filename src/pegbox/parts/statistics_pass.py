"""The hooks behind `parts.statistics.collect`: what is read at each layer, and how it adds up.

One `Collector` lives for one pass. Layers whose input is the very same tensor (seen on first use) form a group with one
accumulator for input statistics; gradients are each layer's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.parts.anatomy import Anatomy, Piece

__all__ = ["GRADIENT_KINDS", "INPUT_KINDS", "Collector", "flat_sequences"]

INPUT_KINDS = frozenset({"input_mean", "input_abs", "input_norm", "input_unit_norm", "input_covariance"})
GRADIENT_KINDS = frozenset({"gradient_sum", "gradient_abs", "gradient_square"})
_RECENT = 4  # inputs remembered to see whether the next layer gets the same one


@dataclass
class _Sums:
    """Of one group or layer: running sums by kind, and what they are divided by."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: float = 0.0

    def add(self, kind: str, value: Tensor) -> None:
        if kind in self.sums:
            self.sums[kind] += value
        else:
            self.sums[kind] = value.clone()


def flat_sequences(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens of each sequence, padding left out: a list of (T_b, n) tensors.

    A (N, n) input is one sequence, unless the mask says how its N = B * T rows are arranged.
    """
    if x.ndim == 2 and mask is not None and mask.numel() == x.shape[0]:
        x = x.view(*mask.shape, x.shape[-1])
    if x.ndim == 2:
        return [x]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if mask is None or mask.shape != x.shape[:2]:
        return list(x)
    return [row[keep] for row, keep in zip(x, mask.bool()) if bool(keep.any())]


class Collector:
    """Gathers `spec.kinds` over the layers `pieces`.

    Args:
        spec: a `StatSpec`. per: the gradient's unit.
    """

    def __init__(self, spec: Any, per: str, anatomy: Anatomy, pieces: list[Piece]):
        self.spec, self.per, self.anatomy = spec, per, anatomy
        self.pieces = {piece.module: piece for piece in pieces}
        self.dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        self.input_kinds = [kind for kind in spec.kinds if kind in INPUT_KINDS]
        self.gradient_kinds = [kind for kind in spec.kinds if kind in GRADIENT_KINDS]
        self.leader: dict[str, str] = {}
        self.inputs: dict[str, _Sums] = {}
        self.gradients: dict[str, _Sums] = {}
        self.sequences = self.tokens = 0
        self._recent: deque[tuple[Tensor, str]] = deque(maxlen=_RECENT)
        self._masks: dict[str, Tensor | None] = {}
        self._heads = {
            a.matrices["o"]: a.heads for block in anatomy.blocks for a in block.attentions if "o" in a.matrices
        }
        cross = [a for block in anatomy.blocks for a in block.attentions if a.cross]
        self._from_encoder = {a.matrices[role] for a in cross for role in ("k", "v", "kv") if role in a.matrices}

    # ---- a pass

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name in self.pieces:
            module = model.get_submodule(self.anatomy.actual(name))
            handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._recent.clear()

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A batch comes: note its padding."""
        encoder, decoder = batch.get("attention_mask"), batch.get("decoder_attention_mask")
        self._masks = {"encoder": _flat_mask(encoder), "decoder": _flat_mask(decoder)}
        main = batch.get("input_ids", next((v for v in batch.values() if isinstance(v, Tensor)), None))
        if main is None:
            raise BadInput("A calibration batch holds no tensor.")
        mask = self._masks["encoder"]
        self.sequences += int(mask.any(dim=1).sum()) if mask is not None else main.shape[0]
        self.tokens += int(mask.sum()) if mask is not None else main.shape[:2].numel() if main.ndim == 2 else 0

    def end(self) -> None:
        """The batch is through."""
        self._recent.clear()

    def results(self) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """Means by kind and name, and the layers that never ran."""
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*self.input_kinds, *self.gradient_kinds)}
        for kind in self.input_kinds:
            done: dict[str, Tensor] = {}
            for name in self.pieces:
                leader = self.leader.get(name)
                if leader is not None and self.inputs[leader].count:
                    if leader not in done:
                        done[leader] = self._mean(kind, self.inputs[leader])
                    found[kind][name] = done[leader]
        for sums in self.gradients.values():
            for key, value in sums.sums.items():
                kind, _, parameter = key.partition(" ")
                found[kind][parameter] = value / sums.count
        ran = set(self.leader) | set(self.gradients)
        return found, [name for name in self.pieces if name not in ran]

    def _mean(self, kind: str, sums: _Sums) -> Tensor:
        mean = sums.sums[kind] / sums.count
        return mean.sqrt_() if kind == "input_norm" else mean

    # ---- one layer, one batch

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            leader = self._leader_of(name, x)
            if self.input_kinds and leader == name:
                self._add_input(name, x.detach())
            if self.gradient_kinds and output.requires_grad:
                held = x.detach()
                output.register_hook(lambda gradient: self._add_gradient(name, held, gradient))

        return hook

    def _leader_of(self, name: str, x: Tensor) -> str:
        """The first layer that got this very tensor; decided once per layer."""
        if name not in self.leader:
            same = (other for seen, other in self._recent if seen is x)
            self.leader[name] = next(same, name)
        if self.leader[name] == name:
            self._recent.append((x, name))
        return self.leader[name]

    def _mask(self, name: str) -> Tensor | None:
        block = self.anatomy.block_of(name)
        decoding = block is not None and "decoder" in block[0] and any("encoder" in s for s in self.anatomy.stacks)
        return self._masks["decoder" if decoding and name not in self._from_encoder else "encoder"]

    def _add_input(self, name: str, x: Tensor) -> None:
        sums = self.inputs.setdefault(name, _Sums())
        for rows in flat_sequences(x, self._mask(name)):
            values = self._normalized(name, rows.to(self.dtype))
            by_sequence = self.spec.weigh == "sequence"
            share = 1.0 / len(values) if by_sequence else 1.0
            for kind in self.input_kinds:
                if kind == "input_covariance":
                    sums.add(kind, values.T @ values)
                elif kind == "input_unit_norm":
                    heads = self._heads.get(name) or values.shape[1]
                    sums.add(kind, values.view(len(values), heads, -1).norm(dim=-1).sum(dim=0) * share)
                else:
                    sums.add(kind, _per_feature(kind, values) * share)
            sums.count += 1 if by_sequence else len(values)

    def _normalized(self, name: str, rows: Tensor) -> Tensor:
        if not bool(torch.isfinite(rows).all()):
            raise BadInput(f"The inputs of '{name}' are not finite on a calibration sequence; look at that row.")
        if self.spec.normalize == "none":
            return rows
        largest = rows.abs().max() if self.spec.normalize == "abs_max" else rows.max().abs()
        if float(largest) == 0:
            raise BadInput(
                f"A calibration sequence's largest input of '{name}' is 0, so it can't be divided by it. Use "
                "normalize: abs_max (or none), or leave out that row."
            )
        return rows / largest

    def _add_gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise BadInput(f"The gradients at '{name}' are not finite on a calibration batch; look at its rows.")
        piece, mask = self.pieces[name], self._mask(name)
        inputs = [rows.to(self.dtype) for rows in flat_sequences(x, mask)]
        grads = [rows.to(self.dtype) for rows in flat_sequences(gradient, mask)]
        if self.per == "batch":
            inputs, grads = [torch.cat(inputs)], [torch.cat(grads)]
        sums = self.gradients.setdefault(name, _Sums())
        for rows, grad in zip(inputs, grads):
            sums.count += len(rows) if self.per == "token" else 1
            for kind in self.gradient_kinds:
                for parameter in piece.parameters:
                    is_bias = parameter != piece.weight
                    value = _of_gradient(kind, None if is_bias else rows, grad, self.per == "token")
                    sums.add(f"{kind} {parameter}", value.T if piece.transposed and not is_bias else value)


def _flat_mask(mask: Any) -> Tensor | None:
    """(B, T) bool, or None where no two-dimensional mask is given."""
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _per_feature(kind: str, values: Tensor) -> Tensor:
    """(n,) sums over tokens."""
    if kind == "input_mean":
        return values.sum(dim=0)
    return values.abs().sum(dim=0) if kind == "input_abs" else values.square().sum(dim=0)


def _of_gradient(kind: str, x: Tensor | None, grad: Tensor, per_token: bool) -> Tensor:
    """(m, n) of the weight's gradient over one unit, or summed over its tokens as units; (m,) of the bias's."""

    def product(g: Tensor, rows: Tensor | None) -> Tensor:
        return g.sum(dim=0) if rows is None else g.T @ rows

    if kind == "gradient_sum":
        return product(grad, x)
    if kind == "gradient_abs":
        return product(grad.abs(), None if x is None else x.abs()) if per_token else product(grad, x).abs()
    return product(grad.square(), None if x is None else x.square()) if per_token else product(grad, x).square()
