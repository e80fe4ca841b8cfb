"""ABMLL's cost over plain LoRA: a meta-step, its state, prediction by the mean and by samples.

    python benchmarks/abmll.py [--layers 6] [--repeats 3] [--out benchmarks/results/abmll.json]

A random Llama of SmolLM2-135M's block shape, vocabulary 8192, float32, one thread, 4 rows of 64 tokens per
micro-batch, rank 8 on queries and values. Seconds are the process's own CPU time, medians of alternating repeats after
a warm-up, per task: a LoRA step is one micro-batch's forward and backward and the optimizer's share; an episode is K
inner steps and the outer pass. Targets: episode <= 1.3 (K + 1) LoRA steps, 2.8 with K = 1; state 2 pairs of LoRA; mean
mode <= 1.05 LoRA's forward, M samples <= 1.3 M of it.
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
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.engine.problem import MicroLoss, StepProblem, total_counts
from pegbox.objectives.base import OBJECTIVE
from pegbox.optim.base import OPTIM
from pegbox.parts.context import Context
from pegbox.parts.priors import drawn
from pegbox.tasks.text import TextTask
from pegbox.tuners.axis import TUNER

RESULTS = Path(__file__).parent / "results" / "abmll.json"
TARGETS = {"episode_5": 1.3 * 6, "episode_1": 2.8, "state": 2.0, "mean_forward": 1.05, "ten_samples": 13.0}
TERMS = [{"kind": "kl_to_prior"}, {"kind": "prior"}]
ROWS, TOKENS = 4, 64


def wrapped(layers: int, block: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_hidden_layers=layers, **shape))
    return TUNER.validate(block).attach(model, None, Context(model=model))


def batch(number: int, query: int) -> dict[str, Any]:
    ids = torch.randint(8192, (ROWS, TOKENS), generator=torch.Generator().manual_seed(number))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "episode": torch.tensor([0, query]),
    }


def stepper(model: nn.Module, terms: list[Any], optim: dict[str, Any], queries: list[int]) -> Callable[[], None]:
    """One optimizer step over micro-batches."""
    objective = OBJECTIVE.validate({"terms": terms})
    ctx = Context(model=model, total_steps=1, tasks=("a", "b"))
    loss = MicroLoss(objective, objective.setup(ctx), TextTask().view(model), ctx)
    step = OPTIM.validate(optim)
    optimizer = step.optimizer([{"params": [(n, p) for n, p in model.named_parameters() if p.requires_grad]}])
    given, state = [batch(i, q) for i, q in enumerate(queries)], step.setup(ctx)
    model.train()

    def run() -> None:
        problem = StepProblem(loss, given, total_counts(objective, given), model, optimizer)
        optimizer.zero_grad()
        step.estimate(state, problem)
        optimizer.step()

    return run


def forwards(model: nn.Module, how: Any, count: int) -> Callable[[], None]:
    inputs = {k: v for k, v in batch(0, 0).items() if k in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def run() -> None:
        model.eval()
        with drawn(model, how):
            for _ in range(count):
                model(**inputs)

    return run


def medians(jobs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            if turn:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lora = wrapped(given.layers, {"kind": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]})
    ours = wrapped(given.layers, {"kind": "bayesian_lora", "r": 8, "target_modules": ["q_proj", "v_proj"]})
    jobs = {
        "lora step": stepper(lora, [], {"kind": "adamw"}, [0]),
        "episode 1": stepper(ours, TERMS, {"kind": "episodic", "inner": {"steps": 1}}, [0, 1]),
        "episode 5": stepper(ours, TERMS, {"kind": "episodic", "inner": {"steps": 5}}, [0, 1]),
    }
    seconds = medians(jobs, given.repeats)
    seconds |= medians(
        {
            "lora forward": forwards(lora, "mean", 1),
            "mean forward": forwards(ours, "mean", 1),
            "ten samples": forwards(ours, "sample", 10),
        },
        given.repeats,
    )
    state = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, lora)]
    found = {
        "episode_5": seconds["episode 5"] / seconds["lora step"],
        "episode_1": seconds["episode 1"] / seconds["lora step"],
        "state": state[0] / state[1],
        "mean_forward": seconds["mean forward"] / seconds["lora forward"],
        "ten_samples": seconds["ten samples"] / seconds["lora forward"],
    }
    rows = {k: {"ratio": round(v, 3), "target": TARGETS[k], "reached": v <= TARGETS[k]} for k, v in found.items()}
    whole = {"layers": given.layers, "seconds": seconds, "rows": rows, "machine": platform.platform()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
