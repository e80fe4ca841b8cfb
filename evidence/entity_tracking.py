"""Evidence for entity tracking: fine-tuning sharpens the circuit that the base has; it builds no new one.

Claims (arXiv:2402.14811), on a small model: E1 the base's pruned circuit is faithful (at least 0.85 of the base's
accuracy), and random circuits of its size are not (at most half of it). E2 the base's circuit in the tuned model does
better than the whole base, by 0.15. E3 at least 0.7 of the tuned model's own circuit lies in the base's. E4 the tuned
model's activations at the circuit's heads, moved into the base, close at least 0.7 of the gap.

A two-block Llama (4 heads, D 64) learns compact boxes ("label object" n times, ".", then queries): 2 boxes until 98 %,
4 boxes until it answers 7 boxes in 60 % of cases (the base), then 150 steps on 7 boxes (tuned). All heads at the
query, at the queried object and at the token behind it are pruned backwards with everything else at its mean. What is
found on one set of prompts is measured on another. From scratch 4 boxes stay at chance for thousands of steps.

    python evidence/entity_tracking.py [--seeds 5] [--out evidence/results/entity_tracking.json]
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import warnings
from typing import Any

import torch
from record import arguments, verdict, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.analyze.circuits import (
    Ablation,
    Circuit,
    HeadView,
    Prompts,
    accuracy,
    cross_accuracy,
    gap_closed,
    head_means,
    prune,
    random_circuits,
)  # fmt: skip
from pegbox.parts.pairs import ModelPair

LABELS, OBJECTS, STOP = 8, 24, 32
POSITIONS = ["last", "object", "next"]  # "next": the token behind the object, where some bases pass it on
FIRST = 5  # seeds 0 to 4 were used to choose the positions and how many prompts the pruning needs
LIMITS = {"two": 2000, "four": 400}  # steps; where seven boxes are reached at all, some 30 on four do it


def context(rows: int, boxes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, boxes) label and object ids, distinct in a row."""
    labels = torch.rand(rows, LABELS, generator=generator).argsort(1)[:, :boxes]
    objects = torch.rand(rows, OBJECTS, generator=generator).argsort(1)[:, :boxes] + LABELS
    return labels, objects


def training_rows(rows: int, boxes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids, targets): the context, ".", and all boxes as queries in any order; the loss is on their objects."""
    labels, objects = context(rows, boxes, generator)
    order = torch.rand(rows, boxes, generator=generator).argsort(1)
    pairs = torch.stack([labels, objects], -1).flatten(1)
    queries = torch.stack([labels.gather(1, order), objects.gather(1, order)], -1).flatten(1)
    ids = torch.cat([pairs, torch.full((rows, 1), STOP), queries], 1)
    targets = torch.full_like(ids, -100)
    targets[:, 2 * boxes + 1 :: 2] = objects.gather(1, order)
    return ids, targets


def questions(rows: int, boxes: int, seed: int) -> Prompts:
    """One query a row, its label as the last token; the queried box runs over all places."""
    generator = torch.Generator().manual_seed(seed)
    labels, objects = context(rows, boxes, generator)
    asked = torch.arange(rows) % boxes
    pairs = torch.stack([labels, objects], -1).flatten(1)
    query = labels.gather(1, asked[:, None])
    ids = torch.cat([pairs, torch.full((rows, 1), STOP), query], 1)
    answers = objects.gather(1, asked[:, None])[:, 0]
    return Prompts(
        ids, torch.ones_like(ids, dtype=torch.bool), {"object": 2 * asked + 1, "next": 2 * asked + 2}, answers
    )


def small_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=STOP + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.12, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip


def train(
    model: nn.Module, boxes: int, steps: int, rate: float, generator: torch.Generator, optimizer: Any = None
) -> Any:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=rate)
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    for _ in range(steps):
        ids, targets = training_rows(64, boxes, generator)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return optimizer


def curriculum(seed: int) -> tuple[nn.Module, nn.Module, dict[str, int]] | None:
    """(base, tuned, steps of each part); None where a part is not learnt within its limit."""
    model, generator = small_llama(seed), torch.Generator().manual_seed(1000 + seed)
    view, steps, optimizer = HeadView(model), {"two": 0, "four": 0, "seven": 150}, None
    while accuracy(view, questions(128, 2, 5)) < 0.98:
        optimizer = train(model, 2, 25, 2e-3, generator, optimizer)
        steps["two"] += 25
        if steps["two"] >= LIMITS["two"]:
            return None
    test = questions(210, 7, 6)
    while accuracy(view, test, batch=210) < 0.60:
        optimizer = train(model, 4, 5, 1e-3, generator, optimizer)
        steps["four"] += 5
        if steps["four"] >= LIMITS["four"]:
            return None
    base = copy.deepcopy(model)
    train(model, 7, steps["seven"], 1e-3, generator)
    return base, model, steps


def measured(model: nn.Module, rows: int = 980) -> Ablation:
    view = HeadView(model)
    means = head_means(view, questions(490, 7, 8), batch=490)
    return Ablation(view, questions(rows, 7, 7), means, batch=rows, tokens=65536)


def one_seed(seed: int) -> dict[str, Any] | None:
    trained = curriculum(seed)
    if trained is None:
        return None
    base, tuned, steps = trained
    ours, theirs = measured(base), measured(tuned)
    whole = Circuit.whole(ours.view, POSITIONS)
    circuit, own = (prune(a, whole, stop=0.85).circuit for a in (ours, theirs))
    held = {name: _fresh(model) for name, model in (("base", base), ("tuned", tuned))}
    inside = {name: a.circuits([circuit])[0].accuracy for name, a in held.items()}
    drawn = random_circuits(held["base"], circuit, 10, torch.Generator().manual_seed(seed))
    before, after = (a.model.accuracy for a in held.values())
    at_object = [m for m in circuit.members() if m[0] == "object"]
    cases = {"circuit": circuit.members(), "object alone": at_object}
    moved = cross_accuracy(ModelPair(tuned, base), held["base"].prompts, cases, batch=490)
    return {
        "steps": steps,
        "base": before,
        "tuned": after,
        "unpruned_in_base": held["base"].circuits([whole])[0].accuracy,
        "pairs": len(circuit),
        "circuit_in_base": inside["base"],
        "random": statistics.mean(drawn),
        "circuit_in_tuned": inside["tuned"],
        "own_pairs": len(own),
        "overlap": own.overlap(circuit),
        "moved": moved["circuit"],
        "moved_object_alone": moved["object alone"],
        "closed": gap_closed(before, after, moved["circuit"]),
    }


def _fresh(model: nn.Module) -> Ablation:
    """Measured on prompts that nothing was pruned on."""
    view = HeadView(model)
    return Ablation(
        view, questions(490, 7, 9), head_means(view, questions(490, 7, 8), batch=490), batch=490, tokens=65536
    )


def checks_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    faithful = statistics.mean(row["circuit_in_base"] / row["base"] for row in rows)
    return {
        "E1 faithful": {"share": faithful, "holds": faithful >= 0.85},
        "E1 beyond chance": {
            "circuit": mean("circuit_in_base"), "random": mean("random"),
            "holds": mean("random") <= 0.5 * mean("circuit_in_base"),
        },
        "E2 base circuit in tuned": {
            "circuit": mean("circuit_in_tuned"), "base": mean("base"),
            "holds": mean("circuit_in_tuned") > mean("base") + 0.15,
        },
        "E3 overlap": {"share": mean("overlap"), "holds": mean("overlap") >= 0.7},
        "E4 gap closed": {"share": mean("closed"), "holds": mean("closed") >= 0.7},
    }  # fmt: skip


def main() -> None:
    args = arguments("entity_tracking", __doc__, 5)
    warnings.filterwarnings("ignore", message="The embeddings of base and tuned model differ")
    runs: dict[str, dict[str, Any]] = {}
    without: list[str] = []  # seeds whose curriculum gives no base
    for seed in itertools.count(FIRST):
        if len(runs) == args.seeds or len(without) > 2 * args.seeds:
            break
        found = one_seed(seed)
        print(seed, json.dumps(found), flush=True)
        if found is None:
            without.append(str(seed))
        else:
            runs[str(seed)] = found
    checks = checks_of(list(runs.values()))
    write(
        args.out,
        "entity-tracking",
        {
            "claim": "Fine-tuning sharpens the circuit that the base has, and builds no new one.",
            "baseline": "random circuits of the same sizes; the base model",
            "method": "backward pruning under mean ablation, the circuit followed into the tuned model, and its "
            "activations moved into the base; found and measured on different prompts",
            "chosen": "on seeds 0 to 4, which are not reported (2 and 3 gave no base): 980 prompts to prune on, since "
            "210 let the greedy order overfit them; the token behind the object as a third position, since without it "
            "even all heads kept 0.62 of a base's accuracy on seed 4",
            "seeds": list(runs),
            "seeds_without_a_base": without,
            "results": runs,
            "checks": checks,
            "verdict": verdict(checks),
        },
    )


if __name__ == "__main__":
    main()
