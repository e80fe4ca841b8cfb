"""GreenTrainer's cost: FLOPs and time of a step at rho over full tuning, the selection's time, the importance pass.

    python benchmarks/greentrainer.py [--layers 6] [--repeats 5] [--rho 0.5]

A random Llama of SmolLM2-135M's block shape, vocabulary 8192, float32, one thread, AdamW, 8 rows of 128 tokens. Full
and budgeted steps alternate in one process; seconds are the process's own CPU time, medians after one warm-up. FLOPs
are counted. Targets: FLOPs rho +- 0.03, time at rho = 0.5 at most 0.65 of full, selecting 400 tensors in 1000 units at
most 50 ms, the importance pass at most two forward and backward passes and one optimizer step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import in_turns, saved_bytes, smollm_shaped, write
from torch import nn

from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.cost_trace import trace
from pegbox.parts.metering import measuring_flops, optimizer_state_bytes
from pegbox.parts.statistics_drop import tensor_importance
from pegbox.select import SELECT
from pegbox.select.knapsack_solve import knapsack_suffix, official_suffix
from pegbox.tuners.full import Full

TARGETS = {"flops_off_rho": 0.03, "seconds_over_full_at_half": 0.65, "select_400_ms": 50, "importance_over_steps": 1.0}


def loss_of(net: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return net(**batch).loss


def selected(net: nn.Module, batch: dict[str, torch.Tensor], rho: float) -> Any:
    selector = SELECT.validate({"kind": "knapsack", "rho": rho})
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-5)
    stats = selector.statistics().gather(net, [batch], loss_of, lambda: optimizer)
    return selector.select(Anatomy.of(net), dict(net.named_parameters()), stats, torch.Generator())


def made(layers: int, batch: dict[str, torch.Tensor], rho: float | None) -> tuple[nn.Module, Any, dict[str, Any]]:
    net = smollm_shaped(layers)
    allocation = None if rho is None else selected(net, batch, rho)
    Full().attach(net, allocation, Context(net))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-5)
    return net, optimizer, allocation.facts if allocation is not None else {}


def step_of(net: nn.Module, optimizer: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def steps(layers: int, repeats: int, rhos: list[float]) -> dict[str, Any]:
    ids = torch.randint(0, 8192, (8, 128), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    built = {"full": made(layers, batch, None), **{f"rho {rho}": made(layers, batch, rho) for rho in rhos}}
    seconds = in_turns({name: step_of(net, optimizer, batch) for name, (net, optimizer, _) in built.items()}, repeats)
    found: dict[str, Any] = {}
    for name, (net, optimizer, facts) in built.items():
        with measuring_flops() as flops:
            loss_of(net, batch).backward()
        net.zero_grad()
        found[name] = {
            "seconds": seconds[name],
            "seconds_over_full": seconds[name] / seconds["full"],
            "flops": flops.total,
            "saved_bytes": saved_bytes(lambda net=net: loss_of(net, batch)),
            "optimizer_state_bytes": optimizer_state_bytes(optimizer),
            **{key: facts[key] for key in ("rho_planned", "rho_counted") if key in facts},
        }
    for row in found.values():
        row["flops_over_full"] = row["flops"] / found["full"]["flops"]
    return found


def importance(layers: int, repeats: int) -> dict[str, float]:
    """The pass over two forward-backwards and one optimizer step, and the trace over a forward."""
    ids = torch.randint(0, 8192, (8, 128), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    net = smollm_shaped(layers)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-5)
    plain = step_of(net, optimizer, batch)

    def two_passes() -> None:
        loss_of(net, batch).backward()
        plain()

    def forward() -> None:
        with torch.no_grad():
            loss_of(net, batch)

    found = in_turns(
        {
            "two_passes_and_a_step": two_passes,
            "importance": lambda: tensor_importance(net, [lambda: loss_of(net, batch)], optimizer),
            "forward": forward,
            "trace": lambda: trace(net, lambda: loss_of(net, batch)),
        },
        repeats,
    )
    return {**found, "importance_over_steps": found["importance"] / found["two_passes_and_a_step"]}


def selecting(count: int = 400, units: int = 1000) -> dict[str, float]:
    """Milliseconds to choose among `count` tensors: the exact programme, and the published recursion."""
    numbers = np.random.default_rng(0)
    value, own, through = numbers.normal(size=count), numbers.random(count), numbers.random(count)
    scale = units / (own.sum() + through.sum())
    own_q, steps_q = np.ceil(own * scale).astype(int), np.ceil(through * scale).astype(int)
    limit = units // 2
    jobs = {
        "exact": lambda: knapsack_suffix(value, own_q, np.cumsum(steps_q), limit),
        "official": lambda: official_suffix(value, own_q, steps_q, limit),
    }
    return {name: 1000 * min(_wall(job) for _ in range(5)) for name, job in jobs.items()}


def _wall(job: Callable[[], Any]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.5, 0.7])
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "layers": args.layers,
        "repeats": args.repeats,
        "step": steps(args.layers, args.repeats, args.rho),
        "importance": importance(args.layers, max(1, args.repeats // 2)),
        "select_ms": selecting(),
    }
    write("greentrainer", result, TARGETS)


if __name__ == "__main__":
    main()
