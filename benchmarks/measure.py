"""What every benchmark does alike: a model of SmolLM2-135M's block shape, fair timing, saved bytes, a result file.

Two things are compared in one process, in turns: what the machine does besides then meets both. Seconds are the
process's own CPU time unless wall time is asked for; ratios are of the medians, after one warm-up of each.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["in_turns", "machine", "saved_bytes", "smollm_shaped", "write"]

RESULTS = Path(__file__).parent / "results"
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def smollm_shaped(layers: int = 6, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with SmolLM2-135M's blocks, float32; vocabulary 8192, tied, unless `changes` say otherwise."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **{**SHAPE, "vocab_size": 8192, "num_hidden_layers": layers, "tie_word_embeddings": True, **changes}
        )
    )


def in_turns(
    jobs: Mapping[str, Callable[[], Any]], repeats: int = 5, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each job, all jobs run in turns `repeats` times after one warm-up of each."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(repeats + 1):
        for name, job in jobs.items():
            before = clock()
            job()
            if round_number:
                taken[name].append(clock() - before)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of distinct storages that `forward` saves for its backward pass, parameters left out."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # held, so that no storage is freed and its address used again
    del kept
    return sum(seen.values())


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": list(os.getloadavg()),
    }


def write(name: str, result: Mapping[str, Any], targets: Mapping[str, float] | None = None) -> None:
    """Write `results/<name>.json` and show it."""
    whole = {"machine": machine(), "targets": dict(targets or {}), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(whole, indent=1))
