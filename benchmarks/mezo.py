"""MeZO's cost over inference: time of a step over two forwards, peak bytes over a forward, bytes a step on the disk.

    python benchmarks/mezo.py [--tokens 2048] [--repeats 3]

A random model of SmolLM2-135M's shape in float32, one thread. Forwards and steps alternate in one process, so that
drift of the machine hits both; seconds are the process's own CPU time, because other programs may run beside it. Peaks
are of fresh processes (the largest resident size): one that only runs forwards, and one a way of restoring the weights.
Writes benchmarks/results/mezo.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pegbox.optim import OPTIM
from pegbox.parts.context import Context

RESULTS = Path(__file__).parent / "results" / "mezo.json"
TARGETS = {"step_over_two_forwards": 1.25, "trajectory_bytes_a_step": 12, "peak_over_inference": "largest tensor"}


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Forwards:
    """A problem whose value is one forward over a fixed batch."""

    micro = 1

    def __init__(self, net: nn.Module, tokens: int):
        self.net, self.params = net, dict(net.named_parameters())
        self.ids = torch.randint(0, 49152, (max(1, tokens // 512), min(512, tokens)))

    @torch.no_grad()
    def value(self) -> float:
        logits = self.net(input_ids=self.ids).logits
        return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()))


def stepper(net: nn.Module, **options: Any) -> tuple[Callable[[Any], Any], Any, Any]:
    step = OPTIM.validate({"kind": "mezo", **options})
    state = step.setup(Context(model=net, total_steps=100))
    return (lambda problem: step.estimate(state, problem)), step, state


def seconds(job: Callable[[], Any]) -> float:
    before = time.process_time()
    job()
    return time.process_time() - before


def times(tokens: int, repeats: int) -> dict[str, Any]:
    net = model().eval()
    problem = Forwards(net, tokens)
    ways = {name: stepper(net, restore=name)[0] for name in ("in_place", "exact")}
    for take in ways.values():
        take(Forwards(net, 8))  # the first step hashes the weights
    measured: dict[str, list[float]] = {"two_forwards": [], **{name: [] for name in ways}}
    for _ in range(repeats):
        measured["two_forwards"].append(seconds(lambda: (problem.value(), problem.value())))
        for name, take in ways.items():
            measured[name].append(seconds(lambda take=take: take(problem)))
    medians = {name: statistics.median(values) for name, values in measured.items()}
    ratios = {name: medians[name] / medians["two_forwards"] for name in ways}
    return {"tokens": problem.ids.numel(), "seconds": medians, "step_over_two_forwards": ratios}


def peak(kind: str, tokens: int) -> int:
    """Largest resident bytes of a fresh process that runs forwards ("inference") or steps."""
    command = [sys.executable, __file__, "--child", kind, "--tokens", str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(kind: str, tokens: int) -> int:
    net = model().eval()
    problem = Forwards(net, tokens)
    if kind == "inference":
        for _ in range(2):
            problem.value()
    else:
        stepper(net, restore=kind)[0](problem)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trajectory_bytes(steps: int = 1000) -> dict[str, float]:
    """Bytes a step of the file that a run on the full model leaves, without its header."""
    net = model().eval()
    take, step, state = stepper(net, restore="exact")
    problem = Forwards(net, 8)
    take(problem)
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (0, steps):
            for i in range(count):
                state.trajectory.append([i], [0.1], 1e-6)
            step.save(state, Path(folder))
            sizes.append(sum(p.stat().st_size for p in Path(folder).iterdir()))
    return {"a_step": (sizes[1] - sizes[0]) / steps, "header": sizes[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["time", "memory"], help="measure this alone and keep the other in the file")
    parser.add_argument("--child")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        sys.stdout.write(str(child(given.child, given.tokens)))
        return
    result: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "threads": 1, "torch": torch.__version__},
        "targets": TARGETS,
    }
    if given.only != "memory":
        result["time"] = times(given.tokens, given.repeats)
    if given.only != "time":
        peaks = {kind: peak(kind, given.tokens) for kind in ("inference", "in_place", "exact")}
        result["peak_bytes"] = peaks
        result["peak_over_inference"] = {k: peaks[k] - peaks["inference"] for k in ("in_place", "exact")}
        result["largest_tensor_bytes"] = max(p.numel() * p.element_size() for p in model().parameters())
        result["trajectory_bytes"] = trajectory_bytes()
    RESULTS.parent.mkdir(exist_ok=True)
    if given.only and RESULTS.is_file():
        result = json.loads(RESULTS.read_text()) | result
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
