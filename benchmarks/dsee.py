"""DSEE's cost: a tuning step over PEFT's LoRA, the decomposition of one matrix, a smaller dense model's latency.

    python benchmarks/dsee.py [--layers 4] [--repeats 5] [--full-decomposition]

Targets: step <= 1.15 of LoRA of the same rank, with saved bytes that grow by the entries only; decomposing 768 x 768 in
100 passes <= 25 s, with rank_cap 16 <= 1 s, on one core; latency <= 0.85 of dense at 25 % fewer counted FLOPs, batch 8,
length 128, BERT-base's block shape. CPU seconds, medians after one warm-up, all in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, saved_bytes, smollm_shaped, write
from torch import nn

from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.decompose import decompose_low_rank_sparse
from pegbox.parts.metering import measuring_flops
from pegbox.prepare import PREPARE
from pegbox.select import SELECT
from pegbox.tuners import TUNER

TARGETS = {
    "step_over_lora": 1.15,
    "decompose_100_passes_s": 25,
    "decompose_capped_s": 1,
    "latency_over_dense": 0.85,
}


def tuned(layers: int, entries: bool) -> nn.Module:
    """Ours, or PEFT's LoRA, rank 16 on q and v."""
    net = smollm_shaped(layers)
    if not entries:
        block = {"kind": "lora", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
        return TUNER.validate(block).attach(net, None, Context(net))
    selector = SELECT.validate({"kind": "random", "budget": {"count": 64}, "target_modules": ("q", "v")})
    chosen = selector.select(Anatomy.of(net), dict(net.named_parameters()), None, torch.Generator().manual_seed(0))
    return TUNER.validate({"kind": "lowrank_sparse"}).attach(net, chosen, Context(net))


def step_of(net: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(layers: int, repeats: int) -> dict[str, Any]:
    ids = torch.randint(0, 8192, (4, 128), generator=torch.Generator().manual_seed(1))
    nets = {"lora": tuned(layers, False), "lowrank_sparse": tuned(layers, True)}
    seconds = in_turns({name: step_of(net, ids) for name, net in nets.items()}, repeats)
    kept = {name: saved_bytes(lambda net=net: net(input_ids=ids, labels=ids).loss) for name, net in nets.items()}
    return {
        "seconds": seconds,
        "saved_bytes": kept,
        "step_over_lora": seconds["lowrank_sparse"] / seconds["lora"],
        "saved_over_lora": kept["lowrank_sparse"] / kept["lora"],
    }


def decompositions(complete: bool) -> dict[str, float]:
    w = 0.04 * torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    found = {"decompose_capped_s": _seconds(lambda: decompose_low_rank_sparse(w, rank_cap=16))}
    if complete:
        found["decompose_100_passes_s"] = _seconds(lambda: decompose_low_rank_sparse(w))
    return found


def _seconds(job: Callable[[], Any]) -> float:
    began = time.process_time()
    job()
    return time.process_time() - began


def latency(layers: int, repeats: int) -> dict[str, float]:
    """Blocks of BERT-base's shape: 3 of 12 heads and a third of the neurons leave."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, vocab_size=1000)
    dense, small = BertForSequenceClassification(config).eval(), BertForSequenceClassification(config).eval()
    block = {"kind": "prune", "mode": "W", "heads": 3, "neurons": 0.25}
    PREPARE.validate(block).apply(small, tuple, Context(small))
    ids = torch.randint(0, 1000, (8, 128), generator=torch.Generator().manual_seed(1))

    def forward(net: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                net(input_ids=ids)

        return run

    flops = {}
    for name, net in (("dense", dense), ("small", small)):
        with measuring_flops() as meter:
            forward(net)()
        flops[name] = meter.total
    seconds = in_turns({"dense": forward(dense), "small": forward(small)}, repeats)
    return {
        "flops_over_dense": flops["small"] / flops["dense"],
        "latency_over_dense": seconds["small"] / seconds["dense"],
        **{f"{name}_s": value for name, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full-decomposition", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "layers": args.layers,
        "repeats": args.repeats,
        "step": steps(args.layers, args.repeats),
        "decomposition": decompositions(args.full_decomposition),
        "latency": latency(args.layers, args.repeats),
    }
    write("dsee", result, TARGETS)


if __name__ == "__main__":
    main()
