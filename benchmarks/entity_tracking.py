"""Path patching beside its naive loop, and all heads of a real model.

    python benchmarks/entity_tracking.py [--model smollm2-135m-q4] [--prompts 32] [--boxes 7] [--out ...]

Naive: one sender and one run at a time, whole prompts through all blocks, as the definition is written. Ours: all
senders of a block side by side, from their block on, on the tokens that can differ. Seconds are medians of the
process's own CPU time on one thread; the naive loop on the real model is timed on a few senders and scaled. Targets: at
least 4 times faster on a 4-block, 8-head model with equal scores; all heads of SmolLM2-135M on 32 prompts within 5
minutes on two cores; of three tokens no more bytes than three tokens have.
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
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.analyze.circuits import (
    Head,
    HeadView,
    Patch,
    Prompts,
    attribution,
    capture,
    path_patching,
    rank_correlation,
)
from pegbox.analyze.circuits.activations import last_logits, taken
from pegbox.analyze.circuits.desiderata import as_prompts
from pegbox.analyze.circuits.paths import probabilities
from pegbox.models import load
from pegbox.parts.boxes import BoxTask

TARGETS = {"naive_over_ours": 4, "score_difference": 1e-5, "real_minutes_on_two_cores": 5}


@torch.no_grad()
def naive(
    view: HeadView, clean: Prompts, corrupt: Prompts, receivers: list[Head], position: str, senders: list[Head]
) -> Tensor:
    """Scores of some senders through the receivers' queries, or on the logits."""
    here, there = capture(view, clean), capture(view, corrupt)
    at, other, rows = clean.at(position), corrupt.at(position), torch.arange(len(clean))
    p_clean = probabilities(here.logits, clean.right())
    scores = torch.full((view.layers, view.heads), float("nan"), dtype=torch.float64)
    for sender in senders:
        held = [Patch(view.site("o", n), here["o", n]) for n in range(view.layers) if n != sender.layer]
        value, site = here["o", sender.layer].clone(), view.site("o", *sender)
        value[rows, at, site.columns] = there["o", sender.layer][rows, other, site.columns]
        held.append(Patch(view.site("o", sender.layer), value))
        seen = capture(view, clean, ("q",), at[:, None], held)
        logits = seen.logits
        if receivers:
            sites = {r: view.site("q", *r) for r in receivers}
            edits = [Patch(s, taken(seen["q", r.layer][:, 0], s), at) for r, s in sites.items()]
            logits = last_logits(view, clean, edits)
        scores[sender] = ((probabilities(logits, clean.right()) - p_clean) / p_clean).mean()
    return scores


def seconds(job: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    taken_, result = [], None
    for _ in range(repeats):
        before = time.process_time()
        result = job()
        taken_.append(time.process_time() - before)
    return statistics.median(taken_), result


def small(repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, initializer_range=0.1,
    )  # fmt: skip
    view = HeadView(LlamaForCausalLM(config).eval())
    draw = torch.Generator().manual_seed(0)
    sides = [torch.randint(3, 512, (16, 50), generator=draw) for _ in range(2)]
    answers = torch.randint(3, 512, (16,), generator=draw)
    clean, corrupt = (Prompts(ids, torch.ones_like(ids).bool(), {}, answers) for ids in sides)
    found: dict[str, Any] = {}
    for name, receivers in (("direct", []), ("through queries", [Head(3, 1), Head(2, 5)])):
        composition = "q" if receivers else None
        slow, scores = seconds(lambda r=receivers: naive(view, clean, corrupt, r, "last", view.all()), repeats)
        fast, ours = seconds(
            lambda r=receivers, c=composition: path_patching(view, clean, corrupt, receivers=r, composition=c), repeats
        )
        found[name] = {
            "naive_seconds": slow, "seconds": fast, "naive_over_ours": slow / fast, "forwards": ours.forwards,
            "score_difference": float((ours.scores - scores).abs().max()),
        }  # fmt: skip
    columns = torch.tensor([[10, 47, 49]]).expand(16, 3)
    found["bytes"] = {"three_tokens": capture(view, clean, ("o",), columns).nbytes, "all": capture(view, clean).nbytes}
    return found


def real(model: str, count: int, boxes: int) -> dict[str, Any]:
    net, tokenizer = load(model)[:2]
    view, worded = HeadView(net.eval()), BoxTask(boxes=boxes).worded(tokenizer)
    questions = worded.questions(count, 0)
    clean = as_prompts(worded.prompts(questions, 0), 0)
    corrupt = as_prompts(worded.prompts(worded.corrupted(questions, 0), 0), 0)
    found: dict[str, Any] = {"prompts": count, "tokens": clean.width, "heads": view.layers * view.heads}
    wall = time.perf_counter()
    took, direct = seconds(lambda: path_patching(view, clean, corrupt, batch=count), 1)
    found["direct"] = {"cpu_seconds": took, "wall_seconds": time.perf_counter() - wall, "forwards": direct.forwards}
    for name, position, composition in (("label by v", "label", "v"), ("previous label by v", "previous_label", "v")):
        receivers = [Head(view.layers - 3, 0), Head(view.layers // 2, 1)]
        wall = time.perf_counter()
        took, scores = seconds(
            lambda p=position, c=composition, r=receivers: path_patching(
                view, clean, corrupt, receivers=r, composition=c, position=p, batch=count
            ),
            1,
        )
        found[name] = {"cpu_seconds": took, "wall_seconds": time.perf_counter() - wall, "forwards": scores.forwards}
    took, guess = seconds(lambda: attribution(view, clean, corrupt, batch=count), 1)
    found["estimate"] = {"cpu_seconds": took, "rank_correlation": rank_correlation(guess, direct.scores)}
    few = view.all()[:: max(1, len(view.all()) // 3)][:3]
    slow, _ = seconds(lambda: naive(view, clean, corrupt, [], "last", few), 1)
    found["naive_direct_cpu_seconds_scaled"] = slow / len(few) * len(view.all())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-q4", help="'' leaves the real model out")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "entity_tracking.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = {"targets": TARGETS, "small": small(args.repeats)}
    print(json.dumps(record["small"], indent=1), flush=True)
    if args.model:
        record["real"] = {"model": args.model, **real(args.model, args.prompts, args.boxes)}
        print(json.dumps(record["real"], indent=1))
    record["machine"] = {
        "platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
