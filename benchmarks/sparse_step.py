"""What a sparse step costs beside the frozen base, LoRA and PEFT's SHiRA of equal count, in one process.

Six blocks of SmolLM2-135M's shape, random weights. The variants take turns, so that drift hits all alike; medians.
Ratios are the result; seconds belong to the machine named in the JSON.

    python benchmarks/sparse_step.py [--rounds 15] [--blocks 6] [--out benchmarks/results/sparse_step.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model

from pegbox.tuners.sparse import SparseConfig

RANK = 8  # of LoRA and SHiRA; the sparse budget is the same count
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(blocks: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=3, num_hidden_layers=blocks)).train()


def variants(blocks: int) -> dict[str, Any]:
    """Name -> model; equal trainable counts for the three adapters."""
    frozen = base(blocks)
    frozen.requires_grad_(False)
    select = {"kind": "random", "budget": {"rank": RANK}}
    return {
        "frozen": frozen,
        "lora": get_peft_model(base(blocks), LoraConfig(r=RANK, target_modules=TARGETS, lora_dropout=0.0)),
        "shira": get_peft_model(base(blocks), ShiraConfig(r=RANK, target_modules=TARGETS, random_seed=0)),
        "sparse": get_peft_model(base(blocks), SparseConfig(select=select, target_modules=TARGETS)),
    }


class SavedBytes:
    """Peak bytes of tensors that autograd keeps for backward, parameters and buffers left out; each storage once."""

    def __init__(self, model: torch.nn.Module):
        self.known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if _dense(t)}
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        return tensor, [_Token(self, part) for part in ([tensor] if _dense(tensor) else _parts(tensor))]

    def __enter__(self) -> SavedBytes:
        self.context = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda packed: packed[0])
        self.context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


class _Token:
    def __init__(self, meter: SavedBytes, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.meter, self.key, self.size = meter, storage.data_ptr(), storage.nbytes()
        if self.key in meter.known:
            self.size = 0
        elif meter.held.get(self.key, 0) == 0:
            meter.now += self.size
            meter.peak = max(meter.peak, meter.now)
        meter.held[self.key] = meter.held.get(self.key, 0) + 1

    def __del__(self) -> None:
        self.meter.held[self.key] -= 1
        if self.meter.held[self.key] == 0:
            self.meter.now -= self.size


def _dense(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout == torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    return [tensor.values(), tensor.crow_indices(), tensor.col_indices()]


def step(model: Any, ids: torch.Tensor, autocast: bool) -> None:
    """Forward and backward; the frozen base back-propagates to its input embeddings, as every adapter has to."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if any(p.requires_grad for p in model.parameters()):
            loss = model(input_ids=ids, labels=ids).loss
        else:
            embeddings = model.get_input_embeddings()(ids).requires_grad_()
            loss = model(inputs_embeds=embeddings, labels=ids).loss
    loss.backward()


def taken(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each job (one thread: other processes hardly disturb them) in rounds in which all take their turn;
    one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    order, turns = list(jobs), random.Random(0)
    for turn in range(rounds + 1):
        turns.shuffle(order)  # a fixed place in the round would favour some
        for name in order:
            start = time.process_time()
            jobs[name]()
            if turn:
                times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Median of the rounds' ratios, and the ratio of the least times (on a busy machine the steadier of the two)."""
    pairs = zip(times[one], times[other], strict=True)
    return {"median": statistics.median(a / b for a, b in pairs), "least": min(times[one]) / min(times[other])}


def steps(models: dict[str, Any], tokens: int, autocast: bool, rounds: int) -> dict[str, Any]:
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    optimizers = {
        name: torch.optim.AdamW(list(filter(lambda p: p.requires_grad, model.parameters())), 1e-4, fused=True)
        for name, model in models.items()
        if name != "frozen"
    }

    def job(name: str) -> Callable[[], None]:
        def run() -> None:
            step(models[name], ids, autocast)
            if name in optimizers:
                optimizers[name].step()
                optimizers[name].zero_grad()

        return run

    times = taken({name: job(name) for name in models}, rounds)
    saved = {}
    for name, model in models.items():
        with SavedBytes(model) as meter:
            step(model, ids, autocast)
        model.zero_grad()
        saved[name] = meter.peak
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "saved_bytes": saved,
        "time_over_lora": ratio(times, "sparse", "lora"),
        "time_over_shira": ratio(times, "sparse", "shira"),
        "saved_over_lora": saved["sparse"] / saved["lora"],
        "saved_over_shira": saved["sparse"] / saved["shira"],
    }


def forwards(blocks: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Forward alone at 1 % density: the base's, ours with nothing to write, ours with all values to write.

    The base is a second set of modules over the very same weights, so that memory layout has no part in the ratio;
    ratios are medians over rounds of neighbours.
    """
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(0))
    bare = base(blocks)
    frozen = copy.deepcopy(bare, {id(p): p for p in bare.parameters()})
    model = get_peft_model(bare, SparseConfig(select={"kind": "random", "budget": {"density": 0.01}}))
    values = [p for p in model.parameters() if p.requires_grad]

    def quiet(net: Any) -> None:
        with torch.no_grad():
            net(input_ids=ids)

    def pending() -> None:
        with torch.no_grad():
            for p in values:
                p.add_(0.0)
        quiet(model)

    def change_only() -> None:
        with torch.no_grad():
            for p in values:
                p.add_(0.0)

    jobs = {"base": lambda: quiet(frozen), "sparse": lambda: quiet(model), "pending": pending, "change": change_only}
    times = taken(jobs, 4 * rounds)
    times["pending"] = [p - c for p, c in zip(times["pending"], times["change"], strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "over_base": ratio(times, "sparse", "base"),
        "pending_over_base": ratio(times, "pending", "base"),
    }


def artefact(blocks: int) -> dict[str, Any]:
    """Bytes per entry of LIFT's adapter at 5 % with a fixed mask, and seconds to load it onto the loaded base."""
    select = {"kind": "low_rank_magnitude", "budget": {"density": 0.05}}
    model = get_peft_model(base(blocks), SparseConfig(select=select, coordinates="absolute"))
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        times = []
        for _ in range(3):
            fresh = base(blocks)
            start = time.perf_counter()
            PeftModel.from_pretrained(fresh, folder)
            times.append(time.perf_counter() - start)
    return {"entries": entries, "bytes_per_entry": size / entries, "load_seconds": statistics.median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    models = variants(options.blocks)
    counts = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "torch": torch.__version__,
            "load": os.getloadavg(),
        },
        "blocks": options.blocks,
        "trainable": counts,
        "forward": {str(tokens): forwards(options.blocks, tokens, options.rounds) for tokens in (128, 512)},
        "artefact": artefact(options.blocks),
        "steps": {},
    }
    for tokens, autocast in ((128, False), (512, False), (128, True), (512, True)):
        key = f"{tokens}{'-bf16-autocast' if autocast else ''}"
        rounds = 2 if autocast else options.rounds  # 16 bits are slow on a CPU; their bytes are what counts
        result["steps"][key] = steps(models, tokens, autocast, rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
