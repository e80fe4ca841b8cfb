"""HFT's cost over full fine-tuning: time of a step, FLOPs, gradient and optimizer bytes; time of drawing a split.

    python benchmarks/hft.py [--layers 12] [--repeats 3] [--out benchmarks/results/hft.json]

A random Llama of SmolLM2-135M's block shape, vocabulary 8192, float32, one thread, AdamW, 8 rows of 128 tokens.
Full and half steps alternate in one process; seconds are the process's own CPU time, medians of the repeats after one
warm-up. FLOPs are counted. Targets: step <= 0.90 of full, gradient + optimizer bytes <= 0.55 of full with embeddings
frozen, drawing below 50 ms for 1000 matrices.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.draws import draw, items_of
from pegbox.select import SELECT
from pegbox.tuners.full import Full

RESULTS = Path(__file__).parent / "results" / "hft.json"
TARGETS = {"step_over_full": 0.90, "bytes_over_full_frozen_embeddings": 0.55, "draw_ms_per_1000": 50}
ROWS = {"full": None, "half": {}, "half, embeddings frozen": {"always_on": []}}


def model(layers: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        **{**shape, "vocab_size": 8192, "num_hidden_layers": layers, "tie_word_embeddings": True, **changes}
    )
    config._attn_implementation = "eager"  # so that attention's products are counted
    return LlamaForCausalLM(config)


def attached(layers: int, options: dict[str, Any] | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = model(layers)
    allocation = None
    if options is not None:
        weights, generator = dict(net.named_parameters()), torch.Generator().manual_seed(0)
        selector = SELECT.validate({"kind": "half", **options})
        allocation = selector.select(Anatomy.of(net), weights, None, generator)
    Full().attach(net, allocation, Context(net))
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.1)


def step_of(net: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def cpu_seconds(job: Callable[[], None]) -> float:
    before = time.process_time()
    job()
    return time.process_time() - before


def counted(net: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> dict[str, int]:
    """FLOPs of forward and backward, bytes of gradients and optimizer state."""
    counter = FlopCounterMode(display=False)
    with counter:
        loss = net(input_ids=ids, labels=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    state = [t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t) and t.ndim]
    optimizer.zero_grad(set_to_none=True)
    size = sum(t.numel() * t.element_size() for t in [*grads, *state])
    return {"forward_flops": forward, "backward_flops": counter.get_total_flops() - forward, "bytes": size}


def steps(layers: int, repeats: int) -> dict[str, dict[str, float]]:
    ids = torch.randint(0, 8192, (8, 128), generator=torch.Generator().manual_seed(1))
    made = {name: attached(layers, options) for name, options in ROWS.items()}
    todo = {name: step_of(net, optimizer, ids) for name, (net, optimizer) in made.items()}
    taken: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(repeats + 1):
        for name, step in todo.items():
            seconds = cpu_seconds(step)
            if turn:
                taken[name].append(seconds)
    counts = {name: counted(net, optimizer, ids) for name, (net, optimizer) in made.items()}
    first = {"seconds": statistics.median(taken["full"]), **counts["full"]}
    found: dict[str, dict[str, float]] = {}
    for name in todo:
        trained = sum(p.numel() for p in made[name][0].parameters() if p.requires_grad)
        found[name] = {
            "seconds": statistics.median(taken[name]),
            "seconds_over_full": statistics.median(taken[name]) / first["seconds"],
            "flops_over_full": sum(counts[name][k] for k in ("forward_flops", "backward_flops"))
            / sum(first[k] for k in ("forward_flops", "backward_flops")),
            "bytes_over_full": counts[name]["bytes"] / first["bytes"],
            "trained": trained,
        }
    return found


def drawing(repeats: int) -> dict[str, float]:
    """Milliseconds per 1000 matrices: the draw alone, and with the anatomy's items looked up."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.device("meta"):
        anatomy = Anatomy.of(model(143, **small))  # 143 blocks of 7 matrices
    matrices = sum(1 for _ in anatomy.linears())
    categories = ("attention", "mlp", "norm")
    items = items_of(anatomy, categories)
    generator = torch.Generator().manual_seed(0)
    jobs = {
        "draw": lambda: draw(items, "category", 0.5, "count", generator),
        "draw_by_params": lambda: draw(items, "category", 0.5, "params", generator),
        "items_and_draw": lambda: draw(items_of(anatomy, categories), "category", 0.5, "count", generator),
    }
    return {
        name: 1000 * min(cpu_seconds(job) for _ in range(max(3, repeats))) * 1000 / matrices
        for name, job in jobs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "targets": TARGETS,
        "layers": args.layers,
        "repeats": args.repeats,
        "step": steps(args.layers, args.repeats),
        "draw_ms_per_1000": drawing(args.repeats),
        "machine": {"platform": platform.platform(), "processor": platform.processor(), "torch": torch.__version__},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: record[k] for k in ("step", "draw_ms_per_1000")}, indent=1))


if __name__ == "__main__":
    main()
