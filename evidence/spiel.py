"""Evidence for SpIEL: entries that are dropped and grown by their gradients learn more than entries that stay.

Claims (arXiv:2401.16405): E1 at equal K (that of a LoRA of rank 1, 1.3 % of the matrices) growth by accumulated
gradients reaches a lower training loss than random entries that stay, on every seed. E2 its validation loss is at most
3 % above that of LoRA with as many trained parameters. E3 the share of entries replaced per event follows
r0 (1 - t / T) (within 1 % for growth by momentum, where nothing is dropped and regrown at once; never above it for
gradients), and most of the final entries have moved further than the median entry of the random run.

A four-block Llama (D 128) is pre-trained on two instructions (repeat six symbols, reverse them) and then tuned on two
others (sort them, shift each by one), answers only, 256 rows for 200 updates of 32. Rates are chosen per method from
four on a seed of its own, by validation loss; nothing is chosen on the seeds that are reported.

    python evidence/spiel.py [--seeds 3] [--updates 200] [--out evidence/results/spiel.json]
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import record
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.optim import OPTIM
from pegbox.parts.schedules import factor
from pegbox.select import SELECT
from pegbox.select.regrow import rate_at
from pegbox.tuners.sparse import MaskRefresh, SparseConfig

SYMBOLS, LENGTH, BATCH, ROWS = 24, 6, 32, 256
REPEAT, REVERSE, SORT, SHIFT, ANSWER = range(SYMBOLS, SYMBOLS + 5)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BUDGET = {"rank": 1}
SCHEDULE = {"every": 20, "accumulate": 5, "rate": 0.2, "policy": "linear"}
REGROW = {"kind": "regrow", "budget": BUDGET, "schedule": SCHEDULE}
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"select": REGROW, "optim": "aged_adamw"},
    "momentum": {"select": {**REGROW, "growth": "momentum"}, "optim": "sm3"},
    "random": {"select": {**REGROW, "growth": "random", "schedule": {"every": None}}, "optim": "aged_adamw"},
    "lora": {"optim": "adamw"},
}


def rows(generator: torch.Generator, count: int, instructions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(count, 2 L + 2) token ids and labels: instruction, symbols, separator, answer."""
    symbols = torch.randint(0, SYMBOLS, (count, LENGTH), generator=generator)
    kinds = torch.tensor(instructions)[torch.randint(0, len(instructions), (count, 1), generator=generator)]
    answers = {
        REPEAT: symbols,
        REVERSE: symbols.flip(1),
        SORT: symbols.sort(1).values,
        SHIFT: (symbols + 1) % SYMBOLS,
    }
    answer = sum((kinds == kind) * answers[kind] for kind in instructions)
    ids = torch.cat([kinds, symbols, torch.full((count, 1), ANSWER), answer], 1)  # type: ignore[list-item]
    labels = ids.clone()
    labels[:, : LENGTH + 2] = -100
    return ids, labels


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels).loss


def pretrained(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SYMBOLS + 5, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=2 * LENGTH + 2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(400):
        loss_of(model, *rows(generator, BATCH, (REPEAT, REVERSE))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def attached(base: nn.Module, method: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    if "select" in method:
        return get_peft_model(copy.deepcopy(base), SparseConfig(select=method["select"], seed=seed))  # type: ignore[arg-type]
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"))  # type: ignore[arg-type]


def tune(base: nn.Module, name: str, rate: float, seed: int, updates: int) -> dict[str, Any]:
    method = METHODS[name]
    model = attached(base, method, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    step = OPTIM.validate({"kind": method["optim"], "lr": rate})
    optimizer = step.optimizer([{"params": trained}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor("linear", updates, 0.03))
    work = None
    if "select" in method:
        work = MaskRefresh(SELECT.validate(method["select"]), seed=seed, total=lambda: updates, model=model)
        work.begin(0, model)
    generator = torch.Generator().manual_seed(1000 + seed)
    ids, labels = rows(generator, ROWS, (SORT, SHIFT))
    held_out = rows(generator, 512, (SORT, SHIFT))
    moved = []
    for update in range(updates):
        pick = torch.randint(0, ROWS, (BATCH,), generator=generator)
        loss_of(model, ids[pick], labels[pick]).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if work is not None:
            events = len(work.done)
            work.refresh(update + 1, model, optimizer)
            moved += [(update + 1, 1 - d.kept / d.trained) for d in work.done[events:]]
    with torch.no_grad():
        train, validation = float(loss_of(model, ids, labels)), float(loss_of(model, *held_out))
    sizes = torch.cat([p.detach().abs() for p in trained]) if work is not None else torch.zeros(0)
    count = sum(p.numel() for p in trained)
    return {"train": train, "validation": validation, "trained": count, "moved": moved, "sizes": sizes}


def expected(update: int, updates: int) -> float:
    """The share that the schedule asks for."""
    return rate_at(update, updates, SELECT.validate(REGROW).schedule)


def one_seed(seed: int, chosen: dict[str, float], updates: int) -> dict[str, Any]:
    base = pretrained(seed)
    found = {name: tune(base, name, chosen[name], seed, updates) for name in METHODS}
    sizes = {name: run.pop("sizes") for name, run in found.items()}
    beyond = float((sizes["gradient"] > sizes["random"].median()).float().mean())
    return {**found, "final_entries_beyond_random_median": beyond}


def checks(runs: list[dict[str, Any]], updates: int) -> dict[str, dict[str, Any]]:
    lower = [r["gradient"]["train"] / r["random"]["train"] for r in runs]
    over = statistics.mean(r["gradient"]["validation"] for r in runs) / statistics.mean(
        r["lora"]["validation"] for r in runs
    )
    gaps = {
        name: [share - expected(update, updates) for r in runs for update, share in r[name]["moved"]]
        for name in ("gradient", "momentum")
    }
    beyond = [r["final_entries_beyond_random_median"] for r in runs]
    return {
        "E1_train_loss_over_random": {"ratios": lower, "holds": all(x < 1 for x in lower)},
        "E2_validation_over_lora": {"ratio": over, "at_most": 1.03, "holds": over <= 1.03},
        "E3_replaced_share": {
            "momentum_largest_gap": max(map(abs, gaps["momentum"])),
            "gradient_highest_above": max(gaps["gradient"]),
            "holds": max(map(abs, gaps["momentum"])) <= 0.01 and max(gaps["gradient"]) <= 0.01,
        },
        "E3_entries_beyond_random_median": {"shares": beyond, "holds": all(x > 0.5 for x in beyond)},
    }


def main() -> None:
    given = record.arguments(
        "spiel", __doc__, seeds=3, extend=lambda parser: parser.add_argument("--updates", type=int, default=200)
    )
    base = pretrained(100)
    tried = {n: {r: tune(base, n, r, 100, given.updates)["validation"] for r in RATES} for n in METHODS}
    chosen = {name: min(losses, key=losses.__getitem__) for name, losses in tried.items()}
    runs = [one_seed(seed, chosen, given.updates) for seed in range(given.seeds)]
    found = checks(runs, given.updates)
    record.write(
        given.out,
        "spiel",
        {
            "claim": "Dropping and growing entries by accumulated gradients beats fixed random ones and equals LoRA",
            "baseline": "random fixed entries; LoRA of equal count",
            "method": "SpIEL-AG (growth by accumulated gradient), SpIEL-MA beside it",
            "seeds": list(range(given.seeds)),
            "chosen": {"rates": chosen, "tried": {n: {str(r): v for r, v in t.items()} for n, t in tried.items()}},
            "results": runs,
            "checks": found,
            "verdict": record.verdict(found),
        },
    )


if __name__ == "__main__":
    main()
