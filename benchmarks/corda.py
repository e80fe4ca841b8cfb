"""What CorDA's preparation costs on SmolLM2-135M's shape: seconds by part, peak memory, stored bytes.

    python benchmarks/corda.py [--layers 30] [--samples 64] [--length 256] [--rank 32] [--out FILE]

A random model (time and memory don't depend on the weights), one thread, float64 decompositions. Seconds are the
process's own CPU time; the parts are measured by wrapping the functions that do them. Target: 64 sequences of 256
tokens under 5 minutes on one core, and never more than one block's covariances at a time. Writes
benchmarks/results/corda.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.parts.context import Context
from pegbox.parts.statistics_pass import Collector
from pegbox.prepare import PREPARE, corda

RESULTS = Path(__file__).parent / "results" / "corda.json"
TARGETS = {"cpu_seconds": 300}


def smollm2(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )
    )  # fmt: skip


class Timer:
    """CPU seconds spent inside functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - before

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, timer, held = smollm2(args.layers), Timer(), []

    original = Collector.results

    def results(self: Collector) -> Any:
        found = original(self)
        tensors = {id(t): t for t in found[0].get("input_covariance", {}).values()}
        held.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        return found

    Collector.results = results  # type: ignore[method-assign]
    corda.decompose = timer.wrap("decompositions", corda.decompose)
    corda.take_out = timer.wrap("taking out", corda.take_out)
    Collector._add_input = timer.wrap("covariances", Collector._add_input)  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (args.samples, args.length), generator=generator)
    component = PREPARE.validate({"kind": "corda", "rank": args.rank, "samples": args.samples})
    before = time.process_time()
    record = component.apply(model, lambda: [{"input_ids": part} for part in ids.split(8)], Context(model))
    total = time.process_time() - before
    stored = sum(t.numel() * t.element_size() for pair in record["factors"].values() for t in pair)
    matrices = len(record["factors"])
    parts = {name: round(seconds, 2) for name, seconds in timer.seconds.items()}
    parts["forward and the rest"] = round(total - sum(timer.seconds.values()), 2)
    row = {
        "cpu_seconds": round(total, 1),
        "parts": parts,
        "matrices": matrices,
        "covariance_bytes_at_once": max(held),
        "covariance_bytes_of_a_block": (3 * 576**2 + 1536**2) * 8,
        "stored_bytes": stored,
    }
    machine = {"platform": platform.platform(), "processor": platform.processor(), "torch": torch.__version__}
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    result = {"targets": TARGETS, "settings": settings, "result": row, "machine": machine}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
