"""What balanced losses and packed rows cost and save, in one process.

    python benchmarks/mftcoder.py [--layers 6] [--repeats 5] [--vocabulary 8192]

A random Llama of SmolLM2-135M's block shape, float32, one thread, LoRA-like frozen head off: all weights train. Steps:
plain cross-entropy, case3, FAMO (next step's losses; re-evaluated), CoBa every step and every 20th, focal; one step is
forward, backward and what the balance does around it. Layouts: 256 rows of skewed lengths, padded in batches of 16
against best-fit rows of 512: padding's share of the tokens, and useful tokens per second of forward and backward.
Targets: case3 <= 1.02 plain; FAMO with the next step's losses and CoBa at 20 <= 1.03; FAMO re-evaluated <= 1.4; padding
share <= 0.10 packed where padded has >= 0.60; useful tokens per second >= 2 x padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write
from torch import nn

from pegbox.data.collate import PaddingCollator
from pegbox.data.layouts import arranged
from pegbox.objectives.base import OBJECTIVE, StepView
from pegbox.parts.context import Context
from pegbox.parts.rowsource import RowSource
from pegbox.tasks.views import CausalView

TARGETS = {"case3": 1.02, "famo next": 1.03, "coba 20": 1.03, "famo again": 1.4, "padding packed": 0.1, "speed": 2.0}
COLLATE = PaddingCollator(0)
TASKS = ("a", "b", "c")


def rows(lengths: list[int], vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        made.append(
            {"input_ids": ids, "labels": [-100, *ids[1:]], "sample_id": i, "task_id": i % 3, "task": "abc"[i % 3]}
        )
    return made


def stepper(net: nn.Module, batch: dict[str, Any], block: dict[str, Any], source: RowSource) -> Callable[[], None]:
    """One optimizer step's work without the optimizer's own."""
    objective, view = OBJECTIVE.validate(block), CausalView(net)
    ctx = Context(net, tasks=TASKS, streams={"validation": source})
    state, done = objective.setup(ctx), [0]

    def step() -> None:
        totals = objective.count(batch)
        around = StepView(view, [batch], totals, done[0])
        with torch.no_grad():
            objective.before_step(state, around)
        parts = [v for n, v in objective.losses(state, view, batch, totals, None) if not n.startswith("_")]
        sum(parts[1:], parts[0]).backward()
        with torch.no_grad():
            objective.after_step(state, around)
        net.zero_grad(set_to_none=True)
        done[0] += 1

    return step


def balance_seconds(layers: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    net = smollm_shaped(layers, vocab_size=vocabulary)
    batch = COLLATE(rows([128] * 8, vocabulary))
    source = RowSource(rows([128] * 8, vocabulary, seed=1), COLLATE)

    def balanced(**options: Any) -> dict[str, Any]:
        return {"kind": "task_balanced", **options}

    coba = {"kind": "coba", "warmup": 2, "history_length": 50, "rows": 8}
    blocks = {
        "plain": {},
        "case3": balanced(),
        "focal": balanced(mode="focal_sample"),
        "famo next": balanced(balance={"kind": "famo", "reevaluate": False}),
        "famo again": balanced(balance={"kind": "famo"}),
        "coba 1": balanced(balance={**coba, "interval": 1}),
    }
    jobs = {name: stepper(net, batch, block, source) for name, block in blocks.items()}
    seconds = in_turns(jobs, repeats)
    ratios = {name: value / seconds["plain"] for name, value in seconds.items()}
    ratios["coba 20"] = 1 + (ratios["coba 1"] - ratios["case3"]) / 20 + (ratios["case3"] - 1)
    return {"seconds": seconds, "over_plain": ratios}


def packing(layers: int, vocabulary: int, count: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in 8 + 400 * torch.rand(count, generator=generator) ** 6]
    made, net = rows(lengths, vocabulary), smollm_shaped(layers, vocab_size=vocabulary)
    for row in made:
        row["task_id"], row["task"] = 0, "a"
    packed = arranged(made, "best_fit", 511, report=False)
    batches = {
        "padded": [COLLATE(made[i : i + 16]) for i in range(0, count, 16)],
        "packed": [COLLATE(packed[i : i + 4]) for i in range(0, len(packed), 4)],
    }
    objective, view = OBJECTIVE.validate({}), CausalView(net)

    def job(name: str) -> Callable[[], None]:
        def passes() -> None:
            for batch in batches[name]:
                next(objective.losses(None, view, batch, objective.count(batch), None))[1].backward()
                net.zero_grad(set_to_none=True)

        return passes

    seconds = in_turns({name: job(name) for name in batches}, max(1, repeats // 3))
    useful = sum(lengths)
    share = {name: 1 - useful / sum(b["input_ids"].numel() for b in batches[name]) for name in batches}
    speed = {name: useful / seconds[name] for name in batches}
    return {"padding_share": share, "useful_tokens_per_second": speed, "speed_ratio": speed["packed"] / speed["padded"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    write(
        "mftcoder",
        {
            "layers": args.layers,
            "balances": balance_seconds(args.layers, args.vocabulary, args.repeats),
            "packing": packing(args.layers, args.vocabulary, args.rows, args.repeats),
        },
        TARGETS,
    )


if __name__ == "__main__":
    main()
