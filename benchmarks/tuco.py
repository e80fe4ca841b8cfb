"""TuCo's cost against a forward of the tuned model, and a scaled token against a plain one.

    python benchmarks/tuco.py [--layers 30] [--tokens 64] [--prompts 32] [--batch 8] [--repeats 3]

A random Llama of SmolLM2-135M's shape with SmolLM2's vocabulary, and a LoRA of rank 8 on all linears, float32, one
thread. Passes alternate in one process. Memory: peak of anonymous resident bytes during a pass over that before it,
beside the bytes of the update and of one stream. Writes benchmarks/results/tuco.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import measure
import torch
from lines import Peak
from peft import LoraConfig, get_peft_model

from pegbox.analyze.contribution import tuning_contribution
from pegbox.parts.mixing import mixed
from pegbox.parts.pairs import ModelPair

TARGETS = {
    "tuco_over_forward": 2.1,
    "with_output": 3.1,
    "adapter_over_forward": 2.2,
    "token_over_token": 2.1,
    "seconds": 60.0,
}


def prompts(rows: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(0, 8000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 30), ("tokens", 64), ("prompts", 32), ("batch", 8), ("repeats", 3), ("answer", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)

    def model(seed: int) -> Any:
        return measure.smollm_shaped(given.layers, seed, vocab_size=49152).eval()

    base, tuned = model(0), model(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".layers." in name:
                parameter += 1e-3
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = get_peft_model(model(0), config).eval()
    two, shared = ModelPair(tuned, base), ModelPair(adapter)
    batch = prompts(given.batch, given.tokens)
    forwards = measure.in_turns(
        {
            "forward": lambda: tuned(**batch, use_cache=False),
            "tuco": lambda: tuning_contribution(two, batch),
            "with_output": lambda: tuning_contribution(two, batch, output=True),
            "adapter_forward": lambda: adapter(**batch, use_cache=False),
            "adapter_tuco": lambda: tuning_contribution(shared, batch),
        },
        given.repeats,
    )
    with Peak() as plain:
        tuned(**batch, use_cache=False)
    with Peak() as peak:
        tuning_contribution(two, batch)
    result: dict[str, Any] = {
        "seconds_of": forwards,
        "tuco_over_forward": forwards["tuco"] / forwards["forward"],
        "with_output": forwards["with_output"] / forwards["forward"],
        "adapter_over_forward": forwards["adapter_tuco"] / forwards["adapter_forward"],
        "stream_bytes": given.batch * given.tokens * 576 * 4,
        "forward_extra_bytes": plain.extra,
        "tuco_extra_bytes": peak.extra,
    }
    result |= scaled(two, given)
    began = time.perf_counter()
    for _ in range(max(1, given.prompts // given.batch)):
        tuning_contribution(two, batch)
    result["seconds"] = time.perf_counter() - began
    measure.write("tuco", {"arguments": vars(given), **result}, TARGETS)


def scaled(pair: ModelPair, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a whole answer, plain and scaled, the prompt's share taken off."""
    one = prompts(1, given.tokens)

    def answer(alpha: float, tokens: int) -> Any:
        def job() -> None:
            with mixed(pair, alpha) as model:
                model.generate(**one, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

        return job

    jobs = {f"{name}_{n}": answer(a, n) for name, a in (("plain", 1.0), ("scaled", 0.9)) for n in (1, 1 + given.answer)}
    taken = measure.in_turns(jobs, given.repeats)
    tokens = {
        name: (taken[f"{name}_{1 + given.answer}"] - taken[f"{name}_1"]) / given.answer for name in ("plain", "scaled")
    }
    return {"seconds_a_token": tokens, "token_over_token": tokens["scaled"] / tokens["plain"]}


if __name__ == "__main__":
    main()
