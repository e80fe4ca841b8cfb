"""Evidence for S2FT: units learn a domain with less forgetting, and adapters of disjoint units fuse.

Claims (arXiv:2412.06289, and behaviour that follows from them): E1 tuned on one domain after pretraining on three, to
the same loss there (within 2 %), the loss on the other two rises at least 10 % less than with full fine-tuning, on
average; LoRA of equal count is measured beside it. E2 two adapters trained apart on two tasks with disjoint units, then
fused, lose less accuracy than two LoRAs of equal count that are summed. E3 replacing one adapter by another in a matrix
(2048 x 2048, s = 64) takes less than half of what LoRA (rank 32) takes.

A four-block Llama (D 64). E1: a domain is a permutation of 96 symbols followed with probability 0.9; which of three it
is has to be told from the symbols. After a short pretraining on all of them B is tuned on until its loss has come down
by half of the way to the source's entropy. E2: tables of keys and values to be learnt by heart. The rate of each method
is chosen from three on a seed outside the report's: the least rise in E1, the best recall of one adapter in E2.

    python evidence/s2ft.py [--seeds 3] [--out evidence/results/s2ft.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import arguments, verdict, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.parts.slices import Slice, SliceSet, fuse
from pegbox.tuners.slices import SlicesConfig, Switcher, export_slices

SYMBOLS, DOMAINS, LENGTH, FOLLOWS = 96, 3, 16, 0.9
MOST_STEPS = 300
KEYS, VALUES, TABLE = 200, 40, 40
RATES = {"full": (3e-4, 1e-3, 3e-3), "s2ft": (1e-3, 3e-3, 1e-2), "lora": (1e-3, 3e-3, 1e-2)}
UNITS = {"d": 0.25}
CHANNELS = 4 * 128


def small_llama(vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def tuned(base: nn.Module, method: str, seed: int, exclude: tuple[str, ...] = ()) -> Any:
    """The base with a method attached: 128 channels of the down matrices, a LoRA on them of at most as many weights."""
    model: Any = copy.deepcopy(base)
    if method == "s2ft":
        return get_peft_model(
            model, SlicesConfig(select={"kind": "units", "ratios": UNITS, "exclude": list(exclude)}, seed=seed)
        )
    if method == "lora":
        rank = math.floor(UNITS["d"] * CHANNELS) * 64 // (4 * (64 + 128))
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=["down_proj"]))
    return model


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


# ---- E1: domains


class Domains:
    """Sources of sequences [start, s_1, s_2, ...]: 0 is A, 1 is B, 2 is C."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.next = [torch.randperm(SYMBOLS, generator=self.generator) for _ in range(DOMAINS)]

    def rows(self, domain: int, count: int) -> Tensor:
        """(count, LENGTH) ids."""
        symbols = [torch.randint(SYMBOLS, (count,), generator=self.generator)]
        for _ in range(LENGTH - 2):
            stray = torch.randint(SYMBOLS, (count,), generator=self.generator)
            follows = torch.rand(count, generator=self.generator) < FOLLOWS
            symbols.append(torch.where(follows, self.next[domain][symbols[-1]], stray))
        return torch.stack([torch.full((count,), SYMBOLS), *symbols], dim=1)


def domain_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean over the symbols that have a predecessor."""
    logits = model(input_ids=ids).logits[:, 1:-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())


@torch.no_grad()
def measured(model: Any, ids: Tensor) -> float:
    return float(domain_loss(model, ids))


def floor_of_loss() -> float:
    """The source's entropy per symbol."""
    hit, miss = FOLLOWS + (1 - FOLLOWS) / SYMBOLS, (1 - FOLLOWS) / SYMBOLS
    return -(hit * math.log(hit) + (SYMBOLS - 1) * miss * math.log(miss))


def pretrained_on_domains(domains: Domains, seed: int) -> nn.Module:
    model = small_llama(SYMBOLS + 1, seed)
    optimizer = optimizer_of(model, 3e-3)
    for _ in range(250):
        ids = torch.cat([domains.rows(d, 16) for d in range(DOMAINS)])
        optimizer.zero_grad()
        domain_loss(model, ids).backward()
        optimizer.step()
    return model


def tune_to(model: Any, domains: Domains, tests: dict[int, Tensor], target: float, rate: float) -> dict[str, float]:
    """Tune on the B until its loss meets the target; the losses then. The last step is halved to meet it."""
    optimizer = optimizer_of(model, rate)
    for step in range(1, MOST_STEPS + 1):
        kept = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        optimizer.zero_grad()
        domain_loss(model, domains.rows(1, 32)).backward()
        optimizer.step()
        if measured(model, tests[1]) <= target:
            return {"steps": step, **_met(model, kept, tests, target)}
    return {"steps": step, "b": measured(model, tests[1]), "a": math.inf, "c": math.inf}


@torch.no_grad()
def _met(model: Any, kept: list[Tensor], tests: dict[int, Tensor], target: float) -> dict[str, float]:
    """Between the last two steps, where B's loss equals the target."""
    trained = [p for p in model.parameters() if p.requires_grad]
    last = [p.detach().clone() for p in trained]
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        for p, before, after in zip(trained, kept, last, strict=True):
            p.copy_(torch.lerp(before, after, middle))
        low, high = (low, middle) if measured(model, tests[1]) <= target else (middle, high)
    return {"b": measured(model, tests[1]), "a": measured(model, tests[0]), "c": measured(model, tests[2])}


def forgetting(seed: int, rates: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Per method and rate: B's loss, the rise on A and C, steps."""
    domains = Domains(seed)
    base = pretrained_on_domains(domains, seed)
    tests = {d: domains.rows(d, 64) for d in range(DOMAINS)}
    start = {d: measured(base, ids) for d, ids in tests.items()}
    target = start[1] - 0.5 * (start[1] - floor_of_loss())
    found: dict[str, Any] = {"start_b": start[1], "target": target}
    for method, several in rates.items():
        found[method] = {}
        for rate in several:
            model = tuned(base, method, seed)
            end = tune_to(model, domains, tests, target, rate)
            rise = statistics.mean((end["a"] - start[0], end["c"] - start[2]))
            found[method][str(rate)] = {**end, "rise": rise}
    return found


# ---- E2: tables


class Tables:
    """Three tables of keys and values: 0 is known beforehand, 1 and 2 are the tasks."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.keys = torch.randperm(KEYS, generator=generator)[: 3 * TABLE].split(TABLE)
        self.values = [torch.randint(KEYS, KEYS + VALUES, (TABLE,), generator=generator) for _ in range(3)]

    def rows(self, table: int) -> tuple[Tensor, Tensor]:
        keys = self.keys[table]
        return torch.stack([keys, torch.full_like(keys, KEYS + VALUES)], dim=1), self.values[table]


def fit(model: Any, tables: Tables, table: int, steps: int, rate: float) -> None:
    ids, values = tables.rows(table)
    optimizer = optimizer_of(model, rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(input_ids=ids).logits[:, -1], values).backward()
        optimizer.step()


@torch.no_grad()
def recall(model: Any, tables: Tables, table: int) -> float:
    ids, values = tables.rows(table)
    return float((model(input_ids=ids).logits[:, -1].argmax(-1) == values).float().mean())


def fused_slices(base: nn.Module, tables: Tables, seed: int, rate: float) -> dict[str, float]:
    own, adapters = [], []
    with tempfile.TemporaryDirectory() as folder:
        for task in (1, 2):
            model = tuned(base, "s2ft", seed + task, exclude=(folder,) if task == 2 else ())
            fit(model, tables, task, 240, rate)
            own.append(recall(model, tables, task))
            adapters.append(export_slices(model))
            model.save_pretrained(folder)
    both = copy.deepcopy(base)
    Switcher(both).to(fuse(adapters))
    return _drop(own, both, tables)


def summed_loras(base: nn.Module, tables: Tables, seed: int, rate: float) -> dict[str, float]:
    own, both = [], copy.deepcopy(base)
    for task in (1, 2):
        model = tuned(base, "lora", seed + task)
        fit(model, tables, task, 240, rate)
        own.append(recall(model, tables, task))
        merged = model.merge_and_unload().state_dict()
        with torch.no_grad():
            for name, tensor in both.state_dict().items():
                tensor.add_(merged[name] - base.state_dict()[name])
    return _drop(own, both, tables)


def _drop(own: list[float], both: nn.Module, tables: Tables) -> dict[str, float]:
    together = [recall(both, tables, task) for task in (1, 2)]
    return {"own": statistics.mean(own), "fused": statistics.mean(together),
            "drop": statistics.mean(own) - statistics.mean(together)}  # fmt: skip


FUSED: dict[str, Callable[..., dict[str, float]]] = {"s2ft": fused_slices, "lora": summed_loras}


def fusing(seed: int, rates: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    tables = Tables(seed)
    base = small_llama(KEYS + VALUES + 1, seed)
    fit(base, tables, 0, 200, 3e-3)
    return {name: {str(r): FUSED[name](base, tables, seed, r) for r in rates[name]} for name in FUSED}


# ---- E3: switching


def switching() -> dict[str, float]:
    """Median seconds of replacing one adapter by another in one matrix."""
    generator = torch.Generator().manual_seed(0)
    weight, lora = torch.randn(2048, 2048), torch.randn(2048, 2048)
    pair = []
    for _ in range(2):
        index = torch.randperm(2048, generator=generator)[:64]
        pair.append(SliceSet({"w": Slice(1, 2048, index, torch.randn(2048, 64, generator=generator) * 1e-3)}))
    factors = [(torch.randn(32, 2048), torch.randn(2048, 32)) for _ in range(2)]
    switcher, taken = Switcher({"w": weight}), {"s2ft": [], "lora": []}  # type: ignore[var-annotated]
    for turn in range(20):
        old, new = factors[turn % 2], factors[1 - turn % 2]
        began = time.perf_counter()
        switcher.to(pair[turn % 2])
        middle = time.perf_counter()
        lora.sub_(old[1] @ old[0]).add_(new[1] @ new[0])
        taken["s2ft"].append(middle - began)
        taken["lora"].append(time.perf_counter() - middle)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


# ---- the record


def chosen_rates(seed: int) -> dict[str, dict[str, float]]:
    """On a seed outside the report's."""
    one, two = forgetting(seed, RATES), fusing(seed, {n: RATES[n] for n in FUSED})
    return {
        "forgetting": {n: min(RATES[n], key=lambda r, n=n: one[n][str(r)]["rise"]) for n in RATES},
        "fusing": {n: max(RATES[n], key=lambda r, n=n: two[n][str(r)]["own"]) for n in FUSED},
    }


def flat(found: dict[str, Any]) -> dict[str, Any]:
    """One rate per method: its numbers."""
    return {k: next(iter(v.values())) if isinstance(v, dict) else v for k, v in found.items()}


def checks_of(runs: dict[str, dict[str, Any]], times: dict[str, float]) -> dict[str, dict[str, Any]]:
    def mean(part: str, name: str, key: str) -> float:
        return statistics.mean(run[part][name][key] for run in runs.values())

    rises = {name: mean("forgetting", name, "rise") for name in RATES}
    equal = all(
        abs(run["forgetting"][n]["b"] / run["forgetting"]["target"] - 1) <= 0.02 for run in runs.values() for n in RATES
    )
    less = 1 - rises["s2ft"] / rises["full"]
    drops = {name: mean("fusing", name, "drop") for name in FUSED}
    ratio = times["s2ft"] / times["lora"]
    return {
        "E1": {"rise": rises, "less_than_full": less, "equal_b_loss": equal, "holds": equal and less >= 0.10},
        "E2": {"drop": drops, "holds": drops["s2ft"] < drops["lora"]},
        "E3": {"switch_over_lora": ratio, "holds": ratio < 0.5},
    }


def main() -> None:
    args: argparse.Namespace = arguments("s2ft", __doc__, seeds=3)
    chosen = chosen_rates(1000)
    runs: dict[str, dict[str, Any]] = {}
    for seed in range(args.seeds):
        one = {name: (rate,) for name, rate in chosen["forgetting"].items()}
        two = {name: (rate,) for name, rate in chosen["fusing"].items()}
        runs[str(seed)] = {"forgetting": flat(forgetting(seed, one)), "fusing": flat(fusing(seed, two))}
        print(seed, json.dumps(runs[str(seed)]), flush=True)
    times = switching()
    checks = checks_of(runs, times)
    write(
        args.out,
        "s2ft",
        {
            "claim": "A few trained channels learn a domain with less forgetting; adapters of disjoint units fuse.",
            "baseline": "full fine-tuning to the same loss; LoRA of equal count on the same matrices",
            "method": "a quarter of the channels, columns of the down matrices, drawn at random",
            "seeds": list(runs),
            "chosen": chosen,
            "results": runs,
            "switch_seconds": times,
            "checks": checks,
            "verdict": verdict(checks),
        },
    )


if __name__ == "__main__":
    main()
