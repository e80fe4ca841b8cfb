"""A tiny model, set and objective for the engine's tests; what they need of other axes is the real thing."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from pegbox.data.collate import PaddingCollator
from pegbox.engine import TrainSettings, train_stage
from pegbox.objectives.base import OBJECTIVE
from pegbox.optim.base import OPTIM
from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView
from pegbox.testing import tiny_llama

COLLATE = PaddingCollator(258)
gc.freeze()  # trainers collect garbage when they start; what was imported need not be walked each time


def examples(count: int = 20, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Random token rows of different lengths; the first three tokens are not trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(6, longest + 1, (1,), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "sample_id": i, "row_id": f"row{i:04d}"})
    return rows


def model(lora: bool = False, seed: int = 0, **overrides: Any) -> Any:
    """A tiny Llama with dropout, or LoRA with dropout on it."""
    base = tiny_llama(seed=seed, attn_implementation="eager", **overrides)
    if not lora:
        return base
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))


def stage(out: Path, *, net: Any = None, **options: Any) -> tuple[Any, Any]:
    """Run `train_stage` on the tiny model; returns (outcome, model). Options go to the settings or to the call."""
    net = model() if net is None else net
    fields = {k: options.pop(k) for k in list(options) if k in TrainSettings.model_fields}
    settings = TrainSettings(**{"steps": 4, "batch": 4, "micro_batch": 2, "device": "cpu", "probe": False, **fields})
    call: dict[str, Any] = {
        "view": CausalView,
        "train_set": examples(),
        "eval_set": None,
        "collator": COLLATE,
        "objective": OBJECTIVE.validate({"kind": "tokens", "token": {"kind": "sft"}}),
        "step": OPTIM.validate({"kind": "adamw", "lr": 1e-2, "schedule": "constant", "warmup": 0.0}),
        "policies": [],
        "ctx": Context(model=net, seed=settings.seed),
        "callbacks": [],
    }
    call |= options
    return train_stage(net, settings=settings, out=out, **call), net


def weights(net: Any) -> dict[str, torch.Tensor]:
    """Copies of the trained weights."""
    return {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
