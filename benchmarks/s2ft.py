"""What S2FT costs: a step beside full fine-tuning and LoRA of equal count, memory, serving ten adapters, switching.

SmolLM2-135M's shape with random weights, d = 0.03 (1 382 columns of the MLPs' down matrices). LoRA has the same
matrices at the nearest lower rank; one over all linear layers is measured beside it. Variants take turns;
ratios are the result. Memory counts parameters, gradients, optimizer state and the peak of what autograd saves.

    python benchmarks/s2ft.py [--layers 30] [--vocabulary 49152] [--tokens 512] [--repeats 5] [--serving-repeats 30]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import in_turns, smollm_shaped, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pegbox.parts.metering import optimizer_state_bytes, saved_bytes, tensor_bytes
from pegbox.parts.slices import Slice, SliceSet
from pegbox.tuners.slices import ParallelAdapters, SlicesConfig, Switcher

TARGETS = {
    "step_over_full": 0.75,
    "step_over_lora": 1.0,
    "memory_over_full": 0.5,
    "memory_over_lora": 1.0,
    "serving_over_lora": 0.9,
    "switch_over_lora": 0.5,
}
WIDTH, COLUMNS, RANK, ADAPTERS = 2048, 64, 32, 10


# ---- training


def variants(layers: int, vocabulary: int) -> dict[str, nn.Module]:
    """Models that train; equal counts but for `full`."""

    def base() -> Any:
        return smollm_shaped(layers, vocab_size=vocabulary).train()

    select = {"kind": "units", "ratios": {"d": 0.03}}
    models: dict[str, nn.Module] = {
        "full": base(),
        "s2ft": get_peft_model(base(), SlicesConfig(select=select)),
        "s2ft_contiguous": get_peft_model(base(), SlicesConfig(select=select, layout="contiguous")),
        "s2ft_bypass": get_peft_model(base(), SlicesConfig(select=select, execution="bypass")),
    }
    count = trained(models["s2ft"])
    for name, targets in (("lora", ["down_proj"]), ("lora_all", "all-linear")):
        one = trained(get_peft_model(base(), LoraConfig(r=1, target_modules=targets)))
        models[name] = get_peft_model(base(), LoraConfig(r=max(1, count // one), target_modules=targets))
    return models


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stepper(model: Any, ids: Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def memory(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> dict[str, int]:
    """Bytes by kind, in a step after the first."""
    with saved_bytes(model) as saved:
        model(input_ids=ids, labels=ids).loss.backward()
    found = {
        "parameters": sum(tensor_bytes(p) for p in model.parameters()),
        "gradients": sum(tensor_bytes(p.grad) for p in model.parameters() if p.grad is not None),
        "state": optimizer_state_bytes(optimizer),
        "saved": saved.peak,
    }
    optimizer.zero_grad()
    return {**found, "total": sum(found.values())}


def training(layers: int, vocabulary: int, tokens: int, repeats: int) -> dict[str, Any]:
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    models = variants(layers, vocabulary)
    made = {name: stepper(model, ids) for name, model in models.items()}
    seconds = in_turns({name: step for name, (step, _) in made.items()}, repeats)
    held = {name: memory(models[name], optimizer, ids) for name, (_, optimizer) in made.items()}
    return {
        "trained": {name: trained(model) for name, model in models.items()},
        "seconds": seconds,
        "bytes": held,
        "step_over_full": seconds["s2ft"] / seconds["full"],
        "step_over_lora": seconds["s2ft"] / seconds["lora"],
        "step_over_lora_all": seconds["s2ft"] / seconds["lora_all"],
        "memory_over_full": held["s2ft"]["total"] / held["full"]["total"],
        "memory_over_lora": held["s2ft"]["total"] / held["lora"]["total"],
        "memory_over_lora_all": held["s2ft"]["total"] / held["lora_all"]["total"],
    }


# ---- serving and switching


class Layer(nn.Module):
    """One linear layer as a model, so that PEFT's mixed batches serve it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def slices(axis: int, seed: int) -> SliceSet:
    generator = torch.Generator().manual_seed(seed)
    shape = (WIDTH, COLUMNS) if axis else (COLUMNS, WIDTH)
    index = torch.randperm(WIDTH, generator=generator)[:COLUMNS].sort().values
    return SliceSet({"proj.weight": Slice(axis, WIDTH, index, torch.randn(shape, generator=generator) * 1e-3)})


def loras(model: nn.Module) -> Any:
    config = LoraConfig(r=RANK, target_modules=["proj"], init_lora_weights=False)
    served = get_peft_model(model, config, adapter_name="a0")
    for number in range(1, ADAPTERS):
        served.add_adapter(f"a{number}", config)
    return served.eval()


def serving(tokens: int, repeats: int) -> dict[str, Any]:
    """Ten rows through ten adapters, `tokens` each, in one layer of the official serving benchmark's size."""
    torch.manual_seed(0)
    x = torch.randn(ADAPTERS, tokens, WIDTH)
    names = [f"a{number}" for number in range(ADAPTERS)]
    base, jobs = Layer().eval(), {}
    plain = Layer().eval()
    lora = loras(Layer())

    def run(model: Any, **options: Any) -> Callable[[], None]:
        def job() -> None:
            with torch.no_grad():
                for _ in range(10):
                    model(x, **options)

        return job

    jobs["base"] = run(plain)
    jobs["lora"] = run(lora, adapter_names=names)
    for kind, axis in (("columns", 1), ("rows", 0)):
        model = Layer().eval()
        served = ParallelAdapters(model, {name: slices(axis, i) for i, name in enumerate(names)})
        inner = run(model)

        def job(served: ParallelAdapters = served, inner: Callable[[], None] = inner) -> None:
            with served.rows(names):
                inner()

        jobs[kind] = job
    del base
    seconds = in_turns(jobs, repeats)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "columns_over_lora": seconds["columns"] / seconds["lora"],
        "rows_over_lora": seconds["rows"] / seconds["lora"],
    }


def switching(repeats: int) -> dict[str, Any]:
    """Replacing one adapter's weights by another's in a matrix: S2FT exact and by subtraction, LoRA's B A."""
    torch.manual_seed(0)
    weights = {name: torch.randn(WIDTH, WIDTH) for name in ("exact", "subtracted", "lora")}
    pair = [slices(1, seed) for seed in (0, 1)]
    factors = [(torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)) for _ in range(2)]

    def slices_job(exact: bool, name: str) -> Callable[[], None]:
        switcher = Switcher({"proj.weight": weights[name]}, exact)
        return lambda: [switcher.to(adapter) for adapter in pair * 5] and None

    def lora_job() -> None:
        weight = weights["lora"]
        for _ in range(5):
            for (a_old, b_old), (a_new, b_new) in (factors, factors[::-1]):
                weight.sub_(b_old @ a_old).add_(b_new @ a_new)

    jobs = {
        "exact": slices_job(True, "exact"),
        "subtracted": slices_job(False, "subtracted"),
        "lora": lora_job,
    }
    seconds = in_turns(jobs, repeats)
    return {"seconds": seconds, **{f"{n}_over_lora": seconds[n] / seconds["lora"] for n in ("exact", "subtracted")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serving-repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    served = {f"{tokens}": serving(tokens, args.serving_repeats) for tokens in (1, 32)}
    switched = switching(args.serving_repeats)
    result = {
        "layers": args.layers,
        "tokens": args.tokens,
        "training": training(args.layers, args.vocabulary, args.tokens, args.repeats),
        "serving": served,
        "switching": switched,
    }
    write("s2ft", result, TARGETS)


if __name__ == "__main__":
    main()
