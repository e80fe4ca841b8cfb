"""SaRA's step over dense AdamW's on the same model; its bytes; the rank loss's cost; the threshold of many weights.

    python benchmarks/sara.py [--layers 6] [--tokens 128] [--repeats 9] [--weights 1e8]

A random Llama of SmolLM2-135M's block shape (see `measure.py`), float32, one thread, density 0.06. Targets: a step <=
1.15 of dense AdamW's; gradients and state <= density * 12 bytes per weight + the largest tensor's gradient (counted at
the peak of a backward pass); the rank loss <= 0.20 of a step; a global threshold over 1e8 weights <= 2 s and <= 1.1 * 4
bytes per weight.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write

from pegbox.optim.sparse_leaves import sara_adamw
from pegbox.parts.thresholds import quantile_threshold

DENSITY = 0.06
TARGETS = {
    "step_over_adamw": 1.15,
    "bytes_over_counted": 1.0,
    "rank_loss_over_step": 0.2,
    "threshold_seconds": 2.0,
    "threshold_bytes_over_weights": 1.1,
}


class GradientPeak:
    """Bytes of the model's and the leaves' gradients at once, followed through a backward pass."""

    def __init__(self, model: Any, optimizer: Any):
        self.model, self.optimizer, self.peak = model, optimizer, 0
        self.handles = [p.register_hook(self._arrives) for p in model.parameters() if p.requires_grad]

    def _arrives(self, grad: torch.Tensor) -> None:
        held = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        held += sum(x.values.grad.nbytes for x in self.optimizer.leaves.values() if x.values.grad is not None)
        self.peak = max(self.peak, held + grad.nbytes)


def threshold(count: int) -> dict[str, float]:
    named = {str(i): torch.randn(count // 10) for i in range(10)}
    tracemalloc.start()
    began = time.process_time()
    quantile_threshold(named, DENSITY)
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": seconds, "bytes_over_weights": peak / (4 * count)}


def rank_seconds(optimizer: Any, rounds: int = 20) -> float:
    """Mean CPU seconds of the nuclear norm's gradient on a randomly drawn matrix."""
    optimizer.lambda_rank, before = 5e-4, time.process_time()
    for optimizer.updates in range(rounds):
        optimizer._add_rank_gradient()
    return (time.process_time() - before) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--weights", type=float, default=1e8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(0, 8192, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    nets = {name: smollm_shaped(given.layers) for name in ("adamw", "sara")}
    optimizers: dict[str, Any] = {"adamw": torch.optim.AdamW(nets["adamw"].parameters(), 1e-4)}
    optimizers["sara"] = sara_adamw(nets["sara"], density=DENSITY, lambda_rank=0.0)

    def step(name: str) -> None:
        nets[name](input_ids=ids, labels=ids).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    seconds = in_turns({name: lambda name=name: step(name) for name in nets}, given.repeats)
    model, optimizer = nets["sara"], optimizers["sara"]
    meter = GradientPeak(model, optimizer)
    model(input_ids=ids, labels=ids).loss.backward()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    total = sum(p.numel() for p in model.parameters())
    counted = DENSITY * 12 * total + 4 * max(p.numel() for p in model.parameters())
    found = threshold(int(given.weights))
    write(
        "sara",
        {
            "layers": given.layers,
            "tokens": given.tokens,
            "weights": total,
            "seconds": seconds,
            "bytes": {"gradients_peak": meter.peak, "state": state, "counted": counted},
            "threshold": found,
            "ratios": {
                "step_over_adamw": seconds["sara"] / seconds["adamw"],
                "bytes_over_counted": (meter.peak + state) / counted,
                "rank_loss_over_step": rank_seconds(optimizer) / seconds["sara"],
                "threshold_seconds": found["seconds"],
                "threshold_bytes_over_weights": found["bytes_over_weights"],
            },
        },
        TARGETS,
    )


if __name__ == "__main__":
    main()
