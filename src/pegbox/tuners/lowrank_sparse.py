"""A low-rank update and a few single entries beside it, under one scale.

    y = W x + s (B A + S2) x,   s = alpha / r,   A ~ N(0, 0.02^2), B = 0, S2 = 0 with N trained positions

The tuner of DSEE (arXiv:2111.00160) on query and value matrices. It is one layer of the sparse tuner with a low-rank
site: no second sparse layer, N values and N positions, not a masked matrix. The positions come from `select:`; without
one (N = 0) this is LoRA, with r = 0 it is sparse tuning. It takes up what a preparation carried over from an earlier
adapter. What it does not do: prune (`prepare/prune.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from pegbox.errors import BadInput
from pegbox.parts.allocation import Allocation, Entries, PerTensor
from pegbox.parts.anatomy import Anatomy
from pegbox.parts.carried import Update, carried, take
from pegbox.parts.context import Context
from pegbox.parts.parameterinfo import touch
from pegbox.tuners.axis import TUNER
from pegbox.tuners.base import Tuner
from pegbox.tuners.sparse.tuner import SparseTuner

__all__ = ["LowRankSparse", "export_lora"]


@TUNER.register
class LowRankSparse(Tuner):
    """Low rank plus sparse.

    Args:
        r, alpha: rank and numerator of the scale s = alpha / r (alpha itself where r is 0).
        std: of A's first values.
        dropout: on the low-rank part's input.
        target_modules: where the low-rank part goes; entries of other matrices are refused.
        execution, values: as the sparse tuner's.
    """

    kind: Literal["lowrank_sparse"] = "lowrank_sparse"

    r: Annotated[int, Field(ge=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    std: Annotated[float, Field(gt=0)] = 0.02
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q", "v")
    execution: Literal["auto", "in_place", "scatter", "bypass", "lean"] = "auto"
    values: Literal["float32", "bfloat16"] = "float32"

    reproduces: ClassVar[str] = "arXiv:2111.00160"
    takes: ClassVar[frozenset[str]] = frozenset({"entries"})
    takes_up: ClassVar[bool] = True
    holds_vectors: ClassVar[bool] = False
    rewrites_base: ClassVar[bool] = True  # in place, between forwards
    merge: ClassVar[Literal["exact", "lossy", "no"]] = "lossy"

    @property
    def needs_floating_base(self) -> bool:  # type: ignore[override]
        """Writing entries and building weights need the base's own numbers."""
        return self.execution in {"in_place", "scatter"}

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.r if self.r else self.alpha

    def attach(self, model: nn.Module, allocation: Allocation | None, ctx: Context) -> nn.Module:
        """Raises `BadInput` for neither rank nor entries, entries outside the targets, and a carried update that does
        not fit."""
        from pegbox.tuners.peft_methods import attach_peft, task_type_of

        waiting = carried(model)
        given = self._allocation(model, allocation, waiting)
        config = SparseTuner(execution=self.execution, values=self.values).config(
            scale=self.scale, task_type=task_type_of(model)
        )
        wrapped = attach_peft(model, config.with_allocation(given))
        if waiting:
            _fill(wrapped, take(model), self.scale)
        return wrapped

    def _allocation(self, model: nn.Module, allocation: Allocation | None, waiting: dict[str, Update]) -> Allocation:
        anatomy = Anatomy.of(model)
        entries = {name: choice.index for name, choice in (allocation or {}).items() if isinstance(choice, Entries)}
        if waiting:  # the positions of before, as far as they are left
            entries = {f"{m}.weight": u.index for m, u in waiting.items() if u.index is not None}
        if not self.r and not any(index.numel() for index in entries.values()):
            raise BadInput("tuner 'lowrank_sparse' has neither a rank nor entries: set r, or give it a `select:`.")
        targets = _targets(anatomy, self.target_modules)
        outside = [name for name in entries if name.removesuffix(".weight") not in targets]
        if outside:
            raise BadInput(
                f"select chose entries of '{outside[0]}', and tuner.target_modules {list(self.target_modules)} leave "
                "it out. Give both the same modules."
            )
        given = Allocation()
        for module, rows in targets.items():
            index = entries.get(f"{module}.weight")
            if not self.r:
                if index is not None:
                    given[f"{module}.weight"] = Entries(index)
                continue
            sites = [self._site(part) for part in rows]
            shape = anatomy.piece(module).shape
            trained = sum(self.r * (shape[1] + (shape[0] if part is None else _count(part))) for part in rows)
            options = {"sites": sites, "trained": trained + (0 if index is None else index.numel())}
            given[f"{module}.weight"] = PerTensor("tuner", options, index)
        return given

    def _site(self, rows: list[list[int]] | None) -> dict[str, Any]:
        site = {"kind": "lora", "r": self.r, "scale": self.scale, "std": self.std, "dropout": self.dropout}
        return site if rows is None else {**site, "rows": rows}

    def reference(self, model: Any) -> AbstractContextManager[Any]:
        return model.disable_adapter()

    def save(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        return SparseTuner().save(model, folder)

    def load(self, model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
        return SparseTuner().load(model, folder, trainable=trainable)


def _targets(anatomy: Anatomy, words: tuple[str, ...]) -> dict[str, list[list[list[int]] | None]]:
    """module -> the row ranges of each part that trains (None: all rows). A fused matrix is cut by role."""
    found: dict[str, list[list[list[int]] | None]] = {}
    fused = [p for p in anatomy.pieces if p.kind == "linear" and p.block and set(p.slices) & set(words)]
    for piece in fused:
        found[piece.module] = [[list(r) for r in piece.slices[word]] for word in words if word in piece.slices]
    rest = [w for w in words if not any(w in p.slices for p in fused)]
    for module in anatomy.resolve(rest) if rest else []:
        if anatomy.piece(module).kind != "linear":
            raise BadInput(f"tuner.target_modules: '{module}' is no linear layer.")
        found[module] = [None]
    return found


def _count(rows: list[list[int]]) -> int:
    return sum(stop - start for start, stop in rows)


@torch.no_grad()
def _fill(wrapped: nn.Module, updates: dict[str, Update], scale: float) -> None:
    """Put first values in. The scale may have changed: the update stays what it was."""
    from pegbox.tuners.sparse.model import sparse_layers

    layers, name = sparse_layers(wrapped), str(wrapped.active_adapter)
    for module, update in updates.items():
        layer = layers.get(module)
        if layer is None:
            raise BadInput(f"An update of '{module}' was carried over, and the tuner has no layer there.")
        factor = update.scale / scale
        if update.values is not None:
            values = layer.sparse_values("weight", name)
            values.copy_(update.values * factor)
            touch([values])
        sites = layer.sites_of(name)
        if update.a is not None and update.b is not None:
            if len(sites) != 1 or sites[0].A.shape != update.a.shape or sites[0].B.shape != update.b.shape:
                raise BadInput(
                    f"The update of '{module}' that was carried over has rank {update.a.shape[0]}; set r to it."
                )
            sites[0].A.copy_(update.a)
            sites[0].B.copy_(update.b * factor)


def export_lora(model: Any, folder: Path) -> None:
    """Write the low-rank part alone as an ordinary PEFT LoRA adapter (the entries are left out)."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    from pegbox.tuners.sparse.model import sparse_layers

    name, tensors, ranks, scales = str(model.active_adapter), {}, set(), set()
    layers = {module: layer.sites_of(name) for module, layer in sparse_layers(model).items()}
    for module, sites in layers.items():
        if len(sites) != 1 or sites[0].rows is not None:
            raise BadInput(f"'{module}' has {len(sites)} low-rank parts or one over some rows; PEFT's LoRA holds one.")
        tensors[f"base_model.model.{module}.lora_A.weight"] = sites[0].A.detach().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = sites[0].B.detach().cpu().contiguous()
        ranks.add(sites[0].A.shape[0])
        scales.add(sites[0].scale)
    if len(ranks) != 1 or len(scales) != 1:
        raise BadInput("The model has no low-rank part of one rank and scale to export.")
    rank = ranks.pop()
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(r=rank, lora_alpha=scales.pop() * rank, target_modules=sorted(layers), inference_mode=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
