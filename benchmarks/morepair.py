"""What two views cost over one: seconds of a step, peak of saved bytes, NEFTune, and inference after merging.

    python benchmarks/morepair.py [--layers 6] [--tokens 256] [--rows 2] [--repeats 5]

A random Llama of SmolLM2-135M's blocks with LoRA on every linear layer. Both views have the same length, so two
forwards and backwards are the least there is. Targets: a step <= 2.1 x plain; peak of saved bytes, sequential, <= 1.05
x plain; noise <= 1 % of a step; the merged model has the base's parameters and FLOPs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write
from peft import LoraConfig, get_peft_model

from pegbox.objectives.base import Objective
from pegbox.objectives.token import Tokens
from pegbox.objectives.views import MultiView
from pegbox.parts.context import Context
from pegbox.parts.metering import measuring_flops, saved_bytes
from pegbox.tasks.views import CausalView

TARGETS = {"step": 2.1, "saved": 1.05, "noise": 1.01, "merged FLOPs": 1.0}


def batch_of(rows: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def side(first: int) -> dict[str, Any]:
        ids = torch.randint(0, 8192, (rows, tokens), generator=generator)
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        mask, numbers = torch.ones_like(ids), torch.arange(rows) + first
        common = {"sample_ids": numbers, "sample_weight": torch.ones(rows)}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **common}

    return {**side(0), "views": {"explain": side(rows)}}


def stepper(objective: Objective, model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward the way the engine does them: loss by loss where they share no graph."""
    view, state = CausalView(model), objective.setup(Context(model))
    totals = objective.count(batch)

    def job() -> None:
        for name, loss in objective.losses(state, view, batch, totals, None):
            if not name.startswith("_"):
                loss.backward()
        model.zero_grad()

    return job


def flops(model: Any, batch: dict[str, Any]) -> int:
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad(), measuring_flops() as meter:
        model(**inputs, use_cache=False)
    return int(meter.total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 6), ("tokens", 256), ("rows", 2), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = smollm_shaped(args.layers)
    batch = batch_of(args.rows, args.tokens)
    bare = flops(base, batch)
    config = LoraConfig(r=32, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    arms: dict[str, Objective] = {
        "plain": Tokens(),
        "lam 0": MultiView(views={"explain": 0.0}),
        "plain + noise": MultiView(views={"explain": 0.0}, neftune=5.0),
        "sequential": MultiView(),
        "joined": MultiView(execution="joined"),
    }
    jobs = {name: stepper(objective, model, batch) for name, objective in arms.items()}
    seconds = in_turns(jobs, args.repeats)
    peaks = {}
    for name, job in jobs.items():
        with saved_bytes(model) as saved:
            job()
        peaks[name] = saved.peak
    merged = model.merge_and_unload().eval()
    ratios = {
        "step": seconds["sequential"] / seconds["plain"],
        "step, joined": seconds["joined"] / seconds["plain"],
        "saved": peaks["sequential"] / peaks["plain"],
        "saved, joined": peaks["joined"] / peaks["plain"],
        "noise": seconds["plain + noise"] / seconds["plain"],
        "lam 0": seconds["lam 0"] / seconds["plain"],
        "merged FLOPs": flops(merged, batch) / bare,
    }
    write("morepair", {"sizes": vars(args), "seconds": seconds, "peak_saved_bytes": peaks, "ratios": ratios}, TARGETS)


if __name__ == "__main__":
    main()
