"""Several slices adapters in one batch: each row of the batch goes through its own.

    columns    y_n = W x_n + D_a(n) x_n[I_a(n)]          rows    y_n = W x_n;  y_n[I_a(n)] += D_a(n) x_n

One product with W is shared by all rows; an adapter's part is one small product more (LoRA's are two, over all of x).
arXiv:2412.06289, parallel serving. Forward only; training goes through the tuner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput, Unsupported, WrongBase, did_you_mean
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.coupled import reordering_of
from pegbox.parts.slices import Slice, SliceSet
from pegbox.tuners.sparse.execution import base_facts

__all__ = ["ParallelAdapters", "gathered_product", "scattered_product"]


def gathered_product(x: Tensor, index: Tensor, blocks: Tensor) -> Tensor:
    """x_n[I_n] D_n^T. x (N, ..., in), index (N, s), blocks (N, out, s) -> (N, ..., out)."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    taken = flat.gather(2, index[:, None, :].expand(-1, flat.shape[1], -1))
    return torch.bmm(taken, blocks.transpose(1, 2)).reshape(*x.shape[:-1], blocks.shape[1])


def scattered_product(y: Tensor, x: Tensor, index: Tensor, blocks: Tensor) -> Tensor:
    """y_n with x_n D_n^T added at I_n. x (N, ..., in), index (N, s), blocks (N, s, in), y (N, ..., out)."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    part = torch.bmm(flat, blocks.transpose(1, 2)).to(y.dtype)
    at = index[:, None, :].expand(-1, flat.shape[1], -1)
    return y.reshape(len(y), -1, y.shape[-1]).scatter_add(2, at, part).reshape(y.shape)


class _Rows:
    """Which adapter each row of the present batch goes through: in the batch's order, and grouped."""

    def __init__(self, ids: Sequence[int], device: torch.device):
        self.count = len(ids)
        self.groups: list[tuple[int, Tensor | slice]] = []
        for adapter in sorted(set(ids) - {-1}):
            at = [n for n, a in enumerate(ids) if a == adapter]
            whole = at == list(range(at[0], at[0] + len(at)))
            self.groups.append((adapter, slice(at[0], at[0] + len(at)) if whole else torch.tensor(at, device=device)))


class _Served:
    """The blocks of all adapters on one linear layer, and what they add to its output."""

    def __init__(self, owner: ParallelAdapters, base: nn.Module, pieces: Mapping[int, Slice]):
        facts = base_facts(base)
        self.owner = owner
        self.parts = {a: self._prepared(piece, facts) for a, piece in pieces.items()}
        sizes = {(rows, len(index)) for rows, index, _ in self.parts.values()}
        self.stacked: tuple[bool, Tensor, Tensor] | None = None
        if len(sizes) == 1 and list(self.parts) == list(range(len(owner.adapters))):
            rows, index, block = (list(t) for t in zip(*self.parts.values(), strict=True))
            self.stacked = (rows[0], torch.stack(index), torch.stack(block))
            self.parts = {a: (rows[0], *(t[a] for t in self.stacked[1:])) for a in self.parts}

    @staticmethod
    def _prepared(piece: Slice, facts: Any) -> tuple[bool, Tensor, Tensor]:
        """(rows?, index, block as (out, s) or (s, in))."""
        transposed = facts.transposed and not facts.packed
        values = piece.values.t() if transposed else piece.values
        dtype = facts.dtype
        return (
            (piece.axis == 0) is not transposed,
            piece.index.to(facts.device),
            values.to(facts.device, dtype).contiguous(),
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        rows, x = self.owner.present, args[0]
        if rows is None:
            return y
        if y.requires_grad:
            raise Unsupported("Adapters served side by side don't train; run the model under torch.no_grad().")
        if len(x) != rows.count:
            if x.ndim != 2 or len(x) % rows.count:
                raise BadInput(f"A batch of {len(x)} rows, and adapters were named for {rows.count}.")
            x = x.view(rows.count, -1, x.shape[-1])  # (N T, in): tokens flattened by the model
            return self._add(rows, x, y.view(rows.count, -1, y.shape[-1])).flatten(0, 1)
        return self._add(rows, x, y)

    def _add(self, rows: _Rows, x: Tensor, y: Tensor) -> Tensor:
        if self.stacked is not None and self._one_each(rows):
            by_rows, index, blocks = self.stacked
            if by_rows:
                return scattered_product(y, x, index, blocks)
            return y + gathered_product(x, index, blocks)
        for adapter, at in rows.groups:
            part = self.parts.get(adapter)
            if part is None:
                continue
            by_rows, index, block = part
            if by_rows:
                y[at] = y[at].index_add(-1, index, nn.functional.linear(x[at], block).to(y.dtype))
            else:
                taken = x[at].index_select(-1, index)
                y[at] += nn.functional.linear(taken, block).to(y.dtype)
        return y

    def _one_each(self, rows: _Rows) -> bool:
        """Row n goes through adapter n, for all of them: the stacked blocks serve as they are."""
        return rows.count == len(self.parts) == len(rows.groups) and all(
            isinstance(at, slice) and at.start == a for a, at in rows.groups
        )


class ParallelAdapters:
    """Serves several adapters over one bare model.

        served = ParallelAdapters(model, {"law": a, "medicine": b})
        with served.rows(["law", "medicine", None]):
            model.generate(...)

    Args:
        model: the base, quantized or not; it stays as it is but for hooks, which `remove` takes off.
        adapters: name -> what `read_slices` or `export_slices` gives, in differences.

    Raises `WrongBase` for adapters that don't fit this model.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, SliceSet]):
        if reordering_of(model) is not None:
            raise Unsupported("The units of this model are re-ordered; adapters go by original numbers. Undo it first.")
        self.adapters = list(adapters)
        self.present: _Rows | None = None
        self.device = next(model.parameters()).device
        anatomy = Anatomy.of(model)
        pieces: dict[str, dict[int, Slice]] = {}
        for number, (name, adapter) in enumerate(adapters.items()):
            for parameter, piece in adapter.items():
                self._check(model, anatomy, name, parameter, piece)
                pieces.setdefault(parameter.removesuffix(".weight"), {})[number] = piece
        self.handles = []
        for module_name, mine in pieces.items():
            module = model.get_submodule(anatomy.actual(module_name))
            self.handles.append(module.register_forward_hook(_Served(self, module, mine)))

    @staticmethod
    def _check(model: nn.Module, anatomy: Anatomy, name: str, parameter: str, piece: Slice) -> None:
        module = parameter.removesuffix(".weight")
        known = {p.module for p in anatomy.pieces if p.kind == "linear"}
        if module not in known:
            raise WrongBase(
                f"Adapter '{name}' changes '{module}', which this model has not.{did_you_mean(module, known)}"
            )
        shape = base_facts(model.get_submodule(anatomy.actual(module))).shape
        if shape != piece.shape:
            raise WrongBase(f"Adapter '{name}': '{module}' has shape {shape} here and {piece.shape} in the adapter.")
        if piece.mode != "add":
            raise Unsupported(f"Adapter '{name}' holds values in absolute coordinates; serving needs differences.")

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """While active, row n of every batch goes through the adapter `names[n]` (None: the bare base)."""
        unknown = [n for n in names if n is not None and n not in self.adapters]
        if unknown:
            raise BadInput(f"No adapter '{unknown[0]}' is served.{did_you_mean(str(unknown[0]), self.adapters)}")
        before = self.present
        self.present = _Rows([-1 if n is None else self.adapters.index(n) for n in names], self.device)
        try:
            yield
        finally:
            self.present = before

    def remove(self) -> None:
        """Take the hooks off: the model is the bare base again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
