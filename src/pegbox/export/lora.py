"""Any run as a LoRA adapter that plain PEFT loads: the best low-rank approximation of what changed.

    D = W_tuned - W_base,    D ~ B A with B = U_r S_r^(1/2), A = S_r^(1/2) V_r^T,    error = ||D - B A||_F / ||D||_F

Linear layers and embeddings take the low-rank form; other modules that changed (norms) are kept whole; a changed bias
of a linear layer has no place in either and is named in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pegbox.errors import BadInput
from pegbox.export.card import write_export_card
from pegbox.export.differences import compare_logits, logits_of, prompt_ids
from pegbox.export.tuned import open_tuned, plain_model, tuned_tensors
from pegbox.models import load
from pegbox.parts.files import staged_folder
from pegbox.parts.lowrank import svd

__all__ = ["Approximation", "approximate_update", "export_lora"]


@dataclass(frozen=True)
class Approximation:
    """b (m, r) and a (r, n) with b a near an update; square: ||D||_F^2; error_square: ||D - b a||_F^2."""

    b: Tensor
    a: Tensor
    square: float
    error_square: float

    @property
    def error(self) -> float:
        """Relative, in the Frobenius norm."""
        return (self.error_square / self.square) ** 0.5 if self.square else 0.0


def approximate_update(update: Tensor, rank: int) -> Approximation:
    """The best approximation of a matrix (m, n) by one of at most `rank`.

    Singular values that are rounding are dropped. The error is exact: the singular values left out.
    """
    found = svd(update)
    floor = float(found.s[0]) * max(update.shape) * torch.finfo(found.s.dtype).eps
    kept = max(1, min(rank, int((found.s > floor).sum())))
    root = found.s[:kept].sqrt()
    squares = found.s.double().square()
    return Approximation(
        b=found.u[:, :kept] * root,
        a=root[:, None] * found.v[:, :kept].mT,
        square=float(squares.sum()),
        error_square=float(squares[kept:].sum()),
    )


@dataclass
class _Split:
    """What changed, by the form it takes."""

    low: dict[str, Approximation] = field(default_factory=dict)  # module name -> factors
    whole: dict[str, nn.Module] = field(default_factory=dict)  # module name -> the base's module
    values: dict[str, Tensor] = field(default_factory=dict)  # tensor name -> tuned values, for whole modules
    left_out: dict[str, float] = field(default_factory=dict)  # tensor name -> ||D||_F


def export_lora(
    run: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int = 64,
    check: bool = True,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Write a PEFT LoRA adapter of at most `rank` for the run's base.

    Returns:
        folder, bytes, the rank, the relative error over all tensors and the worst tensors' (and all, by name), what was
        kept whole or left out, and, checked, the logit differences.

    Raises:
        Unsupported: the update has no form as weights. BadInput: nothing changed.
    """
    opened = open_tuned(run, base=base, device=device)
    ids = prompt_ids(opened.tokenizer, prompts, plain_model(opened.model).config.vocab_size)
    expected = logits_of(opened.model, ids) if check else []
    root = opened.manifest.root
    bare = load(opened.source, device=device, precision="fp32", task=root.task, model_kwargs=root.model_kwargs).model
    split = _split(bare, opened.model, rank)
    if not split.low and not split.whole:
        raise BadInput(f"'{run}' equals its base in every tensor, so there is no update to export.")
    tuned = _attach(bare, split, rank)
    report = _report(split, rank)
    with staged_folder(Path(out)) as place:
        tuned.save_pretrained(str(place), save_embedding_layers=False)
        if opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(place)
        write_export_card(place, opened, f"LoRA of rank {rank} by singular value decomposition", report)
    measured = compare_logits(expected, logits_of(tuned, ids)) if check else {}
    size = (Path(out) / "adapter_model.safetensors").stat().st_size
    return {"folder": str(out), "bytes": size, **report, **measured}


@torch.no_grad()
def _split(bare: nn.Module, tuned: nn.Module, rank: int) -> _Split:
    split = _Split()
    state = bare.state_dict()
    for name, tensor in tuned_tensors(tuned):
        if torch.equal(tensor, state[name]):
            continue
        owner, _, leaf = name.rpartition(".")
        module = bare.get_submodule(owner)
        update = (tensor - state[name]).float()
        if leaf == "weight" and _takes_lora(module):
            split.low[owner] = approximate_update(_as_out_in(module, update), rank)
        elif _takes_lora(module):
            split.left_out[name] = float(torch.linalg.vector_norm(update))
        else:
            split.whole[owner] = module
            split.values[name] = tensor.clone()
    return split


def _takes_lora(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _as_out_in(module: nn.Module, update: Tensor) -> Tensor:
    """(out, in): what B A stands for. PEFT's embedding holds W^T, transformers' Conv1D too."""
    from transformers.pytorch_utils import Conv1D

    return update.T if isinstance(module, nn.Embedding | Conv1D) else update


def _attach(bare: nn.Module, split: _Split, rank: int) -> Any:
    """A PEFT model that carries the factors; scaling is 1 throughout."""
    from peft import LoraConfig, get_peft_model

    from pegbox.tuners.peft_methods import task_type_of

    ranks = {name: approximation.a.shape[0] for name, approximation in split.low.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks) or ["none"],
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        modules_to_save=sorted(split.whole) or None,
        task_type=task_type_of(bare),
    )
    model: Any = get_peft_model(bare, config)
    inner = model.get_base_model()
    for name, approximation in split.low.items():
        _set_factors(inner.get_submodule(name), approximation)
    with torch.no_grad():
        for name, value in split.values.items():
            owner, _, leaf = name.rpartition(".")
            inner.get_submodule(owner).modules_to_save["default"].get_parameter(leaf).copy_(value)
    return model


@torch.no_grad()
def _set_factors(layer: Any, approximation: Approximation) -> None:
    if "default" in layer.lora_embedding_A:
        layer.lora_embedding_A["default"].copy_(approximation.a)
        layer.lora_embedding_B["default"].copy_(approximation.b)
    else:
        layer.lora_A["default"].weight.copy_(approximation.a)
        layer.lora_B["default"].weight.copy_(approximation.b)


def _report(split: _Split, rank: int) -> dict[str, Any]:
    square = sum(a.square for a in split.low.values()) + sum(n * n for n in split.left_out.values())
    error = sum(a.error_square for a in split.low.values()) + sum(n * n for n in split.left_out.values())
    errors = {name: approximation.error for name, approximation in split.low.items()}
    return {
        "rank": rank,
        "relative_error": (error / square) ** 0.5 if square else 0.0,
        "largest_tensor_error": max(errors.values(), default=0.0),
        "tensors": len(errors),
        "kept_whole": sorted(split.whole),
        "left_out": sorted(split.left_out),
        "errors": errors,
    }
