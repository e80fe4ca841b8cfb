"""From an adapter over a decomposed base to an ordinary LoRA over the original one, of twice the rank.

    delta W = s B A - B0 A0 = [s B, -B0] [A; A0]

so anybody's PEFT can load it, without this package. Cut back to a smaller rank by SVD if asked, with the error told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pegbox.errors import BadInput, Corrupt, Unsupported
from pegbox.parts.files import write_json, write_tensors
from pegbox.prepare.corda import read_factors

__all__ = ["stacked", "to_plain_lora", "truncated"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def stacked(a: Tensor, b: Tensor, scale: float, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """(A' (2r, n), B' (m, 2r)) with B' A' = scale B A - B0 A0."""
    return torch.cat([a, a0.to(a)]), torch.cat([scale * b, -b0.to(b)], dim=1)


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A, B, error): the best factors of `rank` of B A, with || B A - B_r A_r ||_F / || B A ||_F."""
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    error = float((s[rank:].square().sum() / s.square().sum().clamp_min(1e-300)).sqrt())
    return (root[:, None] * (vt[:rank] @ qa.T)).to(a), ((qb @ u[:, :rank]) * root).to(b), error


def to_plain_lora(adapter: Path, record: Path, out: Path, rank: int | None = None) -> dict[str, float]:
    """Write a PEFT LoRA folder over the original base.

    Args:
        adapter: the trained adapter's folder. record: the preparation's folder (its A0, B0).
        out: a folder to write; it may exist if it is empty.
        rank: cut every matrix back to this rank; default: keep all 2r.

    Returns the relative error of each module's update (0 where nothing was cut). Raises `Corrupt`, `BadInput` for
    folders that don't belong together, `Unsupported` for LoRA variants whose update is not s B A.
    """
    config, tensors = _read(adapter)
    factors, _ = read_factors(record)
    written, errors, ranks = {}, {}, {}
    for name, (a0, b0) in factors.items():
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" not in tensors:
            raise BadInput(f"{adapter} has no adapter for '{name}', which {record} took a part out of.")
        a, b = tensors.pop(f"{key}.lora_A.weight"), tensors.pop(f"{key}.lora_B.weight")
        new_a, new_b = stacked(a, b, _scale(config, name, len(a)), a0, b0)
        errors[name] = 0.0
        if rank is not None and rank < len(new_a):
            new_a, new_b, errors[name] = truncated(new_a, new_b, rank)
        written[f"{key}.lora_A.weight"], written[f"{key}.lora_B.weight"] = new_a, new_b
        ranks[name] = len(new_a)
    if tensors:
        raise Unsupported(f"{adapter} also holds '{next(iter(tensors))}', which has no place in a plain LoRA.")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty; name a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / _WEIGHTS, written, metadata={"format": "pt"})
    write_json(out / _CONFIG, _plain_config(config, ranks))
    return errors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / _WEIGHTS))
    except Exception as error:
        raise Corrupt(f"{folder} is no readable adapter folder ({error}).") from error
    if config.get("peft_type") != "LORA":
        raise Unsupported(f"{folder} holds a '{config.get('peft_type')}' adapter; only LoRA can be converted.")
    for option in ("use_dora", "lora_bias"):
        if config.get(option):
            raise Unsupported(f"{folder} was trained with {option}, so its update is not s B A; merge it instead.")
    if config.get("use_rslora") and (config.get("rank_pattern") or config.get("alpha_pattern")):
        raise Unsupported("rank-stabilised scales with rank or alpha patterns can't be converted; merge instead.")
    return config, tensors


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """s of one module, by PEFT's rules for patterns."""
    alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)


def _plain_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Scale 1 everywhere: alpha = r of each module."""
    common = max(ranks.values(), key=list(ranks.values()).count)
    odd = {re.escape(name): r for name, r in ranks.items() if r != common}
    changes = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
    }
    return {**config, **changes}
