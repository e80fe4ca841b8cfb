"""SpIEL's step beside LoRA's of equal count; what watching gradients and one event add; bytes held.

    python benchmarks/spiel.py [--layers 6] [--tokens 128] [--repeats 15]

A random Llama of SmolLM2-135M's block shape (see `measure.py`), float32, one thread, LoRA of rank 8. Targets: a step
<= 1.25 of LoRA's, a step whose gradients are watched (averaged over the six of a phase) <= 1.15 of a plain one, an
event <= 1 step, and bytes beside the base <= 1.2 of values, positions, moments, candidates and one dense gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write
from peft import LoraConfig, get_peft_model

from pegbox.optim import OPTIM
from pegbox.select import SELECT
from pegbox.tuners.sparse import MaskRefresh, SparseConfig, sparse_layers
from pegbox.tuners.sparse.refresh import start_watching, stop_watching

RANK, PHASE, TOTAL = 8, 6, 10**6
TARGETS = {"step_over_lora": 1.25, "watched_over_plain": 1.15, "event_over_step": 1.0, "bytes_over_counted": 1.2}
SELECT_BLOCK = {"kind": "regrow", "budget": {"rank": RANK}, "schedule": {"every": 20, "accumulate": 5}}


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def prepared(growth: str, layers: int) -> tuple[Any, Any, MaskRefresh]:
    config = SparseConfig(select={**SELECT_BLOCK, "growth": growth}, task_type="CAUSAL_LM")
    model = get_peft_model(smollm_shaped(layers), config)
    step = OPTIM.validate({"kind": "sm3" if growth == "momentum" else "aged_adamw"})
    work = MaskRefresh(SELECT.validate(config.select), total=lambda: TOTAL, model=model)
    return model, step.optimizer([{"params": trained(model)}]), work


def step_of(model: Any, optimizer: Any, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def held_bytes(model: Any, optimizer: Any) -> dict[str, float]:
    """Bytes beside the base against the count: AG's 20 per entry, 16 per candidate; once with one dense gradient."""
    layers = sparse_layers(model).values()
    slots = [layer.slot("default", "weight") for layer in layers]
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    watched = sum(w.nbytes() for layer in layers for w in layer.watches.values())
    patterns = sum(
        p.crow_indices().nbytes + p.col_indices().nbytes + p.values().nbytes
        for layer in layers
        for p in layer._patterns.values()
    )
    kept = sum(s.index.nbytes + s.values.nbytes for s in slots)
    originals = sum(t.nbytes for layer in layers for t in (*layer.in_place._positions, *layer.in_place._originals))
    k, largest = sum(s.index.numel() for s in slots), max(torch.Size(x.shape_of("weight")).numel() for x in layers)
    counted = k * 20 + k * 16 + 4 * largest
    total = kept + state + watched + patterns + originals + 4 * largest
    return {"held": total, "counted": counted, "ratio": total / counted, "in_place_and_patterns": originals + patterns}


def event_seconds(momentum: bool, model: Any, optimizer: Any, work: MaskRefresh) -> float:
    """Median CPU seconds of one event alone; between events gradients of the same size are shown again."""
    taken = []
    for _ in range(4):
        if not momentum:
            start_watching(model)
            for layer in sparse_layers(model).values():
                watch = layer.watches[("default", "weight")]
                watch.see(torch.randn(layer.shape_of("weight")))
                watch.close()
        before = time.process_time()
        work.refresh(25, model, optimizer)
        taken.append(time.process_time() - before)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(0, 8192, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    lora = get_peft_model(smollm_shaped(given.layers), LoraConfig(r=RANK, target_modules="all-linear"))
    models = {growth: prepared(growth, given.layers) for growth in ("accumulated_gradient", "momentum")}
    steps = {name: step_of(model, optimizer, ids) for name, (model, optimizer, _) in models.items()}
    steps["lora"] = step_of(lora, torch.optim.AdamW(trained(lora), fused=True), ids)
    model, optimizer, work = models["accumulated_gradient"]

    def watched_phase() -> None:
        start_watching(model)
        for _ in range(PHASE):
            steps["accumulated_gradient"]()
            work.after_step(0, model)
        stop_watching(model)

    def plain_phase() -> None:
        for _ in range(PHASE):
            steps["accumulated_gradient"]()

    seconds = in_turns(steps, given.repeats)
    phases = in_turns({"watched": watched_phase, "plain": plain_phase}, max(2, given.repeats // 3))
    start_watching(model)
    plain_phase()
    work.after_step(0, model)
    held = held_bytes(model, optimizer)
    events = {name: event_seconds(name == "momentum", *parts) for name, parts in models.items()}
    write(
        "spiel",
        {
            "layers": given.layers,
            "tokens": given.tokens,
            "trained": {
                "lora": sum(p.numel() for p in trained(lora)),
                "sparse": sum(p.numel() for p in trained(model)),
            },
            "seconds": seconds,
            "phases": phases,
            "event_seconds": events,
            "bytes": held,
            "ratios": {
                "step_over_lora": seconds["accumulated_gradient"] / seconds["lora"],
                "momentum_step_over_lora": seconds["momentum"] / seconds["lora"],
                "watched_over_plain": phases["watched"] / phases["plain"],
                "event_over_step": events["accumulated_gradient"] / seconds["accumulated_gradient"],
                "momentum_event_over_step": events["momentum"] / seconds["momentum"],
                "bytes_over_counted": held["ratio"],
            },
        },
        TARGETS,
    )


if __name__ == "__main__":
    main()
