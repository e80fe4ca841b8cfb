"""What objectives and the corruption policy cost over plain SFT: seconds and saved bytes of one step, in one process.

    python benchmarks/objectives.py [--layers 30] [--tokens 512] [--rounds 5] [--out benchmarks/results/objectives.json]

A random Llama of SmolLM2-135M's shape. Every row does one forward and backward of the same batch; rows take turns, so
drift hits all alike, and a row's time is its fastest round of processor time on one thread. Rows `hf` are transformers'
own loss. Full tuning has a trained head and a frozen copy as reference; LoRA has a frozen head and the adapter switched
off. Targets: sft <= hf, dft and masked thought <= 1.05 sft, asft <= 1.40 sft, k3 and its cache <= 1.40 and 1.10.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pegbox.data.base import DATA
from pegbox.objectives.base import OBJECTIVE
from pegbox.parts.context import Context
from pegbox.tasks.views import CausalView

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"token": "sft"},
    "dft": {"token": "dft"},
    "asft": {"kind": "asft", "lam": 0.1},
    "asft reverse": {"kind": "asft", "lam": 0.1, "kl": "reverse"},
    "asft k3": {"kind": "asft", "lam": 0.1, "kl": "k3"},
    "asft k3 cached": {"kind": "asft", "lam": 0.1, "kl": "k3", "cache_reference": True},
}


class Words:
    """As much of a tokenizer as the policy asks for."""

    unk_token_id, pad_token_id = 0, 0

    def __len__(self) -> int:
        return 49152

    def get_vocab(self) -> dict[str, int]:
        return {"<unk>": 0}


def smollm2(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))


def peak_saved(job: Callable[[], Tensor], model: nn.Module) -> int:
    """Most bytes that autograd holds at once, parameters left out, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, list[int]] = {}
    peak = 0

    class Token:
        def __init__(self, key: int):
            self.key = key

        def __del__(self) -> None:
            held[self.key][0] -= 1
            if not held[self.key][0]:
                del held[self.key]

    def pack(t: Tensor) -> tuple[Tensor, Token | None]:
        nonlocal peak
        storage = t.untyped_storage()
        key = storage.data_ptr()
        if key in known:
            return t, None
        held.setdefault(key, [0, storage.nbytes()])[0] += 1
        peak = max(peak, sum(size for _, size in held.values()))
        return t, Token(key)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda pair: pair[0]):
        job().backward()
    return peak


def jobs(model: nn.Module, batch: dict[str, Tensor], adapter: bool) -> dict[str, Callable[[], Tensor]]:
    """One step's loss by name; each call does all that a step does before `backward`."""
    ctx = Context(model, total_steps=100, step=lambda: 99, tokenizer=Words())
    ctx.reference = model.disable_adapter if adapter else None  # type: ignore[assignment]
    view = CausalView(model)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    found: dict[str, Callable[[], Tensor]] = {"hf": lambda: model(**inputs).loss}

    def own(block: dict[str, Any], corrupt: bool = False) -> Callable[[], Tensor]:
        objective = OBJECTIVE.validate(block)
        state = objective.setup(ctx)
        policy = DATA.validate({"kind": "corruption", "rate": 0.4, "form": "existing"})
        known = policy.setup(ctx)

        def job() -> Tensor:
            given = policy.on_batch(known, batch, ctx) if corrupt else batch
            with torch.no_grad():
                ref = objective.reference(state, view, given)
            parts = dict(objective.losses(state, view, given, objective.count(given), ref))
            return parts["tokens"]

        return job

    found |= {name: own(block) for name, block in OBJECTIVES.items()}
    found["masked thought"] = own(OBJECTIVES["sft"], corrupt=True)
    return found


def measure(model: nn.Module, batch: dict[str, Tensor], adapter: bool, rounds: int) -> dict[str, dict[str, float]]:
    todo = jobs(model, batch, adapter)
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(rounds + 1):
        for name, job in todo.items():
            model.zero_grad()
            began = time.process_time()
            job().backward()
            if turn:  # the first round warms up
                seconds[name].append(time.process_time() - began)
    saved = {name: peak_saved(job, model) for name, job in todo.items()}
    best = {name: min(s) for name, s in seconds.items()}
    return {
        name: {
            "seconds": round(best[name], 4),
            "over sft": round(best[name] / best["sft"], 3),
            "saved MiB": round(saved[name] / 2**20, 1),
            "saved over sft": round(saved[name] / saved["sft"], 3),
        }
        for name in todo
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "objectives.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, length = max(1, args.tokens // 128), min(128, args.tokens)
    ids = torch.randint(1, 49152, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(length) < length // 4, -100)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "sample_ids": torch.arange(rows),
    }
    results = {}
    for name, adapter in (("full", False), ("lora", True)):
        model = smollm2(args.layers)
        results[name] = measure(lora(model) if adapter else model, batch, adapter, args.rounds)
        for row, numbers in results[name].items():
            print(f"{name:5} {row:15}", "  ".join(f"{k} {v}" for k, v in numbers.items()), flush=True)
    machine = {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "torch": torch.__version__,
        "threads": 1,
    }
    record = {
        "layers": args.layers,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "machine": machine,
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
