"""Modules beside a matrix that an allocation gave a tuner of its own: a low-rank product, or a bottleneck behind it.

    lora     y <- y + drop_path(s B A drop(x))              A [r, in] kaiming-uniform (or normal), B [out, r] zeros
    adapter  y <- y + drop_path(U gelu(D drop(y) + d) + u)  D [r, out], U [out, r] zeros

They act on all outputs, or on some rows of a fused matrix. Both leave the layer as it is when they are new. A low-rank
site folds into the weight; a bottleneck is not linear and does not. Source of the placements: He et al.,
arXiv:2303.08566. What is here belongs to one adapter of one sparse layer; `held.py` keeps it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pegbox.errors import BadInput, Unsupported, WrongBase, did_you_mean
from pegbox.tuners.sparse.execution import BaseFacts

__all__ = ["Bottleneck", "LowRank", "make_sites"]

_OPTIONS = {"kind", "r", "dropout", "drop_path", "rows", "biases", "shape", "scale", "std"}


class _Site(nn.Module):
    """What both kinds share: the rows they act on, dropout, and a share of samples that is left alone."""

    rows: Tensor | None

    def __init__(self, rows: list[list[int]] | None, dropout: float, drop_path: float, channels: int):
        super().__init__()
        self.dropout, self.drop_path, self.channels = dropout, drop_path, channels
        at = None if rows is None else torch.cat([torch.arange(a, b) for a, b in rows])
        self.register_buffer("rows", at, persistent=False)

    def add(self, y: Tensor, change: Tensor) -> Tensor:
        """y (..., out) or (B, out, H, W) with the change of this site's rows added."""
        if self.training and self.drop_path:
            kept = torch.rand(len(change), *[1] * (change.ndim - 1), device=change.device) >= self.drop_path
            change = change * kept / (1 - self.drop_path)
        change = change.to(y.dtype)
        return y + change if self.rows is None else y.index_add(self.channels, self.rows, change)


class LowRank(_Site):
    """See the file's header. Of a convolution A is a kernel [r, in * kh * kw] and B mixes its channels."""

    mergeable = True

    def __init__(self, base: nn.Module, facts: BaseFacts, options: dict[str, Any], dtype: torch.dtype):
        outputs, inputs = _sizes(facts)
        conv = isinstance(base, nn.Conv2d)
        super().__init__(
            options.get("rows"), options.get("dropout", 0.0), options.get("drop_path", 0.0), 1 if conv else -1
        )
        count = outputs if self.rows is None else self.rows.numel()
        rank = int(options["r"])
        if rank >= min(inputs, count):
            raise BadInput(f"r = {rank} is no low rank for a {count} x {inputs} matrix. Lower it.")
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=facts.device))
        self.B = nn.Parameter(torch.zeros(count, rank, dtype=dtype, device=facts.device))
        self.scale, std = float(options.get("scale", 1.0)), options.get("std")
        if not self.A.is_meta:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5)) if std is None else nn.init.normal_(self.A, std=std)
        self._conv: tuple[Any, Any, Any, torch.Size] | None = None
        if isinstance(base, nn.Conv2d):
            self._conv = base.stride, base.padding, base.dilation, base.weight.shape[1:]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dropped = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        if self._conv is None:
            return self.add(y, self._scaled(F.linear(F.linear(dropped, self.A), self.B)))
        stride, padding, dilation, kernel = self._conv
        inner = F.conv2d(dropped, self.A.view(-1, *kernel), None, stride, padding, dilation)
        return self.add(y, self._scaled(F.conv2d(inner, self.B[:, :, None, None])))

    def _scaled(self, change: Tensor) -> Tensor:
        return change if self.scale == 1.0 else change * self.scale

    @torch.no_grad()
    def fold(self, weight: Tensor, transposed: bool) -> None:
        """Add B A into the weight, in place."""
        change = self._scaled(self.B @ self.A)
        matrix = weight.t() if transposed else weight.view(weight.shape[0], -1)
        if self.rows is None:
            matrix.copy_((matrix.to(change.dtype) + change).to(weight.dtype))
        else:
            matrix[self.rows] = (matrix[self.rows].to(change.dtype) + change).to(weight.dtype)


class Bottleneck(_Site):
    """See the file's header."""

    mergeable = False

    def __init__(self, base: nn.Module, facts: BaseFacts, options: dict[str, Any], dtype: torch.dtype):
        if isinstance(base, nn.Conv2d):
            raise Unsupported("an adapter site stands behind a linear layer; give a convolution a low-rank one.")
        super().__init__(options.get("rows"), options.get("dropout", 0.0), options.get("drop_path", 0.0), -1)
        count = _sizes(facts)[0] if self.rows is None else self.rows.numel()
        rank, biases = int(options["r"]), bool(options.get("biases", True))
        where: dict[str, Any] = {"dtype": dtype, "device": facts.device}
        self.D = nn.Parameter(torch.empty(rank, count, **where))
        self.U = nn.Parameter(torch.zeros(count, rank, **where))
        self.d = nn.Parameter(torch.zeros(rank, **where)) if biases else None
        self.u = nn.Parameter(torch.zeros(count, **where)) if biases else None
        if not self.D.is_meta:
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mine = y if self.rows is None else y.index_select(-1, self.rows)
        dropped = F.dropout(mine.to(self.D.dtype), self.dropout, self.training)
        return self.add(y, F.linear(F.gelu(F.linear(dropped, self.D, self.d)), self.U, self.u))


_KINDS = {"lora": LowRank, "adapter": Bottleneck}


def make_sites(
    base: nn.Module, facts: BaseFacts, blocks: list[dict[str, Any]], dtype: torch.dtype, name: str
) -> nn.ModuleList:
    """The modules that `blocks` describe: kind, r, and optionally dropout, drop_path, rows, biases, shape,
    scale and std (of a low-rank site: s, and the standard deviation that A is drawn with).

    Raises `BadInput` for what is not known, `WrongBase` where `shape` is another than the matrix has.
    """
    made = nn.ModuleList()
    for block in blocks:
        kind = str(block.get("kind"))
        if kind not in _KINDS:
            raise BadInput(f"{name}: a matrix can't get a '{kind}'.{did_you_mean(kind, _KINDS)}")
        if unknown := sorted(set(block) - _OPTIONS):
            raise BadInput(f"{name}: unknown option '{unknown[0]}'.{did_you_mean(unknown[0], _OPTIONS)}")
        if "shape" in block and tuple(block["shape"]) != facts.shape:
            raise WrongBase(f"{name} has shape {list(facts.shape)} here and {list(block['shape'])} in the allocation.")
        if facts.shape and (not facts.matrix or (isinstance(base, nn.Conv2d) and base.groups != 1)):
            raise Unsupported(f"{name}: only matrices and convolutions without groups can get a module.")
        made.append(_KINDS[kind](base, facts, block, dtype))
    return made


def _sizes(facts: BaseFacts) -> tuple[int, int]:
    """(outputs, inputs)."""
    first, rest = facts.shape[0], math.prod(facts.shape[1:])
    return (rest, first) if facts.transposed else (first, rest)
