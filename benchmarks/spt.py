"""SPT's cost: measuring sensitivities over plain passes, allotting 86 M scores, a step with single weights over LoRA.

    python benchmarks/spt.py [--layers 6] [--repeats 5] [--scores 86000000]

Blocks of SmolLM2-135M's shape, float32, one thread. Stage 1 is compared with as many forward and backward passes of
full fine-tuning; a step of single weights with one of LoRA of rank 8 and as many weights. Medians of CPU seconds, in
turns.
Targets: stage 1 <= 1.2 of plain passes; a step <= 1.3 of LoRA's; 16 bytes per single weight beside its index;
allotting 86 M scores <= 10 s.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write
from peft import LoraConfig, get_peft_model

from pegbox.parts.anatomy import Anatomy
from pegbox.parts.statistics_parameters import sensitivity
from pegbox.select import SELECT
from pegbox.select.allotment import Site, allot, module_cost
from pegbox.tuners.sparse import SparseConfig, sparse_layers

TARGETS = {"stage1_over_plain": 1.2, "step_over_lora": 1.3, "bytes_per_single": 24, "allot_86M_seconds": 10.0}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
warnings.filterwarnings("ignore", category=FutureWarning)


def stage_one(layers: int, repeats: int, tokens: int) -> dict[str, float]:
    model = smollm_shaped(layers)
    names = SELECT.validate({"kind": "sensitivity"}).statistics().names(Anatomy.of(model))
    ids = torch.randint(0, 8192, (max(1, tokens // 128), 128))

    def loss(m: Any, batch: Any) -> Any:
        return m(input_ids=batch, labels=batch).loss

    def plain() -> None:
        model.zero_grad()
        loss(model, ids).backward()

    seconds = in_turns({"plain": plain, "stage1": lambda: sensitivity(model, [ids], loss, names=names)}, repeats)
    return {**seconds, "ratio": seconds["stage1"] / seconds["plain"]}


def singles(layers: int, repeats: int, tokens: int) -> dict[str, float]:
    base = smollm_shaped(layers)
    ids = torch.randint(0, 8192, (max(1, tokens // 128), 128))
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=LINEARS))
    select = {"kind": "random", "budget": {"rank": 8}}
    sparse = get_peft_model(copy.deepcopy(base), SparseConfig(select=select, execution="lean", task_type="CAUSAL_LM"))
    jobs, held = {}, 0.0
    for name, model in {"lora": lora, "singles": sparse}.items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        jobs[name] = step
    seconds = in_turns(jobs, repeats)
    count = sum(p.numel() for p in sparse.parameters() if p.requires_grad)
    for layer in sparse_layers(sparse).values():
        slot = layer.slot("default", "weight")
        kept = [slot.index, *layer.in_place._positions, *layer.in_place._originals]
        held += sum(t.numel() * t.element_size() for t in kept) + 16 * slot.values.numel()
    return {**seconds, "ratio": seconds["singles"] / seconds["lora"], "bytes_per_single": held / count}


def allotting(count: int) -> dict[str, float]:
    """ViT-B's matrices: twelve blocks of four 768 x 768 and two 768 x 3072, scaled to `count` scores in all."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    blocks = max(1, round(count / sum(a * b for a, b in shapes)))
    scores = {f"{i}.{j}": torch.rand(s, generator=draw) ** 8 for i in range(blocks) for j, s in enumerate(shapes)}
    sites = [Site(n, s.numel(), "matrix", module_cost("lora", 8, *reversed(s.shape))) for n, s in scores.items()]
    found = {"scores": float(sum(s.numel() for s in scores.values()))}
    for search in ("grid", "exact"):
        began = time.process_time()
        allot(scores, sites, budget=400_000, search=search)  # type: ignore[arg-type]
        found[f"{search}_seconds"] = time.process_time() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--scores", type=int, default=86_000_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "layers": given.layers,
        "stage1": stage_one(given.layers, given.repeats, given.tokens),
        "step": singles(given.layers, given.repeats, given.tokens),
        "allot": allotting(given.scores),
    }
    write("spt", result, TARGETS)


if __name__ == "__main__":
    main()
