"""NeuroAda's cost beside LoRA of equal count and mask-based tuning: time of a step, bytes; time of selecting.

    python benchmarks/neuroada.py [--layers 6] [--repeats 5] [--tokens 512]

Blocks of SmolLM2-135M's shape, float32, one thread, AdamW. A LoRA of rank 1 has as many weights as k = 2, rank 2 as
k = 4; k = 1 is below what LoRA can be and stands beside rank 1. "copied" is the form the official code uses: theta is
scattered into a copy of each weight by autograd. All variants take turns in one process; medians of CPU seconds.
Targets: a step <= 1.15 of LoRA's and <= 0.8 of mask-based tuning's; <= 20 bytes per trained weight beside activations;
selecting in a 4096 x 4096 matrix <= 1 s.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, saved_bytes, smollm_shaped, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pegbox.parts.anatomy import Anatomy
from pegbox.parts.context import Context
from pegbox.parts.indexsets import row_top
from pegbox.parts.metering import optimizer_state_bytes
from pegbox.select import SELECT
from pegbox.tuners.full import Full
from pegbox.tuners.sparse import SparseConfig, sparse_layers

TARGETS = {"step_over_lora": 1.15, "step_over_mask": 0.8, "bytes_per_weight": 20, "select_4096_seconds": 1.0}
RANKS = {1: 1, 2: 1, 4: 2}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
warnings.filterwarnings("ignore", category=FutureWarning)


class Copied(nn.Module):
    """The tuned weight as a copy made by autograd."""

    def __init__(self, index: Tensor):
        super().__init__()
        self.register_buffer("index", index.long())
        self.theta = nn.Parameter(torch.zeros(index.numel()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten().scatter_add(0, self.index, self.theta).view_as(weight)


def chosen(model: nn.Module, k: int) -> Any:
    selector = SELECT.validate({"kind": "per_neuron", "k": k})
    return selector.select(Anatomy.of(model), dict(model.named_parameters()), None, torch.Generator())


def variants(base: nn.Module, k: int) -> dict[str, nn.Module]:
    """Name -> attached model, all over copies of one base."""
    lora = LoraConfig(r=RANKS[k], target_modules=LINEARS, lora_dropout=0.0)
    found: dict[str, nn.Module] = {"lora": get_peft_model(copy.deepcopy(base), lora)}
    for form in ("lean", "in_place", "bypass"):
        config = SparseConfig(execution=form, task_type="CAUSAL_LM").with_allocation(chosen(base, k))
        found[form] = get_peft_model(copy.deepcopy(base), config)
    masked = copy.deepcopy(base)
    Full().attach(masked, chosen(masked, k), Context(masked))
    found["mask"] = masked
    copied = copy.deepcopy(base).requires_grad_(False)
    for name, choice in chosen(base, k).items():
        module = copied.get_submodule(name.rsplit(".", 1)[0])
        parametrize.register_parametrization(module, "weight", Copied(choice.index))
    found["copied"] = copied
    return found


def step_of(model: nn.Module, ids: Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def of_k(base: nn.Module, k: int, ids: Tensor, repeats: int) -> dict[str, Any]:
    models = variants(base, k)
    steps = {name: step_of(model, ids) for name, model in models.items()}
    seconds = in_turns({name: step for name, (step, _) in steps.items()}, repeats)
    result: dict[str, Any] = {}
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result[name] = {
            "seconds": seconds[name],
            "over_lora": seconds[name] / seconds["lora"],
            "over_mask": seconds[name] / seconds["mask"],
            "trained": trained,
            "saved_bytes": saved_bytes(lambda m=model: m(input_ids=ids, labels=ids).loss),
            "state_bytes": optimizer_state_bytes(steps[name][1]),
        }
    result["lean"]["bytes_per_weight"] = held_bytes(models["lean"], steps["lean"][1])
    return result


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Per trained weight: position, value, gradient, optimizer state and whatever else the layers keep."""
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.ndim]  # without step counters
    total = float(sum(t.numel() * t.element_size() for t in state))
    layers = list(sparse_layers(model).values())
    count = 0
    for layer in layers:
        slot = layer.slot("default", "weight")
        count += slot.values.numel()
        kept = [slot.index, slot.values, slot.values, *layer.in_place._positions, *layer.in_place._originals]
        total += sum(t.numel() * t.element_size() for t in kept)  # values twice: the gradient has their size
        total += sum(p.values().numel() * 8 for p in layer._patterns.values())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = smollm_shaped(given.layers).requires_grad_(False)
    ids = torch.randint(0, 8192, (max(1, given.tokens // 128), 128), generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {f"k={k}": of_k(base, k, ids, given.repeats) for k in given.k}
    matrix = torch.randn(4096, 4096)
    began = time.process_time()
    row_top(matrix.abs(), 4)
    result["select_4096_seconds"] = time.process_time() - began
    write("neuroada", {"layers": given.layers, "tokens": ids.numel(), "repeats": given.repeats, **result}, TARGETS)


if __name__ == "__main__":
    main()
