"""What the Bayesian data scheduler costs: seconds of a step over plain tuning and over the unweighted mix, and bytes.

    python benchmarks/bds.py [--layers 6] [--repeats 5] [--rows 2000]

A random Llama of SmolLM2-135M's block shape, vocabulary 8192, float32, one thread, 4 user and 4 trusted rows of 128
tokens. A step is the policy's batch, forward, backward, and the scheduler's own step. Targets: scalar <= 2.1 of plain
tuning and <= 1.02 of the mix; memory 3 numbers of 4 bytes per row. A neural scheduler (one block) is measured beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write

from pegbox.data.base import DATA
from pegbox.data.collate import PaddingCollator
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.parts.metering import optimizer_state_bytes
from pegbox.parts.rowsource import RowSource
from pegbox.tasks.views import CausalView

TARGETS = {"scalar_over_sft": 2.1, "scalar_over_mix": 1.02, "bytes_per_row": 12}
COLLATE = PaddingCollator(0)


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(first)
    found = []
    for i in range(count):
        ids = torch.randint(1, 8192, (128,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, *ids[1:]], "sample_id": first + i})
    return found


def stepper(net: Any, train: RowSource, **options: Any) -> tuple[Callable[[], None], Any]:
    policy = DATA.validate({"kind": "bayesian_scheduler", "safe": "made here", **options})
    objective = OBJECTIVE.validate({"kind": "task_balanced", "mode": "case2"})
    at, view = [0], CausalView(net)
    streams = {"train": train, "safe": RowSource(rows(64, 100_000), COLLATE)}
    ctx = Context(net, total_steps=1000, step=lambda: at[0], streams=streams, tasks=("all",))
    ctx.roles = {"scheduler": smollm_shaped(1, seed=1)}
    state, told = policy.setup(ctx), objective.setup(ctx)

    def step() -> None:
        batch = policy.on_batch(state, train.batch([(4 * at[0] + i) % len(train) for i in range(4)]), ctx)
        parts = dict(objective.losses(told, view, batch, objective.count(batch), None))
        parts["tokens"].backward()
        policy.observe(state, batch["sample_ids"], {"sample_ce": parts["_sample_ce"].detach()})
        net.zero_grad(set_to_none=True)
        at[0] += 1

    return step, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, train = smollm_shaped(args.layers), RowSource(rows(args.rows), COLLATE)
    scalar, state = stepper(net, train)
    small = RowSource(rows(64), COLLATE)
    jobs = {
        "sft": stepper(net, train, mode="sft")[0],
        "mix": stepper(net, train, mode="anchored")[0],
        "scalar": scalar,
        "neural": stepper(net, small, scheduler="neural")[0],
    }
    seconds = in_turns(jobs, args.repeats)
    held = 4 * args.rows + optimizer_state_bytes(state.scheduler.optimizer)
    result = {
        "layers": args.layers,
        "seconds": seconds,
        "scalar_over_sft": seconds["scalar"] / seconds["sft"],
        "scalar_over_mix": seconds["scalar"] / seconds["mix"],
        "neural_over_mix": seconds["neural"] / seconds["mix"],
        "bytes_per_row": held / args.rows,
    }
    write("bds", result, TARGETS)


if __name__ == "__main__":
    main()
